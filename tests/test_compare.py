"""Runs side by side: only what is comparable is compared, and only what is larger than noise is called a difference."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from evaluated_runs import HOSTILE, PNG, add_evaluation, evaluation, figure, make_run
from scipy import stats
from test_evaluation_page import check_page

from server.compare import compare, compare_html, compare_json, compare_text, holm
from server.evaluations import load_comparable
from shared.errors import UsageError
from shared.rundir import RunDirectory

Evaluated = tuple[list[RunDirectory], list[dict[str, object]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """Three seeds of one setting, two of another."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, changes in {
        "a0": {"seed": 0}, "a1": {"seed": 1}, "a2": {"seed": 2}, "b0": {"seed": 0, "generator.width": 16},
        "b1": {"seed": 1, "generator.width": 16},
    }.items():  # fmt: skip
        made[name] = RunDirectory.open(make_run(folder / name, changes, quality=False))
    return made


def fids(runs: dict[str, RunDirectory], values: dict[str, float]) -> Evaluated:
    return [runs[name] for name in values], [evaluation(fid=value) for value in values.values()]


# ---- the statistics


def test_holm_agrees_with_a_hand_computed_example() -> None:
    # Four p values by hand: .005 * 4 = .02, .01 * 3 = .03, .03 * 2 = .06, .04 * 1 = .04, which may not be below .06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_holds_the_chance_of_any_false_alarm() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    trials, pairs = 4000, 6
    alarms = sum(min(holm(list(rng.random(pairs)))) <= 0.05 for _ in range(trials))
    # Independent true hypotheses: P(any) = 1 - (1 - .05 / 6)**6 = .0490; false alarm of this test < 1e-6.
    expected = 1 - (1 - 0.05 / pairs) ** pairs
    assert abs(alarms - trials * expected) < 5 * math.sqrt(trials * expected * (1 - expected))


def test_a_difference_is_z_of_two_intervals_and_said_in_words(runs: dict[str, RunDirectory]) -> None:
    opened, evaluations = fids(runs, {"a0": 12.0, "b0": 15.0})
    row = next(row for block in compare(opened, evaluations).blocks for row in block.rows if row.metric == "fid")
    # By hand: half-widths .5 and .5, s = .5 / 1.96 = .2551 each, z = 3 / .3608 = 8.3, reach = 1.96 * .3608 = .707.
    (difference,) = row.differences
    assert difference.p == pytest.approx(2 * stats.norm.sf(3 / math.hypot(0.5 / 1.96, 0.5 / 1.96)), rel=1e-3)
    assert difference.words == "a0 is better than b0 by 3 ± 0.71: larger than noise"
    assert difference.words in check_page(compare_html(opened, evaluations)).text


def test_the_correction_takes_away_what_one_pair_alone_would_claim(runs: dict[str, RunDirectory]) -> None:
    # z = .8 / .3608 = 2.217, p = .0266: below .05 alone; among three pairs 3 * .0266 = .080.
    opened, evaluations = fids(runs, {"a0": 12.0, "b0": 12.8})
    assert "a0 is better than b0 by 0.8 ± 0.71: larger than noise" in compare_text(opened, evaluations)
    opened, evaluations = fids(runs, {"a0": 12.0, "b0": 12.8, "a1": 12.4})
    text = compare_text(opened, evaluations)
    assert "a0 and b0 are not told apart (0.8 ± 0.71)" in text
    (row,) = (row for block in compare(opened, evaluations).blocks for row in block.rows if row.metric == "fid")
    assert [difference.p for difference in row.differences if difference.difference > 0.7] == [
        pytest.approx(3 * 2 * stats.norm.sf(0.8 / math.hypot(0.5 / 1.96, 0.5 / 1.96)), rel=1e-3)
    ]


