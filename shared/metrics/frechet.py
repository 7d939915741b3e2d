"""FID: how far apart two sets of features lie when each is taken for a Gaussian.

The figure is torch-fidelity's; its floor and its resampling use an equal form that is several times faster.
Not covered: the bias. FID of few pictures is too high, by about the variance of the features times D / 4 times
(1 / n + 1 / reference n) for features alike in all directions, so figures compare at equal numbers only: the floor
stands beside each. Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500; of the bias, Chong and Forsyth
2020, https://arxiv.org/abs/1911.07023.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from shared.metrics import Figure, Measurement, Pictures, Setting
from shared.metrics.extractor import LONG, in_words
from shared.metrics.feature_sets import FeatureSets, joined, one_thread
from shared.metrics.figure import bootstrap, deviation_interval
from shared.torchvision_operators import ensure_importable

RESAMPLINGS = 30
MANY_FEATURES, FEWER_RESAMPLINGS = 512, 20  # of 2,048 features one takes about 10 s
# Where the bias is about a tenth of the features' variance; 10,000 are what published figures of 2,048 features ask.
PICTURES_PER_FEATURE, ENOUGH = 5, 10_000


@dataclass(frozen=True, eq=False)
class FrechetDistance:
    """The metric, ready to measure."""

    sets: FeatureSets
    reference: dict[str, Any]

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        sets = FeatureSets.prepare(setting)
        return cls(sets, _statistics(sets.reference.pooled))

    def measure(self, pictures: Pictures) -> Measurement:
        generated, reference, floor = self.sets.of(pictures).pooled, self.sets.reference.pooled, self.sets.floor.pooled
        with nullcontext() if generated.shape[1] > MANY_FEATURES else one_thread():
            return Measurement([self._figure(pictures, generated, reference, floor)])

    def _figure(self, pictures: Pictures, generated: np.ndarray, reference: np.ndarray, floor: np.ndarray) -> Figure:
        found = _fidelity().fid_statistics_to_metric(_statistics(generated), self.reference, False)
        value = float(found["frechet_inception_distance"])
        floor_n = self.sets.floor_n(pictures)
        replicas = self._replicas(generated)
        return Figure(
            name=self.sets.called("fid", "frechet distance"),
            value=value,
            interval=deviation_interval(
                value, replicas,
                f"1.96 standard deviations of {len(replicas)} bootstraps of generated and reference pictures; the"
                " bias of few pictures is not in it",
            ),
            better="lower",
            floor=squared_distance(floor[:floor_n], reference),
            at_floor_n=squared_distance(generated[:floor_n], reference) if floor_n < len(generated) else None,
            warning=joined(self.sets.not_comparable("FID"), _too_few(len(generated), *reference.shape)),
            **self.sets.about(pictures),
        )  # fmt: skip

    def _replicas(self, generated: np.ndarray) -> list[float]:
        setting, reference = self.sets.setting, self.sets.reference.pooled
        count = RESAMPLINGS if generated.shape[1] <= MANY_FEATURES else FEWER_RESAMPLINGS
        began, done = time.monotonic(), 0

        def replica(rows: np.ndarray, reference_rows: np.ndarray) -> float:
            nonlocal done
            distance = squared_distance(generated[rows], reference[reference_rows])
            done += 1
            left = (time.monotonic() - began) * (count - 1)
            if done == 1 and left > LONG:
                setting.progress(f"resampling FID {count} times: about {in_words(left)} on this machine")
            setting.step(done, count)
            return distance

        return bootstrap(replica, len(generated), len(reference), seed=setting.seed, count=count)


def squared_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The squared Frechet distance of two Gaussians with the means and covariances of `(N, D)` and `(M, D)`.

    The trace of the square root of S1 S2 is the sum of the singular values of A B', for any A, B with A'A = S1 and
    B'B = S2: of a symmetric matrix no larger than D or the fewer pictures.
    """
    (mean, a), (other_mean, b) = _mean_and_root(first), _mean_and_root(second)
    product = a @ b.T  # (<= D, <= D)
    gram = product @ product.T if len(a) <= len(b) else product.T @ product
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0)).sum()
    return float(((mean - other_mean) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap)


def _mean_and_root(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `(D,)`, and A with A'A the covariance: `(N, D)` where there are few pictures, else `(D, D)`."""
    n, dim = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features - mean
    if n <= dim:
        return mean, centred / np.sqrt(n - 1)
    covariance = centred.T @ centred / (n - 1)
    # Features that never vary make it singular; this much is lost in rounding anyway.
    rounding = 10 * dim * np.finfo(np.float64).eps * np.trace(covariance)
    if rounding == 0:
        return mean, np.zeros((1, dim))
    covariance[np.diag_indices(dim)] += rounding
    return mean, np.linalg.cholesky(covariance).T


def _too_few(n: int, reference_n: int, dim: int) -> str:
    fewer = min(n, reference_n)
    if fewer <= dim:
        return f"{fewer:,} pictures for {dim:,} features: singular covariance; compare with the floor, not with 0"
    if fewer < min(ENOUGH, PICTURES_PER_FEATURE * dim):
        return f"{fewer:,} pictures for {dim:,} features: biased upward; compare with the floor, not with 0"
    return ""


def _statistics(features: np.ndarray) -> dict[str, Any]:
    statistics: dict[str, Any] = _fidelity().fid_features_to_statistics(torch.from_numpy(features))
    return statistics


def _fidelity() -> Any:
    ensure_importable()
    from torch_fidelity import metric_fid

    return metric_fid
