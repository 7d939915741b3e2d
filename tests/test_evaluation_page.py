"""What a report says of an evaluation: every figure with what makes it believable, every gap with its reason."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evaluated_runs import HOSTILE, add_evaluation, evaluation, figure, make_run

from server.charts import Line, Point, confusion, curves, points
from server.evaluation_page import METRIC_WORDS, evaluation_sections
from server.evaluations import gallery_bytes, load_evaluation
from server.report import report_html
from server.report_tables import REPORT_TABLES
from shared.errors import RunDirectoryError
from shared.metrics import METRICS, Table
from shared.privacy.accounting import spent_epsilon
from shared.privacy.plan import make_plan
from shared.rundir import RunDirectory


class Page(HTMLParser):
    """What a browser would make of a page: its words by heading, what it fetches and runs, what has no alternative."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.outside: list[str] = []
        self.scripts = 0
        self.without_alternative: list[str] = []
        self.alternatives: list[str] = []
        self.unreachable_tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.scripts += tag in ("script", "iframe", "object", "embed") or any(name.startswith("on") for name in given)
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = given.get(name) or ""
            if value and not value.startswith(("data:image/png;base64,", "#")):
                self.outside.append(value)
        if tag in ("img", "svg"):
            alternative = given.get("alt" if tag == "img" else "aria-label")
            self.alternatives.append(alternative or "")
            if not alternative or (tag == "svg" and given.get("role") != "img"):
                self.without_alternative.append(tag)
        for name, value in given.items():
            if name not in ("aria-label", "alt") and "http" in (value or ""):
                self.outside.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(page: str) -> Page:
    """Nothing is fetched or run, whatever the inputs say, and every drawing has words."""
    parsed = Page(page)
    assert parsed.outside == []
    assert parsed.scripts == 0
    assert parsed.without_alternative == []
    assert "<script" not in page.lower()
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "default-src 'none'" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    return parsed


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("runs") / "a")
    add_evaluation(path, evaluation())
    add_evaluation(path, evaluation(key="feedbeef"), whole=False)
    return path


@pytest.fixture(scope="module")
def page(run_path: Path) -> str:
    return report_html(RunDirectory.open(run_path))


def test_whatever_stands_in_an_evaluation_is_text_and_nothing_is_fetched(page: str) -> None:
    words = check_page(page).text
    for place in ("noted", "squares", "no model that knows texts was named", "fedcanvas evaluate"):
        assert f"{place} {HOSTILE}" in words


def test_every_figure_stands_with_all_that_makes_it_believable(page: str) -> None:
    row = re.search(r"<tr><th scope=\"row\">fid<br>.*?</tr>", page)
    assert row is not None
    cells = Page(row[0]).text
    for part in (
        "lower is better", "12 ", "11.5 to 12.5", "of 500", "generated, of as many: 14", "1,000", "against 500",
        "against public shapes, reference", "by local 3f9a01c2", f"⚠ not comparable with published ones {HOSTILE}",
    ):  # fmt: skip
        assert part in cells
    accuracy = re.search(r"<tr><th scope=\"row\">caption-accuracy: accuracy<br>.*?</tr>", page)
    assert accuracy is not None
    assert "0.3333" in accuracy[0]
    assert "0.79 to 0.81" in accuracy[0]


def test_what_was_not_measured_stands_there_with_its_reason_and_never_as_a_number(page: str) -> None:
    words = Page(page).text
    assert "no model that knows texts was named" in words
    assert "name one: --clip" in words
    assert "This evaluation is partial: clip-score, is, kid, nearest, prdc were not asked for, or not reached." in words
    assert not re.search(r'<tr><th scope="row">retrieval[^/]*</th><td>', page)


def test_an_interrupted_evaluation_is_named_and_not_shown(page: str) -> None:
    assert "Evaluation feedbeef was interrupted: it has measured fid. It is not shown here" in Page(page).text


def test_a_metric_that_was_begun_and_not_finished_is_said_to_be_so(run_path: Path) -> None:
    cut = evaluation()
    cut["metrics"]["kid"] = {"seconds": 1.0}
    words = Page(" ".join(evaluation_sections(RunDirectory.open(run_path), cut, epsilon_at={}))).text
    assert "kernel distance (KID) kid interrupted before it was finished" in words


def test_every_metric_has_a_sentence_of_what_it_says_and_what_not() -> None:
    assert sorted(METRIC_WORDS) == METRICS.names()


def test_a_confusion_matrix_says_its_numbers_in_words_and_in_a_table(page: str) -> None:
    alternative = next(a for a in Page(page).alternatives if "confusion of colour" in a)
    assert f"red: 80% of 10 right, most often mistaken for {HOSTILE} (20%)." in alternative
    assert f"{HOSTILE}: 64% of 11 right, most often mistaken for blue (27%)." in alternative
    assert "blue: none." in alternative
    assert '<th scope="row">red</th><td>8</td><td>2</td><td>0</td>' in page


