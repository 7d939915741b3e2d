"""A figure and all that makes it believable: how many pictures, against what, by what, how sure, beside which marks.

Intervals are at 95 %. Where a figure is a mean over pictures they come from a bootstrap of the pictures; where it
depends on a training, from its seeds as well. They cover the drawing of pictures and seeds, never the choice of the
reference set or of the extractor: those are named beside the figure instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np

Better = Literal["lower", "higher", "neither"]

CONFIDENCE = 0.95
BOOTSTRAPS = 1000
NORMAL_QUANTILE = 1.959964  # of the standard normal distribution, at (1 + CONFIDENCE) / 2


@dataclass(frozen=True)
class Interval:
    """`low` to `high` at 95 %, and in words where they come from."""

    low: float
    high: float
    how: str


@dataclass(frozen=True)
class Figure:
    """One number about generated pictures.

    Attributes:
        name: unique within a metric, such as "fid" or "accuracy of colour".
        better: which direction is good.
        n: generated pictures that it is about.
        reference: the public set that it was measured against, with the part of it.
        reference_n: pictures of that part.
        extractor: what made features, with its fingerprint; `None` where none did.
        seeds: of pictures, trainings and resampling, by purpose.
        floor: the same figure for `floor_n` real pictures in place of generated ones. A generator of typical or of
            few pictures can get past it where spread is not asked for: caption accuracy, precision, class score.
        at_floor_n: the figure for only the first `floor_n` generated pictures, where those are fewer than `n`.
        chance: what guessing gets.
        warning: why the number should not be taken at its face.
    """

    name: str
    value: float
    interval: Interval
    better: Better
    n: int
    reference: str
    reference_n: int
    extractor: str | None = None
    seeds: dict[str, list[int]] = field(default_factory=dict)
    floor: float | None = None
    floor_n: int | None = None
    at_floor_n: float | None = None
    chance: float | None = None
    warning: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        known = {f.name for f in fields(cls)}
        inner = {key: value for key, value in table.items() if key in known}
        numbers = ("value", "floor", "at_floor_n", "chance")  # "inf" is a text in JSON
        inner.update({key: float(inner[key]) for key in numbers if inner.get(key) is not None})
        low, high = float(inner["interval"]["low"]), float(inner["interval"]["high"])
        return cls(**{**inner, "interval": Interval(low, high, str(inner["interval"]["how"]))})


def mean_interval(values: np.ndarray, *, seed: int, count: int = BOOTSTRAPS) -> Interval:
    """Percentile bootstrap of the mean of one value a picture, `(N,)`.

    Where all values are equal a bootstrap cannot tell how sure the mean is; for fractions the rule of three then
    bounds it (Hanley and Lippman-Hand 1983).
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if n and values.min() == values.max() and values[0] in (0.0, 1.0):
        reach = min(1.0, 3 / n)
        low, high = (0.0, reach) if values[0] == 0 else (1 - reach, 1.0)
        return Interval(low, high, f"all {n} pictures agree: rule of three")
    rng = np.random.Generator(np.random.Philox(seed))
    different, counts = np.unique(values, return_counts=True)
    if len(different) <= 64:  # a few values, such as right and wrong: their counts are all that matters
        means = rng.multinomial(n, counts / n, size=count) @ different / n
    else:
        means = np.array([values[rng.integers(n, size=n)].mean() for _ in range(count)])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high), f"bootstrap of {n} pictures, {count} times")


def deviation_interval(value: float, replicas: Sequence[float], how: str) -> Interval:
    """`value` and 1.96 standard deviations of bootstrapped `replicas` to both sides.

    For figures that a bootstrap shifts (a Frechet distance grows when pictures repeat), so that percentiles of the
    replicas would lie beside the figure.
    """
    reach = NORMAL_QUANTILE * float(np.std(replicas, ddof=1)) if len(replicas) > 1 else math.inf
    return Interval(value - reach, value + reach, how)


def seeds_interval(values: Sequence[float], *, test_deviation: float = 0.0, how: str) -> Interval:
    """Of a mean over trainings: Student's t over their seeds, together with the drawing of the test pictures.

    Args:
        values: the figure of each training.
        test_deviation: standard deviation of the mean that comes from the test pictures alone.
    """
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    of_seeds = 0.0
    if count > 1:
        of_seeds = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    reach = math.hypot(of_seeds, NORMAL_QUANTILE * test_deviation)
    return Interval(mean - reach, mean + reach, how)


def bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float], n: int, reference_n: int, *, seed: int, count: int
) -> list[float]:
    """`statistic(rows, reference_rows)` for `count` resamplings with replacement of both sides."""
    rng = np.random.Generator(np.random.Philox(seed))
    return [statistic(rng.integers(n, size=n), rng.integers(reference_n, size=reference_n)) for _ in range(count)]
