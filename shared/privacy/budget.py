"""May a run be reserved on a lineage? A privacy filter: what was reserved before and the run together stay below.

The server chooses each run after it saw the last one's releases, so runs are not composed as if they had been fixed
beforehand. Two filters hold against that choice:

    sum     the runs' (epsilon, delta) add up. Each run is priced where it takes the same share of the lifetime's
            epsilon as of its delta, so that neither is used up before the other.
    renyi   the runs' Renyi divergences of one order, chosen with the lineage, add up; the whole then is
            (epsilon, delta) with the lifetime's delta, once.

A run is priced whole, slack for retries included, before its first release: inside a run only weights are adaptive,
so PRV and PLD price it. Nothing is given back for what a run left unspent.
Sources: Rogers et al. 2016, https://arxiv.org/abs/1605.08294 (sums); Feldman & Zrnic 2021,
https://arxiv.org/abs/2008.11193 (Renyi). Not here: the file that holds all this (`shared.privacy.ledger`).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from shared.errors import PrivacyError
from shared.privacy.accounting import (
    SMALLEST_DELTA,
    Spent,
    estimated_epsilon,
    renyi_budget,
    renyi_cost,
)
from shared.privacy.plan import PrivacyPlan, epsilon_table

FilterName = Literal["sum", "renyi"]
EVEN_ENOUGH = 0.1  # shares of epsilon and delta that differ by less need no search
SEARCH_STEPS = 20
# Of a lifetime's delta, kept from a Renyi filter for draws that are cut; and of that, what one run may use of it.
RENYI_OVERFLOW, RENYI_OVERFLOW_OF_RUN = 1e-3, 1e-6


@dataclass(frozen=True)
class Lifetime:
    """All that may ever be released about one lineage.

    Attributes:
        max_epsilon: infinite only for simulated sites of runs without privacy.
        delta: of all runs together.
        order: of the Renyi filter; `None` for sums.
    """

    max_epsilon: float
    delta: float
    filter: FilterName = "sum"
    order: float | None = None

    def __post_init__(self) -> None:
        if not self.max_epsilon > 0:
            raise PrivacyError(f"a lifetime epsilon of {self.max_epsilon:g} admits nothing", hint="name one above 0")
        if not 0 < self.delta < 1:
            raise PrivacyError(f"a lifetime delta of {self.delta:g} is not between 0 and 1")
        if (self.filter == "renyi") != (self.order is not None):
            raise PrivacyError("an order belongs to the Renyi filter, and only there")
        if self.order is not None and (self.order <= 1 or self.renyi_budget <= 0):
            raise PrivacyError(
                f"the Renyi filter of order {self.order:g} admits nothing within epsilon {self.max_epsilon:g}",
                hint="leave the order out: the best one is chosen",
            )

    @property
    def renyi_budget(self) -> float:
        assert self.order is not None
        return renyi_budget(self.max_epsilon, self.delta * (1 - RENYI_OVERFLOW), order=self.order)


@dataclass(frozen=True)
class Price:
    """What a run costs, whole.

    Attributes:
        epsilon, delta: of all its reserved releases; epsilon is the larger of PRV and PLD.
        renyi: divergence of the lifetime's order; `None` with sums.
        rows: (steps, PRV, PLD, RDP) at `delta`, ascending, the unsampled release included: epsilon on the way.
        overflow: delta for draws beyond the padded size; with sums a part of `delta`, with the Renyi filter beside it.
        overflow_epsilon: of the guarantee that it is added to: the run's with sums, the lifetime's with the filter.
    """

    epsilon: float
    delta: float
    renyi: float | None
    rows: tuple[tuple[int, float, float, float], ...] = ()
    overflow: float = 0.0
    overflow_epsilon: float = 0.0

    def epsilon_after(self, steps: int) -> float:
        """Of the run's first `steps` steps; never less than true, exact at the planned and the reserved number."""
        if not self.rows:
            return self.epsilon
        place = min(bisect_left(self.rows, steps, key=lambda row: row[0]), len(self.rows) - 1)
        return max(self.rows[place][1:3])


def price_run(
    plan: PrivacyPlan, lifetime: Lifetime, *, overflow_share: float = 0.0, at_delta: float | None = None
) -> Price:
    """What the run of `plan` costs a lineage; some seconds where the plan is new to this process.

    Args:
        overflow_share: part of the price's delta that is kept for draws beyond the padded size; 0 where nothing is
            padded. The Renyi filter keeps a part of its own.
        at_delta: with sums, the delta that is charged; the one of even shares where it is not given.
    """
    if not plan.private:
        return Price(math.inf, 0.0, math.inf if lifetime.filter == "renyi" else None)
    kept = 1 - overflow_share
    renyi = None
    if lifetime.order is not None:
        delta = lifetime.delta
        renyi = renyi_cost(as_spent(plan, plan.reserved_steps), order=lifetime.order)
    else:
        delta = _even_delta(plan, lifetime, kept) if at_delta is None else at_delta
    reports = epsilon_table(replace(plan, delta=delta * kept), plan.warm_start_noise_multiplier is not None).reports
    rows = tuple((report.steps, report.prv, report.pld, report.rdp) for report in reports)
    epsilon, overflow, overflow_epsilon = reports[-1].epsilon, overflow_share * delta, reports[-1].epsilon
    if lifetime.order is not None:
        # Divergences are converted once, at the end: what is cut then counts against the whole lifetime's epsilon.
        overflow = RENYI_OVERFLOW_OF_RUN * lifetime.delta if overflow_share else 0.0
        overflow_epsilon = lifetime.max_epsilon
    return Price(epsilon, delta, renyi, rows, overflow, overflow_epsilon)


