"""`fedcanvas simulate` from data to pictures: what it writes, what it says, how it stops and goes on.

One tiny federation with the production functions; the oracles are the files on disk and the accountants.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from toy_federation import PROMPTS, make_sites, toy_config

from server.app import REFERENCE, ReferencePlace, _probe
from server.sheet import contact_sheet
from shared.cli import run
from shared.data import ImageCaptionDataset, unseen_split
from shared.errors import DataError
from shared.observer import SilentObserver
from shared.privacy.accounting import spent_epsilon
from shared.rundir import RunDirectory
from simulations.cli import _two_digits, _with_public_figures
from simulations.progress import RunProgress, duration
from simulations.shapes import make_shapes

SMALL = [
    "--rounds", "3", "--set", "evaluation.samples=96", "--set", "evaluation.every=2", "--set", "training.fakes=8",
    "--set", "training.generator-batch=8", "--set", "compute.checkpoint-every=2", "--set", "compute.server-threads=1",
    "--set", "privacy.retry-slack=3", "--set", "federation.published-records=90",
]  # fmt: skip
ROUNDS = 3


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data of 90 shapes and a reference set of 300 from another seed."""
    folder = tmp_path_factory.mktemp("simulate")
    make_shapes(folder / "data", count=90, seed=1, image_size=8)
    make_shapes(folder / "reference", count=300, seed=2, image_size=8)
    return folder


def quicken(patched: pytest.MonkeyPatch) -> None:
    """The classifier."""
    patched.setattr("shared.metrics.attributes.LEAST_STEPS", 10)
    patched.setattr("shared.metrics.attributes.LEAST_PICTURES", 2)


