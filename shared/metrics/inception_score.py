"""Inception score: whether a classifier is sure about each picture, and of many classes over all of them.

It looks at generated pictures alone; real ones stand beside it as the mark to reach. The figure is torch-fidelity's.
Not covered: whether pictures show what they should, or differ within a class. Source: Salimans et al. 2016,
https://arxiv.org/abs/1606.03498.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from shared.errors import DataError
from shared.metrics import Figure, Measurement, Pictures, Setting
from shared.metrics.feature_sets import FeatureSets
from shared.metrics.figure import deviation_interval
from shared.metrics.local import LocalExtractor
from shared.torchvision_operators import ensure_importable

# torch-fidelity's defaults, so that its command line says the same.
SPLITS, SHUFFLE_SEED = 10, 2020
RESAMPLINGS = 200


@dataclass(frozen=True, eq=False)
class InceptionScore:
    """The metric, ready to measure."""

    sets: FeatureSets
    floor_logits: np.ndarray

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        sets = FeatureSets.prepare(setting)
        if sets.floor.logits is None:
            raise DataError(
                f"the extractor {setting.extractor.name} tells no classes, and an inception score is made of them",
                hint="leave `is` out, or name an extractor with classes: inception, or local where the public set has"
                " attributes",
            )
        return cls(sets, sets.floor.logits)

    def measure(self, pictures: Pictures) -> Measurement:
        logits = self.sets.of(pictures).logits
        assert logits is not None  # as of the floor, by the same extractor
        floor_n = self.sets.floor_n(pictures)
        value = score(logits)
        about = self.sets.about(pictures)
        about.update(reference=self.sets.setting.public.floor.name, reference_n=floor_n)
        about["seeds"]["splits"] = [SHUFFLE_SEED]
        figure = Figure(
            name=self.sets.called("inception score", "class score"),
            value=value,
            interval=deviation_interval(
                value, resampled_scores(logits, seed=self.sets.setting.seed, count=RESAMPLINGS),
                f"1.96 standard deviations of {RESAMPLINGS} bootstraps of the pictures of each split",
            ),
            better="higher",
            floor=score(self.floor_logits[:floor_n]),
            at_floor_n=score(logits[:floor_n]) if floor_n < len(logits) else None,
            warning=self.sets.not_comparable("inception scores"),
            **about,
        )  # fmt: skip
        splits = _splits(len(logits))
        notes = ["the inception score compares with no reference; its floor is the score of real pictures"]
        extractor = self.sets.setting.extractor
        if isinstance(extractor, LocalExtractor):
            notes.append(f"its classes are the values of {next(iter(extractor.classifier.values))}")
        if splits != SPLITS:
            notes.append(f"inception score over {splits} splits, fewer than the usual {SPLITS}")
        return Measurement([figure], notes=notes)


def score(logits: np.ndarray) -> float:
    """Mean over splits, 1 at least, the number of classes at most."""
    ensure_importable()
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(torch.from_numpy(logits), _splits(len(logits)), True, SHUFFLE_SEED)
    return float(found["inception_score_mean"])


def resampled_scores(logits: np.ndarray, *, seed: int, count: int) -> list[float]:
    """The score with the pictures of each split drawn anew, with replacement, `count` times."""
    n, splits = len(logits), _splits(len(logits))
    order = np.random.RandomState(SHUFFLE_SEED).permutation(n)  # torch-fidelity's splits
    rng = np.random.Generator(np.random.Philox(seed))
    scores = torch.zeros(count, dtype=torch.float64)
    for split in range(splits):
        rows = order[split * n // splits : (split + 1) * n // splits]
        log_p = torch.from_numpy(logits[rows]).double().log_softmax(dim=1)  # (R, K)
        p = log_p.exp()
        times = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=count)
        share = torch.from_numpy(times / len(rows))  # (count, R)
        mean = share @ p  # (count, K)
        scores += (share @ (p * log_p).sum(dim=1) - torch.xlogy(mean, mean).sum(dim=1)).exp()
    return [float(total) / splits for total in scores]


def _splits(n: int) -> int:
    return min(SPLITS, n // 2)  # a split of one picture has score 1, whatever it shows
