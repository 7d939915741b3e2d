"""KID: the squared maximum mean discrepancy of two sets of features, with the kernel (x'y / D + 1)^3.

It has no bias, so that it may be compared at different numbers of pictures, and can be a little below 0. The figure
is torch-fidelity's mean over subsets; its floor is the same mean, over the same subsets, made faster.
Source: Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from shared.metrics import Figure, Interval, Measurement, Pictures, Setting
from shared.metrics.feature_sets import FeatureSets, one_thread
from shared.metrics.figure import CONFIDENCE
from shared.torchvision_operators import ensure_importable

# torch-fidelity's defaults, so that its command line says the same.
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020
BLOCKS = 10  # disjoint ones, for the interval; more where they would grow beyond
LARGEST_BLOCK = 2000


@dataclass(frozen=True, eq=False)
class KernelDistance:
    """The metric, ready to measure."""

    sets: FeatureSets

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        return cls(FeatureSets.prepare(setting))

    def measure(self, pictures: Pictures) -> Measurement:
        generated, reference, floor = self.sets.of(pictures).pooled, self.sets.reference.pooled, self.sets.floor.pooled
        floor_n, size = self.sets.floor_n(pictures), _subset_size(generated, reference)
        ensure_importable()
        from torch_fidelity.metric_kid import kid_features_to_metric

        with one_thread():
            found = kid_features_to_metric(
                torch.from_numpy(generated), torch.from_numpy(reference),
                kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=SUBSET_SEED, verbose=False,
            )  # fmt: skip
        value = float(found["kernel_inception_distance_mean"])
        figure = Figure(
            name=self.sets.called("kid", "kernel distance"),
            value=value,
            interval=block_interval(value, generated, reference, seed=self.sets.setting.seed),
            better="lower",
            floor=mean_over_subsets(floor[:floor_n], reference),
            at_floor_n=mean_over_subsets(generated[:floor_n], reference) if floor_n < len(generated) else None,
            warning=self.sets.not_comparable("KID"),
            **self.sets.about(pictures),
        )
        figure.seeds["subsets"] = [SUBSET_SEED]
        notes = [f"KID over subsets of {size} pictures, fewer than the usual {SUBSET_SIZE:,}"]
        return Measurement([figure], notes=notes if size < SUBSET_SIZE else [])


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Without bias, of `(N, D)` and `(M, D)`, N and M at least 2."""
    n, m, dim = len(first), len(second), first.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        base = torch.addmm(torch.ones((), dtype=x.dtype), x, y.T, alpha=1 / dim)
        return (base * base).mul_(base)  # a power would take five times as long

    def total(values: Tensor) -> float:
        return float(values.sum(dim=-1).double().sum())

    own, other = kernel(first, first), kernel(second, second)
    within = (total(own) - total(own.diagonal())) / (n * (n - 1))
    within += (total(other) - total(other.diagonal())) / (m * (m - 1))
    return within - 2 * total(kernel(first, second)) / (n * m)


def mean_over_subsets(first: np.ndarray, second: np.ndarray) -> float:
    """torch-fidelity's figure, up to rounding."""
    size = _subset_size(first, second)
    rng = np.random.RandomState(SUBSET_SEED)  # with another generator they would be other subsets
    found = []
    with one_thread():
        for _ in range(SUBSETS):
            rows, others = (torch.from_numpy(of[rng.choice(len(of), size, replace=False)]) for of in (first, second))
            found.append(squared_discrepancy(rows, others))
    return float(np.mean(found))


def block_interval(value: float, first: np.ndarray, second: np.ndarray, *, seed: int) -> Interval:
    """Student's t over the discrepancies of disjoint blocks of both sets, around `value`.

    Blocks are independent, so their spread is that of their mean; the subsets overlap, and theirs is not. The mean
    over subsets varies no more than that over blocks, and less where the sets are alike: there the interval is wide.
    """
    from scipy.stats import t

    fewer, more = sorted((len(first), len(second)))
    blocks = min(fewer // 2, max(BLOCKS, -(-more // LARGEST_BLOCK)))
    if blocks < 2:
        return Interval(-math.inf, math.inf, "too few pictures for two blocks")
    rng = np.random.Generator(np.random.Philox(seed))
    pairs = zip(np.array_split(rng.permutation(first), blocks), np.array_split(rng.permutation(second), blocks),
                strict=True)  # fmt: skip
    with one_thread():
        found = [squared_discrepancy(torch.from_numpy(rows), torch.from_numpy(others)) for rows, others in pairs]
    reach = float(t.ppf((1 + CONFIDENCE) / 2, blocks - 1) * np.std(found, ddof=1) / math.sqrt(blocks))
    return Interval(value - reach, value + reach,
                    f"Student's t over {blocks} disjoint blocks of generated and reference pictures")  # fmt: skip


def _subset_size(first: np.ndarray, second: np.ndarray) -> int:
    return min(SUBSET_SIZE, len(first), len(second))
