"""Do pictures show what their prompts ask for? By a classifier trained on real pictures of a public set.

It reads each attribute (colour, shape, ...) on its own and all of them together, and the same is said of real
pictures that it has not seen. A generator of typical pictures can get more than those, which is no merit.
Not covered: whether pictures are varied or sharp, and prompts that no caption of the public set equals; those are
counted and left out. A generator can please one classifier: the figure is about this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from shared.errors import DataError
from shared.metrics import Gallery, Measurement, Pictures, Table
from shared.metrics.attributes import NO_MEANING, MeasuringClassifier, measuring_classifier
from shared.metrics.figure import Figure, mean_interval

if TYPE_CHECKING:
    from shared.metrics import Part, Setting

ALL = "accuracy"  # the name of the figure of all attributes together
SHOWN = 12  # pictures of a gallery
MOST_CONFUSED = 24  # values of an attribute whose confusion is shown


@dataclass(frozen=True, eq=False)
class CaptionAccuracy:
    """The metric, ready to measure.

    Attributes:
        real: right or wrong for each picture of the part `floor`, by figure name.
    """

    classifier: MeasuringClassifier
    setting: Setting
    real: dict[str, np.ndarray]

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        classifier = measuring_classifier(setting)
        floor = setting.public.floor
        prompts, rows = _known_captions(classifier, floor)
        right, _, _ = _judge(classifier, floor.images[rows], prompts) if rows else ({}, None, None)
        return cls(classifier, setting, right)

    def measure(self, pictures: Pictures) -> Measurement:
        """Accuracy of all attributes at once and of each, beside chance and beside real pictures.

        Raises:
            DataError: no prompt equals a caption of the public set.
        """
        rows = self.classifier.matching(pictures.prompts)
        if not rows:
            raise DataError(
                "no prompt equals a caption of the reference set, so no picture can be judged",
                hint="prompts to be measured must be spelled as the reference captions are",
            )
        images, prompts = pictures.images[rows], [pictures.prompts[row] for row in rows]
        right, predicted, alignment = _judge(self.classifier, images, prompts)
        public, extractor = self.setting.public, f"classifier {self.classifier.fingerprint[:8]}"
        chance = _without_looking(self.classifier.asked(prompts))
        figures = []
        for name, column in right.items():
            real = self.real.get(name)
            figures.append(
                Figure(
                    name, float(column.mean()), mean_interval(column, seed=self.setting.seed), "higher", len(column),
                    public.fit.name, len(public.fit), extractor=extractor,
                    seeds={"pictures": [pictures.seed], "resampling": [self.setting.seed]},
                    floor=float(real.mean()) if real is not None else None,
                    floor_n=len(real) if real is not None else None, chance=chance[name],
                )
            )  # fmt: skip
        notes = [
            f"judged by a classifier of {len(public.fit):,} real pictures of the public set; every fifth of them was"
            f" kept from its training, and of those it is right about {self.classifier.held_out['all']:.3f}",
            *self.classifier.left_out,
        ]
        if len(rows) < len(pictures):
            notes.append(f"{len(pictures) - len(rows)} pictures are left out: {NO_MEANING}")
        notes += self._not_asked(prompts)
        return Measurement(
            figures, self._confusions(prompts, predicted), _best_and_worst(images, prompts, alignment), notes
        )

    def _not_asked(self, prompts: Sequence[str]) -> list[str]:
        """Values of the public set that no prompt asks for."""
        notes = []
        for name, column in self.classifier.asked(prompts).items():
            missing = [value for place, value in enumerate(self.classifier.values[name]) if place not in column]
            if missing:
                listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                notes.append(f"no prompt of the model asks for {name} {listed}: nothing is said about it")
        return notes

    def _confusions(self, prompts: Sequence[str], predicted: Mapping[str, np.ndarray]) -> list[Table]:
        tables = []
        for name, asked in self.classifier.asked(prompts).items():
            known = self.classifier.values[name]
            if len(known) <= MOST_CONFUSED:
                counts = np.zeros((len(known), len(known)), int)
                np.add.at(counts, (asked, predicted[name]), 1)
                rows = [[value, *counts[place].tolist()] for place, value in enumerate(known)]
                head = ["asked", *known]
                tables.append(Table(f"confusion of {name}", head, rows, "pictures: asked for, and read as"))
        return tables


def _known_captions(classifier: MeasuringClassifier, part: Part) -> tuple[list[str], list[int]]:
    """Of each picture its first caption whose attributes are known, and the rows that have one."""
    known = classifier.captions
    found = [next((caption for caption in captions if caption in known), None) for captions in part.captions]
    rows = [row for row, caption in enumerate(found) if caption is not None]
    return [caption for caption in found if caption is not None], rows


def _without_looking(asked: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By figure name what a model gets that ignores its prompts and always shows what is asked for most often."""
    most = {
        f"{ALL} of {name}": float(np.unique(column, return_counts=True)[1].max() / len(column))
        for name, column in asked.items()
    }
    together = np.stack(list(asked.values()), axis=1)
    return {**most, ALL: float(np.unique(together, axis=0, return_counts=True)[1].max() / len(together))}


def _judge(
    classifier: MeasuringClassifier, images: np.ndarray, prompts: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Right or wrong by figure name, the value read by attribute, and the log probability of what was asked."""
    _, told = classifier.read(images)
    asked = classifier.asked(prompts)
    predicted = {name: values.argmax(axis=1) for name, values in told.items()}
    single = {f"{ALL} of {name}": (predicted[name] == asked[name]).astype(float) for name in asked}
    alignment = np.sum([told[name][np.arange(len(images)), asked[name]] for name in asked], axis=0)
    every = np.stack(list(single.values())).min(axis=0)
    return {ALL: every, **(single if len(single) > 1 else {})}, predicted, alignment


def _best_and_worst(images: np.ndarray, prompts: Sequence[str], alignment: np.ndarray) -> list[Gallery]:
    order = np.argsort(-alignment, kind="stable")
    galleries = []
    for name, rows in (("best", order[:SHOWN]), ("worst", order[::-1][:SHOWN])):
        shown = [
            (f"{prompts[row]} ({np.exp(alignment[row]):.2g})", images[row][None]) for row in rows
        ]
        galleries.append(Gallery(name, f"{name} by alignment: probability of what was asked for", shown))
    return galleries