def test_pictures_come_from_the_folder_of_the_evaluation_alone(run_path: Path, page: str) -> None:
    assert "The picture ../../../prompts.txt (“worst”) is missing, or is no picture." in Page(page).text
    assert f"best {HOSTILE}" in Page(page).alternatives
    known = evaluation()
    for file in ("../../../sheet.png", "/etc/passwd", "..", "fid.json", ".", "", "a\0b", "absent.png"):
        assert gallery_bytes(run_path, known, file) is None
    assert gallery_bytes(run_path, {**known, "key": "../evaluations/0123abcd"}, "prompts.png") is None
    assert gallery_bytes(run_path, known, "prompts.png") is not None


def test_quality_over_epsilon_is_drawn_at_the_epsilon_of_the_steps_charged_by_then(run_path: Path, page: str) -> None:
    plan = make_plan(RunDirectory.open(run_path).config)
    first, last = (  # the second round was asked for twice
        spent_epsilon(sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps,
                      delta=plan.delta).epsilon
        for steps in (3, 5)
    )  # fmt: skip
    alternative = next(a for a in Page(page).alternatives if a.startswith("caption accuracy for its epsilon"))
    assert f"0.2 (0.15 to 0.25) at epsilon spent per site {first:.4g}, 0.4 (0.35 to 0.45) at {last:.4g}" in alternative
    assert "guessing, accuracy: 0.333" in alternative


def test_what_measured_during_training_stands_there_with_its_marks_and_its_part_of_the_time(page: str) -> None:
    words = Page(page).text
    assert f"caption accuracy against 120 pictures of shapes {HOSTILE}, fit, by classifier 7c2d" in words
    assert "They took 4 s, 10.0% of the training's time." in words  # of four rounds of 9 s
    alternative = next(a for a in Page(page).alternatives if a.startswith("caption accuracy over rounds"))
    assert "real pictures, accuracy: 0.97. guessing, accuracy: 0.333." in alternative


def test_what_was_not_measured_during_training_is_told_with_its_reason(page: str) -> None:
    assert f"retrieval no model {HOSTILE}" in Page(page).text


def test_a_run_without_privacy_has_no_curve_over_epsilon(tmp_path: Path) -> None:
    words = check_page(report_html(RunDirectory.open(make_run(tmp_path / "a", {"privacy.name": "none"})))).text
    assert "Quality over rounds" in words
    assert "for its epsilon" not in words
    assert "epsilon is infinite throughout" in words


