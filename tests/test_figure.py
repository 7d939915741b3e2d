"""Intervals: they hold the truth as often as they say, and a figure survives its way through JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from shared.metrics.figure import Figure, Interval, bootstrap, deviation_interval, mean_interval, seeds_interval
from shared.plain import plain

REPEATS = 400
# Of 400 intervals that each hold the truth with probability .95 (bootstraps at n = 150: at least .92), fewer than 339
# do with probability below 1e-6 (binomial tail at .92).
FEWEST_HELD = 339


def test_a_bound_on_how_often_intervals_fail_has_a_known_false_alarm_rate() -> None:
    assert stats.binom.cdf(FEWEST_HELD - 1, REPEATS, 0.92) < 1e-5


def test_intervals_of_a_mean_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(REPEATS):
        interval = mean_interval((rng.random(150) < 0.8).astype(float), seed=seed)
        held += interval.low <= 0.8 <= interval.high
    assert FEWEST_HELD <= held < REPEATS


@pytest.mark.slow
def test_intervals_of_values_that_are_no_counts_too() -> None:
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.exponential(size=150), seed=seed, count=300) for seed in range(REPEATS)]
    held = sum(interval.low <= 1 <= interval.high for interval in intervals)
    assert FEWEST_HELD <= held < REPEATS


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_pictures_that_all_agree_leave_room_by_the_rule_of_three(value: float) -> None:
    interval = mean_interval(np.full(300, value), seed=0)
    assert (interval.low, interval.high) == ((0.0, 0.01) if value == 0 else (0.99, 1.0))
    # The exact bound of Clopper and Pearson at 95 %, one-sided, lies just inside.
    assert 1 - 0.05 ** (1 / 300) <= 0.01


def test_the_interval_over_seeds_is_students_and_adds_the_test_pictures() -> None:
    values = [0.80, 0.82, 0.78]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    found = seeds_interval(values, how="x")
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    wider = seeds_interval(values, test_deviation=0.01, how="x")
    assert wider.high - 0.8 == pytest.approx(math.hypot(high - 0.8, 1.959964 * 0.01))
    alone = seeds_interval([0.8], test_deviation=0.01, how="x")
    assert (alone.low, alone.high) == (pytest.approx(0.8 - 0.0196, abs=1e-4), pytest.approx(0.8196, abs=1e-4))


def test_a_shifted_bootstrap_gives_an_interval_around_the_figure() -> None:
    replicas = np.random.default_rng(0).normal(7.0, 0.5, size=5000)
    found = deviation_interval(6.0, replicas.tolist(), "x")
    assert (found.low, found.high) == (pytest.approx(6 - 0.98, abs=0.03), pytest.approx(6 + 0.98, abs=0.03))


def test_a_bootstrap_resamples_both_sides_and_repeats_itself() -> None:
    def size(rows: np.ndarray, reference: np.ndarray) -> float:
        assert (len(rows), len(reference)) == (30, 20)
        assert rows.max() < 30
        assert reference.max() < 20
        return float(len(set(rows.tolist())) + 100 * len(set(reference.tolist())))

    first = bootstrap(size, 30, 20, seed=3, count=5)
    assert first == bootstrap(size, 30, 20, seed=3, count=5)
    assert len(set(first)) > 1


def test_a_figure_comes_back_from_json_as_it_was() -> None:
    figure = Figure(
        "fid", 3.25, Interval(-math.inf, math.inf, "one replica"), "lower", 10, "mine, reference", 20,
        extractor="local 12345678", seeds={"pictures": [1]}, floor=0.5, floor_n=10, warning="few",
    )  # fmt: skip
    assert Figure.from_dict(json.loads(json.dumps(plain(figure.to_dict())))) == figure
