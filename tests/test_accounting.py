"""Epsilon against other people's accountants, closed forms and numerical integrals."""

from __future__ import annotations

import math
import time

import dp_accounting
import numpy as np
import pytest
from dp_accounting import gaussian_mechanism
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from shared.errors import PrivacyError
from shared.privacy import accounting
from shared.privacy.accounting import (
    EpsilonReport,
    EpsilonTable,
    Spent,
    analytic_gaussian_epsilon,
    analytic_gaussian_noise_multiplier,
    composed_epsilon,
    epsilon_curve,
    estimated_epsilon,
    spent_epsilon,
)

DELTA = 1e-5


@pytest.mark.parametrize(
    ("sampling_rate", "noise_multiplier", "steps", "pld", "prv", "rdp"),
    [
        (0.0683, 2.011, 3000, 9.995, 10.006, 10.757),
        (0.00853, 2.0, 174_000, 9.386, 9.396, 10.079),
        (0.0256, 0.622, 200, 7.98, 7.99, 9.33),
    ],
)
def test_published_reference_values_are_met(
    sampling_rate: float, noise_multiplier: float, steps: int, pld: float, prv: float, rdp: float
) -> None:
    report = spent_epsilon(
        sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps, delta=DELTA
    )  # fmt: skip
    assert report.pld == pytest.approx(pld, abs=0.01)
    assert report.prv == pytest.approx(prv, abs=0.01)
    assert report.rdp == pytest.approx(rdp, abs=0.01)
    assert report.epsilon == max(report.prv, report.pld)
    assert report.fallback == ""


@pytest.mark.parametrize("sampling_rate", [0.002, 0.05, 0.5])
@pytest.mark.parametrize(
    ("noise_multiplier", "steps"),
    [
        (1.1, 40),
        (2.5, 400),
        pytest.param(0.5, 40, marks=pytest.mark.slow),
        pytest.param(60.0, 40_000, marks=pytest.mark.slow),
    ],
)
def test_the_two_accountants_agree_within_002_and_lie_below_rdp(
    sampling_rate: float, noise_multiplier: float, steps: int
) -> None:
    report = spent_epsilon(
        sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps, delta=DELTA
    )  # fmt: skip
    assert report.prv == pytest.approx(report.pld, abs=0.02)
    assert report.epsilon < report.rdp
    assert report.fallback == ""


def test_opacus_own_accountants_give_the_same() -> None:
    report = spent_epsilon(sampling_rate=0.1, noise_multiplier=1.5, steps=300, delta=DELTA)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(1.5, 0.1, 300)]
    assert report.prv == pytest.approx(prv.get_epsilon(DELTA), abs=1e-4)
    assert report.rdp == pytest.approx(rdp.get_epsilon(DELTA), abs=1e-9)


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(5.0, 1), (1.0, 1), (20.0, 400), (0.5, 30)])
def test_without_sampling_every_accountant_is_the_analytic_gaussian(noise_multiplier: float, steps: int) -> None:
    report = spent_epsilon(sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=steps, delta=DELTA)
    exact = gaussian_mechanism.get_epsilon_gaussian(noise_multiplier / math.sqrt(steps), DELTA)
    assert report.pld == report.prv == pytest.approx(exact, rel=1e-6)
    assert report.rdp > exact


def test_one_sampled_step_costs_what_the_integral_says() -> None:
    sampling_rate, sigma = 0.2, 1.1
    x = np.linspace(-12, 14, 400_001)
    without = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    record = np.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    with_record = (1 - sampling_rate) * without + sampling_rate * record
    report = spent_epsilon(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=1, delta=DELTA)

    def delta_at(epsilon: float) -> float:
        removed = np.trapezoid(np.maximum(with_record - math.exp(epsilon) * without, 0), x)
        added = np.trapezoid(np.maximum(without - math.exp(epsilon) * with_record, 0), x)
        return float(max(removed, added))

    assert delta_at(report.pld) <= DELTA * (1 + 1e-6)
    assert delta_at(report.pld - 0.001) > DELTA
    assert delta_at(report.prv) <= DELTA
    assert delta_at(report.prv - 0.021) > DELTA


