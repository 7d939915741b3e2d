"""What a run of noised releases costs: epsilon by PRV and by PLD, the larger counts, RDP beside them.

Priced is one site's run: Poisson-subsampled Gaussian steps of fixed q and sigma, and at most one unsampled
Gaussian release before them (the warm start). Adding and removing a record are composed separately. An
accountant that fails is replaced by a looser bound and the report says so; no approximation ever counts.
Across runs, whose parameters the server chooses after it saw outputs, `composed_epsilon` tells what is known
afterwards and `renyi_cost` what a Renyi filter adds up; whether a release is allowed is `shared.privacy.budget`'s.
Not here: the choice of sigma (`shared.privacy.plan`).
"""

from __future__ import annotations

import math
import threading
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # its parts load where they are first used: whoever draws pictures prices nothing

from shared.errors import PrivacyError

ADJACENCY = "add/remove"
# Below this the rounding of the Fourier transforms, about 1e-13 in all, is no longer small beside delta.
SMALLEST_DELTA = 1e-11
PLD_INTERVAL = 1e-4  # 1e-3 is looser than RDP for many tiny steps
PRV_EPSILON_ERROR = 0.01
PRV_POINTS = 2**21  # 16 MiB an array
SEARCH_POINTS = 2**18
TABLE_POINTS = 16

# Opacus's orders and a few larger ones, which small epsilons need.
ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 72, 80, 96, 128, 192, 256, 512], dtype=float)

# warnings.catch_warnings changes the whole process.
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class EpsilonReport:
    """Epsilon of one site's releases so far, with all that gives the number a meaning.

    Attributes:
        prv, pld, rdp: upper bounds on epsilon by each accountant; infinite without privacy.
        delta: of (epsilon, delta).
        steps: the subsampled steps that are priced; a table may answer for a few more than were asked.
        unit: what is added or removed ("example": an image with all its captions; "subject": all images of one).
        fallback: empty, or which accountant failed and which looser bound stands in its place.
    """

    prv: float
    pld: float
    rdp: float
    delta: float
    steps: int
    unit: str = "example"
    adjacency: str = ADJACENCY
    fallback: str = ""

    @property
    def epsilon(self) -> float:
        return max(self.prv, self.pld)

    def to_dict(self) -> dict[str, Any]:
        return {"epsilon": self.epsilon, **asdict(self)}

    def __str__(self) -> str:
        loose = f"; {self.fallback}" if self.fallback else ""
        return f"epsilon = {self.epsilon:.3g} (delta {self.delta:.0e}, {self.adjacency} one {self.unit}{loose})"

    @classmethod
    def no_privacy(cls, *, delta: float, steps: int, unit: str = "example") -> EpsilonReport:
        return cls(math.inf, math.inf, math.inf, delta, steps, unit)


def spent_epsilon(
    *, sampling_rate: float, noise_multiplier: float, steps: int, delta: float,
    warm_start_noise_multiplier: float | None = None, unit: str = "example",
) -> EpsilonReport:  # fmt: skip
    """Epsilon of `steps` subsampled steps and, where given, one unsampled release before them.

    Args:
        sampling_rate: Poisson rate q in (0, 1]; 1 is priced as the analytic Gaussian.
        noise_multiplier: noise std over sensitivity of a step, > 0.
        warm_start_noise_multiplier: the same of the unsampled release; `None` when there was none.
    Raises:
        PrivacyError: a noise multiplier that is not above 0, or q or delta out of range.
    """
    return epsilon_curve(
        sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=[steps], delta=delta,
        warm_start_noise_multiplier=warm_start_noise_multiplier, unit=unit,
    )[0]  # fmt: skip


