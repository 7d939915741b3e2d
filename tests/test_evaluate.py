"""`fedcanvas evaluate`: every figure or its reason, kept as it goes, refused with words where it cannot be believed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from public_pictures import PLAIN, shapes
from released_run import PROMPTS, make_released_run
from safetensors.torch import load_file, save_file
from toy_federation import PROMPTS as TOY_PROMPTS
from toy_federation import make_sites, toy_policy

from client.enrolment import add_records, record_digests
from server.evaluate_cli import EvaluationProgress
from shared.cli import run
from shared.config import DataConfig
from shared.data import open_dataset
from shared.data.encoding import encode_png
from shared.metrics import METRICS, Measurement, Pictures, Setting
from shared.metrics.figure import Figure, Interval
from shared.metrics.public_sets import divide
from shared.privacy.ledger import Ledger
from shared.rundir import load_model, take_lock
from shared.torchvision_operators import ensure_importable

QUICK = ["--metrics", "caption-accuracy,downstream,nearest", "--n", "240", "--trainings", "1"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.metrics.attributes.LEAST_STEPS", 30)
    monkeypatch.setattr("shared.metrics.downstream.FEWEST_STEPS", 20)
    monkeypatch.setattr("shared.metrics.downstream.EPOCHS", 1)
    monkeypatch.setattr("shared.metrics.downstream.PASSES_OF_MLP", 3)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a released run, and a public set of 500 pictures as an .npz."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_released_run(folder / "runs/a")
    write_npz(folder / "public.npz", 500)
    return folder


@pytest.fixture
def place(places: Path, tmp_path: Path) -> Path:
    return shutil.copytree(places, tmp_path / "here")


def write_npz(file: Path, count: int, *, test: int = 0, seed: int = 0, channels: int = 3) -> None:
    """Shapes as an .npz whose captions are the prompts of the model: "a photo of a <class>" says so itself."""
    made = {}
    for split, number, of in (("train", count, seed), ("test", test, seed + 1)):
        if number:
            data = shapes(number, seed=of, channels=channels)
            captions = [captions[0] for captions in data.captions]
            made[f"x_{split}"] = data.images[..., 0] if channels == 1 else data.images
            made[f"y_{split}"] = np.array([PROMPTS.index(caption) for caption in captions])
    np.savez(file, class_names=np.array([f"kind {place}" for place in range(len(PROMPTS))]), **made)


def folder_of_shapes(path: Path, count: int, *, channels: int = 3, seed: int = 0) -> Path:
    """The layout of a folder, whose captions equal the prompts."""
    data = shapes(count, channels=channels, seed=seed)
    (path / "images").mkdir(parents=True)
    lines = ["file_name,text,colour,background"]
    for place, image in enumerate(data.images):
        (path / f"images/{place}.png").write_bytes(encode_png(image))
        kind = next(kind for kind in PLAIN if kind.caption == data.captions[place][0])
        lines.append(f"images/{place}.png,{kind.caption},{kind.colour},{kind.background}")
    (path / "captions.csv").write_text("\n".join(lines) + "\n")
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert run(["evaluate", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run(["evaluate", *map(str, arguments)]) > 0
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "hint: " in error
    return error


# ---- what it says


def test_every_figure_stands_with_what_makes_it_believable(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = folder_of_shapes(place / "public", 500)
    found = evaluated(capsys, place / "runs/a", "--reference", reference, *QUICK)
    assert list(found["metrics"]) == ["caption-accuracy", "downstream", "nearest"]
    assert found["reference"]["parts"] == {"fit": 200, "reference": 100, "floor": 100, "test": 100}
    for entry in found["metrics"].values():
        for table in entry["figures"]:
            figure = Figure.from_dict(table)
            assert figure.n == 240
            assert figure.reference.startswith("public, ")
            assert figure.interval.how
            assert figure.interval.low <= figure.value <= figure.interval.high
            assert figure.floor is not None
            assert figure.seeds["pictures"] == [1]
    assert (found["privacy"]["epsilon"], found["privacy"]["simulated"]) == (1.5, True)
    stored = json.loads((place / "runs/a/evaluations" / found["key"] / "evaluation.json").read_text())
    assert stored["metrics"] == found["metrics"]


def test_the_text_says_the_same_numbers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = folder_of_shapes(place / "public", 500)
    found = evaluated(capsys, place / "runs/a", "--reference", reference, *QUICK)
    assert run(["evaluate", str(place / "runs/a"), "--reference", str(reference), *QUICK]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for metric, entry in found["metrics"].items():
        for table in entry["figures"]:
            numbers = [table["value"], table["interval"]["low"], table["interval"]["high"], table["floor"]]
            shown = [f"{number:.4f}" if abs(number) < 10 else f"{number:.2f}" for number in numbers]
            label = f"{metric}: {table['name']} "
            rests = [line.removeprefix(label) for line in lines if line.startswith(label)]
            (told,) = (rest.split() for rest in rests if not rest.startswith("of "))
            assert told[:5] == [shown[0], shown[1], "to", shown[2], shown[3]]
    assert "epsilon 1.5 at delta 1e-04, add/remove one example" in text


@pytest.mark.slow
def test_the_same_command_gives_the_same_figures_and_another_seed_others(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = folder_of_shapes(place / "public", 500)
    arguments = [place / "runs/a", "--reference", reference, *QUICK]
    first = evaluated(capsys, *arguments, "--out", place / "one")
    again = evaluated(capsys, *arguments, "--out", place / "two")
    other = evaluated(capsys, *arguments, "--out", place / "one", "--seed", "5")
    figures = [[entry["figures"] for entry in found["metrics"].values()] for found in (first, again, other)]
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]
    assert first["key"] == again["key"] != other["key"]


@pytest.mark.slow
def test_pictures_of_an_evaluation_that_is_kept_elsewhere_are_on_the_page(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = place / "page.html"
    evaluated(
        capsys, place / "runs/a", "--reference", place / "public.npz", "--metrics", "nearest", "--n", "24",
        "--out", place / "elsewhere", "--html", page,
    )  # fmt: skip
    assert "is missing, or is no picture" not in page.read_text()
    assert page.read_text().count("data:image/png") == 2


def test_control_characters_of_a_public_set_do_not_reach_the_terminal(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = folder_of_shapes(place / "public", 500)
    table = reference / "captions.csv"
    table.write_text(table.read_text().replace(",red,", ",\x1b[2Jred,"))
    assert run(["evaluate", str(place / "runs/a"), "--reference", str(reference), "--n", "12", "--metrics",
                "caption-accuracy"]) == 0  # fmt: skip
    found = capsys.readouterr()
    assert "\x1b" not in found.out


def test_what_cannot_be_measured_says_why_and_is_not_a_number(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = place / "public.npz"  # whose captions are no prompts of the model
    asking = [place / "runs/a", "--reference", reference, "--n", "24", "--metrics"]
    found = evaluated(capsys, *asking, "caption-accuracy,clip-score,nearest")["metrics"]
    for name in ("caption-accuracy", "clip-score"):
        assert "figures" not in found[name]
        assert found[name]["not_measured"]
    assert "no prompt equals a caption" in found["caption-accuracy"]["not_measured"]
    assert run(["evaluate", *map(str, asking), "clip-score,nearest"]) == 0
    assert "not measured: " in capsys.readouterr().out
    assert run(["evaluate", *map(str, asking), "clip-score"]) == 4  # a script must see that there is no figure
    shown = capsys.readouterr()
    assert "not measured: " in shown.out
    assert "none of the metrics could be measured" in shown.err


def test_nothing_is_drawn_for_a_metric_that_lacks_what_it_needs(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.evaluator.pictures", lambda *_, **__: pytest.fail("drawn"))
    asking = [place / "runs/a", "--reference", place / "public.npz", "--n", "24", "--metrics", "clip-score"]
    assert run(["evaluate", *map(str, asking)]) == 4
    assert "no CLIP model was named" in capsys.readouterr().out


def test_a_test_split_of_the_file_is_what_is_tested_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(place / "both.npz", 400, test=70)
    found = evaluated(
        capsys, place / "runs/a", "--reference", place / "both.npz", "--metrics", "nearest", "--n", "40"
    )
    assert found["reference"]["parts"]["test"] == 70
    assert any("tested on x_test of both.npz" in text for text in found["conversions"])


def simulated_on(place: Path, *data: Path) -> Path:
    """The run as a simulation on `data` leaves it."""
    (place / "runs/a/simulation.json").write_text(json.dumps({"data": [str(path) for path in data]}))
    return place / "runs/a"


def test_pictures_that_simulated_sites_trained_on_are_never_tested_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = folder_of_shapes(place / "public", 500)
    copied = shutil.copytree(trained, place / "under-another-name")
    asking = [simulated_on(place, trained), "--reference", copied, *QUICK]
    found = evaluated(capsys, *asking)
    assert found["metrics"]["downstream"]["not_measured"].startswith("100 of the 100 pictures to test on")
    assert "--test names" in found["metrics"]["downstream"]["hint"]
    assert "figures" in found["metrics"]["caption-accuracy"]
    assert any("trained on 500 of the 500 public pictures" in text for text in found["conversions"])
    assert not (place / "runs/a-sites").exists()
    others = folder_of_shapes(place / "others", 60, seed=5)
    found = evaluated(capsys, *asking, "--test", others)
    assert found["metrics"]["downstream"]["figures"][0]["reference_n"] == 60


def test_some_pictures_that_simulated_sites_trained_on_are_left_out_of_the_test_and_counted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = folder_of_shapes(place / "public", 500)
    half = shutil.copytree(whole, place / "half")
    lines = (whole / "captions.csv").read_text().splitlines()
    (half / "captions.csv").write_text("\n".join(lines[:251]) + "\n")
    found = evaluated(capsys, simulated_on(place, half), "--reference", whole, *QUICK)
    left = found["reference"]["parts"]["test"]
    assert 25 < left < 75  # about half of a hundred
    assert f"{100 - left} pictures to test on are left out" in found["conversions"][-1]
    assert found["metrics"]["downstream"]["figures"][0]["reference_n"] == left


def test_training_pictures_that_are_gone_are_said_to_be(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated = simulated_on(place, place / "moved.npz")
    found = evaluated(capsys, simulated, "--reference", place / "public.npz", "--metrics", "nearest", "--n", "24")
    assert any("is not at" in text and "moved.npz" in text for text in found["conversions"])


def test_a_model_folder_alone_is_measured_beside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(place / "runs/a/model", place / "given")
    found = evaluated(capsys, model, "--reference", place / "public.npz", "--metrics", "nearest", "--n", "24")
    assert Path(found["file"]).parent.parent == place / "given-evaluations"


def test_from_inside_a_model_folder_figures_and_caches_land_beside_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(place / "runs/a/model", place / "given"))
    found = evaluated(capsys, ".", "--reference", place / "public.npz", "--metrics", "nearest", "--n", "24")
    assert Path(found["file"]).parent.parent == place / "given-evaluations"
    assert (place / ".fedcanvas-reference").is_dir()


def test_the_model_folder_of_a_run_is_measured_as_its_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name for file in (place / "runs/a").iterdir()}
    asking = ["--reference", place / "public.npz", "--metrics", "nearest", "--n", "24"]
    found = evaluated(capsys, place / "runs/a/model", *asking)
    assert Path(found["file"]).parent.parent == place / "runs/a/evaluations"
    assert {file.name for file in (place / "runs/a").iterdir()} - before == {"evaluations"}


def test_fewer_pictures_than_prompts_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(capsys, place / "runs/a", "--reference", place / "public.npz", "--metrics", "nearest", "--n", "5")
    assert any("5 pictures are fewer than the model's 12 prompts" in text for text in found["conversions"])


@pytest.mark.slow
def test_how_uneven_public_captions_are_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = (folder_of_shapes(place / "even", 500) / "captions.csv").read_text().splitlines()
    shutil.copytree(place / "even", place / "uneven")
    for row in range(250):  # half of them get one caption
        file, _, *attributes = lines[row].split(",")
        lines[row] = ",".join([file, PROMPTS[0], *attributes])
    (place / "uneven/captions.csv").write_text("\n".join([head, *lines]) + "\n")
    said = {}
    for name in ("even", "uneven"):
        asking = [place / "runs/a", "--reference", place / name, "--metrics", "nearest", "--n", "24"]
        said[name] = [text for text in evaluated(capsys, *asking)["conversions"] if "so even" in text]
    assert said["even"] == []
    # 1/2 + 1/24 have the first caption, and 1/12 would be even.
    [text] = said["uneven"]
    assert 0.36 < float(text.split(", but ")[1].split("%")[0]) / 100 < 0.56


# ---- interrupted, and gone on with


class _Counting:
    """A metric that counts how often it is measured, and is interrupted when it is told so."""

    measured: list[str] = []  # noqa: RUF012
    interrupt = False

    @classmethod
    def prepare(cls, setting: Setting) -> _Counting:
        return cls()

    def measure(self, pictures: Pictures) -> Measurement:
        if _Counting.interrupt:
            raise KeyboardInterrupt
        _Counting.measured.append(pictures.digest)
        return Measurement([Figure("count", 1.0, Interval(1, 1, "x"), "higher", len(pictures), "none", 0)])


@pytest.fixture
def _with_counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(METRICS._entries, "zz-counting", "test_evaluate:_Counting")
    _Counting.measured.clear()
    yield
    _Counting.interrupt = False


@pytest.mark.usefixtures("_with_counting")
def test_an_interrupted_evaluation_keeps_what_it_has_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(place / "runs/a"), "--reference", str(place / "public.npz"), "--n", "24"]
    _Counting.interrupt = True
    assert run(["evaluate", *arguments, "--metrics", "nearest,zz-counting"]) == 130
    error = capsys.readouterr().err
    assert "what was measured so far is kept" in error
    assert "fedcanvas evaluate" in error
    assert "--metrics nearest,zz-counting" in error
    (folder,) = (place / "runs/a/evaluations").iterdir()
    assert (folder / "nearest.json").is_file()
    assert not (folder / "evaluation.json").exists()
    kept = (folder / "nearest.json").stat().st_mtime_ns
    _Counting.interrupt = False
    found = evaluated(capsys, *arguments, "--metrics", "nearest,zz-counting")
    assert (folder / "nearest.json").stat().st_mtime_ns == kept
    assert list(found["metrics"]) == ["nearest", "zz-counting"]
    evaluated(capsys, *arguments, "--metrics", "zz-counting")
    assert len(_Counting.measured) == 1
    evaluated(capsys, *arguments, "--metrics", "zz-counting", "--fresh")
    assert len(_Counting.measured) == 2


@pytest.mark.usefixtures("_with_counting")
def test_measuring_one_again_keeps_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [place / "runs/a", "--reference", place / "public.npz", "--n", "24"]
    first = evaluated(capsys, *arguments, "--metrics", "nearest,zz-counting")
    (folder,) = (place / "runs/a/evaluations").iterdir()
    kept = json.loads((folder / "nearest.json").read_text())
    (folder / "nearest.json").write_text(json.dumps({**kept, "versions": {"torch": "2.0.0"}}))
    found = evaluated(capsys, *arguments, "--metrics", "zz-counting", "--fresh")
    assert list(found["metrics"]) == ["nearest", "zz-counting"]
    # The command is of all that the file holds, and the versions are those that measured.
    assert found["command"] == first["command"]
    assert "--metrics nearest,zz-counting" in found["command"]
    assert found["metrics"]["nearest"]["versions"] == {"torch": "2.0.0"}
    assert "versions" not in found["metrics"]["zz-counting"]
    assert {"torch-fidelity", "scikit-learn"} <= found["versions"].keys()


@pytest.mark.usefixtures("_with_counting")
def test_a_bug_in_one_metric_is_told_and_the_others_are_measured(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: _Counting, pictures: Pictures) -> Measurement:
        raise ValueError("a shape is wrong")

    monkeypatch.setattr(_Counting, "measure", broken)
    monkeypatch.setitem(METRICS._entries, "aa-first", METRICS._entries["zz-counting"])
    which = ["--metrics", "aa-first,nearest"]
    arguments = [place / "runs/a", "--reference", place / "public.npz", "--n", "24", *which]
    found = evaluated(capsys, *arguments)
    assert found["metrics"]["aa-first"]["not_measured"] == "ValueError: a shape is wrong"
    assert "Traceback" in Path(found["metrics"]["aa-first"]["hint"].rpartition(" ")[2]).read_text()
    assert "figures" in found["metrics"]["nearest"]


@pytest.mark.slow
def test_a_damaged_partial_result_is_measured_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [place / "runs/a", "--reference", place / "public.npz", "--n", "24", "--metrics", "nearest"]
    first = evaluated(capsys, *arguments)
    file = Path(first["file"]).with_name("nearest.json")
    file.write_text(file.read_text()[:50])
    assert evaluated(capsys, *arguments)["metrics"]["nearest"]["figures"] == first["metrics"]["nearest"]["figures"]


def test_features_of_public_pictures_are_made_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [place / "runs/a", "--reference", place / "public.npz", "--n", "24", "--metrics", "nearest"]
    evaluated(capsys, *arguments)
    cache = place / "runs/.fedcanvas-reference"
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")}
    assert any(name.startswith("features-") for name in before)
    assert any(name.startswith("attributes-") for name in before)
    evaluated(capsys, *arguments, "--fresh")
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("*.safetensors")} == before


# ---- bad input


def test_a_reference_must_be_named_and_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing --reference" in refused(capsys, place / "runs/a")
    assert "there is no data at" in refused(capsys, place / "runs/a", "--reference", place / "nowhere")


def test_an_empty_reference_and_one_of_a_single_picture_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "empty").mkdir()
    (place / "empty/captions.csv").write_text("file_name,text\n")
    assert "has no rows" in refused(capsys, place / "runs/a", "--reference", place / "empty")
    single = folder_of_shapes(place / "single", 1)
    assert "too few for its parts" in refused(capsys, place / "runs/a", "--reference", single)


def test_grey_pictures_of_mixed_sizes_are_prepared_as_the_runs_own_and_that_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = folder_of_shapes(place / "grey", 120, channels=1)
    (grey / "images/0.png").write_bytes(encode_png(np.zeros((30, 50, 1), np.uint8)))
    found = evaluated(capsys, place / "runs/a", "--reference", grey, "--metrics", "nearest", "--n", "24")
    assert any("squares of 8 px, colour" in text for text in found["conversions"])
    assert "figures" in found["metrics"]["nearest"]


def test_weights_that_are_not_finite_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "runs/a/model"
    weights = load_file(folder / "generator.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "generator.safetensors")
    card = json.loads((folder / "model.json").read_text())
    card["files"]["generator.safetensors"] = hashlib.sha256((folder / "generator.safetensors").read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(card))
    assert "not finite" in refused(capsys, place / "runs/a", "--reference", place / "public.npz")


def test_an_extractor_that_is_none_and_an_unknown_metric_are_refused_before_anything_is_drawn(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [place / "runs/a", "--reference", place / "public.npz"]
    assert "unknown metric 'fidd'" in refused(capsys, *arguments, "--metrics", "fidd")
    assert "inceptoin" in refused(capsys, *arguments, "--extractor", "inceptoin")
    (place / "note.pth").write_text("this is no network")
    asking = [*arguments, "--extractor", place / "note.pth", "--metrics", "nearest", "--n", "24"]
    assert run(["evaluate", *map(str, asking), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert "note.pth" in found["metrics"]["nearest"]["not_measured"]


def test_a_run_that_is_not_finished_says_how_to_finish_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "runs/a/model")
    assert "is not finished" in refused(capsys, place / "runs/a", "--reference", place / "public.npz")


@pytest.mark.slow
def test_two_evaluations_at_one_time_do_not_mix(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [place / "runs/a", "--reference", place / "public.npz", "--metrics", "nearest", "--n", "24"]
    found = evaluated(capsys, *arguments)
    with take_lock(Path(found["file"]).parent):
        assert "in use by another process" in refused(capsys, *arguments)


def test_on_a_terminal_bars_come_down_again(capsys: pytest.CaptureFixture[str]) -> None:
    with EvaluationProgress(terminal=True) as progress:
        progress.metric("fid", 1, 2)
        progress.line("features")
        progress.step(1, 2)
        progress.step(2, 2)
    with EvaluationProgress(terminal=False) as progress:
        progress.metric("fid", 1, 2)
        progress.line("features")
        progress.step(2, 2)
    assert "1 of 2: fid\n  features\n" in capsys.readouterr().err


def drawn_by_hand(place: Path, count: int, out: Path) -> Path:
    """The pictures that an evaluation of `count` measures, as `generate` writes them; without its sheet."""
    whose = ["--model", str(place / "runs/a"), "--prompts", str(place / "runs/a/prompts.txt")]
    assert run(["generate", *whose, "--total", str(count), "--seed", "1", "--out", str(out)]) == 0
    (out / "sheet.png").unlink()
    return out


def test_pictures_that_are_measured_are_those_that_generate_draws(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[np.ndarray] = []
    monkeypatch.setitem(METRICS._entries, "nearest", "test_evaluate:_Counting")
    monkeypatch.setattr(_Counting, "measure", lambda self, pictures: measured.append(pictures.images) or _none())
    evaluated(capsys, place / "runs/a", "--reference", place / "public.npz", "--metrics", "nearest", "--n", "40")
    files = drawn_by_hand(place, 40, place / "pictures").glob("*.png")
    drawn = {
        int(file.stem.rpartition("-")[2]): cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files
    }
    assert sorted(drawn) == list(range(40))
    assert np.array_equal(measured[0], np.stack([drawn[place] for place in range(40)]))


def _none() -> Measurement:
    return Measurement([Figure("count", 1.0, Interval(1, 1, "x"), "higher", 1, "none", 0)])


@pytest.mark.slow
def test_figures_are_those_of_torch_fidelitys_own_command_from_what_generate_wrote(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inception with random weights, the published ones being out of reach; the public part as PNG files."""
    ensure_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), place / "inception.pth")
    n = 24
    found = evaluated(
        capsys, place / "runs/a", "--reference", place / "public.npz", "--extractor", place / "inception.pth",
        "--metrics", "fid,kid,is,prdc", "--n", n,
    )  # fmt: skip
    values = {
        figure["name"]: figure["value"] for entry in found["metrics"].values() for figure in entry["figures"]
    }
    generated, real = drawn_by_hand(place, n, place / "generated"), place / "real"
    real.mkdir()
    dataset = open_dataset(place / "public.npz", config=load_model(place / "runs/a").config.data)
    for row, image in enumerate(divide(dataset, n=n).reference.images):
        (real / f"{row:03d}.png").write_bytes(encode_png(image))
    code = (
        "from shared.torchvision_operators import ensure_importable; ensure_importable()\n"
        "from torch_fidelity.fidelity import main; main()"
    )
    command = [
        sys.executable, "-c", code, "--input1", str(generated), "--input2", str(real), "--fid", "--kid", "--prc",
        "--json", "--kid-subset-size", str(n), "--feature-extractor", "inception-v3-compat",
        "--feature-extractor-weights-path", str(place / "inception.pth"), "--cpu", "--no-cache", "--silent",
        "--no-samples-shuffle",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    theirs = json.loads(ended.stdout)
    named = {name.partition(" by ")[0]: value for name, value in values.items()}
    assert named["frechet distance"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3, rel=1e-3)
    assert named["kernel distance"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-3)
    assert named["precision"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert named["recall"] == pytest.approx(theirs["recall"], abs=1e-3)


# ---- a site's private data


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A deployed site of 400 records whose policy allows questions up to epsilon 4."""
    (made,) = make_sites(tmp_path / "site", sizes=(400,), seed=None, policy=toy_policy(max_query_epsilon=4.0))
    return made


@pytest.fixture
def asking(tmp_path: Path) -> Path:
    """A released run whose prompts are the captions of the site's records."""
    return make_released_run(tmp_path / "runs/asking", prompts=TOY_PROMPTS.texts)


def charges(site: Path) -> list[str]:
    (ledger,) = site.rglob("ledger.jsonl")
    return [json.loads(line)["kind"] for line in ledger.read_text().splitlines()]


def test_a_sites_private_data_are_refused_as_reference_and_nothing_of_them_is_kept(
    asking: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (site, site / "data.npz"):
        error = refused(capsys, asking, "--reference", path, "--n", "24")
        assert "is private: site site-0" in error
        assert "--charge EPSILON" in error
    assert not (asking / "evaluations").exists()
    assert not (asking.parent / ".fedcanvas-reference").exists()
    assert charges(site) == ["opened"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_copies_of_a_lineages_records_are_refused_before_anything_is_decoded_into_a_cache(
    asking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    machine = tmp_path / "machine"
    monkeypatch.setenv("FEDCANVAS_STATE", str(machine))
    (far,) = make_sites(tmp_path / "far/away/from/here", sizes=(30,), seed=None, store=str(machine))
    opened = open_dataset(far / "data.npz", config=DataConfig.model_validate({}), cache_dir=far / "cache")
    add_records(Ledger(machine / "of-site-0"), record_digests(opened, machine))
    with np.load(far / "data.npz") as arrays:
        held, labels, names = arrays["x_train"], arrays["y_train"], arrays["class_names"]
    public = {"x_train": 255 - held, "y_train": labels, "x_test": 255 - held, "y_test": labels, "class_names": names}
    np.savez(tmp_path / "copied.npz", **{**public, f"x_{split}": held})
    error = refused(capsys, asking, "--reference", tmp_path / "copied.npz", "--n", "24")
    assert f"is private: lineage 'of-site-0' in {machine}" in error
    assert not (asking.parent / ".fedcanvas-reference").exists()


def test_told_to_charge_the_ledger_one_noised_figure_comes_out(
    asking: Path, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [asking, "--reference", site, "--charge", "2", "--yes", "--n", "60"]
    first = evaluated(capsys, *arguments)
    assert first["charged"]
    assert first["epsilon"] == pytest.approx(2.0, abs=1e-6)
    # 400 records with noise below 5 standard deviations of it: false alarm below 1e-6.
    assert abs(first["noised_count"] - 400) < 5 * 2**0.5 * first["noise_multiplier"] * 1.01
    assert 0 <= first["low"] <= first["value"] <= first["high"] <= 1
    assert "charge" in charges(site)
    prompts = len(TOY_PROMPTS.texts)
    assert {key: first["question"][key] for key in ("pictures", "seed", "prompts", "chance")} == {
        "pictures": 60, "seed": 1, "prompts": prompts, "chance": 1 / prompts,
    }  # fmt: skip
    assert len(first["question"]["model"]) == len(first["question"]["classifier"]) == 64
    again = evaluated(capsys, *arguments)
    assert not again["charged"]
    assert again["value"] == first["value"]
    assert run(["evaluate", *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    assert f"{first['value']:.3f}" in text
    assert "noise included" in text
    assert f"guessing gets at most {1 / prompts:.3g}" in text


def test_without_a_yes_nothing_is_charged(
    asking: Path, site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    error = refused(capsys, asking, "--reference", site, "--charge", "2", "--n", "60")
    assert "costs each example epsilon 2" in error
    assert "a record with none of these prompts counts as wrong" in error
    assert "nothing was charged" in error
    assert charges(site) == ["opened"]


def test_a_charge_above_the_policy_or_of_public_data_is_refused(
    asking: Path, site: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, asking, "--reference", site, "--charge", "5", "--yes", "--n", "60")
    assert "max-query-epsilon" in error
    assert charges(site) == ["opened"]
    refused(capsys, asking, "--reference", place / "public.npz", "--charge", "1", "--yes", "--n", "60")
    error = refused(capsys, asking, "--reference", site, "--charge", "1", "--yes", "--metrics", "fid")
    assert "--charge asks one question" in error
    for stray in (["--yes"], ["--delta", "1e-6"]):
        assert "belong to --charge" in refused(capsys, asking, "--reference", place / "public.npz", *stray)


# ---- beside another run


@pytest.mark.slow
def test_two_evaluated_runs_are_compared_and_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_released_run(place / "runs/b", seed=1)
    reference = folder_of_shapes(place / "public", 500)
    for name in "ab":
        page = ["--html", place / f"{name}.html"]
        evaluated(capsys, place / f"runs/{name}", "--reference", reference, *QUICK, *page)
        assert "downstream: cnn accuracy" in (place / f"{name}.html").read_text()
    runs = [str(place / f"runs/{name}") for name in "ab"]
    assert run(["compare", *runs, "--html", str(place / "both.html")]) == 0
    assert "cnn accuracy" in capsys.readouterr().out
    assert (place / "both.html").read_text().startswith("<!doctype html>")
    assert run(["compare", *runs, "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert run(["compare", runs[0]]) == 2
    assert "one run is nothing to compare" in capsys.readouterr().err
    shutil.rmtree(place / "runs/b/evaluations")
    assert run(["compare", *runs]) == 8
    assert "fedcanvas evaluate" in capsys.readouterr().err