@pytest.mark.slow
def test_intervals_that_hold_one_side_fixed_tell_nothing_apart(tmp_path: Path) -> None:
    opened, evaluations = [], []
    for name, value in (("a", 0.2), ("b", 0.8)):
        opened.append(RunDirectory.open(make_run(tmp_path / name, {"federation.rounds": 5 if name == "a" else 6})))
        made = evaluation()
        made["metrics"]["prdc"] = {"figures": [figure("recall", value, 0.01)], "notes": [], "tables": []}
        evaluations.append(made)
    (row,) = (row for block in compare(opened, evaluations).blocks for row in block.rows if row.metric == "prdc")
    assert [difference.larger_than_noise for difference in row.differences] == [False]
    assert "no interval to tell them apart by" in row.differences[0].words


def test_without_an_interval_nothing_is_told_apart(runs: dict[str, RunDirectory]) -> None:
    for reach in (math.inf, 0.0):
        evaluations = [evaluation(fid=value) for value in (10.0, 90.0)]
        for made in evaluations:
            made["metrics"]["fid"]["figures"] = [figure("fid", 10.0, reach, better="lower")]
        evaluations[1]["metrics"]["fid"]["figures"][0]["value"] = 90.0
        text = compare_text([runs["a0"], runs["b0"]], evaluations)
        assert "a0 and b0: no interval to tell them apart by" in text


def test_what_is_alike_for_many_runs_is_said_once(runs: dict[str, RunDirectory]) -> None:
    opened, evaluations = fids(runs, {"a0": 12.0, "b0": 12.8, "a1": 12.4})
    for made in evaluations:
        made["metrics"]["prdc"] = {"figures": [figure("recall", 0.5, 0.01)], "notes": [], "tables": []}
        made["metrics"]["retrieval"] = {"not_measured": "no model", "hint": "name one"}
    for text in (compare_text(opened, evaluations), check_page(compare_html(opened, evaluations)).text):
        assert text.count("no interval to tell them apart by") == 1
        assert "3 pairs of " in text
        assert text.count("no model (name one)") == 1
    assert "a0, b0 and a1: retrieval not measured" in compare_text(opened, evaluations)


def test_runs_that_differ_in_the_seed_alone_stand_together_with_a_t_interval(runs: dict[str, RunDirectory]) -> None:
    values = {"a0": 12.0, "a1": 13.0, "a2": 12.2, "b0": 20.0, "b1": 21.5}
    opened, evaluations = fids(runs, values)
    found = compare(opened, evaluations)
    assert [group.places for group in found.groups] == [(0, 1, 2), (3, 4)]
    (row,) = (row for block in found.blocks for row in block.rows if row.metric == "fid")
    for group in found.groups:
        seeds = [list(values.values())[place] for place in group.places]
        low, high = stats.t.interval(0.95, len(seeds) - 1, loc=np.mean(seeds), scale=stats.sem(seeds))
        mean, interval = row.means[group.name]
        assert (mean, interval.low, interval.high) == pytest.approx((np.mean(seeds), low, high))
        assert "seeds" in interval.how
    (over_seeds,) = row.over_seeds
    expected = stats.ttest_ind([12.0, 13.0, 12.2], [20.0, 21.5], equal_var=False)
    assert over_seeds.p == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert over_seeds.reach == pytest.approx((high - low) / 2)
    words = check_page(compare_html(opened, evaluations)).text
    assert "a0, a1 and a2 differ in the seed alone: they also stand together, as a mean over 3 seeds." in words
    assert "mean of b0 and b1 (2 seeds)" in words


def test_two_runs_with_one_seed_are_no_two_seeds(tmp_path: Path) -> None:
    opened = [RunDirectory.open(make_run(tmp_path / name, quality=False)) for name in ("x", "y")]
    found = compare(opened, [evaluation(), evaluation()])
    assert found.groups == []
    assert found.cautions == ["x and y have the very same weights."]