def epsilon_curve(
    *, sampling_rate: float, noise_multiplier: float, steps: Sequence[int], delta: float,
    warm_start_noise_multiplier: float | None = None, unit: str = "example",
) -> list[EpsilonReport]:  # fmt: skip
    """`spent_epsilon` after each of the ascending counts `steps`, for little more than the cost of the last."""
    releases = _Releases(sampling_rate, noise_multiplier, _mu(warm_start_noise_multiplier))
    releases.check(delta, steps)
    sampled = [count for count in steps if count > 0 and sampling_rate < 1]
    pld, pld_fallback = _first_that_answers("PLD", _pld_curve, releases, sampled, delta)
    prv, prv_fallback = _first_that_answers("PRV", _prv_curve, releases, sampled, delta)
    rdp, rdp_fallback = _first_that_answers("RDP", _rdp_curve, releases, steps, delta)
    unsampled = len(steps) - len(sampled)  # 0 steps come first; with q = 1 it is all of them
    exact = [analytic_gaussian_epsilon(releases.mu_without_sampling(count), delta) for count in steps[:unsampled]]
    fallback = "; ".join(filter(None, [pld_fallback, prv_fallback, rdp_fallback]))
    return [
        EpsilonReport(p, q, r, delta, count, unit, ADJACENCY, fallback)
        for p, q, r, count in zip([*exact, *prv], [*exact, *pld], rdp, steps, strict=True)
    ]


def estimated_epsilon(
    *, sampling_rate: float, noise_multiplier: float, steps: int, delta: float,
    warm_start_noise_multiplier: float | None = None,
) -> float:  # fmt: skip
    """Close to `spent_epsilon(...).epsilon` and many times quicker; no bound, so only a search may use it."""
    releases = _Releases(sampling_rate, noise_multiplier, _mu(warm_start_noise_multiplier))
    releases.check(delta, [steps])
    if sampling_rate == 1 or steps == 0:
        return analytic_gaussian_epsilon(releases.mu_without_sampling(steps), delta)
    return _first_that_answers("PRV", _prv_estimate, releases, [steps], delta)[0][0]


