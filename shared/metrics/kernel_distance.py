"""KID: the squared maximum mean discrepancy of two sets of features, with the kernel (x'y / D + 1)^3.

It has no bias, so that it may be compared at different numbers of pictures, and can be a little below 0. The figure
is torch-fidelity's mean over subsets; its floor is the mean over the first fifth of them, which estimates the same.
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
from shared.metrics.feature_sets import FeatureSets
from shared.metrics.figure import CONFIDENCE
from shared.torchvision_operators import ensure_importable

# torch-fidelity's defaults, so that its command line says the same.
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 2020
FLOOR_SUBSETS = 20  # a figure takes 6 s of 10,000 pictures, and the floor is asked for twice
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
        floor_n, value = self.sets.floor_n(pictures), mean_over_subsets(generated, reference)
        figure = Figure(
            name="kid",
            value=value,
            interval=block_interval(value, generated, reference, seed=self.sets.setting.seed),
            better="lower",
            floor=mean_over_subsets(floor[:floor_n], reference, count=FLOOR_SUBSETS),
            at_floor_n=mean_over_subsets(generated[:floor_n], reference, count=FLOOR_SUBSETS)
            if floor_n < len(generated) else None,
            warning=self.sets.not_comparable("KID"),
            **self.sets.about(pictures),
        )  # fmt: skip
        figure.seeds["subsets"] = [SUBSET_SEED]
        size = _subset_size(generated, reference)
        notes = [f"KID over subsets of {size} pictures, fewer than the usual {SUBSET_SIZE:,}"]
        return Measurement([figure], notes=notes if size < SUBSET_SIZE else [])


def squared_discrepancy(first: Tensor, second: Tensor) -> float:
    """Without bias, of `(N, D)` and `(M, D)`, N and M at least 2."""
    n, m, dim = len(first), len(second), first.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return ((x @ y.T).double() / dim + 1) ** 3

    own, other = kernel(first, first), kernel(second, second)
    within = (own.sum() - own.diagonal().sum()) / (n * (n - 1))
    within += (other.sum() - other.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * kernel(first, second).mean())


def mean_over_subsets(first: np.ndarray, second: np.ndarray, *, count: int = SUBSETS) -> float:
    """torch-fidelity's figure, with its defaults but for what is named."""
    ensure_importable()
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(first), torch.from_numpy(second),
        kid_subsets=count, kid_subset_size=_subset_size(first, second), rng_seed=SUBSET_SEED, verbose=False,
    )  # fmt: skip
    return float(found["kernel_inception_distance_mean"])


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
    found = [squared_discrepancy(torch.from_numpy(rows), torch.from_numpy(others)) for rows, others in pairs]
    reach = float(t.ppf((1 + CONFIDENCE) / 2, blocks - 1) * np.std(found, ddof=1) / math.sqrt(blocks))
    return Interval(value - reach, value + reach,
                    f"Student's t over {blocks} disjoint blocks of generated and reference pictures")  # fmt: skip


def _subset_size(first: np.ndarray, second: np.ndarray) -> int:
    return min(SUBSET_SIZE, len(first), len(second))
