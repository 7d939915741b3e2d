"""What people get from a run: pictures from prompts, the same ones every time, and a page that needs no network."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from released_run import CONFIG

from server.cli import _names
from server.report import report_html
from server.sheet import contact_sheet
from shared.cli import run
from shared.config import RunConfig
from shared.data.encoding import encode_png
from shared.errors import ConfigError, RunDirectoryError
from shared.models import build_discriminator, build_generator
from shared.privacy.accounting import EpsilonReport, spent_epsilon
from shared.privacy.plan import make_plan
from shared.rundir import RunDirectory, load_model
from shared.text import build_encoder

SPENT = EpsilonReport(1.5, 1.4, 1.7, 1e-4, 5, unit="subject")
PROMPTS = ("a red circle", "<script>alert(1)</script> & 'quotes'", "一个红色的圆")


def make_run(path: Path, config: RunConfig = CONFIG, *, rounds: int = 5) -> Path:
    """A run directory as training leaves it, with the weights a model starts with."""
    plan, encoder = make_plan(config), build_encoder(config.text)
    with RunDirectory.create(path, config=config, prompts=PROMPTS) as rundir:
        for server_round in range(1, rounds + 1):
            rundir.charge(server_round, steps=1, reserved_steps=plan.reserved_steps)
            rundir.append_event(
                {"server_round": server_round, "fakes_accuracy": 0.5 + server_round / 100, "fakes_loss": 0.7,
                 "generator_loss": float("nan") if server_round == 1 else 0.6, "generator_steps": 2.0 * server_round}
            )  # fmt: skip
            rundir.append_timing(server_round, 0.25)
        rundir.write_bytes(rundir.sample_name(rounds), encode_png(np.zeros((8, 8, 3), np.uint8)))
        rundir.save_model(
            generator=build_generator(config, embedding_dim=encoder.dim).state_dict(),
            discriminator=build_discriminator(config, embedding_dim=encoder.dim).state_dict(),
            card={"encoder_fingerprint": encoder.fingerprint, "plan": plan.to_dict(), "spent": SPENT.to_dict()},
        )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a")


# ---- generate


def test_pictures_are_png_files_of_the_model_named_by_prompt_and_number(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    assert run(["generate", "a red circle", "a blue star", "--model", str(model), "--n", "2", "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "a-red-circle-000.png", "a-red-circle-001.png", "a-blue-star-000.png", "a-blue-star-001.png", "sheet.png",
    }  # fmt: skip
    assert cv2.imread(str(out / "a-red-circle-000.png")).shape == (8, 8, 3)


def test_a_picture_is_what_the_generator_draws_from_its_latents(model: Path, tmp_path: Path) -> None:
    given = ["generate", "a red circle", "--model", str(model), "--n", "3", "--seed", "4"]
    assert run([*given, "--out", str(tmp_path)]) == 0
    loaded = load_model(model)
    # By hand: latents of picture 2 straight from numpy, one forward, to bytes.
    rng = np.random.Generator(np.random.Philox(key=np.array([4, 2], dtype=np.uint64)))
    latents = torch.from_numpy(rng.standard_normal(8).astype(np.float32))[None]
    image = loaded.generator(latents, loaded.encoder.encode(["a red circle"]))[0].permute(1, 2, 0)
    expected = ((image + 1) * 127.5).round().numpy()
    written = cv2.cvtColor(cv2.imread(str(tmp_path / "a-red-circle-002.png")), cv2.COLOR_BGR2RGB)
    assert np.abs(written.astype(float) - expected).max() <= 1


def test_more_pictures_and_more_prompts_leave_the_others_as_they_were(model: Path, tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    assert run(["generate", "a red circle", "--model", str(model), "--n", "2", "--out", str(few)]) == 0
    assert run(["generate", "x", "a red circle", "--model", str(model / "model"), "--n", "5", "--out", str(many)]) == 0
    assert (few / "a-red-circle-001.png").read_bytes() == (many / "a-red-circle-001.png").read_bytes()


def test_the_sheet_names_the_unit_that_its_epsilon_is_of(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(
        "server.sheet.contact_sheet", lambda *a, **k: (notes.extend(k["notes"]), contact_sheet(*a, **k))[1]
    )
    assert run(["generate", "a", "--model", str(model), "--n", "1", "--out", str(tmp_path)]) == 0
    assert notes == ["epsilon 1.5 per site, add/remove one subject"]


def test_another_seed_draws_other_pictures(model: Path, tmp_path: Path) -> None:
    for seed in ("1", "2"):
        given = ["generate", "a", "--model", str(model), "--n", "1", "--seed", seed]
        assert run([*given, "--out", str(tmp_path / seed)]) == 0
    assert (tmp_path / "1/a-000.png").read_bytes() != (tmp_path / "2/a-000.png").read_bytes()


def test_prompts_from_a_file_and_the_result_as_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("# public\na red circle\n\n一个红色的圆\n", encoding="utf-8")
    given = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--model", str(model), "--n", "1"]
    assert run([*given, "--json", "--out", str(tmp_path / "p")]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [made["prompt"] for made in result["pictures"]] == ["a red circle", "一个红色的圆"]
    assert all(Path(file).is_file() for made in result["pictures"] for file in made["files"])
    assert Path(result["sheet"]).is_file()
    assert "note" not in err  # both were trained on


def test_a_prompt_it_was_not_trained_on_is_drawn_and_noted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "a unicorn", "--model", str(model), "--n", "1", "--out", str(tmp_path)]) == 0
    assert "1 of 1 prompts were not among the 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "empty"), ("   ", "empty"), ("x" * 600, "600 characters"), ("a\nb", "one line")]
)
def test_a_prompt_that_is_none_is_code_9_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str, said: str
) -> None:
    assert run(["generate", prompt, "--model", str(model), "--out", str(tmp_path / "p")]) == 9
    assert said in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_model_folder_that_is_none_is_code_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "a star", "--model", str(tmp_path), "--out", str(tmp_path / "p")]) == 8
    assert "no model at" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["generator.safetensors", "model.json"])
def test_a_damaged_model_is_refused(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = make_run(tmp_path / "run") / "model" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    assert run(["generate", "a star", "--model", str(tmp_path / "run"), "--out", str(tmp_path / "p")]) == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompts", []), ("prompts", "a red circle"), ("prompts", ["a", 3]), ("prompts", [["a"]]),
        ("prompts", ["a\nb"]), ("prompts", [" a"]), ("prompts", {"a": 1}), ("prompts", None),
        ("spent", [1]), ("spent", "x"), ("spent", {"delta": 1e-4}), ("plan", "x"), ("plan", None),
        ("spent.epsilon", "x"), ("spent.epsilon", None), ("spent.epsilon", True), ("spent.epsilon", [1]),
        ("spent.epsilon", float("nan")), ("spent.epsilon", -1), ("spent.epsilon", 10**400), ("spent.delta", "x"),
        ("spent.unit", 3), ("spent.adjacency", None), ("files", "x"), ("files", []), ("config", 3),
    ],
)  # fmt: skip
def test_a_card_of_other_types_is_refused_when_the_model_is_read(
    model: Path, tmp_path: Path, key: str, value: Any
) -> None:
    shutil.copytree(model / "model", tmp_path / "model")
    card = json.loads((tmp_path / "model/model.json").read_text())
    place, _, name = key.rpartition(".")
    (card[place] if place else card)[name] = value
    (tmp_path / "model/model.json").write_text(json.dumps(card))
    with pytest.raises((RunDirectoryError, ConfigError), match=re.escape(str(tmp_path / "model/model.json"))):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "3", "", "{", '{"files": {}}'])
def test_a_card_that_is_no_table_is_refused_when_the_model_is_read(model: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(model / "model", tmp_path / "model")
    (tmp_path / "model/model.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"model\.json is damaged"):
        load_model(tmp_path / "model")


def test_names_of_files_hold_no_separator_and_differ_where_prompts_differ() -> None:
    prompts = ["../../etc/passwd", "a star!", "a star?", "???", "🟥", "a" * 300, "a" * 301, "АБ", "ＡＢＣ", "c\u202eon"]
    names = _names(prompts)
    assert len(set(names)) == len(prompts)
    for name in names:
        assert "/" not in name
        assert not name.startswith((".", "-"))
        assert len(name.encode()) < 100
        assert name.isprintable()


# ---- report


class Page(HTMLParser):
    """What a browser would do with it: what it fetches, what it runs, what has no text alternative."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.without_alternative: list[str] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.scripts += tag == "script" or any(name.startswith("on") for name in given)
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = given.get(name) or ""
            if value and not value.startswith(("data:image/png;base64,", "#")):
                self.fetched.append(value)
        if (tag == "img" and not given.get("alt")) or (tag == "svg" and not given.get("aria-label")):
            self.without_alternative.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page(model: Path) -> str:
    return report_html(RunDirectory.open(model))