def test_figures_of_other_weights_are_marked(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", quality=False)
    rundir = RunDirectory.open(path)
    for stated, expected in (("0" * 64, True), ("e" * 64, False)):
        rundir.write_json("model/model.json", {"weights_digest": stated})
        said = " ".join(evaluation_sections(rundir, evaluation(), epsilon_at={}))
        assert ("of other weights" in said) is expected


def test_a_report_says_that_ledgers_add_up_runs_and_that_it_shows_one(page: str) -> None:
    assert "each site's own ledger adds up its runs, this report shows this run alone." in Page(page).text


def test_a_report_without_evaluations_has_no_section_of_them(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", {"privacy.name": "none"}, quality=False)
    assert not re.search("How good|Quality over", report_html(RunDirectory.open(path)))


# ---- which evaluation


def test_of_evaluations_that_measured_as_much_the_newest_complete_one_is_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    for place, key in enumerate(("cc", "aa", "bb")):
        file = add_evaluation(path, evaluation(key=key)) / "evaluation.json"
        os.utime(file, (1000 + place, 1000 + place))
    add_evaluation(path, evaluation(key="dd"), whole=False)
    assert load_evaluation(path)["key"] == "bb"


def test_a_quick_evaluation_does_not_hide_a_full_one_and_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", {"privacy.name": "none"}, quality=False)
    quick = evaluation(key="bb", n=100)
    quick["metrics"] = {"fid": quick["metrics"]["fid"]}
    for place, made in enumerate((evaluation(key="aa"), quick, evaluation(key="cc"))):
        file = add_evaluation(path, made) / "evaluation.json"
        os.utime(file, (1000 + place, 1000 + place))
    file.write_text("{")
    assert load_evaluation(path)["key"] == "aa"
    words = check_page(report_html(RunDirectory.open(path))).text
    assert "Further evaluations of this run are left aside here" in words
    assert "bb: 1 metric, 100 pictures, against public shapes, features by local 3f9a01c2" in words
    assert f"cc: {file} is damaged" in words


def test_pictures_of_an_evaluation_elsewhere_come_from_its_folder(tmp_path: Path) -> None:
    # A hostile review: with `evaluate --out DIR --html FILE` every picture was missing.
    path = make_run(tmp_path / "a", {"privacy.name": "none"}, quality=False)
    folder = add_evaluation(path, evaluation()).rename(tmp_path / "elsewhere")
    rundir = RunDirectory.open(path)
    assert f"best {HOSTILE}" not in check_page(report_html(rundir, evaluation())).alternatives
    shown = check_page(report_html(rundir, evaluation(), folder))
    assert f"best {HOSTILE}" in shown.alternatives
    assert "../../../prompts.txt (“worst”) is missing" in shown.text
    assert gallery_bytes(path, evaluation(), "../a/sheet.png", folder) is None


def test_a_run_without_evaluation_is_answered_with_the_command_that_makes_one(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a run")
    with pytest.raises(RunDirectoryError, match="no complete evaluation") as caught:
        load_evaluation(path)
    assert caught.value.hint == f"run `fedcanvas evaluate '{path}' --reference DATA`"
    add_evaluation(path, evaluation(), whole=False)
    with pytest.raises(RunDirectoryError, match="was interrupted"):
        load_evaluation(path)


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return content


DAMAGED = {
    "no table": [],
    "cut": None,
    "other format": {**evaluation(), "format": 2},
    "other key": {**evaluation(), "key": "ffff"},
    "no metrics": without(evaluation(), "metrics"),
    "metrics are a list": {**evaluation(), "metrics": []},
    "figure without value": {**evaluation(), "metrics": {"fid": {"figures": [{"name": "fid"}]}}},
    "n is a word": {**evaluation(), "n": "many"},
    "n is true": {**evaluation(), "n": True},
    "privacy is a list": {**evaluation(), "privacy": []},
    "conversions are a number": {**evaluation(), "conversions": 5},
    "versions are a list": {**evaluation(), "versions": ["torch"]},
    "parts are a list": {**evaluation(), "reference": {**evaluation()["reference"], "parts": [400]}},
    "a part is a word": {**evaluation(), "reference": {**evaluation()["reference"], "parts": {"fit": "many"}}},
    "figure of a word": {**evaluation(), "metrics": {"fid": {"figures": [figure("fid", 1.0, 0.1) | {"n": "many"}]}}},
    "figure of no direction": {**evaluation(), "metrics": {"fid": {"figures": [figure("a", 1, 1, better="up")]}}},
    "notes are a number": {**evaluation(), "metrics": {"fid": {"notes": 5}}},
    "row too long": {**evaluation(), "metrics": {"fid": {"tables": [{"title": "x", "head": ["a"], "rows": [[1, 2]]}]}}},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_evaluation_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = make_run(tmp_path / "a", quality=False)
    file = add_evaluation(path, evaluation()) / "evaluation.json"
    file.write_text(json.dumps(DAMAGED[kind]) if kind != "cut" else file.read_text()[:-40])
    with pytest.raises(RunDirectoryError, match=re.escape(str(file))):
        load_evaluation(path)
    with pytest.raises(RunDirectoryError):
        report_html(RunDirectory.open(path))
    if kind not in ("cut", "other key"):
        with pytest.raises(RunDirectoryError, match="the given evaluation"):
            report_html(RunDirectory.open(path), DAMAGED[kind])


# ---- tables that others add


def late_ratings(run: RunDirectory) -> Table:
    return Table("Ratings of people", ["picture", "stars"], [[HOSTILE, 4]], f"of {run.run_id}")


def nothing_to_say(run: RunDirectory) -> None:
    return None


def test_a_registered_table_appears_and_one_that_has_nothing_to_say_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = RunDirectory.open(make_run(tmp_path / "a", {"privacy.name": "none"}))
    monkeypatch.setitem(REPORT_TABLES._entries, "ratings", f"{__name__}:late_ratings")
    monkeypatch.setitem(REPORT_TABLES._entries, "silent", f"{__name__}:nothing_to_say")
    words = check_page(report_html(rundir)).text
    assert f"Ratings of people of {rundir.run_id} picture stars {HOSTILE} 4" in words


def test_the_report_tells_what_sites_said_and_which_rounds_were_repeated(page: str) -> None:
    words = Page(page).text
    assert f"site-00 {'ab' * 32} no" in words
    assert "site-01 none at round 3: policy" in words
    assert "round 2 2" in words


# ---- charts


def test_charts_take_no_text_for_markup_or_a_formula() -> None:
    names = [HOSTILE, "$x^2$", "_hidden", "一个", "\x1b[0m"]
    drawn = points(HOSTILE, "$1$", [Point(name, 1.0, 0.5, float("inf")) for name in names], marks=[("$a$", 2.0)])
    drawn += curves("$t$", "_y", [Line(name, [1, 2], [0.1, 0.2], [0, 0], [1, 1]) for name in names], x_label="round")
    drawn += confusion("$c$", names, [[1] * 5] * 5)
    assert Page(drawn).scripts == 0
    shown = Page(drawn).words
    assert "$x^2$" in shown
    assert any(word.strip() == "_hidden" for word in shown)


def test_numbers_stand_in_the_cells_of_a_small_matrix_only() -> None:
    small, large = ([[3 if row == column else 0 for column in range(k)] for row in range(k)] for k in (12, 13))
    texts = [
        len(re.findall(r"<text[^>]*>\s*3\s*</text>", confusion("c", [f"c{n}" for n in range(len(m))], m)))
        for m in (small, large)
    ]
    assert texts == [12, 0]


@pytest.mark.slow
def test_the_same_evaluation_gives_the_same_page(run_path: Path, page: str) -> None:
    assert report_html(RunDirectory.open(run_path)) == page
