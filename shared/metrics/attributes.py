"""The measuring classifier: reads the attributes of pictures, trained on real captioned ones of a public set.

It has one head an attribute (colour, shape, ...); where a set has no attribute columns but few different captions,
the caption itself is the attribute. The layer before the heads is also what the local extractor gives as features.
Trained in one thread, so that it has the same weights on every machine of one kind, and kept by content.
Not covered: attributes that are names or numbers, with a value of their own for nearly every picture.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.disk import write_whole
from shared.errors import DataError
from shared.metrics.public_sets import Part

if TYPE_CHECKING:
    from shared.metrics import Setting

VERSION = 3  # of the classifier: a change of anything below that changes its weights
HELD_OUT = 5  # every fifth picture is kept to see when training may end
MOST_VALUES = 64  # a column with more is no attribute but a name or a number
LEAST_PICTURES = 5  # of each value of an attribute
NO_MEANING = "no caption of the public set equals their prompt, or such captions stand beside different values"
CAPTION = "caption"  # the attribute of a set that has no other
BATCH = 64
EPOCHS = 7
LEAST_STEPS = 1000  # a small reference set is seen more often
LEARNING_RATE = 3e-3
GOOD_ENOUGH = 0.9985  # accuracy on held-out pictures, all attributes, at which training ends early
ROWS = 500  # pictures of one pass

# (width, stride) of the convolutions: every image size ends at 4 x 4, where the places of edges still count.
WIDTHS = (32, 64, 64, 128)
STRIDES = {8: (1, 1, 2, 1), 28: (2, 1, 2, 2), 32: (2, 1, 2, 2), 64: (2, 2, 2, 2)}
LAST_SIDE = 4
FEATURES = 128


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
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * LAST_SIDE**2, FEATURES), nn.ReLU())
        self.heads = nn.ModuleDict({_key(name): nn.Linear(FEATURES, count) for name, count in classes.items()})
        self.names = tuple(classes)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`(B, C, H, W)` in [-1, 1] to features `(B, 128)` and logits `(B, classes)` for each attribute."""
        features = self.trunk(images)
        return features, {name: self.heads[_key(name)](features) for name in self.names}