def test_the_page_fetches_nothing_and_runs_nothing_whatever_stands_in_a_prompt(page: str) -> None:
    parsed = Page(page)
    assert parsed.fetched == []
    assert parsed.scripts == 0
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)  # matplotlib's clip paths are within the page
    assert PROMPTS[1] in parsed.words  # shown as text


def test_every_picture_and_curve_has_a_text_alternative(page: str) -> None:
    assert Page(page).without_alternative == []
    assert "moving average: 0.51 at round 1, 0.55 at 5" in page
    assert page.count("<svg") == 5


def test_epsilon_on_the_page_is_that_of_the_steps_charged(page: str) -> None:
    plan = make_plan(CONFIG)
    spent = spent_epsilon(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=5, delta=plan.delta
    )
    row = f'<th scope="row">site 02</th><td>{spent.prv:.3f}</td><td>{spent.pld:.3f}</td><td>{spent.rdp:.3f}</td>'
    assert row in page
    assert "1e-04" in page
    assert "add/remove one example" in page


def test_the_page_says_what_was_protected_and_what_not(page: str) -> None:
    assert "Not protected:" in page
    assert "come from a seed that is written down" in page


def test_every_setting_and_its_meaning_is_on_the_page(page: str) -> None:
    for key in CONFIG.to_flat():
        assert f'<th scope="row">{key}</th>' in page


def test_a_run_without_privacy_says_epsilon_is_infinite(tmp_path: Path) -> None:
    text = report_html(RunDirectory.open(make_run(tmp_path / "a", CONFIG.replaced({"privacy.name": "none"}))))
    assert "epsilon = inf" in text
    assert "Nothing was protected" in text
    assert "PRV" not in text


def test_a_run_that_goes_on_can_be_reported_and_one_without_a_round_cannot(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a", config=CONFIG, prompts=PROMPTS) as rundir:
        with pytest.raises(RunDirectoryError, match="no finished round"):
            report_html(rundir)
        rundir.charge(1, steps=1, reserved_steps=9)
        rundir.append_event({"server_round": 1, "fakes_accuracy": 0.5})
        assert "at round 1 of 5" in report_html(rundir)


def test_the_command_writes_one_file_and_says_where(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report", str(model), "--json", "--out", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(model), "report": str(tmp_path / "page.html")}
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(model: Path, page: str) -> None:
    assert report_html(RunDirectory.open(model)) == page
