"""Admission: the lifetime holds against a server that chooses each run after seeing the last one's releases.

The oracle of the adaptive tests is the adversary's best strategy, found backwards over every output on a grid, with
the closed form of the Gaussian mechanism; no accountant takes part in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from shared.errors import PrivacyError
from shared.privacy.accounting import best_renyi_order, renyi_budget
from shared.privacy.budget import Lifetime, Price, fits, price_run, steps_that_fit, what_is_left
from shared.privacy.plan import PrivacyPlan

EPSILON, DELTA = 4.0, 1e-3
GRID = np.linspace(-40, 40, 4001)


def plan_of(
    sigma: float, *, q: float = 1.0, steps: int = 1, delta: float = 1e-6, moments: float | None = None
) -> PrivacyPlan:  # fmt: skip
    return PrivacyPlan(
        private=True, noise_multiplier=sigma, sampling_rate=q, clipping_norm=1.0, expected_batch_size=100.0,
        steps=steps, reserved_steps=steps, delta=delta, warm_start_noise_multiplier=moments, unit="example", sites=2,
    )  # fmt: skip


def after_a_gaussian(value: np.ndarray, sigma: float) -> np.ndarray:
    """E over the release's privacy loss L of `value(epsilon - L)`, on GRID: 1 below it, 0 above."""
    mu = 1 / sigma
    nodes, weights = np.polynomial.hermite_e.hermegauss(121)
    losses = mu**2 / 2 + mu * nodes
    shifted = np.interp(GRID[:, None] - losses, GRID, value, left=1.0, right=0.0)
    return shifted @ (weights / weights.sum())


def worst_delta(lifetime: Lifetime, sigmas: Sequence[float], runs: int, *, filtered: bool = True) -> float:
    """The largest delta at the lifetime's epsilon that any adaptive choice of at most `runs` runs reaches."""
    prices = {sigma: price_run(plan_of(sigma), lifetime) for sigma in sigmas}
    ended = np.maximum(0, 1 - np.exp(np.minimum(GRID, 0))) * (GRID < 0)  # nothing more is released

    def best(reserved: tuple[Price, ...], left: int) -> np.ndarray:
        values = [ended]
        for sigma, price in prices.items():
            if left and (not filtered or fits(price, reserved, lifetime)):
                values.append(after_a_gaussian(best((*reserved, price), left - 1), sigma))
        return np.max(values, axis=0)  # chosen anew for every output so far

    return float(np.interp(lifetime.max_epsilon, GRID, best((), runs)))


LIFETIMES = [
    Lifetime(EPSILON, DELTA), Lifetime(EPSILON, DELTA, "renyi", best_renyi_order(EPSILON, DELTA)),
    Lifetime(EPSILON, DELTA, "renyi", 4.0),
]  # fmt: skip


@pytest.mark.parametrize("lifetime", LIFETIMES, ids=["sum", "renyi", "renyi-4"])
@pytest.mark.parametrize("sigmas", [(1.0, 2.0, 4.0), (1.5, 1.7, 3.0), (0.95, 2.5, 8.0)])
def test_no_adaptive_choice_of_runs_passes_the_lifetime(lifetime: Lifetime, sigmas: tuple[float, ...]) -> None:
    assert worst_delta(lifetime, sigmas, 4) <= DELTA


@pytest.mark.slow
def test_the_adversary_of_that_test_would_pass_a_lifetime_without_a_filter() -> None:
    assert worst_delta(LIFETIMES[0], (1.0, 2.0, 4.0), 4, filtered=False) > 10 * DELTA


def test_choosing_after_seeing_outputs_is_worth_something_to_that_adversary() -> None:
    fixed = []
    for sigmas in product((1.2, 3.0), repeat=3):
        mu = math.sqrt(sum(sigma**-2 for sigma in sigmas))
        value = np.maximum(0, 1 - np.exp(np.minimum(GRID, 0))) * (GRID < 0)
        fixed.append(float(np.interp(EPSILON, GRID, after_a_gaussian(value, 1 / mu))))
    lifetime = Lifetime(EPSILON, 0.5)
    assert worst_delta(lifetime, (1.2, 3.0), 3, filtered=False) >= max(fixed) * (1 - 1e-3)


# ---- sums