def test_warm_start_and_steps_compose_as_dp_accounting_composes_events() -> None:
    report = spent_epsilon(
        sampling_rate=0.06, noise_multiplier=2.0, steps=600, delta=DELTA, warm_start_noise_multiplier=2.0
    )  # fmt: skip
    accountant = PLDAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.06, dp_accounting.GaussianDpEvent(2.0)), 600)
    accountant.compose(dp_accounting.GaussianDpEvent(2.0))
    assert report.pld == pytest.approx(accountant.get_epsilon(DELTA), abs=1e-4)
    assert report.prv == pytest.approx(report.pld, abs=0.02)
    assert report.prv >= report.pld - 1e-3
    assert report.epsilon < report.rdp
    steps_alone = spent_epsilon(sampling_rate=0.06, noise_multiplier=2.0, steps=600, delta=DELTA)
    assert steps_alone.epsilon + 0.1 < report.epsilon < steps_alone.epsilon + analytic_gaussian_epsilon(0.5, DELTA)


def test_a_warm_start_alone_is_the_analytic_gaussian_and_nothing_released_is_free() -> None:
    alone = spent_epsilon(
        sampling_rate=0.1, noise_multiplier=1.0, steps=0, delta=DELTA, warm_start_noise_multiplier=5.0
    )  # fmt: skip
    assert alone.epsilon == pytest.approx(gaussian_mechanism.get_epsilon_gaussian(5.0, DELTA), rel=1e-6)
    nothing = spent_epsilon(sampling_rate=0.1, noise_multiplier=1.0, steps=0, delta=DELTA)
    assert nothing.epsilon == nothing.rdp == 0.0


@pytest.mark.parametrize("epsilon", [0.01, 0.4, 8.0, 300.0])
def test_analytic_gaussian_noise_is_the_smallest_that_keeps_epsilon(epsilon: float) -> None:
    noise_multiplier = analytic_gaussian_noise_multiplier(epsilon, DELTA)
    assert noise_multiplier == pytest.approx(gaussian_mechanism.get_sigma_gaussian(epsilon, DELTA), rel=1e-6)
    assert analytic_gaussian_epsilon(1 / noise_multiplier, DELTA) <= epsilon


def test_a_curve_equals_its_single_points_and_a_table_bounds_what_lies_between() -> None:
    run = {"sampling_rate": 0.1, "noise_multiplier": 1.5, "delta": DELTA, "warm_start_noise_multiplier": 6.0}
    table = EpsilonTable(exact_at=(150, 153), **run)
    singles = {steps: spent_epsilon(steps=steps, **run) for steps in (0, 3, 153)}
    for steps in (0, 153):
        tabulated = table.at(steps)
        assert tabulated.steps == steps
        assert tabulated.pld == pytest.approx(singles[steps].pld, abs=1e-6)
        assert tabulated.prv == pytest.approx(singles[steps].prv, abs=1e-3)
    assert table.at(150).steps == 150
    assert table.at(3).steps >= 3
    assert table.at(3).epsilon >= singles[3].epsilon
    epsilons = [table.at(steps).epsilon for steps in range(154)]
    assert epsilons == sorted(epsilons)
    start = time.perf_counter()
    for steps in range(150):
        table.at(steps)
    assert (time.perf_counter() - start) / 150 < 1e-3


def test_a_price_is_the_same_whatever_was_priced_before() -> None:
    # The distribution of a step is kept: nothing that is composed from it may change it, and each has its own.
    few = {"sampling_rate": 0.1, "noise_multiplier": 2.0, "delta": 1e-5}
    first = spent_epsilon(**few, steps=40)
    others = [spent_epsilon(**few, steps=1), spent_epsilon(**few, steps=400)]
    others.append(spent_epsilon(**{**few, "noise_multiplier": 2.5}, steps=40))
    others.append(composed_epsilon([Spent(0.1, 2.0, 40), Spent(0.1, 2.0, 3, 5.0)], delta=1e-5))
    assert len({first.pld, *(other.pld for other in others)}) == 5
    assert spent_epsilon(**few, steps=40) == first
    accounting._pld_of_step.cache_clear()
    assert spent_epsilon(**few, steps=40) == first


