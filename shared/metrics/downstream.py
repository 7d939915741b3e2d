"""What are generated pictures good for? Classifiers trained on them alone, tested on real test pictures.

    cnn                   two 3 x 3 convolutions (32, 64) with pooling, dropout, one linear layer: Chollet's "Simple
                          MNIST convnet" (https://keras.io/examples/vision/mnist_convnet/), Adam, 10 passes
    logistic regression   scikit-learn's, on pixels, with its defaults
    mlp                   scikit-learn's, on pixels, 100 hidden units as by default

The same classifiers trained on as many real pictures of the public set stand beside. Where those are fewer than the
generated ones, the figure for as few generated ones stands there too: more pictures alone make a better classifier.
The label of a generated picture is what its prompt asks for.
Not covered: classifiers tuned for the data, and pre-training.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.disk import write_whole
from shared.errors import DataError
from shared.metrics import Measurement, Pictures, Table
from shared.metrics.attributes import NO_MEANING, columns_left_out, known_attributes, meanings_of_captions
from shared.metrics.figure import Figure, seeds_interval
from shared.metrics.public_sets import FEWEST

if TYPE_CHECKING:
    from shared.metrics import Part, Setting

VERSION = 1
EPOCHS, BATCH, LEARNING_RATE, DROPOUT = 10, 128, 1e-3, 0.5
FEWEST_STEPS = 300  # a small set is seen more often
PASSES_OF_MLP, STEPS_OF_REGRESSION = 30, 100
ROWS = 1000  # pictures of one pass when a network predicts
MOST_CONFUSED = 24

Labels = dict[str, np.ndarray]  # attribute to (N,) places among its values
Classifier = Callable[[np.ndarray, Labels, np.ndarray, int], Labels]
"""(pictures to learn from, their labels, pictures to tell, seed) to what it tells of those."""


class SimpleConvnet(nn.Module):
    """One head an attribute; see the module. Pictures below 28 px are padded, so that something is left to pool."""

    def __init__(self, *, image_size: int, channels: int, classes: Sequence[int]) -> None:
        super().__init__()
        padding = 0 if image_size >= 28 else 1
        side = (image_size - 2 + 2 * padding) // 2
        side = (side - 2 + 2 * padding) // 2
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(DROPOUT),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Linear(64 * side * side, count) for count in classes])

    def forward(self, images: Tensor) -> list[Tensor]:
        """`(B, C, H, W)` in [0, 1] to logits `(B, classes)` of each attribute."""
        features = self.trunk(images)
        return [head(features) for head in self.heads]


@dataclass(frozen=True, eq=False)
class Downstream:
    """The metric, ready to measure.

    Attributes:
        values: attribute to its values in the test part.
        meanings: caption to the values of its attributes.
        test: labels of the test part.
        left_out: notes on columns that are no attributes.
    """

    setting: Setting
    values: dict[str, list[str]]
    meanings: dict[str, dict[str, str]]
    test: Labels
    left_out: list[str]

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        """Raises `DataError` when the public set has no attribute with two values, or nothing to test on is left."""
        public = setting.public
        if len(public.test) < FEWEST:
            raise DataError(
                f"{public.left_out} of the {public.left_out + len(public.test)} pictures to test on are among those"
                " that the model was trained on",
                hint="--test names public pictures that it has not seen",
            )
        parts = [public.test, public.fit, public.reference, public.floor]
        columns = known_attributes(parts)
        if not columns:
            raise DataError(
                f"the reference set {public.name} has no attributes, so there is nothing to classify",
                hint="give it a column with the class of each picture",
            )
        values = {name: sorted({value for column in of for value in column}) for name, of in columns.items()}
        meanings = meanings_of_captions(parts, columns, values)
        test = {name: _places(of[0], values[name]) for name, of in columns.items()}
        return cls(setting, values, meanings, test, columns_left_out(parts))

    def measure(self, pictures: Pictures) -> Measurement:
        """Accuracy of each classifier on the test part, of all attributes at once and of each.

        Raises:
            DataError: prompts ask for fewer than two different things, or for none that the public set knows.
        """
        rows = [row for row, prompt in enumerate(pictures.prompts) if prompt in self.meanings]
        asked = [self.meanings[pictures.prompts[row]] for row in rows]
        labels = {name: _places([meaning[name] for meaning in asked], known) for name, known in self.values.items()}
        if not rows or all(len(np.unique(column)) < 2 for column in labels.values()):
            raise DataError(
                "the prompts ask for fewer than two things that the reference set knows, so there is nothing to learn",
                hint="prompts to be measured must be spelled as the reference captions are",
            )
        images, setting = pictures.images[rows], self.setting
        figures: list[Figure] = []
        tables: list[Table] = []
        for name, (classifier, varies) in CLASSIFIERS.items():
            seeds = [setting.seed + place for place in range(setting.trainings if varies else 1)]
            setting.progress(f"training the {name} on {len(rows):,} generated pictures, {len(seeds)} x")
            told = []
            for place, seed in enumerate(seeds):
                told.append(classifier(images, labels, setting.public.test.images, seed))
                setting.step(place + 1, len(seeds))
            fewer = min(len(rows), len(setting.public.fit))
            same = None
            if fewer < len(rows):
                setting.progress(f"training the {name} on {fewer:,} of them, as many as there are real ones")
                same = classifier(images[:fewer], _first(labels, fewer), setting.public.test.images, seeds[0])
            figures += self._figures(name, told, len(rows), seeds, pictures.seed, same)
            if name == "cnn":
                tables = self._confusions(told[0], seeds[0])
        notes = list(self.left_out)
        if len(rows) < len(pictures):
            left_out = len(pictures) - len(rows)
            notes.append(f"{left_out} pictures are left out: {NO_MEANING}")
        for name, column in labels.items():
            missing = [value for place, value in enumerate(self.values[name]) if place not in column]
            if missing:
                notes.append(f"no generated picture shows {name} {', '.join(missing)}: real ones are all told wrong")
        return Measurement(figures, tables, notes=notes)

    def _figures(
        self, name: str, told: list[Labels], n: int, seeds: list[int], picture_seed: int, same: Labels | None
    ) -> list[Figure]:
        """`same`: what is told after learning from only as many generated pictures as there are real ones."""
        public = self.setting.public
        real = self._real(name, n)
        at_floor_n = {key: float(right.mean()) for key, right in _right([same], self.test).items()} if same else {}
        figures = []
        for key, right in _right(told, self.test).items():
            of_seeds = right.mean(axis=1)
            tested = right.shape[1]
            # Two right and two wrong ones more (Agresti and Coull 1998): nobody is sure because nothing went wrong.
            share = (of_seeds.mean() * tested + 2) / (tested + 4)
            deviation = math.sqrt(share * (1 - share) / (tested + 4))
            trained = f"{len(seeds)} trainings (Student's t)" if len(seeds) > 1 else "1 training, without its seed,"
            how = f"{trained} and {tested:,} test pictures; the generated pictures are the same throughout"
            interval = seeds_interval(of_seeds.tolist(), test_deviation=deviation, how=how)
            interval = replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
            attributes = [key.removeprefix("accuracy of ")] if key != "accuracy" else list(self.values)
            # What always telling the commonest gets: on an uneven test set that is more than one over the classes.
            combined = np.stack([self.test[attribute] for attribute in attributes], axis=1)
            chance = float(np.unique(combined, axis=0, return_counts=True)[1].max() / len(combined))
            figures.append(
                Figure(
                    f"{name} {key}", float(of_seeds.mean()),
                    interval, "higher", n, public.test.name, len(public.test),
                    seeds={"pictures": [picture_seed], "trainings": seeds}, floor=real[key],
                    floor_n=min(n, len(public.fit)), at_floor_n=at_floor_n.get(key), chance=chance,
                )
            )  # fmt: skip
        return figures

    def _real(self, name: str, n: int) -> dict[str, float]:
        """Figure name to what the same classifier gets from real pictures, one seed; kept by content."""
        public = self.setting.public
        part = public.fit.first(n)
        return self.setting.once(f"downstream {name} of {len(part)} real", lambda: self._train_on_real(name, part))

    def _train_on_real(self, name: str, part: Part) -> dict[str, float]:
        setting = self.setting
        about = f"{VERSION} {name} {EPOCHS} {sorted(self.values.items())} {part.digest} {setting.public.test.digest}"
        digest = hashlib.sha256(about.encode()).hexdigest()[:24]
        path = setting.cache_dir / f"downstream-{digest}.json" if setting.cache_dir else None
        if path is not None and path.is_file():
            try:
                return {key: float(value) for key, value in json.loads(path.read_text()).items()}
            except (ValueError, AttributeError):
                pass  # damaged: made again
        setting.progress(f"training the {name} on {len(part):,} real pictures, once")
        captions = [found[0] for found in part.captions]  # where no column is an attribute and captions are few
        labels = {key: _places(part.attributes.get(key, captions), known) for key, known in self.values.items()}
        told = CLASSIFIERS[name][0](part.images, labels, setting.public.test.images, 0)
        figures = {key: float(right.mean()) for key, right in _right([told], self.test).items()}
        if path is not None:
            write_whole(path, json.dumps(figures).encode())
        return figures

    def _confusions(self, told: Labels, seed: int) -> list[Table]:
        tables = []
        for name, known in self.values.items():
            if len(known) <= MOST_CONFUSED:
                counts = np.zeros((len(known), len(known)), int)
                np.add.at(counts, (self.test[name], told[name]), 1)
                rows = [[value, *counts[place].tolist()] for place, value in enumerate(known)]
                note = f"real test pictures: what they are, and what the cnn of seed {seed} tells"
                tables.append(Table(f"confusion of {name}", ["is", *known], rows, note))
        return tables


def train_convnet(images: np.ndarray, labels: Mapping[str, np.ndarray], seed: int) -> SimpleConvnet:
    """The cnn, trained on `(N, H, W, C)` uint8 and, for each attribute, `(N,)` places from 0."""
    _, height, _, channels = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SimpleConvnet(
            image_size=height, channels=channels, classes=[int(column.max()) + 1 for column in labels.values()]
        )
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wanted = [torch.from_numpy(column) for column in labels.values()]
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
        steps = -(-len(images) // BATCH)
        for _ in range(max(EPOCHS, -(-FEWEST_STEPS // steps))):
            for batch in torch.randperm(len(images)).split(BATCH):
                logits = network(_unit(images[batch.numpy()]))
                loss = torch.stack(
                    [functional.cross_entropy(of, column[batch]) for of, column in zip(logits, wanted, strict=True)]
                ).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    network.eval().requires_grad_(False)
    return network


def tell(network: SimpleConvnet, images: np.ndarray) -> list[np.ndarray]:
    """The likeliest value of each attribute, as `(N,)` places."""
    with torch.no_grad():
        parts = [network(_unit(images[start : start + ROWS])) for start in range(0, len(images), ROWS)]
    return [torch.cat([part[place].argmax(dim=1) for part in parts]).numpy() for place in range(len(network.heads))]


def _cnn(images: np.ndarray, labels: Labels, test: np.ndarray, seed: int) -> Labels:
    return dict(zip(labels, tell(train_convnet(images, labels, seed), test), strict=True))


def _regression(images: np.ndarray, labels: Labels, test: np.ndarray, seed: int) -> Labels:
    from sklearn.linear_model import LogisticRegression

    return _by_sklearn(lambda: LogisticRegression(max_iter=STEPS_OF_REGRESSION), images, labels, test)


def _mlp(images: np.ndarray, labels: Labels, test: np.ndarray, seed: int) -> Labels:
    from sklearn.neural_network import MLPClassifier

    return _by_sklearn(lambda: MLPClassifier(max_iter=PASSES_OF_MLP, random_state=seed), images, labels, test)


CLASSIFIERS: dict[str, tuple[Classifier, bool]] = {
    "cnn": (_cnn, True), "logistic regression": (_regression, False), "mlp": (_mlp, True),
}  # fmt: skip
"""Name to the classifier and whether its training depends on a seed. The first stands for the metric."""


def _by_sklearn(build: Callable[[], object], images: np.ndarray, labels: Labels, test: np.ndarray) -> Labels:
    from sklearn.exceptions import ConvergenceWarning

    flat, shown = _flat(images), _flat(test)
    told = {}
    for name, column in labels.items():
        if len(np.unique(column)) < 2:
            told[name] = np.full(len(test), column[0])
            continue
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it ends after a stated number of passes
            model.fit(flat, column)  # type: ignore[attr-defined]
        told[name] = model.predict(shown)  # type: ignore[attr-defined]
    return told


def _right(told: Sequence[Labels], test: Labels) -> dict[str, np.ndarray]:
    """Figure name to `(trainings, test pictures)` of 0 and 1."""
    single = {name: np.stack([of[name] == column for of in told]).astype(float) for name, column in test.items()}
    every = np.stack(list(single.values())).min(axis=0)
    named = {f"accuracy of {name}": right for name, right in single.items()} if len(single) > 1 else {}
    return {"accuracy": every, **named}


def _first(labels: Labels, count: int) -> Labels:
    return {name: column[:count] for name, column in labels.items()}


def _unit(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(torch.float32).div_(255)


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _places(column: Sequence[str], known: Sequence[str]) -> np.ndarray:
    places = {value: place for place, value in enumerate(known)}
    return np.array([places[value] for value in column], dtype=np.int64)