class EpsilonTable:
    """Epsilon after any number of steps of one run: computed once, then a look-up.

    `at(steps)` answers for the next tabulated number of steps, which is a bound since epsilon never falls
    as steps are added; it is exact at `exact_at`. Costs 1 to 3 seconds to make.
    """

    def __init__(
        self, *, sampling_rate: float, noise_multiplier: float, exact_at: Sequence[int], delta: float,
        warm_start_noise_multiplier: float | None = None, unit: str = "example",
    ) -> None:  # fmt: skip
        largest = max(exact_at)
        stride = -(-largest // TABLE_POINTS)
        self._steps: list[int] = sorted({0, *range(stride, largest, max(stride, 1)), *exact_at})
        self._reports = epsilon_curve(
            sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=self._steps, delta=delta,
            warm_start_noise_multiplier=warm_start_noise_multiplier, unit=unit,
        )  # fmt: skip

    @property
    def reports(self) -> list[EpsilonReport]:
        return list(self._reports)

    @property
    def largest(self) -> int:
        return self._steps[-1]

    def at(self, steps: int) -> EpsilonReport:
        assert 0 <= steps <= self.largest, f"{steps} steps, the table ends at {self.largest}"
        return self._reports[bisect_left(self._steps, steps)]


@dataclass(frozen=True)
class Spent:
    """Releases of one run that were charged: `steps` subsampled ones, and at most one unsampled."""

    sampling_rate: float
    noise_multiplier: float
    steps: int
    unsampled_noise_multiplier: float | None = None


def composed_epsilon(history: Sequence[Spent], *, delta: float) -> EpsilonReport:
    """Epsilon of several runs together, as if all their parameters had been fixed beforehand.

    They were not: the server chose each run after it saw the last one's releases. So this figure is told and never
    admits anything (Rogers et al. 2016, https://arxiv.org/abs/1605.08294). PRV is not computed over several
    runs: its field holds PLD's value.
    """
    parts = [part for part in history if part.steps or part.unsampled_noise_multiplier]
    steps = sum(part.steps for part in parts)
    if not parts:
        return EpsilonReport(0.0, 0.0, 0.0, delta, 0)
    if any(part.noise_multiplier == 0 for part in parts):
        return EpsilonReport.no_privacy(delta=delta, steps=steps)
    for part in parts:
        _Releases(part.sampling_rate, part.noise_multiplier, 0.0).check(delta, [part.steps])
    rdp = _converted(np.sum([_rdp_of(part, ORDERS) for part in parts], axis=0), delta)
    try:
        pld, fallback = _composed_pld(parts, delta, about=rdp), ""
    except Exception as error:  # whatever an accountant raises, the figure must not be lost
        pld, fallback = rdp, f"PLD failed ({type(error).__name__}: {error}), RDP stands in"
    return EpsilonReport(pld, pld, rdp, delta, steps, fallback=fallback)


def renyi_cost(spent: Spent, *, order: float) -> float:
    """Renyi divergence of order `order` between the releases of neighbours, at most; adds up over adaptive runs."""
    return float(_rdp_of(spent, np.array([order]))[0])


def renyi_budget(epsilon: float, delta: float, *, order: float) -> float:
    """Divergence of order `order` that still is (`epsilon`, `delta`): inverse of Balle et al. 2020, theorem 21."""
    return float(epsilon - _conversion(np.array([order]), delta)[0])


def best_renyi_order(epsilon: float, delta: float) -> float:
    """The order, to a tenth, at which a budget of (`epsilon`, `delta`) admits the most Gaussian releases."""
    log = math.log(1 / delta)
    return round(1 + math.sqrt(log) / (math.sqrt(log + epsilon) - math.sqrt(log)), 1)


def analytic_gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact epsilon of an unsampled Gaussian mechanism whose sensitivity is `mu` standard deviations.

    Source: Balle & Wang 2018, theorem 8, https://arxiv.org/abs/1805.06530.
    """
    if mu == 0:
        return 0.0

    def excess(epsilon: float) -> float:
        at, below = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(scipy.special.ndtr(at) - np.exp(epsilon + scipy.special.log_ndtr(below)) - delta)

    if excess(0.0) <= 0:
        return 0.0
    # Zero-concentrated privacy always bounds it: Bun & Steinke 2016, https://arxiv.org/abs/1605.02065.
    above = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    tolerance = 1e-12 * max(above, 1.0)
    return float(scipy.optimize.brentq(excess, 0.0, above, xtol=tolerance)) + tolerance


def analytic_gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """The smallest noise multiplier of one unsampled release that costs at most `epsilon`."""
    low, high = 0.0, 1.0
    while analytic_gaussian_epsilon(high, delta) < epsilon:
        low, high = high, 2 * high
    mu = scipy.optimize.brentq(
        lambda x: analytic_gaussian_epsilon(x, delta) - epsilon, low, high, xtol=1e-12, rtol=1e-10
    )
    return float((1 + 1e-9) / mu)


@dataclass(frozen=True)
class _Releases:
    """Subsampled steps, and one Gaussian release beside them with sensitivity `mu` in standard deviations."""

    sampling_rate: float
    noise_multiplier: float
    mu: float

    def check(self, delta: float, steps: Sequence[int]) -> None:
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise PrivacyError(
                f"noise multiplier {self.noise_multiplier:g} gives no privacy",
                hint="it is derived from privacy.target-epsilon; for no privacy write privacy.name = 'none'",
            )
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(f"sampling rate {self.sampling_rate:g} is not above 0 and at most 1")
        if not 0 < delta < 1:
            raise PrivacyError(f"delta {delta:g} is not between 0 and 1")
        assert list(steps) == sorted({max(0, count) for count in steps}), "step counts must ascend from 0"

    def mu_without_sampling(self, steps: int) -> float:
        """Of all releases as if every record were in every step: never less than what sampling leaves."""
        return math.hypot(math.sqrt(steps) / self.noise_multiplier, self.mu)


def _mu(noise_multiplier: float | None) -> float:
    if noise_multiplier is None:
        return 0.0
    if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
        raise PrivacyError(f"warm start noise multiplier {noise_multiplier:g} gives no privacy")
    return 1 / noise_multiplier


Curve = Callable[[_Releases, Sequence[int], float], list[float]]


def _first_that_answers(
    name: str, curve: Curve, releases: _Releases, steps: Sequence[int], delta: float
) -> tuple[list[float], str]:  # fmt: skip
    """Values of the accountant, or of the next looser bound that answers, and what to say about it."""
    if not steps:
        return [], ""
    bounds = {name: curve, "RDP": _rdp_curve, "the Gaussian mechanism without sampling": _gaussian_curve}
    reason = ""
    for bound, compute in bounds.items():
        try:
            values = compute(releases, steps, delta)
        except Exception as error:  # whatever an accountant raises, the price must not be lost
            reason = reason or f"{type(error).__name__}: {error}"
            continue
        if all(math.isfinite(value) and value >= 0 for value in values):
            return values, f"{name} failed ({reason}), {bound} stands in" if bound != name else ""
        reason = reason or "no finite answer"
    raise PrivacyError(f"no accountant can price these releases: {reason}")


def _gaussian_curve(releases: _Releases, steps: Sequence[int], delta: float) -> list[float]:
    return [analytic_gaussian_epsilon(releases.mu_without_sampling(count), delta) for count in steps]


def _pld_curve(releases: _Releases, steps: Sequence[int], delta: float) -> list[float]:
    """Pessimistic privacy loss distributions (dp-accounting's "connect the dots"), composed on a grid.

    Source: Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_delta(delta)
    # Any grid gives a bound. Finer where epsilon is small beside its rounding, coarser where memory would end.
    about = _rdp_curve(releases, steps[-1:], delta)[0]
    interval = PLD_INTERVAL * max(0.1, min(1.0, 2 * about), about / 64)
    with np.errstate(all="ignore"):
        step = _pld_of_step(releases.sampling_rate, releases.noise_multiplier, interval)
        total = pld.identity(value_discretization_interval=interval)
        if releases.mu:
            total = pld.from_gaussian_mechanism(1 / releases.mu, value_discretization_interval=interval)
        epsilons = []
        block, block_steps = None, 0
        for before, count in zip([0, *steps[:-1]], steps, strict=True):
            if block is None or count - before != block_steps:
                block_steps = count - before
                block = step.self_compose(block_steps)
            total = total.compose(block)
            epsilons.append(float(total.get_epsilon_for_delta(delta)))
    return epsilons


@lru_cache(maxsize=8)  # 1 to 2 seconds to make; a plan asks for it, then its table, its report and its ledger
def _pld_of_step(sampling_rate: float, noise_multiplier: float, interval: float) -> Any:
    """A `PrivacyLossDistribution`; nothing changes one, composing makes another."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )


def _composed_pld(parts: Sequence[Spent], delta: float, *, about: float) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_delta(delta)
    interval = PLD_INTERVAL * max(0.1, min(1.0, 2 * about), about / 64)
    with np.errstate(all="ignore"):
        total = pld.identity(value_discretization_interval=interval)
        for part in parts:
            if part.unsampled_noise_multiplier is not None:
                total = total.compose(
                    pld.from_gaussian_mechanism(
                        part.unsampled_noise_multiplier, value_discretization_interval=interval
                    )
                )
            if part.steps:
                step = _pld_of_step(part.sampling_rate, part.noise_multiplier, interval)
                total = total.compose(step.self_compose(part.steps))
        return float(total.get_epsilon_for_delta(delta))


def _prv_curve(releases: _Releases, steps: Sequence[int], delta: float) -> list[float]:
    """Privacy random variables: the upper end of the error interval."""
    return [upper for _, upper in _prv_intervals(releases, steps, delta, points=PRV_POINTS)]


def _prv_estimate(releases: _Releases, steps: Sequence[int], delta: float) -> list[float]:
    error = _nominal_error(releases, steps[-1], delta)
    return [middle + error for middle, _ in _prv_intervals(releases, steps, delta, points=SEARCH_POINTS)]


def _nominal_error(releases: _Releases, most: int, delta: float) -> float:
    return min(PRV_EPSILON_ERROR, _rdp_curve(releases, [most], delta)[0] / 200)


def _prv_intervals(
    releases: _Releases, steps: Sequence[int], delta: float, *, points: int
) -> list[tuple[float, float]]:  # fmt: skip
    """Estimate and upper bound after each count, with Opacus's machinery on a grid of at most about `points`.

    Opacus's accountant divides by zero at q = 1, so the unsampled release enters as its exact variable,
    a normal one. Source: Gopi et al. 2021, https://arxiv.org/abs/2106.02848.
    """
    from opacus.accountants.analysis import prv

    _check_delta(delta)
    delta_error = delta / 1000
    most = steps[-1]
    total = most + (releases.mu > 0)
    # Remark 5.6 there, as Opacus has it: beyond `reach` neither the composition nor one release has mass.
    alone = _Releases(releases.sampling_rate, releases.noise_multiplier, 0.0)
    reach = 3 + max(
        _rdp_curve(releases, [most], delta_error / 4)[0],
        _rdp_curve(alone, [1], delta_error / (8 * total))[0],
        analytic_gaussian_epsilon(releases.mu, delta_error / (8 * total)),
    )
    spread = math.sqrt(total * math.log(12 / delta_error) / 2)
    mesh = max(_nominal_error(releases, most, delta) / spread, 2 * reach / points)
    epsilon_error = mesh * spread
    if epsilon_error > 0.5:
        raise PrivacyError(f"the error of the accountant would be {epsilon_error:.2g}")
    half = scipy.fft.next_fast_len(math.ceil(reach / mesh) + 1, real=True)
    domain = prv.Domain(-(half - 1) * mesh, half * mesh, 2 * half)
    variables = [prv.PoissonSubsampledGaussianPRV(releases.sampling_rate, releases.noise_multiplier)]
    if releases.mu:
        variables.append(_GaussianPRV(releases.mu))
    with np.errstate(all="ignore"):
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's quadrature, where a density vanishes
            discrete = [
                prv.discretize(prv.TruncatedPrivacyRandomVariable(variable, domain.t_min, domain.t_max), domain)
                for variable in variables
            ]
        intervals = []
        for count in steps:
            composed = prv.compose_heterogeneous(discrete, [count, 1][: len(discrete)])
            _, middle, upper = composed.compute_epsilon(delta, delta_error, epsilon_error)
            intervals.append((float(middle), float(upper)))
    return intervals


def _check_delta(delta: float) -> None:
    if delta < SMALLEST_DELTA:
        raise PrivacyError(f"delta {delta:.0e} is below the rounding of the accountant")


class _GaussianPRV:
    """Privacy loss of an unsampled Gaussian release: normal with mean mu^2 / 2 and standard deviation mu."""

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def cdf(self, loss: Any) -> Any:
        return scipy.special.ndtr((loss - self.mu**2 / 2) / self.mu)


def _rdp_curve(releases: _Releases, steps: Sequence[int], delta: float) -> list[float]:
    """Renyi orders added up, then the smallest epsilon over orders.

    Source: Mironov et al. 2019, https://arxiv.org/abs/1908.10530; conversion: Balle et al. 2020, theorem 21,
    https://arxiv.org/abs/1905.09982.
    """
    one_step = _rdp_of_step(releases.sampling_rate, releases.noise_multiplier, tuple(ORDERS))
    unsampled = ORDERS * releases.mu**2 / 2
    return [_converted(count * one_step + unsampled, delta) if count or releases.mu else 0.0 for count in steps]


def _rdp_of(spent: Spent, orders: np.ndarray) -> np.ndarray:
    steps = _rdp_of_step(spent.sampling_rate, spent.noise_multiplier, tuple(orders)) if spent.steps else 0.0
    unsampled = orders * _mu(spent.unsampled_noise_multiplier) ** 2 / 2
    divergence: np.ndarray = spent.steps * steps + unsampled
    return divergence


def _conversion(orders: np.ndarray, delta: float) -> np.ndarray:
    addend: np.ndarray = np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return addend


def _converted(divergences: np.ndarray, delta: float) -> float:
    """The smallest epsilon over `ORDERS`."""
    return max(0.0, float(np.min(divergences + _conversion(ORDERS, delta))))


@lru_cache(maxsize=256)
def _rdp_of_step(sampling_rate: float, noise_multiplier: float, orders: tuple[float, ...]) -> np.ndarray:
    """One value an order; one that cannot be computed is infinite, which only makes the bound looser."""
    from opacus.accountants.analysis.rdp import compute_rdp

    def at(order: float) -> float:
        try:
            return float(compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
        except (ArithmeticError, ValueError):
            return math.inf

    with np.errstate(all="ignore"):
        values = np.array([at(float(order)) for order in orders])
    return np.where(np.isnan(values), np.inf, values)