def test_the_estimate_of_a_search_is_near_the_bound() -> None:
    run = {"sampling_rate": 0.05, "noise_multiplier": 1.2, "steps": 500, "delta": DELTA}
    assert estimated_epsilon(**run) == pytest.approx(spent_epsilon(**run).epsilon, abs=1e-3)


@pytest.mark.parametrize("accountant", ["pld", "prv"])
@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_failing_accountant_is_replaced_by_rdp_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, accountant: str, failure: str
) -> None:
    def broken(*_: object) -> list[float]:
        if failure == "raises":
            raise FloatingPointError("planted")
        return [math.nan]

    monkeypatch.setattr(accounting, f"_{accountant}_curve", broken)
    report = spent_epsilon(sampling_rate=0.1, noise_multiplier=2.0, steps=10, delta=DELTA)
    assert getattr(report, accountant) == report.rdp == report.epsilon
    assert accountant.upper() in report.fallback
    assert "RDP stands in" in report.fallback
    assert report.fallback in str(report)


def test_when_all_fail_the_price_is_that_without_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[float]:
        raise MemoryError

    for name in ("_pld_curve", "_prv_curve", "_rdp_curve"):
        monkeypatch.setattr(accounting, name, broken)
    report = spent_epsilon(sampling_rate=0.1, noise_multiplier=2.0, steps=10, delta=DELTA)
    assert report.epsilon == pytest.approx(gaussian_mechanism.get_epsilon_gaussian(2 / math.sqrt(10), DELTA), rel=1e-6)
    assert "without sampling" in report.fallback


def test_a_delta_below_the_accountants_rounding_is_priced_by_rdp() -> None:
    report = spent_epsilon(sampling_rate=0.1, noise_multiplier=2.0, steps=100, delta=1e-13)
    assert report.epsilon == report.rdp
    assert "below the rounding" in report.fallback


@pytest.mark.parametrize("noise_multiplier", [0.0, -1.0, math.nan, math.inf])
def test_a_noise_multiplier_of_zero_is_an_error(noise_multiplier: float) -> None:
    with pytest.raises(PrivacyError, match="no privacy"):
        spent_epsilon(sampling_rate=0.1, noise_multiplier=noise_multiplier, steps=1, delta=DELTA)
    with pytest.raises(PrivacyError, match="no privacy"):
        spent_epsilon(
            sampling_rate=0.1, noise_multiplier=1.0, steps=1, delta=DELTA, warm_start_noise_multiplier=noise_multiplier
        )


@pytest.mark.parametrize(("sampling_rate", "delta"), [(0.0, 1e-5), (1.1, 1e-5), (0.1, 0.0), (0.1, 1.0)])
def test_rates_and_deltas_out_of_range_are_refused(sampling_rate: float, delta: float) -> None:
    with pytest.raises(PrivacyError):
        spent_epsilon(sampling_rate=sampling_rate, noise_multiplier=1.0, steps=1, delta=delta)


@pytest.mark.parametrize(
    ("sampling_rate", "noise_multiplier", "steps"),
    [(0.5, 1000.0, 10), (1e-6, 1.0, 1), pytest.param(0.1, 0.2, 300, marks=pytest.mark.slow)],
)
def test_extreme_settings_get_a_finite_bound_without_warnings(
    sampling_rate: float, noise_multiplier: float, steps: int
) -> None:
    report = spent_epsilon(
        sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps, delta=DELTA
    )  # fmt: skip
    assert 0 <= report.epsilon < 1e4


def test_epsilon_never_stands_without_delta_unit_and_adjacency() -> None:
    report = EpsilonReport(prv=7.99, pld=7.98, rdp=9.3, delta=1e-5, steps=200)
    assert str(report) == "epsilon = 7.99 (delta 1e-05, add/remove one example)"
    assert report.to_dict()["epsilon"] == 7.99
    assert str(EpsilonReport.no_privacy(delta=1e-5, steps=3)).startswith("epsilon = inf")


def test_a_curve_with_zero_steps_first_is_priced_in_order() -> None:
    zero, some, more = epsilon_curve(sampling_rate=0.2, noise_multiplier=3.0, steps=[0, 5, 10], delta=DELTA)
    assert [r.steps for r in (zero, some, more)] == [0, 5, 10]
    assert 0 == zero.epsilon < some.epsilon < more.epsilon