# ---- what can be compared


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"extractor": "local ffff0000"}, "extractor: local ffff0000"),
        ({"digest": "9" * 64}, f"public set: {'9' * 12}"),
    ],
)
def test_what_is_not_comparable_stands_apart_with_the_reason_and_accuracies_do_not(
    runs: dict[str, RunDirectory], changed: dict[str, object], said: str
) -> None:
    opened = [runs["a0"], runs["b0"], runs["a1"]]
    evaluations = [evaluation(fid=12.0), evaluation(fid=40.0, **changed), evaluation(fid=12.1)]  # type: ignore[arg-type]
    found = compare(opened, evaluations)
    blocks = {block.places: block for block in found.blocks}
    assert [row.metric for row in blocks[(0, 1, 2)].rows] == ["caption-accuracy", "caption-accuracy", "downstream"]
    assert [row.metric for row in blocks[(0, 2)].rows] == ["fid"]
    assert blocks[(1,)].reason == said
    words = check_page(compare_html(opened, evaluations)).text
    assert "Not comparable with the other runs: b0" in words
    assert said in words
    assert "b0 by" not in "".join(d.words for row in blocks[(0, 2)].rows for d in row.differences)
    assert said in compare_text(opened, evaluations)


def test_another_number_of_pictures_parts_distances_and_what_classifiers_learned_from(
    runs: dict[str, RunDirectory],
) -> None:
    # A hostile review: usefulness at n 240 and n 24 was called different, larger than noise, and averaged over seeds.
    opened = [runs["a0"], runs["a1"], runs["b0"]]
    found = compare(opened, [evaluation(), evaluation(n=5000), evaluation()])
    blocks = {block.places: block for block in found.blocks}
    assert [row.metric for row in blocks[(0, 1, 2)].rows] == ["caption-accuracy", "caption-accuracy"]
    for places, said in (((0, 2), "number of pictures: 1,000"), ((1,), "number of pictures: 5,000")):
        assert [row.metric for row in blocks[places].rows] == ["fid", "downstream"]
        assert blocks[places].reason == said
        assert all(row.means == {} for row in blocks[places].rows)


def test_another_number_of_trainings_parts_usefulness(runs: dict[str, RunDirectory]) -> None:
    evaluations = [evaluation(), evaluation()]
    for made, trainings in zip(evaluations, ([0, 1, 2], [0]), strict=True):
        made["metrics"]["downstream"]["figures"] = [
            figure("cnn accuracy", 0.6, 0.02, seeds={"pictures": [1], "trainings": trainings})
        ]
    found = compare([runs["a0"], runs["b0"]], evaluations)
    apart = [(block.reason, [row.metric for row in block.rows]) for block in found.blocks if block.reason]
    assert apart == [(f"number of trainings: {count}", ["downstream"]) for count in (3, 1)]


def test_the_mean_of_shares_has_an_interval_of_shares_and_a_distance_has_its_own(runs: dict[str, RunDirectory]) -> None:
    opened = [runs["a0"], runs["a1"]]
    found = compare(opened, [evaluation(accuracy=0.9, fid=0.1), evaluation(accuracy=0.95, fid=0.9)])
    rows = {(row.metric, row.any.name): row for block in found.blocks for row in block.rows}
    ((mean, interval),) = rows["caption-accuracy", "accuracy"].means.values()
    # Student's t of two seeds: .925 - 12.706 * .025 = .607, and .925 + .318 > 1.
    assert (mean, interval.low, interval.high) == pytest.approx((0.925, 0.925 - 12.7062 * 0.025, 1.0), abs=1e-4)
    ((mean, interval),) = rows["fid", "fid"].means.values()
    assert (interval.low, interval.high) == pytest.approx((0.5 - 12.7062 * 0.4, 0.5 + 12.7062 * 0.4), abs=1e-3)


