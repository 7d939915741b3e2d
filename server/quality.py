"""How good is the model while it trains, and at the end of a run? A few cheap figures against a public reference set.

The same few hundred prompts and latents each time, so that rounds can be compared: the accuracy of captions, and the
kernel distance (unbiased, so that few pictures are enough) in features of the same classifier. They are
post-processing of what sites released and cost no privacy; no decision of the run depends on them.
Not here: the figures that a release is judged by (`server.evaluator`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.data import ImageCaptionDataset
from shared.errors import DataError
from shared.metrics import METRICS, Figure, Measurement, Metric, Pictures, Setting
from shared.metrics.local import build as build_local
from shared.metrics.public_sets import FEWEST, divide

CHEAP = ("caption-accuracy", "kid")
REAL = 1000  # public pictures to compare with, and as many for the floor
SEED = 2  # of latents: others than on sheets, and others than in evaluations

Draw = Callable[[Sequence[str], int, Sequence[int]], np.ndarray]
"""(prompts, seed, indices of latents) to `(N, H, W, C)` uint8."""


class QualityProbe:
    """The cheap metrics, prepared once."""

    def __init__(
        self, reference: ImageCaptionDataset, *, names: Sequence[str] = CHEAP, cache_dir: Path | None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """Raises `DataError` when the reference set is too small to be divided."""
        self.reference = reference.name
        public = divide(reference, n=REAL, most_test=FEWEST)
        setting = Setting(public, lambda known: build_local(known, ""), cache_dir=cache_dir, progress=progress)
        self.metrics: dict[str, Metric] = {}
        self.not_measured: dict[str, str] = {}
        for name in names:
            try:
                self.metrics[name] = METRICS.get(name).prepare(setting)
            except DataError as error:
                self.not_measured[name] = error.message

    def measure(self, draw: Draw, prompts: Sequence[str], count: int, *, seed: int = SEED) -> dict[str, Any]:
        """Metric to its `Measurement`, or to the reason in words; `count` pictures, evenly over the prompts."""
        asked = [prompts[place % len(prompts)] for place in range(count)]
        pictures = Pictures(draw(asked, seed, range(count)), asked, seed)
        found: dict[str, Any] = dict(self.not_measured)
        for name, metric in self.metrics.items():
            try:
                found[name] = metric.measure(pictures)
            except DataError as error:
                found[name] = error.message
        return found


def as_event(found: Mapping[str, Any], count: int) -> dict[str, Any]:
    """For `events.jsonl`: metric to figure to [value, low, high]; reasons where nothing was measured.

    What a reader needs beside the numbers stands under "about": for each metric the public set and its pictures, what
    made features, seeds, and figure to [real pictures, guessing], `None` where there is no such mark.
    """
    event: dict[str, Any] = {"n": count, "about": {}}
    for name, measured in found.items():
        if isinstance(measured, Measurement):
            first = measured.figures[0]
            event[name] = {
                figure.name: [_short(number) for number in (figure.value, figure.interval.low, figure.interval.high)]
                for figure in measured.figures
            }
            event["about"][name] = {
                "reference": first.reference, "reference_n": first.reference_n, "extractor": first.extractor,
                "seeds": first.seeds,
                "marks": {figure.name: [_short(figure.floor), _short(figure.chance)] for figure in measured.figures},
            }  # fmt: skip
        else:
            event.setdefault("not_measured", {})[name] = measured
    return event


def _short(number: float | None) -> float | None:
    return None if number is None else round(number, 6)


def accuracy_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """(attribute, figure) of the caption accuracy in a result, all attributes together last; empty without one."""
    figures = [Figure.from_dict(table) for table in metrics.get("caption-accuracy", {}).get("figures", [])]
    named = [(figure.name.removeprefix("accuracy of "), figure) for figure in figures[1:]]
    return [*named, *(("all" if named else "accuracy", figure) for figure in figures[:1])]
