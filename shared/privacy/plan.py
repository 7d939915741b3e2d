"""The privacy of a whole run, fixed before its first release: sigma, what it is charged against, what it costs.

Everything here follows from the public run config; sigma is derived, no field lets a person type it or a
sensitivity. The server and every site derive the same plan from the same config.
Not here: whether a site agrees (its ceiling), and who counts the steps that were really started.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import scipy

from shared.config import RunConfig
from shared.errors import PrivacyError
from shared.privacy.accounting import (
    EpsilonReport,
    EpsilonTable,
    analytic_gaussian_noise_multiplier,
    estimated_epsilon,
    spent_epsilon,
)
from shared.privacy.arithmetic import ARITHMETIC_SLACK, LARGEST_SUM

LARGEST_NOISE_MULTIPLIER = 1000.0
SMALLEST_NOISE_MULTIPLIER = 0.2  # below it the accountants lose their footing, and no target epsilon needs it
LATTICE_BITS = 24

_CALIBRATION = threading.Lock()


@dataclass(frozen=True)
class PrivacyPlan:
    """What one site releases in a run, and at what noise. Public.

    Attributes:
        noise_multiplier: noise std over `sensitivity`, of a step; 0.0 only when `private` is False.
        sampling_rate: Poisson rate q of a step.
        expected_batch_size: records of all sites in a step, in expectation: the public divisor.
        steps: rounds x local steps. `reserved_steps` adds the slack for retries; sigma pays for them.
        warm_start_noise_multiplier: of the one moment release; `None` without warm start.
    """

    private: bool
    noise_multiplier: float
    sampling_rate: float
    clipping_norm: float
    expected_batch_size: float
    steps: int
    reserved_steps: int
    delta: float
    warm_start_noise_multiplier: float | None
    unit: str
    sites: int

    @property
    def lattice(self) -> float:
        """Spacing of the public grid that releases are rounded to: a power of two, about C * 2**-24."""
        return 2.0 ** (math.floor(math.log2(self.clipping_norm)) - LATTICE_BITS)

    def sensitivity(self, num_parameters: int) -> float:
        """How far one record moves a clipped sum on the lattice, L2: C (1 + eta), eta of `arithmetic`, and the lattice.

        Rounding moves each of two neighbouring sums by at most half a spacing a coordinate.
        """
        return self.clipping_norm * (1 + ARITHMETIC_SLACK) + math.sqrt(num_parameters) * self.lattice

    def spent(self, steps: int, *, warm_start: bool, exact: bool = False) -> EpsilonReport:
        """Epsilon of one site after `steps` charged steps; the whole federation's is the same.

        A look-up after the first call, which takes one to three seconds. It is exact at `steps` and
        `reserved_steps`; in between it answers for up to a sixteenth of the run more (`EpsilonReport.steps`).

        Args:
            warm_start: whether the moments were released.
            exact: price exactly `steps`, in about a second.
        """
        assert warm_start is False or not self.private or self.warm_start_noise_multiplier is not None
        if not self.private:
            return EpsilonReport.no_privacy(delta=self.delta, steps=steps, unit=self.unit)
        if exact or steps > self.reserved_steps:
            return spent_epsilon(
                sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=steps,
                delta=self.delta, unit=self.unit,
                warm_start_noise_multiplier=self.warm_start_noise_multiplier if warm_start else None,
            )  # fmt: skip
        return epsilon_table(self, warm_start).at(steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for reports; `from_dict` reads it back."""
        return {**asdict(self), "lattice": self.lattice}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        return cls(**{name: value for name, value in values.items() if name != "lattice"})


def make_plan(config: RunConfig) -> PrivacyPlan:
    """Derives the plan; a second or two where sigma is new to this process.

    Raises:
        PrivacyError: delta is not below 1 / records of a site, no sigma up to 1000 reaches the epsilon, or a site
            draws more records in a step than eta is derived for.
    """
    privacy, federation = config.privacy, config.federation
    if config.expected_batch_size / federation.sites > LARGEST_SUM / 2:  # a draw is never twice its expectation
        raise PrivacyError(
            f"a site would draw {config.expected_batch_size / federation.sites:.0f} records in a step; the rounding of"
            f" sums is bounded up to {LARGEST_SUM // 2}",
            hint="lower privacy.sampling-rate, or spread the records over more sites",
        )
    plan = plan_without_noise(config)
    noise_multiplier, warm_start = 0.0, None
    if plan.private:
        per_site = federation.published_records / federation.sites
        if privacy.delta * per_site >= 1:
            raise PrivacyError(
                f"delta {privacy.delta:.0e} is not below 1 / {per_site:.0f}, the published records of a site:"
                " it would allow that a record is simply shown",
                hint=f"set privacy.delta to {_power_of_ten_below(1 / per_site):.0e} or less",
            )
        share = config.warm_start.epsilon_share if config.warm_start.enabled else 0.0
        with _CALIBRATION:  # sites of one process ask at the same time; one of them computes
            noise_multiplier, warm_start = _calibrated(
                privacy.sampling_rate, plan.reserved_steps, privacy.target_epsilon, privacy.delta, share
            )
    return replace(plan, noise_multiplier=noise_multiplier, warm_start_noise_multiplier=warm_start)