def put(path: Path, changed: int, **about: object) -> None:
    """An evaluation that was written at second `changed`; `only` names the metrics it measured."""
    only = about.pop("only", None)
    made = evaluation(**about)  # type: ignore[arg-type]
    if only is not None:
        made["metrics"] = {metric: made["metrics"][metric] for metric in only}  # type: ignore[attr-defined]
    os.utime(add_evaluation(path, made) / "evaluation.json", (changed, changed))


def test_a_quick_evaluation_does_not_hide_what_the_runs_share(tmp_path: Path) -> None:
    # A hostile review: `--metrics fid --n 100` after a full evaluation was all that compare and report saw.
    paths = [make_run(tmp_path / name, {"seed": seed}, quality=False) for seed, name in enumerate("xyz")]
    for place, path in enumerate(paths):
        put(path, 1000 + place, key="aa")
    put(paths[0], 2000, key="bb", n=100, only=["fid"])
    put(paths[1], 2001, key="cc", only=["fid"])
    put(paths[2], 2002, key="dd", n=20_000)
    evaluations = load_comparable(paths)
    assert [made["key"] for made in evaluations] == ["aa", "aa", "aa"]
    opened = [RunDirectory.open(path) for path in paths]
    by = "against public shapes, features by local 3f9a01c2"
    expected = [f"bb: 1 metric, 100 pictures, {by}", f"cc: 1 metric, 1,000 pictures, {by}",
                f"dd: 3 metrics, 20,000 pictures, {by}"]  # fmt: skip
    words, text = check_page(compare_html(opened, evaluations)).text, compare_text(opened, evaluations)
    for aside in expected:
        assert aside in words
        assert f"left aside: evaluation {aside}" in text
    made = compare_json(opened, evaluations)["left_aside"]
    assert [entry["evaluation"] for entry in made] == expected


def test_what_most_runs_share_is_compared_also_where_one_run_knows_more(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, {"seed": seed}, quality=False) for seed, name in enumerate("xy")]
    put(paths[0], 1000, key="aa")
    put(paths[0], 999, key="bb", n=100, only=["fid"])
    put(paths[1], 1000, key="cc", n=100, only=["fid"])
    assert [made["key"] for made in load_comparable(paths)] == ["bb", "cc"]


def test_kinds_that_all_runs_have_are_ranked_once_for_all_of_them(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, {"seed": seed}, quality=False) for seed, name in enumerate("xy")]
    put(paths[0], 1000, key="aa")
    put(paths[0], 1001, key="bb", n=100, only=["fid", "downstream"])
    put(paths[1], 1002, key="cc", only=["fid"])
    put(paths[1], 1003, key="dd", n=100, only=["fid", "downstream"])
    # Three and one metrics against two and two: equal, so the kind that was measured last, in both runs.
    assert [made["key"] for made in load_comparable(paths)] == ["bb", "dd"]


def test_another_test_set_or_classifier_parts_also_accuracies(runs: dict[str, RunDirectory]) -> None:
    other = evaluation()
    other["reference"]["test_digest"] = "7" * 64
    other["metrics"]["caption-accuracy"]["figures"][0]["extractor"] = "classifier 89abcdef"
    found = compare([runs["a0"], runs["b0"]], [evaluation(), other])
    apart = {(row.metric, row.any.name) for block in found.blocks if block.reason for row in block.rows}
    assert apart == {("caption-accuracy", "accuracy"), ("downstream", "cnn accuracy")}


def test_a_figure_that_one_run_lacks_says_why(runs: dict[str, RunDirectory]) -> None:
    lacking, unasked = evaluation(), evaluation()
    lacking["metrics"]["fid"] = {"not_measured": f"too few pictures {HOSTILE}", "hint": "more"}
    del unasked["metrics"]["fid"]
    opened, evaluations = [runs["a0"], runs["b0"], runs["a1"]], [evaluation(), lacking, unasked]
    text = compare_text(opened, evaluations)
    assert f"not measured: too few pictures {HOSTILE}" in text
    assert "not asked for" in text
    words = check_page(compare_html(opened, evaluations)).text
    assert f"b0 fid too few pictures {HOSTILE} (more)" in words