@pytest.fixture(autouse=True)
def _quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def arguments(places: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(places / "data"), "--reference", str(places / "reference")]
    return ["simulate", "toy", *data, "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def finished(places: Path) -> tuple[Path, dict[str, Any], str]:
    """(run directory, result as printed, talk) of an undisturbed run."""
    out = places / "runs/a"
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(io.StringIO()) as said, redirect_stderr(
        io.StringIO()
    ) as talk:
        quicken(patched)
        assert run(arguments(places, out, "--json")) == 0, talk.getvalue()
    return out, json.loads(said.getvalue()), talk.getvalue()


def test_the_result_on_stdout_is_the_one_on_disk(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, result, _ = finished
    assert json.loads((out / "result.json").read_text()) == result


def test_a_run_leaves_sheet_samples_model_and_figures(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, result, _ = finished
    sheet = cv2.imread(str(out / "sheet.png"))
    assert sheet.shape[1] > 400
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["round-00002.png", "round-00003.png"]
    assert {p.name for p in (out / "model").iterdir()} == {
        "generator.safetensors", "discriminator.safetensors", "model.json",
    }  # fmt: skip
    accuracy = result["metrics"]["caption-accuracy"]
    figures = {figure["name"]: figure for figure in accuracy["figures"]}
    assert {figure["n"] for figure in figures.values()} == {96}
    attributes = ("colour", "shape", "size", "background")
    assert set(figures) == {"accuracy", *(f"accuracy of {name}" for name in attributes)}
    assert figures["accuracy"]["chance"] == pytest.approx(1 / 96)
    assert result["seconds"]["training"] > 0
    assert not list(out.rglob("*.tmp"))


def test_figures_during_training_stand_in_the_events_with_intervals(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    out, result, _ = finished
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    quality = {event["server_round"]: event["quality"] for event in events if "quality" in event}
    assert sorted(quality) == [2, 3]
    for figures in quality.values():
        assert figures["n"] == 384
        (kid,) = figures["kid"].values()
        for measured in (figures["caption-accuracy"]["accuracy"], kid):
            value, low, high = measured
            assert low <= value <= high
        of_captions, of_distance = figures["about"]["caption-accuracy"], figures["about"]["kid"]
        real, chance = of_captions["marks"]["accuracy"]
        final = result["metrics"]["caption-accuracy"]["figures"][0]
        assert real == pytest.approx(final["floor"], abs=1e-6)  # the same classifier and the same real pictures
        assert chance == pytest.approx(1 / 96, abs=1e-6)
        assert of_captions["extractor"].startswith("classifier ")
        assert of_distance["extractor"].startswith("local ")
        assert of_captions["seeds"]["pictures"] == [2]
        assert all(about["reference"] and about["reference_n"] > 0 for about in (of_captions, of_distance))
    assert result["seconds"]["quality_during_training"] > 0


def test_epsilon_in_the_result_is_that_of_the_steps_taken(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, result, _ = finished
    privacy = result["privacy"]
    assert set(privacy["epsilon_per_site"]) == {"site-00", "site-01"}
    assert privacy["steps_charged"] == ROUNDS
    expected = spent_epsilon(
        sampling_rate=privacy["sampling_rate"], noise_multiplier=privacy["noise_multiplier"], steps=ROUNDS,
        delta=privacy["delta"],
    )  # fmt: skip
    for epsilon in privacy["epsilon_per_site"].values():
        assert epsilon["prv"] == pytest.approx(expected.prv)
        assert epsilon["pld"] == pytest.approx(expected.pld)
        assert epsilon["rdp"] == pytest.approx(expected.rdp)
        assert epsilon["epsilon"] == max(epsilon["prv"], epsilon["pld"]) < privacy["target_epsilon"]
    assert (privacy["adjacency"], privacy["unit"], privacy["entropy"]) == ("add/remove", "example", "seeded")


def test_every_simulated_site_has_a_ledger_that_says_the_same(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, result, _ = finished
    for site, epsilon in result["privacy"]["epsilon_per_site"].items():
        text = (out.with_name("a-sites") / site / "lineages" / site / "ledger.jsonl").read_text()
        charges = [entry for entry in map(json.loads, text.splitlines()) if entry["kind"] == "charge"]
        assert [entry["server_round"] for entry in charges] == [1, 2, 3]
        charged = charges[0]
        expected = spent_epsilon(
            sampling_rate=charged["sampling_rate"], noise_multiplier=charged["noise_multiplier"], steps=len(charges),
            delta=result["privacy"]["delta"],
        )  # fmt: skip
        assert epsilon["epsilon"] == pytest.approx(expected.epsilon)
        about = result["privacy"]["ledger_per_site"][site]
        assert epsilon["epsilon"] < about["reserved"] <= about["lifetime"] == result["privacy"]["target_epsilon"]
        assert about["left"] == pytest.approx(about["lifetime"] - about["reserved"])


@pytest.mark.slow
def test_a_site_whose_ceiling_is_too_low_refuses_and_the_others_go_on(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(places, tmp_path / "a", "--max-epsilon", "9", "--max-epsilon", "site-01=4", "--json")
    assert run(given) == 0
    captured = capsys.readouterr()
    privacy = json.loads(captured.out)["privacy"]
    assert privacy["epsilon_per_site"]["site-01"]["epsilon"] == 0 < privacy["epsilon_per_site"]["site-00"]["epsilon"]
    assert privacy["ledger_per_site"]["site-01"]["refused"] == {"server_round": 1, "code": "site"}
    assert [privacy["ledger_per_site"][site]["lifetime"] for site in ("site-00", "site-01")] == [9.0, 4.0]
    assert "site site-01 refused with code 'site'" in captured.err
    # The site knows why, and what would fit; the server's side does not.
    log = (tmp_path / "a-sites/site-01/site.log").read_text()
    assert re.search(r"costs epsilon [78][.\d]* .* has epsilon 4 .*a run of epsilon 4 at delta 1\.0e-04 would", log)
    for file in (tmp_path / "a").rglob("*"):
        assert not file.is_file() or b"still fit" not in file.read_bytes()


@pytest.mark.parametrize("value", ["site-07=4", "=", "x", "0", "-1", "site-00=nan"])
def test_a_ceiling_that_is_none_is_refused(
    value: str, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(places, tmp_path / "a", "--max-epsilon", value)) == 2
    assert "sites are site-00 to site-01" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_run_that_was_removed_is_begun_afresh(places: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(arguments(places, tmp_path / "a", "--set", "privacy.name=none", "--rounds", "1")) == 0
        shutil.rmtree(tmp_path / "a")


def test_the_run_says_before_it_starts_how_long_it_will_take(finished: tuple[Path, dict[str, Any], str]) -> None:
    lines = finished[2].splitlines()
    estimate = next(place for place, line in enumerate(lines) if line.startswith("this will take about"))
    first_round = next(place for place, line in enumerate(lines) if line.startswith("round 1/"))
    assert estimate < first_round
    assert not any("\r" in line or "\x1b" in line for line in lines)  # plain lines where there is no terminal


@pytest.mark.slow
def test_the_next_commands_that_are_named_work(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in finished[1]["next"]:
        program, *rest = shlex.split(command)
        assert program == "fedcanvas"
        few = ["--n", "96", "--metrics", "caption-accuracy"] if rest[0] == "evaluate" else []
        assert run([*rest, *few]) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 17  # 16 and their sheet


def test_nothing_of_a_site_is_in_the_run_directory(
    finished: tuple[Path, dict[str, Any], str], places: Path
) -> None:
    out, _, talk = finished
    data = places / "data"
    pixels = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (data / "images").iterdir()}
    for file in out.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert hashlib.sha256(content).hexdigest() not in pixels
            assert b"000000.png" not in content  # names of a site's files
            assert file.suffix not in (".npy", ".u8")
    assert "000000.png" not in talk
    # What only the sites know lies beside it.
    assert (out.with_name("a-sites") / "site-00/indices.npy").is_file()


def test_captions_that_are_no_prompts_appear_nowhere(tmp_path: Path, places: Path) -> None:
    secret = "a photograph of Johanna Quixbury"
    data = tmp_path / "data"
    make_shapes(data, count=90, seed=3, image_size=8)
    table = (data / "captions.csv").read_text().splitlines()
    rows = [line.split(",") for line in table]
    text = [",".join([row[0], secret, *row[2:]]) if place else table[0] for place, row in enumerate(rows)]
    (data / "captions.csv").write_text("\n".join(text) + "\n")
    out = tmp_path / "run"
    given = ["simulate", "toy", "--data", str(data), "--out", str(out), *SMALL, "--set", "privacy.name=none"]
    assert run(given) == 0
    for file in out.rglob("*"):
        assert not file.is_file() or b"Quixbury" not in file.read_bytes(), file


def test_settings_come_from_scenario_then_file_then_options_then_set(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(
        "seed = 5\n[federation]\nrounds = 7\nsites = 5\n[privacy]\nclipping-norm = 3.0\n[training]\nfakes = 16\n"
    )
    monkeypatch.setattr("simulations.cli._train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = [
        "simulate", "toy", "--data", str(places / "data"), "--out", str(tmp_path / "a"), "--config",
        str(tmp_path / "run.toml"), "--rounds", "8", "--sites", "3", "--set", "federation.rounds=9",
        "--set", "privacy.name=none", "--set", "federation.published-records=90",
    ]  # fmt: skip
    assert run(given) == 130
    stored = tomllib.loads((tmp_path / "a/config.toml").read_text())
    assert stored["federation"]["rounds"] == 9  # --set over --rounds
    assert stored["federation"]["sites"] == 3  # option over file
    assert stored["privacy"]["clipping-norm"] == 3.0  # file over scenario
    assert stored["seed"] == 5
    assert stored["privacy"]["sampling-rate"] == 0.2  # scenario


def stop_after(monkeypatch: pytest.MonkeyPatch, server_round: int, error: BaseException) -> None:
    plain = RunProgress.on_round

    def on_round(self: RunProgress, number: int, figures: Mapping[str, float]) -> None:
        plain(self, number, figures)
        if number == server_round:
            raise error

    monkeypatch.setattr(RunProgress, "on_round", on_round)


def test_ctrl_c_then_the_command_that_is_named_ends_in_the_same_weights(
    finished: tuple[Path, dict[str, Any], str], places: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "stopped run"
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        assert run(arguments(places, out)) == 130
    hint = capsys.readouterr().err.splitlines()[-1]
    command = re.search(r"`fedcanvas (.*)`", hint)
    assert command is not None
    assert run([*shlex.split(command[1]), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights_digest"] == finished[1]["weights_digest"]
    assert result["privacy"]["steps_charged"] == ROUNDS  # its noised sum had arrived: nothing was asked again
    for name in ("events.jsonl", "samples/round-00002.png", "model/generator.safetensors"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_run_whose_data_have_changed_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    make_shapes(data, count=90, seed=1, image_size=8)
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt())
        given = ["simulate", "toy", "--data", str(data), "--out", str(out), *SMALL]
        assert run([*given, "--set", "privacy.name=none"]) == 130
    table = data / "captions.csv"
    table.write_text(table.read_text().replace("a small", "a tiny", 1))
    assert run(["simulate", "--resume", "--out", str(out)]) == 8
    assert "the data have changed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_sigkill_at_any_moment_then_resume_ends_in_the_same_weights(
    finished: tuple[Path, dict[str, Any], str], places: Path, tmp_path: Path, seed: int
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "shared.cli", *arguments(places, out, "--resume", "--json")]
    delays = np.random.default_rng(seed).uniform(0.5, 14, size=3)
    for delay in delays:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["weights_digest"] == finished[1]["weights_digest"]
    assert ROUNDS <= result["privacy"]["steps_charged"] <= ROUNDS + 3


def test_a_finished_run_that_is_resumed_shows_its_result_again(
    finished: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "--resume", "--out", str(finished[0])]) == 0
    text = capsys.readouterr().out
    accuracy, privacy = finished[1]["metrics"]["caption-accuracy"], finished[1]["privacy"]
    for figure in accuracy["figures"]:
        name = figure["name"].removeprefix("accuracy of ") if " of " in figure["name"] else "all"
        assert re.search(rf"^  {name} +{figure['value']:.3f} ", text, flags=re.MULTILINE)
    assert re.search(rf"site-01 +{privacy['epsilon_per_site']['site-01']['prv']:.3f} ", text)
    assert all(word in text for word in ("PRV", "PLD", "RDP", "at delta 1e-04", "add/remove", "from seed 0"))


def test_a_finished_run_that_was_moved_names_the_place_where_it_lies(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(finished[0], moved)
    assert run(["simulate", "--resume", "--out", str(moved)]) == 0
    text = capsys.readouterr().out
    assert str(moved / "sheet.png") in text
    assert str(finished[0]) not in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--rounds", "4"], "federation.rounds 3 -> 4"),
        (["--data", "/"], "another data"),
        (["--partition", "dirichlet"], "another partition"),
    ],
)
def test_resume_with_another_request_is_refused_and_says_what_differs(
    finished: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    assert run(["simulate", "--resume", "--out", str(finished[0]), *change]) == 8
    assert named in capsys.readouterr().err


def test_an_out_that_holds_a_run_is_refused_at_once(
    finished: tuple[Path, dict[str, Any], str], places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(places, finished[0])) == 8
    assert "--resume" in capsys.readouterr().err


def test_resume_of_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", "--resume", "--out", str(tmp_path / "typo")]) == 8
    assert "no run directory" in capsys.readouterr().err


def test_a_reference_set_that_is_a_sites_own_data_is_refused(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(places / "data")
    assert run(["simulate", "toy", "--data", data, "--reference", data, "--out", str(tmp_path / "a"), *SMALL]) == 2
    assert "--reference names a site's own data" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_reference_set_that_a_real_site_holds_is_refused_and_nothing_of_it_is_decoded(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site,) = make_sites(tmp_path / "real", sizes=(60,), seed=None)
    reference = ["--reference", str(site / "data.npz")]
    data = ["--data", str(places / "data")]
    assert run(["simulate", "toy", *data, *reference, "--out", str(tmp_path / "runs/a"), *SMALL]) == 4
    assert "is private: site site-0" in capsys.readouterr().err
    assert not (tmp_path / "runs/a").exists()
    assert not (tmp_path / "runs/.fedcanvas-reference").exists()


def test_a_run_whose_reference_became_a_sites_own_ends_before_it_is_read(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path / "real", sizes=(60,), seed=None)
    place = ReferencePlace(str(site / "data.npz"), "train", str(tmp_path / "cache"))
    with RunDirectory.create(
        tmp_path / "run", config=toy_config(), prompts=PROMPTS.texts, documents={REFERENCE: asdict(place)}
    ) as rundir, pytest.raises(DataError, match="is private"):
        _probe(rundir, SilentObserver())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("arrays", "split"), [(("x_train", "x_test"), "test"), (("x_train",), "train")])
def test_the_reference_of_arrays_with_a_test_split_is_that_split(
    tmp_path: Path, arrays: tuple[str, ...], split: str
) -> None:
    np.savez(tmp_path / "a.npz", **{name: np.zeros(1) for name in arrays})
    assert unseen_split(tmp_path / "a.npz") == split
    assert unseen_split(tmp_path) == "train"


def test_several_data_are_one_site_each(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.cli._train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = ["simulate", "--out", str(tmp_path / "a"), "--set", "data.image-size=8", "--delta", "1e-4"]
    given += ["--data", str(places / "data"), "--data", str(places / "reference"), "--set", "privacy.name=none"]
    given += ["--set", "discriminator.name=toy"]
    assert run(given) == 130
    assert tomllib.loads((tmp_path / "a/config.toml").read_text())["federation"]["sites"] == 2
    sites = [tomllib.loads((tmp_path / f"a-sites/site-0{place}/site.toml").read_text()) for place in (0, 1)]
    assert [Path(site["data"]).name for site in sites] == ["data", "reference"]
    assert not any("indices" in site for site in sites)


def test_several_data_and_another_number_of_sites_are_refused(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["--data", str(places / "data"), "--data", str(places / "reference")]
    assert run(["simulate", "toy", "--out", str(tmp_path / "a"), *two, "--sites", "3"]) == 2
    assert "--data names 2 folders and --sites 3" in capsys.readouterr().err


def test_too_few_records_for_the_plan_are_refused_with_the_next_step(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", "toy", "--out", str(tmp_path / "a"), "--data", str(places / "data")]) == 4
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == "error: too few records for the plan: 90 are there, it is made for 400"
    assert "federation.published-records=90" in hint


@pytest.fixture(scope="module")
def of_people(places: Path) -> Path:
    """The same shapes as of thirty people with three pictures each, one after the other, but four of nobody."""
    folder = places / "people"
    shutil.copytree(places / "data", folder)
    head, *rows = (folder / "captions.csv").read_text().splitlines()
    named = [f"{row},{'' if place < 4 else f'person-{place % 30:02d}'}" for place, row in enumerate(rows)]
    (folder / "captions.csv").write_text("\n".join([f"{head},subject_id", *named]) + "\n")
    return folder


BY_SUBJECT = ["--set", "privacy.unit=subject", "--set", "privacy.images-per-subject=2"]


@pytest.mark.slow
def test_a_run_whose_unit_is_the_subject_says_so_wherever_it_says_epsilon(
    of_people: Path, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(
        "server.evaluation.contact_sheet", lambda *a, **k: (notes.extend(k.get("notes", [])), contact_sheet(*a, **k))[1]
    )
    out = tmp_path / "run"
    given = ["simulate", "toy", "--data", str(of_people), "--out", str(out), *SMALL, *BY_SUBJECT]
    assert run([*given, "--set", "federation.published-records=30"]) == 0
    text, talk = capsys.readouterr()
    assert "add/remove one subject" in text
    assert "records name no subject: they are not used" in talk
    assert re.search(r"6 subjects a step, noise multiplier .* for one subject", talk)
    assert any("epsilon" in note and "one subject" in note for note in notes)
    privacy = json.loads((out / "result.json").read_text())["privacy"]
    assert (privacy["adjacency"], privacy["unit"]) == ("add/remove", "subject")
    card = json.loads((out / "model/model.json").read_text())
    assert (card["plan"]["unit"], card["spent"]["unit"]) == ("subject", "subject")
    assert run(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "add/remove one subject" in page
    assert "One subject (a subject_id with all its images" in page
    assert "30 subjects as published" in page
    # Nobody is at two sites, and pictures of nobody are at none.
    rows = [np.load(p).tolist() for p in sorted((tmp_path / "run-sites").glob("site-*/indices.npy"))]
    assert sorted(row for of_site in rows for row in of_site) == list(range(4, 90))
    people = [{row % 30 for row in of_site} for of_site in rows]
    assert [len(of_site) for of_site in people] == [15, 15]
    assert not people[0] & people[1]


@pytest.mark.slow
def test_subjects_are_counted_where_they_are_the_unit(
    of_people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simulations.cli._train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = ["simulate", "--data", str(of_people), "--delta", "1e-3", "--rounds", "3", "--set", "data.image-size=8"]
    given += ["--set", "discriminator.name=toy"]
    assert run([*given, *BY_SUBJECT, "--sites", "2", "--out", str(tmp_path / "a")]) == 130
    assert "published subjects of all sites: 30, rounded" in capsys.readouterr().err
    published = ["--set", "federation.published-records=90", "--set", "privacy.sampling-rate=0.5"]
    assert run([*given, *BY_SUBJECT, *published, "--out", str(tmp_path / "b")]) == 4
    assert "too few subjects for the plan: 30 are there, it is made for 90" in capsys.readouterr().err


def test_data_without_subjects_are_refused_where_they_are_the_unit(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(places, tmp_path / "a", *BY_SUBJECT)) == 4
    assert "error: data has no column 'subject_id', and the privacy unit is the subject" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_damaged_rows_are_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shapes(tmp_path / "data", count=90, seed=1, image_size=8)
    for place in range(5):
        (tmp_path / f"data/images/00000{place}.png").write_bytes(b"no image")
    monkeypatch.setattr("simulations.cli._train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    given = ["simulate", "toy", "--out", str(tmp_path / "a"), "--data", str(tmp_path / "data")]
    assert run([*given, "--set", "federation.published-records=90", "--set", "privacy.name=none"]) == 130
    talk = capsys.readouterr().err
    assert "row 2, images/000000.png: it cannot be decoded as an image: skipped" in talk
    assert "5 rows are skipped in all" in talk


@pytest.mark.parametrize(
    ("records", "published", "rate"),
    [(20_000, 20_000, 0.102), (364, 360, 0.25), (5_000, 5_000, 0.25), (60_000, 60_000, 0.0341), (1_049, 1_000, 0.25)],
)
def test_public_figures_that_nobody_gave_are_chosen_by_the_rule_and_said(
    records: int, published: int, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _with_public_figures({"privacy.delta": 1e-5}, records)
    assert config.federation.published_records == published
    assert config.privacy.sampling_rate == rate
    assert config.expected_batch_size == pytest.approx(min(published / 4, 2048), rel=0.01)
    talk = capsys.readouterr().err
    assert f"{published:,}" in talk
    assert f"q = {rate:g}" in talk


def test_rounding_to_two_digits_is_off_by_at_most_five_percent() -> None:
    for count in range(10, 3000):
        assert abs(_two_digits(count) - count) <= 0.0501 * count


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_now_and_then_and_not_one_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(100, terminal=False) as progress:
        for server_round in range(1, 101):
            progress.on_round(server_round, {"fakes_accuracy": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["round 1/100", "round 100/100"]


def test_a_long_warm_start_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 5))  # a step takes five seconds
    monkeypatch.setattr("simulations.progress.time.monotonic", lambda: float(next(clock)))
    with RunProgress(100, terminal=False) as progress:
        for step in range(1, 11):
            progress.on_warm_start(step, 10)
    assert capsys.readouterr().err.splitlines() == [
        "warm start 4/10, 30 s left of it", "warm start 8/10, 10 s left of it",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar_with_the_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(3, terminal=True) as progress:
        for server_round in (1, 2, 3):
            progress.on_round(server_round, {"fakes_accuracy": 0.5})
        progress.on_message("samples: [bold]x[/bold]")
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "left" in text
    assert "samples: [bold]x[/bold]" in text  # no markup is read from names


def test_every_picture_of_a_dataset_is_at_one_site(finished: tuple[Path, dict[str, Any], str]) -> None:
    rows = [np.load(p) for p in sorted(finished[0].with_name("a-sites").glob("site-*/indices.npy"))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(90))


def test_the_type_that_sites_hold_shows_nothing_when_printed() -> None:
    dataset = ImageCaptionDataset(images=np.zeros((1, 8, 8, 3), np.uint8), captions=[("secret words",)])
    assert "secret" not in repr(dataset)