def plan_without_noise(config: RunConfig) -> PrivacyPlan:
    """All of a plan that needs no accountant: equal in every release, whatever its accountants compute."""
    privacy, federation = config.privacy, config.federation
    steps = federation.rounds * federation.local_steps
    return PrivacyPlan(
        private=privacy.name == "dp-sgd",
        noise_multiplier=0.0,
        sampling_rate=privacy.sampling_rate,
        clipping_norm=privacy.clipping_norm,
        expected_batch_size=config.expected_batch_size,
        steps=steps,
        reserved_steps=steps + privacy.retry_slack * federation.local_steps,
        delta=privacy.delta,
        warm_start_noise_multiplier=None,
        unit=privacy.unit,
        sites=federation.sites,
    )


@lru_cache(maxsize=64)
def _calibrated(
    sampling_rate: float, steps: int, target: float, delta: float, warm_start_share: float
) -> tuple[float, float | None]:  # fmt: skip
    """The smallest noise multipliers, of a step and of the warm start, whose composition stays within `target`."""
    warm_start = None
    if warm_start_share:
        warm_start = _rounded_up(analytic_gaussian_noise_multiplier(target * warm_start_share, delta))
        if warm_start > LARGEST_NOISE_MULTIPLIER:
            raise PrivacyError(
                f"the warm start's share, epsilon {target * warm_start_share:.2g}, needs a noise multiplier"
                f" above {LARGEST_NOISE_MULTIPLIER:g}: nothing would be left of the moments",
                hint="raise warm-start.epsilon-share or privacy.target-epsilon, or set warm-start.enabled = false",
            )
    guess = _central_limit_guess(sampling_rate, steps, target, delta)
    aim = target
    for _ in range(4):
        # Search with the quick estimate, then let both accountants price what was found.
        found = min(_rounded_up(_solve(sampling_rate, steps, delta, warm_start, aim, guess)), LARGEST_NOISE_MULTIPLIER)
        spent = spent_epsilon(
            sampling_rate=sampling_rate, noise_multiplier=found, steps=steps, delta=delta,
            warm_start_noise_multiplier=warm_start,
        )  # fmt: skip
        if spent.epsilon <= target:
            return found, warm_start
        if found == LARGEST_NOISE_MULTIPLIER:
            break
        aim, guess = aim * target / spent.epsilon * (1 - 1e-4), found
    raise PrivacyError(
        f"no noise multiplier up to {LARGEST_NOISE_MULTIPLIER:g} reaches epsilon {target:g} in {steps} steps;"
        f" the smallest that was reached is {spent.epsilon:.2g}",
        hint="raise privacy.target-epsilon, or lower privacy.sampling-rate or federation.rounds",
    )


def _solve(
    sampling_rate: float, steps: int, delta: float, warm_start: float | None, target: float, guess: float
) -> float:  # fmt: skip
    """The noise multiplier at which the estimate gives `target`, from above within 1e-4 of it."""

    def excess(log_noise_multiplier: float) -> float:
        spent = estimated_epsilon(
            sampling_rate=sampling_rate, noise_multiplier=math.exp(log_noise_multiplier), steps=steps, delta=delta,
            warm_start_noise_multiplier=warm_start,
        )  # fmt: skip
        return math.log(max(spent, 1e-12) / target)

    lowest, highest = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    at = min(max(math.log(guess), lowest), highest)
    here = excess(at)
    while True:
        # Epsilon falls at least as fast as 1 / sigma does: the next bracket lies a little beyond that.
        beyond = min(max(at + math.copysign(min(1.2 * abs(here) + 0.02, 1.0), here), lowest), highest)
        there = excess(beyond) if beyond != at else here
        if here * there <= 0:
            break
        if beyond == at:
            return math.exp(at)
        at, here = beyond, there
    low, high = sorted([at, beyond])
    root = float(scipy.optimize.brentq(excess, low, high, xtol=5e-5))
    return math.exp(min(root + 5e-5, high))


def _central_limit_guess(sampling_rate: float, steps: int, target: float, delta: float) -> float:
    """Where the search starts, nothing more: the central limit theorem is no bound (Bu et al. 2020)."""
    mu = 1 / analytic_gaussian_noise_multiplier(target, delta)
    return 1 / math.sqrt(math.log1p(mu**2 / (steps * sampling_rate**2)))


def _rounded_up(noise_multiplier: float) -> float:
    """To four digits after the point: what is printed is what is used, and machines agree."""
    return math.ceil(noise_multiplier * 1e4) / 1e4


def _power_of_ten_below(bound: float) -> float:
    power = 10.0 ** math.floor(math.log10(bound))
    return power if power < bound else power / 10


@lru_cache(maxsize=8)
def epsilon_table(plan: PrivacyPlan, warm_start: bool) -> EpsilonTable:
    return EpsilonTable(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier,
        exact_at=(plan.steps, plan.reserved_steps), delta=plan.delta, unit=plan.unit,
        warm_start_noise_multiplier=plan.warm_start_noise_multiplier if warm_start else None,
    )  # fmt: skip