def test_ten_tenths_are_admitted_and_an_eleventh_is_not() -> None:
    lifetime, tenth = Lifetime(1.0, 1e-6), Price(0.1, 1e-7, None)
    assert sum([0.1] * 10) != 1.0  # in floating point the tenth one would not fit
    assert fits(tenth, [tenth] * 9, lifetime)
    assert not fits(tenth, [tenth] * 10, lifetime)
    assert not fits(Price(0.01, 1e-9, None), [tenth] * 10, lifetime)
    assert not fits(Price(0.01, 1.1e-7, None), [tenth] * 9, lifetime)  # delta adds up too


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "moments"),
    [(0.1, 2.0, 100, None), pytest.param(0.05, 1.1, 300, 12.0, marks=pytest.mark.slow), (1.0, 6.0, 3, None)],
)
def test_a_price_is_what_other_people_s_accountant_says_at_its_delta(
    q: float, sigma: float, steps: int, moments: float | None
) -> None:
    price = price_run(plan_of(sigma, q=q, steps=steps, moments=moments), Lifetime(12.0, 1e-5))
    pld = PLDAccountant()
    pld.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)) if q < 1 else GaussianDpEvent(sigma), steps)
    if moments is not None:
        pld.compose(GaussianDpEvent(moments))
    expected = pld.get_epsilon(price.delta)
    assert price.epsilon == pytest.approx(expected, abs=0.02)
    assert price.epsilon >= expected - 2e-3
    # The same share of epsilon as of delta: neither is used up before the other.
    share = price.epsilon / 12.0, price.delta / 1e-5
    assert share[0] == pytest.approx(share[1], rel=0.01) or (price.delta == 1e-6 and abs(share[0] - share[1]) < 0.1)
    assert price.epsilon_after(steps) == price.epsilon
    assert 0 < price.epsilon_after(1) < price.epsilon


def test_a_run_planned_for_the_whole_lifetime_is_priced_at_its_own_delta() -> None:
    price = price_run(plan_of(1.12, delta=1e-6), Lifetime(4.4, 1e-6))
    assert price.delta == 1e-6
    assert fits(price, [], Lifetime(4.4, 1e-6))


@pytest.mark.slow
def test_what_is_left_and_the_steps_that_fit_lie_within_the_lifetime() -> None:
    lifetime = Lifetime(8.0, 1e-5)
    plan = plan_of(1.5, q=0.1, steps=160)
    price = price_run(plan, lifetime)
    reserved = [Price(8.0 - price.epsilon * 0.7, 1e-6, None)]
    assert not fits(price, reserved, lifetime)
    steps = steps_that_fit(price, reserved, lifetime)
    assert 0 < steps < 160
    left = what_is_left(reserved, lifetime)
    pld = PLDAccountant()
    pld.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.5)), steps)
    assert pld.get_epsilon(price.delta) <= left.epsilon
    assert price.delta <= left.delta


# ---- one Renyi order


def test_the_renyi_filter_adds_up_divergences_as_rdp_does() -> None:
    order = 6.0
    lifetime = Lifetime(8.0, 1e-6, "renyi", order)
    plans = [plan_of(2.0, q=0.1, steps=50), plan_of(3.0, steps=2), plan_of(1.5, q=0.02, steps=200, moments=9.0)]
    prices = [price_run(plan, lifetime) for plan in plans]
    rdp = RdpAccountant(orders=[order])
    for plan in plans:
        step = GaussianDpEvent(plan.noise_multiplier)
        rdp.compose(step if plan.sampling_rate == 1 else PoissonSampledDpEvent(plan.sampling_rate, step), plan.steps)
        if plan.warm_start_noise_multiplier:
            rdp.compose(GaussianDpEvent(plan.warm_start_noise_multiplier))
    total = sum(price.renyi or 0 for price in prices)
    assert total == pytest.approx(rdp._rdp[0], rel=1e-6)
    # What fills the budget to the brim is (epsilon, delta) by the conversion of other people.
    assert renyi_budget(8.0, 1e-6, order=order) == pytest.approx(8.0 - (rdp.get_epsilon(1e-6) - rdp._rdp[0]), rel=1e-9)


@pytest.mark.slow
def test_a_renyi_lifetime_admits_more_runs_than_sums_do() -> None:
    plan = plan_of(3.0, q=0.05, steps=200)
    counts = []
    for lifetime in (Lifetime(8.0, 1e-6), Lifetime(8.0, 1e-6, "renyi", best_renyi_order(8.0, 1e-6))):
        price, reserved = price_run(plan, lifetime), list[Price]()
        while fits(price, reserved, lifetime):
            reserved.append(price)
        counts.append(len(reserved))
    assert counts[0] >= 2
    assert counts[1] > 2 * counts[0]


@pytest.mark.parametrize(
    "values", [(0.0, 1e-6), (-1.0, 1e-6), (math.nan, 1e-6), (8.0, 0.0), (8.0, 1.0), (8.0, 1e-6, "renyi"),
               (8.0, 1e-6, "sum", 4.0), (8.0, 1e-6, "renyi", 1.0), (0.5, 1e-6, "renyi", 2.0)],
)  # fmt: skip
def test_a_lifetime_that_admits_nothing_or_everything_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(PrivacyError):
        Lifetime(*values)  # type: ignore[arg-type]
