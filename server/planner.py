"""What a run will cost and whether it can learn, before anyone joins: from public figures, no data, no models.

Noise and epsilon are those of the run itself: the same `RunConfig`, the same `make_plan`, the same accountants.
"Can learn" compares noise with signal against runs that were measured (docs/results.md); it is a rule of thumb
that knows nothing of the pictures: a plan that passes may still fail on a harder task, one far below will fail.
Not here: the command and its text (`server.plan_cli`), and how long a run takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from scipy import optimize

from shared.config import RunConfig, Scalar
from shared.errors import ConfigError
from shared.privacy.accounting import (
    ADJACENCY,
    EpsilonReport,
    analytic_gaussian_noise_multiplier,
    epsilon_curve,
    estimated_epsilon,
)
from shared.privacy.budget import Lifetime, price_run
from shared.privacy.plan import SMALLEST_NOISE_MULTIPLIER, PrivacyPlan, make_plan

LARGEST_PROPOSED_BATCH = 2048  # the rule of `simulate`: a quarter of the records, no more than these
LARGEST_BATCH = 16_384  # what a better plan may ask for: eight times the demo's work a round
MOST_ROUNDS, MOST_RECORDS = 10_000, 10**9  # where a search ends
LARGEST_EPSILON = 20.0  # nobody is asked to accept more: a larger one promises next to nothing
CURVE_ROWS = 12

# The demo, which learns well (.83 of pictures obey all four words): `simulations.scenarios.demo`, held to it by a test.
DEMO_NOISE_MULTIPLIER, DEMO_BATCH, DEMO_SITES, DEMO_STEPS = 1.515, 1960.0, 4, 470
# Limits against the demo. Measured, as (noise of a step, signal of a run) in units of the demo's: ten garments and
# ten digits (0.4, 1.5 to 1.7) good; shapes at 1,024 records a step (1.2 to 1.3, 0.78 to 0.87) .67 to .70 right; the
# demo at its round 100 (1, 0.46) .70 right, after a warm start; emoji (1.3, 0.48) no object to be told; shapes at 256
# (2.7 to 2.9, 0.27 to 0.36) .10 to .32 right; blood smears (16, 0.04) nothing.
MOST_STEP_NOISE = 2.0
LEAST_RUN_SIGNAL = 0.5
FEWEST_RECORDS_A_STEP = 300  # 256 failed
FEWEST_ROUNDS = 100  # about one generator step a round; the demo had .70 right by round 100
MARGIN = 1.005  # between the estimate of a search and the bound that derives sigma in the end

ROUNDS_DEFINITION = (
    f"at least {FEWEST_ROUNDS}, and all together carry at least {LEAST_RUN_SIGNAL:g} of the demo's signal; with more,"
    f" the noise of a step is above {MOST_STEP_NOISE:g} times the demo's"
)


@dataclass(frozen=True)
class NoiseFigures:
    """Noise of the summed release against signal; the clipping norm C drops out.

    Attributes:
        step: noise std of one coordinate of the sum, over the largest length that the sum can be expected to have,
            which is expected batch size x C: sigma sqrt(K) / (q N), K sites that each add all their noise.
        run: `sqrt(steps) / step`: signal to noise of all steps together, as if they were averaged.
    """

    step: float
    run: float


@dataclass(frozen=True)
class Warned:
    """Why this plan will fail; `code` is stable: records-a-step, step-noise, run-signal, rounds, ceiling."""

    code: str
    message: str


@dataclass(frozen=True)
class Proposal:
    """A plan that is not warned about, and what it changes: names of settings to values."""

    changes: dict[str, Scalar]
    config: RunConfig


@dataclass(frozen=True)
class Outlook:
    """Everything the planner says of one plan.

    Attributes:
        curve: (round, epsilon at its end), ascending; the last is the whole run. 0 is the warm start.
        reserved: epsilon of the run with all its slack for retries, which is what a site's ledger reserves.
        ceiling: of a site's lifetime, in epsilon; runs add up.
        rounds: fewest and most that pass (`ROUNDS_DEFINITION`); `None` when no number does.
    """

    config: RunConfig
    plan: PrivacyPlan
    curve: list[tuple[int, EpsilonReport]]
    reserved: EpsilonReport
    ceiling: float
    noise: NoiseFigures
    trusted_noise: NoiseFigures
    rounds: tuple[int, int] | None
    warnings: list[Warned]
    proposals: list[Proposal]

    @property
    def left(self) -> float:
        """Of the ceiling after the run, by addition."""
        return self.ceiling - self.reserved.epsilon

    @property
    def runs_in_ceiling(self) -> int:
        """As a site's ledger counts them: epsilon and delta add up, and each run takes its share of both."""
        price = price_run(self.plan, Lifetime(self.ceiling, self.plan.delta))
        return math.floor(min(self.ceiling / price.epsilon, self.plan.delta / price.delta) + 1e-9)

    @property
    def rows(self) -> list[tuple[int, EpsilonReport]]:
        """Of the curve: every hundredth round, or what suits a shorter or longer run; the last round."""
        rounds = self.config.federation.rounds
        stride = _stride(rounds)
        return [(at, spent) for at, spent in self.curve if at % stride == 0 or at == rounds]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the schema of `fedcanvas plan --json`."""
        federation, privacy, plan = self.config.federation, self.config.privacy, self.plan
        demo = demo_noise()
        return {
            "asked": {
                "records": federation.published_records,
                "sites": federation.sites,
                "rounds": federation.rounds,
                "local_steps": federation.local_steps,
                "epsilon": privacy.target_epsilon,
                "delta": plan.delta,
                "unit": plan.unit,
                "noise": privacy.noise,
            },
            "adjacency": ADJACENCY,
            "noise_multiplier": plan.noise_multiplier,
            "warm_start_noise_multiplier": plan.warm_start_noise_multiplier,
            "clipping_norm": plan.clipping_norm,
            "sampling_rate": plan.sampling_rate,
            "expected_batch_size": plan.expected_batch_size,
            "expected_batch_size_per_site": plan.expected_batch_size / plan.sites,
            "steps": plan.steps,
            "reserved_steps": plan.reserved_steps,
            "epsilon": [{"round": at, **spent.to_dict()} for at, spent in self.rows],
            "epsilon_reserved": self.reserved.to_dict(),
            "ceiling": {
                "epsilon": self.ceiling, "left": self.left, "runs": self.runs_in_ceiling, "delta_spent": plan.delta,
            },
            "noise": {
                "step": self.noise.step,
                "step_with_a_trusted_aggregator": self.trusted_noise.step,
                "std": self.noise.step * plan.expected_batch_size * plan.clipping_norm,
                "std_with_a_trusted_aggregator": plan.noise_multiplier * plan.clipping_norm,
                "price_of_local_noise": self.noise.step / self.trusted_noise.step,
                "run_signal": self.noise.run,
            },
            "demo": {
                "step": demo.step,
                "run_signal": demo.run,
                "step_noise_ratio": self.noise.step / demo.step,
                "run_signal_ratio": self.noise.run / demo.run,
                "most_step_noise_ratio": MOST_STEP_NOISE,
                "least_run_signal_ratio": LEAST_RUN_SIGNAL,
            },
            "rounds_that_pass": {
                "fewest": self.rounds[0] if self.rounds else None,
                "most": self.rounds[1] if self.rounds else None,
                "definition": ROUNDS_DEFINITION,
                "searched_up_to": MOST_ROUNDS,
            },
            "warnings": [{"code": warned.code, "message": warned.message} for warned in self.warnings],
            "proposals": [{"changes": proposal.changes} for proposal in self.proposals],
        }  # fmt: skip


def proposed_sampling_rate(records: int) -> float:
    """q when nobody names one, by the rule of `simulate`: a quarter of the records, at most 2,048 a step."""
    records = max(records, 1)
    return float(f"{min(records / 4, LARGEST_PROPOSED_BATCH) / records:.3g}")


def demo_noise() -> NoiseFigures:
    return _noise_figures(DEMO_NOISE_MULTIPLIER, DEMO_BATCH, DEMO_SITES, DEMO_STEPS)


def outlook(config: RunConfig, *, ceiling: float | None = None, rate_is_free: bool = False) -> Outlook:
    """Plans `config` and judges it; some seconds.

    Args:
        ceiling: lifetime epsilon of each site; the run's epsilon when not given.
        rate_is_free: the sampling rate came from `proposed_sampling_rate`, so it follows the number of records.
    Raises:
        PrivacyError: as `make_plan`.
    """
    plan = make_plan(config)
    curve, reserved = _epsilon_over_rounds(config, plan)
    noise = _noise_figures(plan.noise_multiplier, plan.expected_batch_size, _noisy_sites(config), plan.steps)
    trusted = _noise_figures(plan.noise_multiplier, plan.expected_batch_size, 1, plan.steps)
    warnings = _warnings(config, noise)
    allowed = config
    if ceiling is not None and reserved.epsilon > ceiling:
        message = f"the run reserves epsilon {reserved.epsilon:.3g}, above the ceiling {ceiling:g}: every site refuses"
        warnings.append(Warned("ceiling", message))
        allowed = config.replaced({"privacy.target-epsilon": ceiling})
    proposals = better_plans(allowed, rate_is_free=rate_is_free, ceiling=ceiling) if warnings else []
    return Outlook(
        config, plan, curve, reserved, config.privacy.target_epsilon if ceiling is None else ceiling, noise, trusted,
        _rounds_that_pass(config), warnings, [Proposal(_difference(config, better), better) for better in proposals],
    )  # fmt: skip


# ---- what it costs


def _epsilon_over_rounds(
    config: RunConfig, plan: PrivacyPlan
) -> tuple[list[tuple[int, EpsilonReport]], EpsilonReport]:  # fmt: skip
    """One curve for the table, the figure and what is reserved: many points cost little more than one."""
    rounds, local_steps = config.federation.rounds, config.federation.local_steps
    stride = _stride(rounds)
    bent = {stride // 16, stride // 4, stride // 2}  # epsilon rises steeply at first: for a figure
    at = sorted({0, *bent, *range(0, rounds, stride), rounds})
    if plan.warm_start_noise_multiplier is None:
        at = at[1:]
    counts = [server_round * local_steps for server_round in at]
    priced = epsilon_curve(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier,
        steps=sorted({*counts, plan.reserved_steps}), delta=plan.delta,
        warm_start_noise_multiplier=plan.warm_start_noise_multiplier, unit=plan.unit,
    )  # fmt: skip
    by_steps = {report.steps: report for report in priced}
    return [(r, by_steps[count]) for r, count in zip(at, counts, strict=True)], by_steps[plan.reserved_steps]


def _stride(rounds: int) -> int:
    """Rounds from row to row: 100, less where that gives under three rows, more where it gives over twelve."""
    if rounds < 300:
        return next(step for step in (50, 20, 10, 5, 2, 1) if rounds >= 3 * step or step == 1)
    step = 100
    while rounds > CURVE_ROWS * step:
        step *= 5 if str(step)[0] == "1" else 2
    return step


# ---- whether it can learn


def _noise_figures(noise_multiplier: float, expected_batch_size: float, sites: int, steps: int) -> NoiseFigures:
    step = noise_multiplier * math.sqrt(sites) / expected_batch_size
    return NoiseFigures(step, math.sqrt(steps) / step)


def _noisy_sites(config: RunConfig) -> int:
    """How many times the noise of one trusted aggregator is in the sum, as a variance."""
    return config.federation.sites if config.privacy.noise == "local" else 1


def _warnings(config: RunConfig, noise: NoiseFigures) -> list[Warned]:
    demo, batch, rounds = demo_noise(), config.expected_batch_size, config.federation.rounds
    found = []
    if batch < FEWEST_RECORDS_A_STEP:
        message = f"{batch:.0f} records a step over all sites: runs at 256 (shapes) and 180 (smears) failed"
        found.append(Warned("records-a-step", message))
    if noise.step > MOST_STEP_NOISE * demo.step:
        ratio = noise.step / demo.step
        message = f"the noise of a step is {ratio:.3g} times the demo's: runs at 2.7 times (shapes) failed"
        found.append(Warned("step-noise", message))
    if noise.run < LEAST_RUN_SIGNAL * demo.run:
        ratio = noise.run / demo.run
        message = f"all rounds carry {ratio:.2g} of the demo's signal: runs at 0.35 (shapes) and 0.47 (emoji) failed"
        found.append(Warned("run-signal", message))
    if rounds < FEWEST_ROUNDS:
        message = (
            f"{rounds} rounds: the generator takes about one step a round, and fewer than {FEWEST_ROUNDS} are too few"
        )
        found.append(Warned("rounds", message))
    return found


# ---- what would do better


def _largest_noise_multiplier(config: RunConfig) -> float:
    """The sigma at which the plan just is not warned about."""
    demo, steps = demo_noise(), config.federation.rounds * config.federation.local_steps
    most_noise = min(MOST_STEP_NOISE * demo.step, math.sqrt(steps) / (LEAST_RUN_SIGNAL * demo.run))
    return most_noise * config.expected_batch_size / math.sqrt(_noisy_sites(config)) / MARGIN


def _excess(config: RunConfig) -> float:
    """Log of what the run costs at the largest bearable noise, over its target: not above 0 when the plan passes."""
    privacy, federation = config.privacy, config.federation
    noise_multiplier = _largest_noise_multiplier(config)
    if noise_multiplier < SMALLEST_NOISE_MULTIPLIER:
        return 10.0 + math.log(SMALLEST_NOISE_MULTIPLIER / noise_multiplier)
    warm_start = None
    if config.warm_start.enabled:
        share = config.warm_start.epsilon_share * privacy.target_epsilon
        warm_start = analytic_gaussian_noise_multiplier(share, privacy.delta)
    steps = (federation.rounds + privacy.retry_slack) * federation.local_steps
    spent = _estimated(privacy.sampling_rate, noise_multiplier, steps, privacy.delta, warm_start)
    return math.log(max(spent, 1e-12) / privacy.target_epsilon)


@lru_cache(maxsize=256)
def _estimated(rate: float, noise_multiplier: float, steps: int, delta: float, warm_start: float | None) -> float:
    return estimated_epsilon(
        sampling_rate=rate, noise_multiplier=noise_multiplier, steps=steps, delta=delta,
        warm_start_noise_multiplier=warm_start,
    )  # fmt: skip


def _crossing(at: Callable[[float], RunConfig], failing: float, passing: float) -> float | None:
    """Where between `failing` and `passing` the plan begins to pass, on the passing side; `None` if it never does.

    The excess is monotone in between. One estimate costs some 0.1 s, so they are few: from the passing end in steps
    as long as epsilon's growth with the square root of the rounds suggests, until a bracket is found.
    """

    def excess(log_value: float) -> float:
        return _excess(at(math.exp(log_value)))

    end, passes = math.log(failing), math.log(passing)
    if (here := excess(passes)) > 0:
        return None
    direction = math.copysign(1.0, end - passes)
    while passes != end:
        step = min(max(-2.2 * here, 0.1), abs(end - passes))
        there = passes + direction * step if step < abs(end - passes) else end
        if (beyond := excess(there)) > 0:
            root = float(optimize.brentq(excess, passes, there, xtol=3e-3))
            return math.exp(root - direction * 3e-3)
        passes, here = there, beyond
    return failing


def _rounds_that_pass(config: RunConfig) -> tuple[int, int] | None:
    """Fewest and most. With more rounds signal grows towards a limit, and the noise of a step grows without one."""
    if config.expected_batch_size < FEWEST_RECORDS_A_STEP:
        return None

    def at(rounds: float) -> RunConfig:
        return config.replaced({"federation.rounds": round(rounds)})

    best = _best_rounds(config)
    fewest = _crossing(at, FEWEST_ROUNDS, best)
    if fewest is None:
        return None
    most = _crossing(at, MOST_ROUNDS, best)
    assert most is not None
    return math.ceil(fewest), max(math.floor(most), math.ceil(fewest))


def _best_rounds(config: RunConfig) -> int:
    """Where both limits bind at once: what no q lets pass at this number of rounds, none passes."""
    demo = demo_noise()
    balanced = (MOST_STEP_NOISE * demo.step * LEAST_RUN_SIGNAL * demo.run) ** 2 / config.federation.local_steps
    return max(FEWEST_ROUNDS, round(balanced))


def better_plans(config: RunConfig, *, rate_is_free: bool, ceiling: float | None) -> list[RunConfig]:
    """The smallest changes that pass: of what costs only time, or else of what costs data or privacy."""
    if _passes(config):
        return [config]
    enough: dict[str, Scalar] = {"federation.rounds": max(config.federation.rounds, FEWEST_ROUNDS)}
    best: dict[str, Scalar] = {"federation.rounds": _best_rounds(config)}
    found = [_other_rounds(config), _larger_rate(config, enough)]
    if not any(found):
        found = [_larger_rate(config, best)]
    if not any(found):
        found = [_more_records(config, enough, rate_is_free=rate_is_free)]
        # At the largest rate and the best number of rounds: where that fails, no epsilon up to the limit will do.
        largest = min(1.0, LARGEST_BATCH / config.federation.published_records)
        found.append(
            _larger_epsilon(config, enough, ceiling=ceiling)
            or _larger_epsilon(config, {**best, "privacy.sampling-rate": largest}, ceiling=ceiling)
        )
    different: list[RunConfig] = []
    for better in found:
        if better is not None and better not in different:
            different.append(better)
    return different


def _other_rounds(config: RunConfig) -> RunConfig | None:
    rounds = _rounds_that_pass(config)
    if rounds is None:
        return None
    asked = config.federation.rounds
    nearest = _two_digits(rounds[0], up=True) if asked < rounds[0] else _two_digits(rounds[1], up=False)
    if not rounds[0] <= nearest <= rounds[1]:
        nearest = min(max(asked, rounds[0]), rounds[1])
    return _checked(config, {"federation.rounds": nearest})


def _larger_rate(config: RunConfig, changes: dict[str, Scalar]) -> RunConfig | None:
    records, rate = config.federation.published_records, config.privacy.sampling_rate
    lowest = min(1.0, max(rate, FEWEST_RECORDS_A_STEP / records))
    highest = min(1.0, LARGEST_BATCH / records)
    if highest < lowest or lowest * records < FEWEST_RECORDS_A_STEP:
        return None
    found = _crossing(lambda q: config.replaced({**changes, "privacy.sampling-rate": q}), lowest, highest)
    if found is None:
        return None
    return _checked(config, {**changes, "privacy.sampling-rate": min(1.0, _rounded_up(found, digits=3))})


def _more_records(config: RunConfig, changes: dict[str, Scalar], *, rate_is_free: bool) -> RunConfig | None:
    records, privacy, sites = config.federation.published_records, config.privacy, config.federation.sites

    def of(records: float) -> dict[str, Scalar]:
        # Delta has to stay below 1 / records of a site.
        delta = privacy.delta
        while delta * records >= 0.99 * sites:
            delta /= 10
        free = min(records / 4, LARGEST_PROPOSED_BATCH) / records
        return {
            **changes, "federation.published-records": round(records), "privacy.delta": float(f"{delta:.6g}"),
            "privacy.sampling-rate": free if rate_is_free else privacy.sampling_rate,
        }  # fmt: skip

    fewest = max(records, FEWEST_RECORDS_A_STEP * (4 if rate_is_free else 1 / privacy.sampling_rate))
    found, most = None, 2 * fewest
    while found is None and most < MOST_RECORDS:
        found = _crossing(lambda count: config.replaced(of(count)), fewest, most)
        fewest, most = most, 4 * most
    if found is None:
        return None
    asked = of(count := _two_digits(math.ceil(found), up=True))
    if rate_is_free:
        asked["privacy.sampling-rate"] = proposed_sampling_rate(count)
    return _checked(config, asked)


def _larger_epsilon(config: RunConfig, changes: dict[str, Scalar], *, ceiling: float | None) -> RunConfig | None:
    highest = LARGEST_EPSILON if ceiling is None else min(LARGEST_EPSILON, ceiling)
    if highest <= config.privacy.target_epsilon:
        return None
    found = _crossing(
        lambda epsilon: config.replaced({**changes, "privacy.target-epsilon": epsilon}),
        config.privacy.target_epsilon, highest,
    )  # fmt: skip
    if found is None:
        return None
    return _checked(config, {**changes, "privacy.target-epsilon": min(highest, _rounded_up(found, digits=2))})


def _checked(config: RunConfig, changes: dict[str, Scalar]) -> RunConfig | None:
    """`None` when rounding its figures lost what the search had found."""
    try:
        better = config.replaced(changes)
    except ConfigError:
        return None
    return better if _passes(better) else None


def _passes(config: RunConfig) -> bool:
    enough = config.expected_batch_size >= FEWEST_RECORDS_A_STEP and config.federation.rounds >= FEWEST_ROUNDS
    return enough and _excess(config) <= 0


def _difference(before: RunConfig, after: RunConfig) -> dict[str, Scalar]:
    flat = before.to_flat()
    return {name: value for name, value in after.to_flat().items() if flat.get(name) != value}


def _rounded_up(value: float, *, digits: int) -> float:
    """To `digits` digits that people can read out."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.{digits}g}")


def _two_digits(count: int, *, up: bool) -> int:
    unit = int(10 ** max(0, len(str(count)) - 2))
    return -(-count // unit) * unit if up else count // unit * unit