def query_plan(*, noise_multiplier: float, sensitivity: float, delta: float, unit: str) -> PrivacyPlan:
    """A run that is one noised answer about all records: an unsampled Gaussian release, reserved like any run."""
    return PrivacyPlan(
        private=True, noise_multiplier=noise_multiplier, sampling_rate=1.0, clipping_norm=sensitivity,
        expected_batch_size=0.0, steps=0, reserved_steps=0, delta=delta,
        warm_start_noise_multiplier=noise_multiplier, unit=unit, sites=1,
    )  # fmt: skip


def as_spent(plan: PrivacyPlan, steps: int, *, unsampled: bool = True) -> Spent:
    return Spent(
        plan.sampling_rate, plan.noise_multiplier, steps, plan.warm_start_noise_multiplier if unsampled else None
    )


def fits(price: Price, reserved: Sequence[Price], lifetime: Lifetime) -> bool:
    """Whether the run and all that was reserved before stay within the lifetime; sums are exact."""
    if lifetime.order is not None:
        # A fraction of 1e-12 stands for the rounding of the divergences themselves.
        cut = _exact_sum([p.overflow for p in (*reserved, price)])
        if cut is None or cut > Fraction(repr(RENYI_OVERFLOW)) * Fraction(repr(lifetime.delta)):
            return False
        total = _exact_sum([p.renyi or 0.0 for p in (*reserved, price)])
        return total is not None and total <= Fraction(lifetime.renyi_budget * (1 - 1e-12))
    epsilon = _exact_sum([p.epsilon for p in (*reserved, price)])
    delta = _exact_sum([p.delta for p in (*reserved, price)])
    if epsilon is None:
        return math.isinf(lifetime.max_epsilon)
    within = math.isinf(lifetime.max_epsilon) or epsilon <= Fraction(repr(lifetime.max_epsilon))
    return within and delta is not None and delta <= Fraction(repr(lifetime.delta))


@dataclass(frozen=True)
class Left:
    """What a further run may still cost. With the Renyi filter: a run that uses up what is left by itself."""

    epsilon: float
    delta: float

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:.3g} at delta {self.delta:.1e}"


def what_is_left(reserved: Sequence[Price], lifetime: Lifetime) -> Left:
    if lifetime.order is not None:
        budget = lifetime.renyi_budget
        left = max(0.0, budget - math.fsum(p.renyi or 0.0 for p in reserved))
        whole = lifetime.max_epsilon - budget
        return Left(left + whole if left > 0 else 0.0, lifetime.delta)
    if not reserved or math.isinf(lifetime.max_epsilon):
        return Left(lifetime.max_epsilon, lifetime.delta)
    epsilon = lifetime.max_epsilon - math.fsum(p.epsilon for p in reserved)
    return Left(max(0.0, epsilon), max(0.0, lifetime.delta - math.fsum(p.delta for p in reserved)))


def steps_that_fit(price: Price, reserved: Sequence[Price], lifetime: Lifetime) -> int:
    """How many steps of the same plan would still fit, by the price's own rows; 0 when none does."""
    if lifetime.order is not None:
        return 0  # rows are epsilons; a divergence of fewer steps is another plan's
    left = what_is_left(reserved, lifetime)
    if price.delta > left.delta:
        return 0
    place = bisect_right(price.rows, left.epsilon, key=lambda row: max(row[1:3]))
    return price.rows[place - 1][0] if place else 0


@lru_cache(maxsize=64)
def _even_delta(plan: PrivacyPlan, lifetime: Lifetime, kept: float) -> float:
    """The delta at which the run takes the same share of the lifetime's delta as of its epsilon."""

    def epsilon_at(delta: float) -> float:
        return estimated_epsilon(
            sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=plan.reserved_steps,
            delta=max(delta * kept, SMALLEST_DELTA), warm_start_noise_multiplier=plan.warm_start_noise_multiplier,
        )  # fmt: skip

    if math.isinf(lifetime.max_epsilon):
        return min(plan.delta, lifetime.delta)
    if plan.delta <= lifetime.delta:
        of_delta, of_epsilon = plan.delta / lifetime.delta, epsilon_at(plan.delta) / lifetime.max_epsilon
        if of_epsilon <= 1 and abs(of_delta - of_epsilon) <= EVEN_ENOUGH:
            return plan.delta
    low, high = math.log(max(SMALLEST_DELTA / lifetime.delta, 1e-6)), 0.0
    if epsilon_at(lifetime.delta) >= lifetime.max_epsilon:
        return lifetime.delta  # it does not fit in any way
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        if epsilon_at(math.exp(middle) * lifetime.delta) > math.exp(middle) * lifetime.max_epsilon:
            low = middle
        else:
            high = middle
        if high - low < 1e-3:
            break
    return float(f"{math.exp(high) * lifetime.delta:.3g}")


def _exact_sum(values: Sequence[float]) -> Fraction | None:
    """Of the decimals as they are written, so that ten times 0.1 is 1; `None` when one is infinite."""
    if any(math.isinf(value) for value in values):
        return None
    return sum((Fraction(repr(float(value))) for value in values), Fraction())