@dataclass(frozen=True, eq=False)
class MeasuringClassifier:
    """The classifier, trained, and what its logits mean.

    Attributes:
        values: attribute to its values, in the order of the classifier's logits.
        captions: caption to the values of its attributes, from all parts of the public set.
        held_out: accuracy on real pictures of the part `fit` that it was not trained on, with "all".
        left_out: sentences about columns that are no attributes.
        digest: of what it was trained on and how.
    """

    network: AttributeClassifier
    values: dict[str, list[str]]
    captions: dict[str, dict[str, str]]
    held_out: dict[str, float]
    digest: str
    left_out: list[str]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, 64 hex digits."""
        digest = hashlib.sha256(f"attributes {VERSION}".encode())
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def matching(self, prompts: Sequence[str]) -> list[int]:
        """Places of the prompts whose attributes are known: those that equal a caption of the public set."""
        return [place for place, prompt in enumerate(prompts) if prompt in self.captions]

    def asked(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Attribute to `(N,)` places among its values, of prompts that are all known."""
        return {
            name: _targets([self.captions[prompt][name] for prompt in prompts], known)
            for name, known in self.values.items()
        }

    def read(
        self, images: np.ndarray, step: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Features `(N, 128)` and log probabilities `(N, values)` for each attribute, of `(N, H, W, C)` uint8."""
        self.network.eval()
        features: list[Tensor] = []
        logits: dict[str, list[Tensor]] = {name: [] for name in self.values}
        with torch.no_grad():
            for start in range(0, len(images), ROWS):
                made, told = self.network(to_unit_range(images[start : start + ROWS]))
                features.append(made)
                for name, values in told.items():
                    logits[name].append(functional.log_softmax(values, dim=1))
                step(min(start + ROWS, len(images)), len(images))
        return torch.cat(features).numpy(), {name: torch.cat(parts).numpy() for name, parts in logits.items()}


def measuring_classifier(setting: Setting) -> MeasuringClassifier:
    """Trained on the part `fit`, or read from the cache; one for all metrics of a setting.

    Raises:
        DataError: the public set has no attribute with two values, and not few captions either.
    """
    return setting.once("measuring classifier", lambda: _build(setting))


def known_attributes(parts: Sequence[Part]) -> dict[str, list[list[str]]]:
    """Attribute to its column in each part; the caption where no column is an attribute and captions are few."""
    columns = _columns(parts)
    kept = {name: of for name, of in columns.items() if not _why_no_attribute(parts, of)}
    if kept:
        return kept
    captions = [[found[0] for found in part.captions] for part in parts]
    return {CAPTION: captions} if not _why_no_attribute(parts, captions) else {}


def columns_left_out(parts: Sequence[Part]) -> list[str]:
    """A sentence for each column that is no attribute, so that none vanishes without a word."""
    reasons = {name: _why_no_attribute(parts, of) for name, of in _columns(parts).items()}
    return [f"the column {name} is not measured: {why}" for name, why in reasons.items() if why]


def _columns(parts: Sequence[Part]) -> dict[str, list[list[str]]]:
    names = [name for name in parts[0].attributes if all(name in part.attributes for part in parts)]
    return {name: [part.attributes[name] for part in parts] for name in names}


def _why_no_attribute(parts: Sequence[Part], column: Sequence[Sequence[str]]) -> str:
    """In words; "" for an attribute. All parts decide together, so that every metric measures the same ones."""
    counts = Counter(value for of in column for value in of)
    if "" in counts:
        return f"{counts['']} pictures have no value"
    if len(counts) < 2:
        return "all pictures have one value"
    if len(counts) > MOST_VALUES:
        return f"it has {len(counts)} values, more than {MOST_VALUES}: a name or a number"
    rarest, few = min(counts.items(), key=lambda item: item[1])
    if few < LEAST_PICTURES:
        return f"{few} pictures have the value '{rarest}', and {LEAST_PICTURES} are the least"
    meant: dict[str, set[str]] = {}
    for part, of in zip(parts, column, strict=True):
        for captions, value in zip(part.captions, of, strict=True):
            for caption in captions:
                meant.setdefault(caption, set()).add(value)
    told = [any(len(meant[caption]) == 1 for caption in captions) for part in parts for captions in part.captions]
    if sum(told) < len(told) / 2:
        return "captions do not tell it, so no prompt asks for it"
    return ""


def _build(setting: Setting) -> MeasuringClassifier:
    public = setting.public
    parts = [public.fit, public.reference, public.floor, public.test]
    columns = known_attributes(parts)
    if not columns:
        raise DataError(
            f"the reference set {public.name} has no attributes to measure by",
            hint=f"give it a column for each attribute, such as colour, with 2 to {MOST_VALUES} values that"
            f" {LEAST_PICTURES} pictures or more have",
        )
    values = {name: sorted(set(of[0])) for name, of in columns.items()}
    _, height, _, channels = public.fit.images.shape
    if height not in STRIDES:
        raise DataError(f"the measuring classifier reads pictures of {sorted(STRIDES)} px, not {height}")
    about = f"{VERSION} {LEAST_STEPS} {sorted(values.items())} {public.fit.digest}"
    digest = hashlib.sha256(about.encode()).hexdigest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(VERSION)
        network = AttributeClassifier(
            image_size=height, channels=channels, classes={name: len(known) for name, known in values.items()}
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        cached = setting.cache_dir / f"attributes-{digest[:24]}.safetensors" if setting.cache_dir else None
        held_out = _restore(network, cached)
        if held_out is None:
            setting.progress(f"training the measuring classifier on {len(public.fit):,} public pictures, once")
            targets = {name: _targets(columns[name][0], known) for name, known in values.items()}
            # One thread: the same weights on every machine, and two get in each other's way beside other work.
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                held_out = _train(network, public.fit.images, targets, setting.step)
            finally:
                torch.set_num_threads(threads)
            _keep(network, held_out, cached)
    network.eval().requires_grad_(False)
    return MeasuringClassifier(
        network, values, meanings_of_captions(parts, columns, values), held_out, digest, columns_left_out(parts)
    )


def meanings_of_captions(
    parts: Sequence[Part], columns: Mapping[str, list[list[str]]], known: Mapping[str, Collection[str]]
) -> dict[str, dict[str, str]]:
    """Caption to its attributes; one that stands beside different ones, or beside an unknown one, is left out.

    Args:
        known: the values of each attribute that a classifier can tell.
    """
    meanings: dict[str, dict[str, str]] = {}
    unclear: set[str] = set()
    for place, part in enumerate(parts):
        for row, captions in enumerate(part.captions):
            meaning = {name: of[place][row] for name, of in columns.items()}
            for caption in captions:
                if meanings.setdefault(caption, meaning) != meaning or any(
                    meaning[name] not in known[name] for name in meaning
                ):
                    unclear.add(caption)
    return {caption: meaning for caption, meaning in meanings.items() if caption not in unclear}


def _train(
    network: AttributeClassifier, images: np.ndarray, targets: dict[str, np.ndarray], step: Callable[[int, int], None]
) -> dict[str, float]:
    """Fits in place and returns the accuracy on every fifth picture, which it is not trained on."""
    rows = np.arange(len(images))
    training, kept = rows[rows % HELD_OUT != 0], rows[rows % HELD_OUT == 0]
    wanted = {name: torch.from_numpy(column) for name, column in targets.items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    batches = -(-len(training) // BATCH)
    epochs = max(EPOCHS, -(-LEAST_STEPS // batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs * batches, pct_start=0.1
    )
    held_out: dict[str, float] = {}
    for epoch in range(epochs):
        network.train()
        for batch in torch.from_numpy(training)[torch.randperm(len(training))].split(BATCH):
            if len(batch) < 2:
                continue  # batch normalisation has no variance of one picture
            _, logits = network(to_unit_range(images[batch.numpy()]))
            loss = torch.stack([functional.cross_entropy(logits[name], wanted[name][batch]) for name in wanted]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        held_out = _accuracy(network, images[kept], {name: column[kept] for name, column in targets.items()})
        if held_out["all"] >= GOOD_ENOUGH:
            break
        step(epoch + 1, epochs)
    step(epochs, epochs)
    return held_out


def _accuracy(network: AttributeClassifier, images: np.ndarray, targets: Mapping[str, np.ndarray]) -> dict[str, float]:
    network.eval()
    right: dict[str, list[np.ndarray]] = {name: [] for name in targets}
    with torch.no_grad():
        for start in range(0, len(images), ROWS):
            _, logits = network(to_unit_range(images[start : start + ROWS]))
            for name, column in targets.items():
                right[name].append(logits[name].argmax(dim=1).numpy() == column[start : start + ROWS])
    joined = {name: np.concatenate(parts) for name, parts in right.items()}
    every = np.stack(list(joined.values())).all(axis=0)
    return {**{name: float(column.mean()) for name, column in joined.items()}, "all": float(every.mean())}


def to_unit_range(images: np.ndarray) -> Tensor:
    """`(B, H, W, C)` uint8 to `(B, C, H, W)` float32 in [-1, 1], channels last in memory."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def _targets(column: Sequence[str], known: Sequence[str]) -> np.ndarray:
    places = {value: place for place, value in enumerate(known)}
    return np.array([places[value] for value in column], dtype=np.int64)


def _key(name: str) -> str:
    """A column's name as a module's: any text, without dots."""
    return "".join(character if character.isalnum() else f"_{ord(character):x}_" for character in name)


def _keep(network: AttributeClassifier, held_out: dict[str, float], path: Path | None) -> None:
    from safetensors.torch import save

    if path is not None:
        write_whole(path, save({k: v.contiguous() for k, v in network.state_dict().items()},
                               {"held_out": json.dumps(held_out)}))  # fmt: skip


def _restore(network: AttributeClassifier, path: Path | None) -> dict[str, float] | None:
    """Held-out accuracy of the cached classifier, loaded in place; `None` when there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if path is None or not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            held_out: dict[str, float] = json.loads(file.metadata()["held_out"])
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError):  # TypeError: without metadata
        return None
    return held_out
