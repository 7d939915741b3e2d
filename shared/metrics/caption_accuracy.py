"""Do pictures show what their prompts ask for? By a classifier trained on the real pictures of a public reference set.

It reads each attribute (colour, shape, ...) on its own and all of them together, and says how often it is right
on real pictures it has not seen: no picture can be judged better than that.
Not covered: whether pictures are varied or sharp, and prompts that no reference caption equals; those are counted
and left out. A generator can please one classifier: the figure is about this one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.data import SUBJECT_ID, ImageCaptionDataset
from shared.errors import DataError
from shared.rundir import write_whole

VERSION = 2  # of the classifier: a change of anything below that changes its weights
HELD_OUT = 5  # every fifth reference picture is kept for judging the classifier
MOST_PICTURES = 12_000  # of the reference set that are looked at
MOST_VALUES = 64  # a column with more is no attribute but a name or a number
LEAST_PICTURES = 10  # of each value of an attribute
BATCH = 64
EPOCHS = 7
LEAST_STEPS = 400  # a small reference set is seen more often
LEARNING_RATE = 3e-3
GOOD_ENOUGH = 0.9985  # accuracy on held-out pictures, all attributes, at which training ends early

# (width, stride) of the convolutions: every image size ends at 4 x 4, where the places of edges still count.
WIDTHS = (32, 64, 64, 128)
STRIDES = {8: (1, 1, 2, 1), 28: (2, 1, 2, 2), 32: (2, 1, 2, 2), 64: (2, 2, 2, 2)}
LAST_SIDE = 4


class AttributeClassifier(nn.Module):
    """Small convolutional network with one head an attribute.

    Args:
        classes: attribute to its number of values.
    """

    def __init__(self, *, image_size: int, channels: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels
        for width, stride in zip(WIDTHS, STRIDES[image_size], strict=True):
            layers += [nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(before * LAST_SIDE**2, n) for name, n in classes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`(B, C, H, W)` in [-1, 1] to logits `(B, classes)` for each attribute."""
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True)
class CaptionAccuracy:
    """The metric, ready to measure.

    Attributes:
        values: attribute to its values, in the order of the classifier's logits.
        captions: caption to the values of its attributes, from the reference set.
        held_out: accuracy on real pictures that the classifier was not trained on, with "all".
    """

    classifier: AttributeClassifier
    values: dict[str, list[str]]
    captions: dict[str, dict[str, str]]
    held_out: dict[str, float]

    @classmethod
    def prepare(
        cls, reference: ImageCaptionDataset, *, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> Self:
        """Trains the classifier, or reads it from `cache_dir` where the same reference set was seen before.

        Raises:
            DataError: the reference set has no attribute columns, or none with two values.
        """
        values = {
            name: sorted(counts)
            for name, counts in ((name, Counter(column)) for name, column in reference.attributes.items())
            if 1 < len(counts) <= MOST_VALUES and min(counts.values()) >= LEAST_PICTURES and "" not in counts
            and name != SUBJECT_ID  # whose a picture is: no prompt asks for that
        }
        if not values:
            raise DataError(
                f"the reference set {reference.name} has no attributes to measure by",
                hint=f"give it a column for each attribute, such as colour, with 2 to {MOST_VALUES} values",
            )
        _, height, _, channels = reference.images.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(VERSION)
            classifier = AttributeClassifier(
                image_size=height, channels=channels, classes={name: len(known) for name, known in values.items()}
            ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            rows = np.random.Generator(np.random.Philox(VERSION)).permutation(len(reference))[:MOST_PICTURES]
            targets = {name: _targets(reference.attributes[name], known)[rows] for name, known in values.items()}
            images = np.stack([reference.images[row] for row in np.sort(rows)])[np.argsort(np.argsort(rows))]
            cached = cache_dir / f"attributes-{_digest(images, targets)}.safetensors" if cache_dir else None
            held_out = _restore(classifier, cached)
            if held_out is None:
                progress(f"training the measuring classifier on {len(rows)} reference pictures, once: about a minute")
                # One thread: the same weights on every machine, and two get in each other's way beside other work.
                threads = torch.get_num_threads()
                torch.set_num_threads(1)
                held_out = _train(classifier, images, targets)
                torch.set_num_threads(threads)
                _keep(classifier, held_out, cached)
        return cls(classifier.eval(), values, _meanings(reference, values), held_out)

    def matching(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose attributes are known: those that equal a reference caption."""
        return [prompt for prompt in prompts if prompt in self.captions]

    def measure(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        """Accuracy for each attribute and for all at once, beside chance and beside real pictures.

        Args:
            images: `(N, H, W, C)` uint8, of the reference set's size and channels.
            prompts: what each picture was made from; those that equal no reference caption are left out.
        Returns:
            `accuracy`, `chance`, `held_out_real` (attribute or "all" to a fraction), `n`, `left_out`.
        Raises:
            DataError: no prompt equals a reference caption.
        """
        asked = [row for row, prompt in enumerate(prompts) if prompt in self.captions]
        if not asked:
            raise DataError(
                "no prompt equals a caption of the reference set, so no picture can be judged",
                hint="prompts to be measured must be spelled as the reference captions are",
            )
        predicted = _predict(self.classifier, images[asked])
        meanings = [self.captions[prompts[row]] for row in asked]
        right = {
            name: predicted[name] == _targets([meaning[name] for meaning in meanings], known)
            for name, known in self.values.items()
        }
        chance = {name: 1 / len(known) for name, known in self.values.items()}
        return {
            "accuracy": _with_all(right),
            "chance": {**chance, "all": float(np.prod(list(chance.values())))},
            "held_out_real": self.held_out,
            "n": len(asked),
            "left_out": len(prompts) - len(asked),
        }


def _meanings(reference: ImageCaptionDataset, values: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    """Caption to its attributes; a caption that stands beside different ones says nothing and is left out."""
    meanings: dict[str, dict[str, str]] = {}
    unclear: set[str] = set()
    for row, captions in enumerate(reference.captions):
        meaning = {name: reference.attributes[name][row] for name in values}
        for caption in captions:
            if meanings.setdefault(caption, meaning) != meaning:
                unclear.add(caption)
    return {caption: meaning for caption, meaning in meanings.items() if caption not in unclear}


def _train(classifier: AttributeClassifier, images: np.ndarray, targets: dict[str, np.ndarray]) -> dict[str, float]:
    """Fits in place and returns the accuracy on every fifth picture, which it is not trained on."""
    rows = np.arange(len(images))
    training, kept = rows[rows % HELD_OUT != 0], rows[rows % HELD_OUT == 0]
    wanted = {name: torch.from_numpy(column) for name, column in targets.items()}
    optimizer = torch.optim.Adam(classifier.parameters(), lr=LEARNING_RATE)
    batches = -(-len(training) // BATCH)
    epochs = max(EPOCHS, -(-LEAST_STEPS // batches))
    steps = epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    held_out: dict[str, float] = {}
    for _ in range(epochs):
        classifier.train()
        for batch in torch.from_numpy(training)[torch.randperm(len(training))].split(BATCH):
            if len(batch) < 2:
                continue  # batch normalisation has no variance of one picture
            logits = classifier(_to_unit_range(images[batch.numpy()]))
            loss = torch.stack([functional.cross_entropy(logits[name], wanted[name][batch]) for name in wanted]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        predicted = _predict(classifier, images[kept])
        held_out = _with_all({name: predicted[name] == targets[name][kept] for name in targets})
        if held_out["all"] >= GOOD_ENOUGH:
            break
    return held_out


def _predict(classifier: AttributeClassifier, images: np.ndarray) -> dict[str, np.ndarray]:
    classifier.eval()
    with torch.no_grad():
        parts = [classifier(_to_unit_range(images[start : start + 500])) for start in range(0, len(images), 500)]
    return {name: torch.cat([part[name].argmax(dim=1) for part in parts]).numpy() for name in classifier.heads}


def _to_unit_range(images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def _with_all(right: Mapping[str, np.ndarray]) -> dict[str, float]:
    single = {name: float(column.mean()) for name, column in right.items()}
    return {**single, "all": float(np.stack(list(right.values())).all(axis=0).mean())}


def _targets(column: Sequence[str], known: Sequence[str]) -> np.ndarray:
    places = {value: place for place, value in enumerate(known)}
    return np.array([places[value] for value in column], dtype=np.int64)


def _digest(images: np.ndarray, targets: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{VERSION} {images.shape}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    for name, column in targets.items():
        digest.update(name.encode() + column.tobytes())
    return digest.hexdigest()[:24]


def _keep(classifier: AttributeClassifier, held_out: dict[str, float], path: Path | None) -> None:
    from safetensors.torch import save

    if path is not None:
        write_whole(path, save({k: v.contiguous() for k, v in classifier.state_dict().items()},
                               {"held_out": json.dumps(held_out)}))  # fmt: skip


def _restore(classifier: AttributeClassifier, path: Path | None) -> dict[str, float] | None:
    """Held-out accuracy of the cached classifier, loaded in place; `None` when there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            held_out: dict[str, float] = json.loads(file.metadata()["held_out"])
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError):
        return None
    return held_out
