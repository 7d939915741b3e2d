"""The commands of a site's engineer: what they write, what they refuse, and that a failed one leaves nothing."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from deployed_site import CHEAP, OPEN, ask
from toy_federation import COLOURS, PROMPTS, make_sites, toy_config, toy_policy

import client.enrolment
from client.account import SiteAccount
from client.policy import SitePolicy
from client.settings import RELEASE_CODE, SiteConfig
from client.site import Site
from shared.cli import run
from shared.errors import LedgerError
from shared.privacy.accounting import best_renyi_order
from shared.privacy.budget import Lifetime, Price
from shared.privacy.ledger import Ledger, Lineage, RunTerms
from shared.privacy.plan import PrivacyPlan
from shared.records import RefusalCode

CAPTION = "an unmistakable crimson walrus"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's lineages, and a working directory of its own."""
    monkeypatch.setenv("FEDCANVAS_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def write_data(folder: Path, *, count: int = 40, seed: int = 0, subjects: Sequence[str] = (), rows: Any = ()) -> Path:
    """Pictures of plain noise with one caption each; `rows` come last in the table, as they are."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    table: list[list[str]] = [["file_name", "text", *(["subject_id"] if subjects else [])]]
    for place in range(count):
        cv2.imwrite(str(folder / f"images/{place}.png"), rng.integers(0, 256, (32, 32, 3), np.uint8))
        table.append([f"images/{place}.png", CAPTION, *([subjects[place % len(subjects)]] if subjects else [])])
    with open(folder / "captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([*table, *rows])
    return folder


def init(*more: str, site: str = "site", data: str = "data", lineage: str = "scans", epsilon: str = "8") -> int:
    return run(["client", "init", site, "--data", data, "--lineage", lineage, "--max-epsilon", epsilon,
                "--delta", "1e-4", *more])  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What the command writes to stdout; a caption or a traceback is nowhere."""
    capsys.readouterr()
    assert run(["client", *arguments]) == code
    out, err = capsys.readouterr()
    assert "walrus" not in out + err
    assert "Traceback" not in err
    return out if code == 0 else err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return found


def everything_in(*folders: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for folder in folders if folder.exists() for path in [folder, *folder.rglob("*")]
    }  # fmt: skip


# ---- init


def test_init_writes_a_whole_site_that_nobody_else_can_read(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    assert init() == 0
    out = capsys.readouterr().out
    assert "40 records" in out
    assert "no column 'subject_id'" in out
    assert "treated as public" in out
    assert "fedcanvas client check-data site" in out
    config, policy, ledger = SiteConfig.read(Path("site")), SitePolicy.read(Path("site")), Ledger(store / "scans")
    assert (config.site_id, config.lineage, config.published_records, config.slot_seconds) == ("site", "scans", 40, 10)
    assert Path(config.store) == store
    assert Path(config.data) == tmp_path / "data"
    assert policy == SitePolicy(max_epsilon=8, delta=1e-4, code=[RELEASE_CODE])
    assert policy.approve_each_run
    assert (ledger.lineage.unit, ledger.lineage.simulated) == ("example", False)
    assert (ledger.lineage.lifetime.max_epsilon, ledger.lineage.lifetime.delta) == (8, 1e-4)
    for path in (tmp_path / "site", store, store / "scans"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (*Path("site").glob("*.toml"), Path("site/anchor.json"), *store.glob("*"), *store.glob("scans/*")):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert not Site(Path("site"), simulated=False).entropy.simulated


def test_the_unit_is_the_subject_where_the_data_name_subjects(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data", subjects=["ada", "bo", "cy", ""])
    assert init("--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["unit"], written["units"], written["published_records"]) == ("subject", 3, 3)
    assert SitePolicy.read(Path("site")).unit == "subject"
    assert Ledger(store / "scans").lineage.unit == "subject"


@pytest.mark.parametrize(("units", "published"), [(40, 40), (101, 110), (1234, 1300), (7, 7), (12_001, 13_000)])
def test_what_is_published_is_rounded_up_to_two_digits(units: int, published: int) -> None:
    from client.data_check import rounded_up

    assert rounded_up(units) == published


def test_a_renyi_filter_gets_the_best_order(store: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    assert init("--filter", "renyi") == 0
    assert Ledger(store / "scans").lineage.lifetime.order == best_renyi_order(8, 1e-4)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--delta", "0.03"], 5, "delta 3e-02 is not below 1 / 40"),
        (["--delta", "0"], 2, "--delta: 0 is not between 0 and 1"),
        (["--max-epsilon", "inf"], 2, "no finite number"),
        (["--max-epsilon", "nan"], 2, "no finite number"),
        (["--max-epsilon", "-1"], 2, "no finite number"),
        (["--published-records", "39"], 2, "below the 40 records"),
        (["--unit", "subject"], 4, "no row of data names one"),
        (["--lineage", "../x"], 2, "--lineage: '../x' is no name"),
        (["--lineage", "a\x1b[2J"], 2, "'a?[2J' is no name"),
        (["--site-id", ""], 2, "--site-id"),
        (["--order", "3"], 2, "--order belongs to the Renyi filter"),
        (["--filter", "renyi", "--order", "1"], 5, "order"),
        (["--slot-seconds", "-1"], 2, "--slot-seconds"),
        (["--shares-records-with", "nobody"], 5, "no other lineage 'nobody'"),
        (["--shares-records-with", "scans"], 5, "no other lineage 'scans'"),
        (["--data", "absent"], 4, "there is no data at absent"),
        (["--data", "."], 4, "no captioned images"),
    ],
)
def test_a_wrong_init_is_refused_and_leaves_nothing(
    more: list[str], code: int, said: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    assert init(*more) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "hint: " in err
    assert not Path("site").exists()
    assert not list(store.glob("*/*"))


def test_a_second_init_is_refused_and_changes_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    assert init() == 0
    before = everything_in(tmp_path / "site", store)
    assert init(lineage="other") == 3
    assert "holds a site already" in capsys.readouterr().err
    assert everything_in(tmp_path / "site", store) == before


def test_records_of_another_lineage_are_refused_until_that_is_declared(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    assert init() == 0
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "data/images", tmp_path / "part/images")
    with open(tmp_path / "part/captions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], *([f"images/{n}.png", CAPTION] for n in range(12))])
    before = everything_in(store)
    assert init(site="two", data="part", lineage="other") == 5
    err = capsys.readouterr().err
    assert "12 of these 12 pictures are records of lineage 'scans' already" in err
    assert "--shares-records-with scans" in err
    assert not Path("two").exists()
    assert everything_in(store).keys() == before.keys()
    # Under the other lineage's own name they are no second account.
    assert init(site="three", data="part", lineage="scans") == 0
    assert "joined: its ledger goes on" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device", "ledger")])
@pytest.mark.parametrize("where", ["record_digests", "keep_digests", "create_site", "SiteConfig.write"])
def test_an_init_that_is_stopped_leaves_no_site_and_no_lineage(
    stop: BaseException, where: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise stop

    write_data(tmp_path / "data")
    if where == "SiteConfig.write":
        monkeypatch.setattr(SiteConfig, "write", stopped)
    else:
        monkeypatch.setattr(client.enrolment, where, stopped)
    assert init() == (130 if isinstance(stop, KeyboardInterrupt) else 1)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert not Path("site").exists()
    assert [path.name for path in store.glob("*") if path.is_dir()] == []
    assert run(["client", "init", "site", "--data", "data", "--lineage", "scans", "--max-epsilon", "8", "--delta",
                "1e-4", "--store", str(store)]) == 0  # fmt: skip


def test_a_failed_init_never_removes_a_ledger_that_has_an_entry(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path / "data")
    assert init() == 0
    monkeypatch.setattr(SiteConfig, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert init("--shares-records-with", "scans", site="two", lineage="other") == 130
    assert not Path("two").exists()
    assert Ledger(store / "other").overlaps == ["scans"]  # noted, so it stays, with its digests
    assert (store / "other/records").exists()
    monkeypatch.undo()
    assert Ledger(store / "scans").overlaps == ["other"]


def test_a_first_line_that_a_crash_left_unfinished_is_no_lineage(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    (store / "scans").mkdir(parents=True)
    (store / "scans/ledger.jsonl").write_bytes(b'{"hash":"12')
    assert init("--json") == 0
    assert not json.loads(capsys.readouterr().out)["joined"]
    assert [entry["kind"] for entry in Ledger(store / "scans").entries] == ["opened"]


def test_a_lineage_whose_ledger_is_gone_is_not_begun_anew(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    assert init() == 0
    (store / "scans/ledger.jsonl").unlink()
    assert init(site="two") == 5
    assert "its ledger is gone" in capsys.readouterr().err
    assert not Path("two").exists()
    assert not (store / "scans/ledger.jsonl").exists()
    (store / "scans/records").unlink()  # what the hint says, of an init that was killed
    assert init(site="two") == 0


def test_what_was_in_a_folder_before_a_failed_init_stays(store: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "site" / "data")
    assert init("--delta", "0.5", data="site/data") == 5
    assert sorted(path.name for path in Path("site").iterdir()) == ["data"]


def test_one_enrolment_at_a_time(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "data")
    with client.enrolment.store_locked(store):
        assert init() == 5
    assert "another enrolment is at work" in capsys.readouterr().err
    assert not Path("site").exists()


# ---- overlapping lineages


def allow_toy_runs(site: Path, **changes: Any) -> None:
    (site / "policy.toml").write_text(toy_policy(**{**OPEN, **changes}).to_toml())


def test_runs_of_overlapping_lineages_are_charged_in_both(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    config = toy_config(CHEAP)
    assert init(site="one", lineage="first") == 0
    allow_toy_runs(Path("one"), delta=1e-4)
    assert ask(Path("one"), config, run_id="early") is None
    assert init("--shares-records-with", "first", site="two", lineage="second") == 0
    allow_toy_runs(Path("two"), delta=1e-4)
    first, second = Ledger(store / "first"), Ledger(store / "second")
    assert (first.overlaps, second.overlaps) == (["second"], ["first"])
    # The shared records have been in the earlier run, so it counts in the new lineage too.
    assert second.runs["early"].steps == first.runs["early"].steps == 1
    assert second.left.epsilon == pytest.approx(first.left.epsilon)
    assert ask(Path("one"), config, run_id="early", server_round=2) is None
    assert ask(Path("two"), config, run_id="late") is None
    first, second = Ledger(store / "first"), Ledger(store / "second")
    for name, steps in (("early", 2), ("late", 1)):
        assert first.runs[name].steps == second.runs[name].steps == steps
    rows = {row["run"]: row for row in as_json(capsys, "ledger", "one")["runs"]}
    assert (rows["early"]["through"], rows["late"]["through"]) == ("", "second")
    assert "through second" in printed(capsys, "ledger", "one")
    # Closed in one is closed in both.
    printed(capsys, "deny", "two", "late")
    assert Ledger(store / "first").runs["late"].closed == Ledger(store / "second").runs["late"].closed is not None


def test_an_overlap_that_was_cut_off_at_any_entry_is_finished_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    price = Price(1.0, 1e-6, None, ((0, 0.0, 0.0, 0.0), (10, 1.0, 1.0, 1.0)))
    plan = PrivacyPlan(True, 30.0, 1.0, 1.0, 10.0, 5, 10, 1e-6, None, "example", 1)

    def begin(ledger: Ledger, run: str) -> None:
        with ledger.locked():
            ledger.reserve(RunTerms(run, "f", "c" * 64, "d" * 64, "e" * 64, plan), price)
            ledger.charge(
                run, server_round=1, attempt=1, release="gradient", steps=3, instruction_digest="a" * 64,
                nonce=bytes(16),
            )  # fmt: skip

    real, after = Ledger._append, 0
    while True:
        lineages = [Lineage(name, "example", Lifetime(100.0, 1e-3)) for name in "ab"]
        a, b = (Ledger.create(tmp_path / str(after) / lineage.name, lineage) for lineage in lineages)
        begin(b, "r1")
        left = [after]

        def cut(self: Ledger, kind: str, left: list[int] = left, **fields: Any) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(self, kind, **fields)

        monkeypatch.setattr(Ledger, "_append", cut)
        try:
            client.enrolment.declare_overlaps(a, [b])
            whole = True
        except KeyboardInterrupt:
            whole = False
        monkeypatch.setattr(Ledger, "_append", real)
        if whole:
            break
        a, b = (Ledger(tmp_path / str(after) / name) for name in "ab")
        if "a" not in b.overlaps:
            begin(b, "r2")  # alone, since it does not know better
        client.enrolment.declare_overlaps(a, [b])
        assert (a.overlaps, b.overlaps) == (["b"], ["a"])
        assert {run: account.steps for run, account in a.runs.items()} == {
            run: account.steps for run, account in b.runs.items()
        }
        after += 1
    assert after == 4  # the run and its charge, and a note in each


def test_an_overlap_whose_earlier_runs_do_not_fit_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data")
    assert init(site="one", lineage="first") == 0
    allow_toy_runs(Path("one"), delta=1e-4)
    assert ask(Path("one"), toy_config(CHEAP), run_id="early") is None
    before = (store / "first/ledger.jsonl").read_bytes()
    assert init("--shares-records-with", "first", site="two", lineage="second", epsilon="1") == 5
    assert "lineage 'first' has reserved 1 run(s) already" in capsys.readouterr().err
    assert (store / "first/ledger.jsonl").read_bytes() == before
    assert not (store / "second").exists()


def test_an_overlap_of_another_unit_is_refused(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path / "data", subjects=["ada", "bo"])
    assert init(site="one", lineage="first") == 0
    assert init("--shares-records-with", "first", "--unit", "example", site="two", lineage="second") == 3
    assert "has the unit 'subject'" in capsys.readouterr().err
    assert not (store / "second").exists()


# ---- check-data


def test_check_data_says_what_is_there_and_never_a_caption(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["images/0.png", f"{CAPTION} again"], ["images/absent.png", CAPTION], ["images/1.png", ""],
            ["images/2.png", "a" * 600]]  # fmt: skip
    data = write_data(tmp_path / "data", rows=rows)
    shutil.copy(data / "images/3.png", data / "images/4.png")
    found = as_json(capsys, "check-data", "data")
    assert (found["records"], found["captions"], found["same_pixels"], found["at_the_limit"]) == (40, 42, 1, 1)
    assert found["captions_per_record"] == {"smallest": 1, "median": 1.0, "largest": 2}
    assert found["skipped"]["there is no such file"] == {"rows": 1, "first_lines": [43]}
    assert found["skipped"]["the caption is empty"] == {"rows": 1, "first_lines": [44]}
    text = printed(capsys, "check-data", "data")
    assert "1 x there is no such file: line 43" in text
    assert "Remove doubles before a lineage is made" in text
    assert "below 1 / 40" in text
    assert not (data / ".fedcanvas-cache").exists()  # no trace beside data that belong to no site yet


def test_check_data_counts_subjects(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path / "data", subjects=["ada", "ada", "bo", ""])
    found = as_json(capsys, "check-data", "data")
    assert (found["unit"], found["subjects"], found["without_subject"]) == ("subject", 2, 10)
    assert found["images_per_subject"] == {"smallest": 10, "median": 15.0, "largest": 20}
    assert any("10 records name no subject" in line for line in found["advice"])


def test_check_data_of_a_site_fills_its_cache_and_adds_new_records_to_the_lineage(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    assert init() == 0
    assert as_json(capsys, "check-data", "site")["records_added_to_lineage"] == 0
    assert len(Ledger(store / "scans").entries) == 1
    cv2.imwrite(str(data / "images/new.png"), np.full((32, 32, 3), 7, np.uint8))
    with open(data / "captions.csv", "a") as file:
        file.write(f"images/new.png,{CAPTION}\r\n")
    found = as_json(capsys, "check-data", "site", "--image-size", "8")
    assert (found["records"], found["records_added_to_lineage"]) == (41, 1)
    assert any("publishes 40 records and has 41" in line for line in found["advice"])
    entry = Ledger(store / "scans").entries[-1]
    assert (entry["kind"], entry["change"]) == ("records", "added")
    assert "41" not in {str(value) for value in entry.values()}  # the ledger tells no number of records
    assert "every picture is known" in printed(capsys, "check-data", "site")

    # More units than are published are refused, and the figure is the person's to raise.
    allow_toy_runs(Path("site"), delta=1e-4)
    assert ask(Path("site"), toy_config(CHEAP)) == RefusalCode.SITE
    settings = Path("site/site.toml")
    settings.write_text(settings.read_text().replace("published-records = 40", "published-records = 50"))

    # The first round of 8 px pictures now decodes nothing.
    allow_toy_runs(Path("site"), delta=1e-4)
    entries = {path.name for path in Path("site/cache").iterdir()}
    assert ask(Path("site"), toy_config(CHEAP)) is None
    assert {path.name for path in Path("site/cache").iterdir()} == entries


def test_check_data_refuses_new_records_that_another_lineage_holds(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    write_data(tmp_path / "other", seed=1)
    assert init() == 0
    assert init(site="two", data="other", lineage="second") == 0
    shutil.copy("other/images/5.png", data / "images/new.png")
    with open(data / "captions.csv", "a") as file:
        file.write(f"images/new.png,{CAPTION}\r\n")
    before = everything_in(store)
    assert "1 of these 41 pictures are records of lineage 'second'" in printed(capsys, "check-data", "site", code=5)
    assert everything_in(store) == before
    found = as_json(capsys, "check-data", "site", "--shares-records-with", "second")
    assert found["records_added_to_lineage"] == 1
    assert Ledger(store / "scans").overlaps == ["second"]
    assert Ledger(store / "second").overlaps == ["scans"]


# ---- a deployed site with a history


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs "one" (two rounds, one of them sent twice) and "two" (one round), answered by a deployed site."""
    (site,) = make_sites(tmp_path_factory.mktemp("history"), sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    config = toy_config(CHEAP)
    for server_round in (1, 2, 2):
        assert ask(site, config, run_id="one", server_round=server_round) is None
    assert ask(site, config, run_id="two") is None
    return site


@pytest.fixture
def site(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; its ledger lies in the folder, so that everything is copied."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(history, tmp_path / "klinik"))


def test_the_ledger_is_shown_run_by_run(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = as_json(capsys, "ledger", "klinik")
    lines = [json.loads(line) for line in (site / "lineages/of-site-0/ledger.jsonl").read_text().splitlines()]
    priced = {line["run"]: line for line in lines if line["kind"] == "run"}
    for row in shown["runs"]:
        charges = [line for line in lines if line["kind"] == "charge" and line["run"] == row["run"]]
        commits = [line for line in lines if line["kind"] == "commit" and line["run"] == row["run"]]
        assert row["steps"] == sum(charge["steps"] for charge in charges)
        assert row["releases"] == len(commits)
        assert row["epsilon_reserved"] == priced[row["run"]]["epsilon"]
        assert row["epsilon_spent"] == commits[-1]["epsilon_after"]
        assert row["delta"] == priced[row["run"]]["delta"]
    totals = shown["totals"]
    assert totals["reserved"] == pytest.approx(sum(line["epsilon"] for line in priced.values()))
    assert totals["left"]["epsilon"] == pytest.approx(8 - totals["reserved"])
    assert 0 < totals["composed"]["epsilon"] < totals["spent"]
    assert (shown["unit"], shown["adjacency"], shown["lifetime"]["filter"]) == ("example", "add/remove", "sum")
    text = printed(capsys, "ledger", "klinik")
    assert "shown, never used to admit" in text
    assert "adjacency add/remove one example, runs add up by sums" in text


def test_verify_names_lines_and_head_and_a_changed_line_is_said_as_it_is(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = site / "lineages/of-site-0/ledger.jsonl"
    found = as_json(capsys, "ledger", "klinik", "--verify")
    lines = ledger.read_bytes().splitlines()
    assert found["verified"] == [{"lineage": "of-site-0", "lines": len(lines), "head": lines[-1][9:73].decode()}]
    assert found["replies"] == 2
    assert "fits" in printed(capsys, "ledger", "klinik", "--verify")
    content = ledger.read_bytes()
    ledger.write_bytes(content.replace(b'"steps":1', b'"steps":0', 1))
    for command in ("ledger", "receipts", "runs", "policy"):
        err = printed(capsys, command, "klinik", code=5)
        assert "was changed or does not follow the line before it" in err
        assert "restore the ledger" in err
    ledger.write_bytes(b"\n".join(lines[:4]) + b"\n")
    assert "is behind what this site has noted" in printed(capsys, "ledger", "klinik", code=5)


def test_an_export_is_the_ledger_line_by_line(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = site / "lineages/of-site-0/ledger.jsonl"
    printed(capsys, "ledger", "klinik", "--export", "copy.jsonl")
    assert Path("copy.jsonl").read_bytes() == ledger.read_bytes()
    assert stat.S_IMODE(Path("copy.jsonl").stat().st_mode) == 0o600
    before = ledger.read_bytes()
    for taken in ("copy.jsonl", str(ledger), "absent/copy.jsonl"):
        assert "hint: " in printed(capsys, "ledger", "klinik", "--export", taken, code=2)
    assert ledger.read_bytes() == before


def test_a_ceiling_rises_when_a_person_types_it_and_says_why(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = site / "lineages/of-site-0/ledger.jsonl"
    before = ledger.read_bytes()
    raise_to = ("ledger", "klinik", "--raise-to", "12", "--reason", "the board agreed")
    for answer in ("yes\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert "not confirmed" in printed(capsys, *raise_to, code=2)
    for wrong in (["--raise-to", "8"], ["--raise-to", "inf"], ["--raise-to", "nan"], ["--raise-to", "12"]):
        reason = [] if wrong[1] == "12" else ["--reason", "x"]
        printed(capsys, "ledger", "klinik", *wrong, *reason, code=2)
    assert ledger.read_bytes() == before
    monkeypatch.setattr(sys, "stdin", io.StringIO("of-site-0\n"))
    text = printed(capsys, *raise_to)
    assert "policy.toml still says 8" in text
    entry = json.loads(ledger.read_text().splitlines()[-1])
    assert (entry["kind"], entry["max_epsilon"], entry["reason"]) == ("ceiling", 12.0, "the board agreed")
    # The lower one counts, and that is the policy's now.
    assert as_json(capsys, "policy", "klinik")["ceiling"]["counts"]["max_epsilon"] == 8
    printed(capsys, "ledger", "klinik", "--raise-to", "13", "--reason", "again", "--yes")
    assert SiteAccount(site, store=site / "lineages", lineage="of-site-0").ledger.lineage.lifetime.max_epsilon == 13


def test_a_lost_anchor_is_renewed_by_a_person_only(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_json(capsys, "ledger", "klinik", "--renew-anchor") == {
        "renewed": False, "before": "fits", "head": SiteAccount(
            site, store=site / "lineages", lineage="of-site-0").ledger.head,
    }  # fmt: skip
    (site / "anchor.json").unlink()
    assert "missing or damaged" in printed(capsys, "ledger", "klinik", code=5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "not confirmed" in printed(capsys, "ledger", "klinik", "--renew-anchor", code=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("renew\n"))
    assert "the anchor is renewed" in printed(capsys, "ledger", "klinik", "--renew-anchor")
    assert "incident" in (site / "site.log").read_text()
    printed(capsys, "ledger", "klinik", "--verify")
    # A damaged ledger is not blessed by it.
    ledger = site / "lineages/of-site-0/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"steps":1', b'"steps":0', 1))
    assert "was changed" in printed(capsys, "ledger", "klinik", "--renew-anchor", "--yes", code=5)


def test_leaving_a_federation_closes_its_runs_and_denies_its_proposals(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allow_toy_runs(site, approve_each_run=True)
    config = toy_config({**CHEAP, "privacy.clipping-norm": 5.0})
    assert ask(site, config, run_id="three") == RefusalCode.APPROVAL
    assert "known: simulation" in printed(capsys, "ledger", "klinik", "--leave-federation", "other", code=2)
    left = as_json(capsys, "ledger", "klinik", "--leave-federation", "simulation", "--reason", "contract ended")
    assert left == {"federation": "simulation", "closed": ["one", "two"], "denied": ["three"]}
    assert ask(site, toy_config(CHEAP), run_id="one", server_round=3) == RefusalCode.DENIED
    assert ask(site, config, run_id="three") == RefusalCode.DENIED
    states = {row["run"]: row["state"] for row in as_json(capsys, "runs", "klinik")["runs"]}
    assert states == {"one": "closed", "two": "closed", "three": "denied"}
    printed(capsys, "ledger", "klinik", "--leave-federation", "simulation", code=2)


# ---- decisions


def test_an_approval_is_of_the_settings_and_prompts_that_were_shown(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allow_toy_runs(site, approve_each_run=True)
    config, other = toy_config(CHEAP), toy_config({**CHEAP, "federation.rounds": 8})
    assert ask(site, config, run_id="new") == RefusalCode.APPROVAL
    (row,) = (row for row in as_json(capsys, "runs", "klinik")["runs"] if row["state"] == "pending")
    text = printed(capsys, "runs", "klinik")
    assert f"fedcanvas client approve klinik new --terms {row['terms']}" in text
    assert "4 rounds" in text
    # The federation proposes something else under the same name before the person decides.
    assert ask(site, other, run_id="new") == RefusalCode.APPROVAL
    assert "asks for other terms" in printed(capsys, "approve", "klinik", "new", "--terms", row["terms"], code=2)
    assert ask(site, other, run_id="new") == RefusalCode.APPROVAL
    (row,) = (row for row in as_json(capsys, "runs", "klinik")["runs"] if row["state"] == "pending")
    assert "8 rounds" in printed(capsys, "approve", "klinik", "new", "--terms", row["terms"])
    # Approved are these settings and these prompts alone.
    assert ask(site, config, run_id="new") == RefusalCode.APPROVAL
    printed(capsys, "approve", "klinik", "new", "--yes")
    assert ask(site, config, run_id="new", prompts=(*PROMPTS.texts, "a fourth")) == RefusalCode.APPROVAL
    assert ask(site, config, run_id="new") == RefusalCode.APPROVAL
    printed(capsys, "approve", "klinik", "new", "--yes")
    assert ask(site, config, run_id="new") is None
    assert "has begun already" in printed(capsys, "approve", "klinik", "new", "--yes", code=2)
    # And once it has begun, another config under its name is refused for what it is.
    assert ask(site, other, run_id="new", server_round=2) == RefusalCode.CONFIG


def test_an_approval_without_terms_asks(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_toy_runs(site, approve_each_run=True)
    assert ask(site, toy_config(CHEAP), run_id="new") == RefusalCode.APPROVAL
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    err = printed(capsys, "approve", "klinik", "new", code=2)
    assert "it would cost each example epsilon" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("approve\n"))
    assert "is approved" in printed(capsys, "approve", "klinik", "new")


def test_a_denied_run_gets_no_answer_and_one_that_has_begun_is_closed(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allow_toy_runs(site, approve_each_run=True)
    config = toy_config(CHEAP)
    assert ask(site, config, run_id="new") == RefusalCode.APPROVAL
    printed(capsys, "deny", "klinik", "new")
    assert ask(site, config, run_id="new") == RefusalCode.DENIED
    assert as_json(capsys, "deny", "klinik", "one", "--reason", "the ethics board said no") == {
        "run": "one", "decision": "denied", "closed": True,
    }  # fmt: skip
    assert ask(site, config, run_id="one", server_round=3) == RefusalCode.DENIED
    entry = json.loads((site / "lineages/of-site-0/ledger.jsonl").read_text().splitlines()[-1])
    assert (entry["kind"], entry["run"], entry["reason"]) == ("closed", "one", "the ethics board said no")
    assert "is closed already" in printed(capsys, "deny", "klinik", "one", code=2)
    assert ask(site, config, run_id="one", server_round=3) == RefusalCode.DENIED


def test_a_run_that_was_never_proposed_is_named_with_those_that_were(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("approve", "deny"):
        assert "no run was proposed yet" in printed(capsys, command, "klinik", "absent", code=2)
    allow_toy_runs(site, approve_each_run=True)
    assert ask(site, toy_config(CHEAP), run_id="spring") == RefusalCode.APPROVAL
    for name in ("sprong", "../runs/spring"):
        assert "spring" in printed(capsys, "approve", "klinik", name, "--yes", code=2)


def test_what_a_federation_calls_itself_cannot_rewrite_a_terminal(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    account = SiteAccount(site, store=site / "lineages", lineage="of-site-0")
    allow_toy_runs(site, approve_each_run=True)
    assert ask(site, toy_config(CHEAP), run_id="new") == RefusalCode.APPROVAL
    proposed = account.proposed("new")
    assert proposed is not None
    account.write_proposed(dataclasses.replace(proposed, summary=["costs epsilon 8\x1b[1A\x1b[2Kcosts nothing\r"]))
    assert "\x1b" not in printed(capsys, "runs", "klinik")


# ---- policy and the group


def test_the_policy_in_words_names_the_ceiling_that_counts_and_the_code(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allow_toy_runs(site, max_epsilon=6.0, code=["0" * 64])
    text = printed(capsys, "policy", "klinik")
    assert "The ledger's own ceiling is epsilon 8" in text
    assert "the policy's is 6" in text
    assert "NOTHING IS ANSWERED NOW" in text
    assert RELEASE_CODE in text
    assert "Never, whatever this file says" in text
    found = as_json(capsys, "policy", "klinik")
    assert found["ceiling"]["counts"]["max_epsilon"] == 6
    assert found["policy"]["max-epsilon"] == 6
    (site / "policy.toml").write_text("max-epsilon = 8.0\ndelta = 1e-3\nsigma = 0.1\n")
    assert "sigma" in printed(capsys, "policy", "klinik", code=3)


@pytest.mark.parametrize("command", ["policy", "runs", "ledger", "receipts"])
def test_a_folder_that_is_no_site_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no site" in printed(capsys, command, str(tmp_path), code=3)


def test_commands_read_while_the_site_is_at_work_and_writing_ones_say_who_holds_the_lock(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SiteAccount.locked
    monkeypatch.setattr(SiteAccount, "locked", lambda self, **_: real(self, wait_seconds=0.0))
    account = SiteAccount(site, store=site / "lineages", lineage="of-site-0")
    with account.locked():
        for command in ("policy", "runs", "ledger", "receipts"):
            printed(capsys, command, "klinik")
        assert "is in use by process" in printed(capsys, "deny", "klinik", "one", code=5)
    assert account.ledger.runs["one"].closed is None


def test_a_reader_between_a_line_and_its_anchor_looks_again(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Ledger._check_anchor, []

    def first_too_early(self: Ledger) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise LedgerError("the ledger is behind its anchor")
        real(self)

    monkeypatch.setattr(Ledger, "_check_anchor", first_too_early)
    printed(capsys, "ledger", "klinik")
    assert len(calls) == 2


def test_the_group_lists_its_commands_and_an_unknown_one_is_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys)
    for name in ("init", "check-data", "policy", "runs", "approve", "deny", "ledger", "receipts"):
        assert f"\n  {name} " in text
    assert "did you mean 'ledger'?" in printed(capsys, "leger", code=2)
    for extra in (["--verify", "--export", "x"], ["--reason", "x"]):
        printed(capsys, "ledger", "x", *extra, code=2)


def test_the_words_of_toy_captions_are_in_no_output(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check-data", "policy", "runs", "ledger", "receipts"):
        text = printed(capsys, command, "klinik")
        assert not set(text.lower().split()) & set(COLOURS)
