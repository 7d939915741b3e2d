"""The planner: its noise pays for what it says, its warnings follow measured runs, and what it proposes passes."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from server import planner
from server.planner import Outlook, better_plans, demo_noise, outlook, proposed_sampling_rate
from shared.cli import run
from shared.config import RunConfig, Scalar
from shared.privacy.plan import make_plan
from simulations.cli import _with_public_figures
from simulations.scenarios import SCENARIOS, demo

# 3,000 records at five sites in full batches: without sampling every price is a formula, so these are quick.
FULL: dict[str, Scalar] = {
    "federation.published-records": 3000,
    "federation.sites": 5,
    "federation.rounds": 400,
    "privacy.target-epsilon": 4.0,
    "privacy.delta": 1e-6,
    "privacy.sampling-rate": 1.0,
}
FULL_LINE = [
    "plan", "--records", "3000", "--sites", "5", "--epsilon", "4", "--delta", "1e-6", "--rounds", "400",
    "--sampling-rate", "1",
]  # fmt: skip
NO_MOMENTS: dict[str, Scalar] = {"warm-start.enabled": False, "training.moment-weight": 0.0}


def full(**changes: Scalar) -> RunConfig:
    return RunConfig.from_flat({**FULL, **{name.replace("__", "."): value for name, value in changes.items()}})


@cache
def sampled() -> Outlook:
    return outlook(full(privacy__sampling_rate=0.25), ceiling=10.0)


def codes(found: Outlook) -> list[str]:
    return [warned.code for warned in found.warnings]


# ---- what it costs


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")  # of the orders in Opacus's own bound
def test_sigma_pays_for_the_run_by_other_peoples_accountants_and_wastes_nothing() -> None:
    plan = sampled().plan
    prv, pld = PRVAccountant(), PLDAccountant()
    prv.history = [(plan.noise_multiplier, 0.25, 405)]
    pld.compose(PoissonSampledDpEvent(0.25, GaussianDpEvent(plan.noise_multiplier)), 405)
    assert 0.99 * 4 < max(prv.get_epsilon(1e-6), pld.get_epsilon(1e-6)) <= 4


def test_every_hundredth_round_has_its_epsilon_by_three_accountants() -> None:
    rows = sampled().rows
    assert [at for at, _ in rows] == [100, 200, 300, 400]
    for at, spent in rows[::3]:
        pld = PLDAccountant()
        pld.compose(PoissonSampledDpEvent(0.25, GaussianDpEvent(sampled().plan.noise_multiplier)), at)
        assert spent.pld == pytest.approx(pld.get_epsilon(1e-6), abs=1e-3)
        assert spent.pld <= spent.prv + 0.02 < spent.rdp
        assert spent.steps == at


@pytest.mark.parametrize(
    ("rounds", "rows"),
    [(1, [1]), (4, [1, 2, 3, 4]), (7, [2, 4, 6, 7]), (30, [10, 20, 30]), (150, [50, 100, 150]), (299, [50, 100, 150,
     200, 250, 299]), (1200, list(range(100, 1201, 100))), (1300, [500, 1000, 1300]), (20_000, [5000, 10_000, 15_000,
     20_000])],
)  # fmt: skip
def test_short_and_long_runs_have_rows_too(rounds: int, rows: list[int]) -> None:
    assert [at for at, _ in outlook(full(federation__rounds=rounds)).rows] == rows


def test_a_warm_start_is_row_0_and_every_local_step_is_charged() -> None:
    found = outlook(full(**{"warm-start.enabled": True, "federation.local-steps": 8, "federation.rounds": 100}))
    assert found.rows[0][0] == 0
    assert found.rows[0][1].epsilon == pytest.approx(0.15 * 4, rel=1e-3)
    assert found.rows[-1][1].steps == 800
    assert found.plan.reserved_steps == 840


@pytest.mark.slow
def test_what_is_left_of_a_lifetime_is_its_ceiling_less_what_the_run_reserves() -> None:
    found = sampled()
    assert found.left == pytest.approx(10 - 4, abs=0.04)
    assert found.left < 10 - found.rows[-1][1].epsilon  # the slack for retries is reserved too
    assert found.runs_in_ceiling == 2
    assert outlook(full()).left == pytest.approx(0, abs=0.04)


def test_the_price_of_local_noise_is_that_of_as_many_noises_as_sites() -> None:
    found, rng, n = sampled(), np.random.default_rng(0), 200_000
    clipping_norm = found.plan.clipping_norm
    std = found.plan.noise_multiplier * clipping_norm
    together = sum(rng.normal(0, std, n) for _ in range(5))
    claimed = found.noise.step * 750 * clipping_norm
    z = (np.square(together / claimed).sum() - n) / math.sqrt(2 * n)
    assert abs(z) < 5.0  # false alarm < 6e-7; 1% wrong gives 6.4
    assert found.noise.step / found.trusted_noise.step == pytest.approx(math.sqrt(5))
    assert found.trusted_noise.step * 750 == pytest.approx(found.plan.noise_multiplier)


def test_signal_of_a_run_is_that_of_the_mean_over_its_steps() -> None:
    # The mean of 400 sums keeps the signal and has a 20th of the noise.
    assert sampled().noise.run == pytest.approx(20 * 750 / (sampled().plan.noise_multiplier * math.sqrt(5)))


def test_q_is_proposed_as_simulate_does() -> None:
    for records in (4, 100, 364, 8192, 20_000, 60_000, 1_234_567):
        flat: dict[str, Scalar] = {"privacy.delta": 1e-5, "federation.published-records": records}
        assert proposed_sampling_rate(records) == _with_public_figures(flat, records).privacy.sampling_rate


# ---- whether it can learn


@pytest.mark.slow
def test_the_demo_it_compares_with_is_the_demo() -> None:
    config, plan = demo(), make_plan(demo())
    assert plan.noise_multiplier == planner.DEMO_NOISE_MULTIPLIER
    assert (plan.sites, plan.steps) == (planner.DEMO_SITES, planner.DEMO_STEPS)
    assert plan.expected_batch_size == pytest.approx(planner.DEMO_BATCH)
    found = outlook(config)
    assert found.warnings == []
    assert found.proposals == []
    assert found.noise.step == pytest.approx(demo_noise().step)
    assert found.noise.run == pytest.approx(demo_noise().run)
    assert found.rounds is not None
    assert found.rounds[0] <= 470 <= found.rounds[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-mnist-10", "mnist-10"])
def test_the_ten_site_scenarios_pass(name: str) -> None:
    assert outlook(SCENARIOS[name].config()).warnings == []


@pytest.mark.slow
def test_the_blood_smears_that_learned_nothing_are_warned_about() -> None:
    # docs/results.md: 364 images at two sites, epsilon 9.85 at delta 1e-3, noise multiplier 3.05, 200 rounds.
    config = full(
        **{"federation.published-records": 360, "federation.sites": 2, "federation.rounds": 200, "privacy.delta": 1e-3,
           "privacy.target-epsilon": 10.0, "privacy.sampling-rate": 0.5, "warm-start.enabled": True}
    )  # fmt: skip
    found = outlook(config)
    assert found.plan.noise_multiplier == pytest.approx(3.05, abs=0.01)
    assert codes(found) == ["records-a-step", "step-noise", "run-signal"]
    assert found.noise.step / demo_noise().step == pytest.approx(15.5, abs=0.1)
    assert found.rounds is None


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [250, 470])
def test_shapes_at_256_records_a_step_are_warned_about_as_they_failed(rounds: int) -> None:
    config = demo().replaced({"privacy.sampling-rate": 0.0128, "federation.rounds": rounds})
    assert codes(outlook(config)) == ["records-a-step", "step-noise", "run-signal"]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [400, 600])
def test_shapes_at_1024_records_a_step_pass_as_they_learned(rounds: int) -> None:
    changes: dict[str, Scalar] = {"privacy.sampling-rate": 0.0512, "federation.rounds": rounds}
    assert codes(outlook(demo().replaced({**changes, **NO_MOMENTS}))) == []


def test_the_range_of_rounds_ends_where_warnings_begin() -> None:
    enough = {"federation.published-records": 40_000, "privacy.delta": 1e-5}
    found = outlook(full(**enough))
    assert found.rounds is not None
    fewest, most = found.rounds
    assert codes(outlook(full(**enough, federation__rounds=fewest))) == []
    assert codes(outlook(full(**enough, federation__rounds=most))) == []
    assert codes(outlook(full(**enough, federation__rounds=math.ceil(1.05 * most)))) == ["step-noise"]


def test_a_ceiling_below_the_run_is_warned_about_and_the_ceiling_is_proposed() -> None:
    found = outlook(full(**{"federation.published-records": 40_000, "privacy.delta": 1e-5}), ceiling=3.0)
    assert codes(found) == ["ceiling"]
    assert found.left < 0
    assert found.runs_in_ceiling == 0
    assert [proposal.changes for proposal in found.proposals] == [{"privacy.target-epsilon": 3.0}]


# ---- what would do better


@pytest.mark.parametrize(
    ("changes", "proposed"),
    [
        ({}, [{"federation.published-records"}]),
        ({"privacy.target-epsilon": 8.0, "federation.published-records": 6000}, [{"federation.published-records"},
         {"privacy.target-epsilon"}]),
        ({"federation.published-records": 40_000, "federation.rounds": 20}, [{"federation.rounds"}]),
        ({"federation.published-records": 40_000, "federation.rounds": 9000}, [{"federation.rounds"}]),
        ({"privacy.delta": 1e-3}, [{"federation.published-records", "privacy.delta"}]),
        ({"federation.published-records": 299, "privacy.target-epsilon": 20.0}, [{"federation.published-records"}]),
    ],
)  # fmt: skip
def test_what_is_proposed_passes_when_it_is_planned(changes: dict[str, Scalar], proposed: list[set[str]]) -> None:
    found = outlook(full(**changes))
    assert found.warnings
    assert [set(proposal.changes) for proposal in found.proposals] == proposed
    for proposal in found.proposals:
        assert outlook(proposal.config).warnings == []


@pytest.mark.parametrize("name", ["federation.published-records", "privacy.target-epsilon"])
def test_a_tenth_less_than_what_is_proposed_does_not_do(name: str) -> None:
    found = outlook(full(**{"privacy.target-epsilon": 8.0, "federation.published-records": 6000}))
    [proposal] = [proposal for proposal in found.proposals if name in proposal.changes]
    value = proposal.changes[name]
    assert isinstance(value, int | float)
    assert codes(outlook(proposal.config.replaced({name: type(value)(0.9 * value)})))


@pytest.mark.slow
def test_a_larger_q_is_proposed_where_it_is_enough() -> None:
    failing = demo().replaced({"privacy.sampling-rate": 0.01, **NO_MOMENTS})
    [better] = better_plans(failing, rate_is_free=False, ceiling=None)
    assert better == failing.replaced({"privacy.sampling-rate": better.privacy.sampling_rate})
    plan = make_plan(better)
    assert plan.expected_batch_size >= 300
    assert plan.sampling_rate < 0.03
    step = plan.noise_multiplier * 2 / plan.expected_batch_size
    assert 1.9 * demo_noise().step < step <= 2 * demo_noise().step
    assert math.sqrt(470) / step >= 0.5 * demo_noise().run


# ---- the command


def test_the_result_as_json_has_one_object_and_its_proposals_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FULL_LINE, "--ceiling", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "asked", "adjacency", "noise_multiplier", "warm_start_noise_multiplier", "clipping_norm", "sampling_rate",
        "sampling_rate_proposed", "expected_batch_size", "expected_batch_size_per_site", "steps", "reserved_steps",
        "epsilon", "epsilon_reserved", "ceiling", "noise", "demo", "rounds_that_pass", "warnings", "proposals",
    }  # fmt: skip
    assert result["asked"]["unit"] == "example"
    assert result["expected_batch_size"] == 3000
    assert result["expected_batch_size_per_site"] == 600
    assert [row["round"] for row in result["epsilon"]] == [100, 200, 300, 400]
    assert {"prv", "pld", "rdp", "epsilon", "delta", "unit"} <= set(result["epsilon"][0])
    assert result["ceiling"]["left"] == pytest.approx(10 - result["epsilon_reserved"]["epsilon"])
    assert {warning["code"] for warning in result["warnings"]} == {"step-noise", "run-signal"}
    for proposal in result["proposals"]:
        assert run([*proposal["command"].split()[1:], "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_the_text_names_unit_delta_noise_warnings_and_a_better_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(FULL_LINE) == 0
    text = capsys.readouterr().out
    for part in (
        "one record (an image with all its captions)", "delta 1e-06", "noise multiplier", "3,000 over all sites",
        "2.24 times the noise", "warning: ", "better: ", "  fedcanvas plan --records ",
    ):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 100 + len("fedcanvas plan")


def test_the_figure_is_a_whole_png_and_nothing_is_left_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*FULL_LINE, "--plot", str(tmp_path / "out.png")]) == 0
    capsys.readouterr()
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    picture = cv2.imread(str(tmp_path / "out.png"))
    assert picture is not None
    assert picture.shape[0] > 300
    assert 0.01 < (picture < 128).mean() < 0.2  # lines and letters on white


@pytest.mark.parametrize(
    ("arguments", "code", "said", "hinted"),
    [
        (["--delta", "0.01"], 5, "delta 1e-02 is not below 1 / 600", "set --delta to 1e-03 or less"),
        (["--epsilon", "inf"], 2, "--epsilon inf is no privacy", "--epsilon 8"),
        (["--epsilon", "-1"], 3, "--epsilon: input should be greater than 0", "--help"),
        (["--epsilon", "1e-6"], 5, "no noise multiplier up to 1000", "raise --epsilon"),
        (["--rounds", "0"], 3, "--rounds: input should be greater than or equal to 1", "--help"),
        (["--sites", "0"], 3, "--sites: input", "--help"),
        (["--records", "0"], 3, "--records: input", "--help"),
        (["--local-steps", "8", "--noise", "distributed"], 3, "secure aggregation", "--help"),
        (["--batch", "9"], 2, "--batch and --sampling-rate say the same", "leave one of them out"),
        (["--ceiling", "0"], 2, "--ceiling 0 allows no run", "lifetime"),
        (["--plot", "out.pdf"], 2, "the figure is a PNG", "out.png"),
        (["--warm-start", "--warm-start-share", "1e-5"], 5, "the warm start's share", "leave --warm-start out"),
        (["--unit", "person"], 2, "--unit: 'person' is not one of", "example"),
    ],
)
def test_a_wrong_question_is_two_lines_with_a_next_step(
    arguments: list[str], code: int, said: str, hinted: str,
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run([*FULL_LINE, *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    error, hint = err.splitlines()[-2:]
    assert said in error
    assert hinted in hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", ["0.5", "3001", "nan"])
def test_a_batch_beyond_the_records_is_refused(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FULL_LINE[:-2], "--batch", batch]) == 2
    assert f"--batch {batch} is not between 1 and 3000" in capsys.readouterr().err


def test_the_help_says_that_records_are_those_of_all_sites(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--help"]) == 0
    assert "of ALL sites" in " ".join(capsys.readouterr().out.split())
