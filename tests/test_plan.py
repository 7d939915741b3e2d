"""The plan of a run: sigma pays for everything that is reserved, and nothing can be typed past it."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from dp_accounting import DpEventBuilder, GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from shared.config import RunConfig, Scalar, setting_names
from shared.errors import ConfigError, PrivacyError
from shared.privacy.plan import LARGEST_NOISE_MULTIPLIER, PrivacyPlan, make_plan

RUN: dict[str, Scalar] = {
    "privacy.delta": 1e-5,
    "privacy.sampling-rate": 0.1024,
    "privacy.target-epsilon": 8.0,
    "privacy.retry-slack": 5,
    "federation.rounds": 400,
    "federation.sites": 4,
    "federation.published-records": 20_000,
}


def run(**changes: Scalar) -> RunConfig:
    return RunConfig.from_flat({**RUN, **{name.replace("__", "."): value for name, value in changes.items()}})


def test_sigma_just_pays_for_all_reserved_steps_by_other_peoples_accountants() -> None:
    plan = make_plan(run())
    assert (plan.steps, plan.reserved_steps) == (400, 405)
    prv = PRVAccountant()
    prv.history = [(plan.noise_multiplier, 0.1024, 405)]
    pld = PLDAccountant()
    pld.compose(PoissonSampledDpEvent(0.1024, GaussianDpEvent(plan.noise_multiplier)), 405)
    charged = max(prv.get_epsilon(1e-5), pld.get_epsilon(1e-5))
    assert 8 * 0.998 < charged <= 8
    assert plan.spent(405, warm_start=False).epsilon == pytest.approx(charged, abs=1e-3)
    assert plan.spent(400, warm_start=False).epsilon < charged < plan.spent(406, warm_start=False).epsilon


def test_a_warm_start_takes_its_share_and_the_whole_stays_within_target() -> None:
    config = run(**{"warm-start.enabled": True, "warm-start.epsilon-share": 0.25})
    plan = make_plan(config)
    assert plan.warm_start_noise_multiplier is not None
    alone = plan.spent(0, warm_start=True, exact=True)
    assert 2 * 0.999 < alone.epsilon <= 2
    assert alone.steps == 0
    events = DpEventBuilder()
    events.compose(GaussianDpEvent(plan.warm_start_noise_multiplier))
    events.compose(PoissonSampledDpEvent(0.1024, GaussianDpEvent(plan.noise_multiplier)), 405)
    pld = PLDAccountant()
    pld.compose(events.build())
    assert 8 * 0.996 < pld.get_epsilon(1e-5) <= 8
    assert plan.spent(405, warm_start=True, exact=True).pld == pytest.approx(pld.get_epsilon(1e-5), abs=1e-3)
    assert plan.noise_multiplier > make_plan(run()).noise_multiplier


def test_every_local_step_is_charged() -> None:
    plan = make_plan(run(**{"federation.local-steps": 8, "federation.rounds": 50, "privacy.retry-slack": 2}))
    assert (plan.steps, plan.reserved_steps) == (400, 416)
    assert plan.noise_multiplier > make_plan(run()).noise_multiplier


def test_full_batches_are_priced_as_the_analytic_gaussian() -> None:
    plan = make_plan(run(**{"privacy.sampling-rate": 1.0}))
    report = plan.spent(405, warm_start=False)
    assert report.pld == report.prv <= 8
    assert report.pld > 8 * 0.999


@pytest.mark.parametrize("target", [2.0, *(pytest.param(target, marks=pytest.mark.slow) for target in (0.05, 40.0))])
def test_small_and_large_targets_are_met(target: float) -> None:
    plan = make_plan(run(**{"privacy.target-epsilon": target}))
    assert target * 0.98 < plan.spent(405, warm_start=False, exact=True).epsilon <= target


def test_no_privacy_is_infinite_everywhere() -> None:
    plan = make_plan(run(**{"privacy.name": "none", "privacy.target-epsilon": 0.001, "warm-start.enabled": True}))
    assert plan.private is False
    assert plan.noise_multiplier == 0.0
    assert plan.warm_start_noise_multiplier is None
    report = plan.spent(3, warm_start=True)
    assert report.epsilon == report.prv == report.pld == report.rdp == math.inf


def test_an_epsilon_that_no_sigma_reaches_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(
        PrivacyError, match=r"epsilon 0.001 in 405 steps; the smallest that was reached is 0.0\d"
    ) as error:
        make_plan(run(**{"privacy.target-epsilon": 0.001}))
    assert "raise privacy.target-epsilon" in str(error.value.hint)


def test_a_warm_start_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(PrivacyError, match="warm start's share") as error:
        make_plan(run(**{"warm-start.enabled": True, "warm-start.epsilon-share": 1e-4}))
    assert "warm-start.epsilon-share" in str(error.value.hint)


@pytest.mark.parametrize("delta", [1 / 5000, 0.01])
def test_a_delta_that_would_let_a_record_be_shown_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="1 / 5000") as error:
        make_plan(run(**{"privacy.delta": delta}))
    assert "1e-04 or less" in str(error.value.hint)
    assert make_plan(run(**{"privacy.delta": 1e-4, "privacy.sampling-rate": 1.0})).delta == 1e-4


def test_no_setting_names_a_noise_multiplier_or_a_sensitivity() -> None:
    assert not [name for name in setting_names() if "sigma" in name or "multiplier" in name or "sensitivity" in name]
    with pytest.raises(ConfigError, match=r"unknown setting 'privacy\.noise-multiplier'"):
        run(**{"privacy.noise-multiplier": 1.0})


@pytest.mark.parametrize("clipping_norm", [0.3, 1.0, 12.0, 1000.0])
def test_the_charged_sensitivity_covers_rounding_to_the_lattice(clipping_norm: float) -> None:
    plan = make_plan(run(**{"privacy.name": "none", "privacy.clipping-norm": clipping_norm}))
    lattice = plan.lattice
    assert math.frexp(lattice)[0] == 0.5  # a power of two: multiples of it are exact
    assert 2**-25 < lattice / clipping_norm <= 2**-24
    rng = np.random.default_rng(3)
    for size in (1, 10, 250_000):
        total = rng.standard_normal(size) * clipping_norm * 30
        record = rng.standard_normal(size)
        record *= clipping_norm / np.linalg.norm(record)
        moved = (np.rint((total + record) / lattice) - np.rint(total / lattice)) * lattice
        worst = clipping_norm + math.sqrt(size) * lattice
        assert np.linalg.norm(moved) <= worst <= plan.sensitivity(size) < clipping_norm * 1.002


def test_the_batch_is_a_public_figure_of_all_sites() -> None:
    plan = make_plan(run(**{"privacy.name": "none"}))
    assert plan.expected_batch_size == pytest.approx(2048)
    assert (plan.sites, plan.unit, plan.sampling_rate, plan.clipping_norm) == (4, "example", 0.1024, 12.0)


def test_a_plan_survives_json_and_is_the_same_for_everyone() -> None:
    plan = make_plan(run())
    assert PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert make_plan(run(seed=9)) == plan  # a seed is no part of privacy


def test_a_report_every_round_is_a_look_up() -> None:
    plan = make_plan(run())
    plan.spent(1, warm_start=False)
    start = time.perf_counter()
    reports = [plan.spent(steps, warm_start=False) for steps in range(406)]
    assert (time.perf_counter() - start) / 406 < 1e-3
    epsilons = [report.epsilon for report in reports]
    assert epsilons == sorted(epsilons)
    assert all(report.steps >= steps for steps, report in enumerate(reports))
    assert reports[400].steps == 400


def test_sigma_is_bounded_and_printed_as_it_is_used() -> None:
    plan = make_plan(run())
    assert plan.noise_multiplier <= LARGEST_NOISE_MULTIPLIER
    assert float(f"{plan.noise_multiplier:.4f}") == plan.noise_multiplier