def test_epsilons_of_different_meaning_are_marked(runs: dict[str, RunDirectory]) -> None:
    other = evaluation()
    other["privacy"]["unit"] = "subject"
    page = compare_html([runs["a0"], runs["b0"]], [evaluation(), other])
    assert "The runs differ in the unit of their privacy" in page
    other["privacy"] = {"name": "none", "epsilon": "inf", "delta": 1e-4}
    assert "no privacy: epsilon = inf" in compare_html([runs["a0"], runs["b0"]], [evaluation(), other])


# ---- the page, the text, the JSON


def test_the_page_shows_intervals_settings_charts_and_pictures_of_every_run(runs: dict[str, RunDirectory]) -> None:
    opened, evaluations = fids(runs, {"a0": 12.0, "b0": 15.0})
    page = compare_html(opened, evaluations)
    parsed = check_page(page)
    assert "11.5 to 12.5" in parsed.text
    assert "generator.width 8 16" in parsed.text
    assert "epsilon 1.5 at delta 1e-04, add/remove one example, simulated" in parsed.text
    chart = next(a for a in parsed.alternatives if a.startswith("fid."))
    assert chart == "fid. a0: 12 (11.5 to 12.5); b0: 15 (14.5 to 15.5); real pictures: 2."
    assert sum(a.startswith("Contact sheet of") for a in parsed.alternatives) == 2
    assert compare_html(opened, evaluations) == page


def test_names_of_runs_are_told_apart_and_escaped(tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)> $a$"
    opened = [RunDirectory.open(make_run(tmp_path / folder / hostile, quality=False)) for folder in ("x", "y")]
    page = compare_html(opened, [evaluation(), evaluation(fid=19.0)])
    assert f"x/{hostile} is better than y/{hostile} by 7" in check_page(page).text


def test_control_characters_of_a_file_do_not_reach_the_terminal(runs: dict[str, RunDirectory]) -> None:
    hostile = evaluation()
    hostile["metrics"]["retrieval"]["not_measured"] = "x\x1b[2Jy"
    assert "\x1b" not in compare_text([runs["a0"], runs["b0"]], [evaluation(), hostile])


def test_the_json_holds_every_pair_and_no_number_that_json_has_not(runs: dict[str, RunDirectory]) -> None:
    opened, evaluations = fids(runs, {"a0": 12.0, "a1": math.inf, "b0": 15.0})
    made = json.loads(json.dumps(compare_json(opened, evaluations), allow_nan=False))
    fid = next(f for block in made["blocks"] for f in block["figures"] if f["metric"] == "fid")
    assert len(fid["differences"]) == 3
    assert [d["larger_than_noise"] for d in fid["differences"]] == [True, False, False]
    assert fid["values"]["a1"]["value"] == "inf"
    assert fid["means"] == {}
    assert made["seeds"] == {"mean of a0 and a1": ["a0", "a1"]}
    assert made["settings"]["generator.width"] == {"a0": "8", "a1": "8", "b0": "16"}


def test_one_run_or_one_run_twice_is_nothing_to_compare(runs: dict[str, RunDirectory]) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([runs["a0"]], [evaluation()])
    with pytest.raises(UsageError, match="named twice"):
        compare([runs["a0"], runs["a0"]], [evaluation(), evaluation()])


def test_a_run_without_a_sheet_is_compared_all_the_same(tmp_path: Path, runs: dict[str, RunDirectory]) -> None:
    path = make_run(tmp_path / "c", {"seed": 9}, quality=False)
    (path / "sheet.png").unlink()
    add_evaluation(path, evaluation())
    assert PNG.startswith(b"\x89PNG")
    page = compare_html([runs["a0"], RunDirectory.open(path)], [evaluation(), evaluation()])
    assert "This run has no contact sheet." in page
