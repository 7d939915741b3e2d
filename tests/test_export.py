"""An export alone, with numpy, onnxruntime and Pillow, draws what the model draws; it appears whole or not at all."""

from __future__ import annotations

import ast
import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from signed_release import signed_run
from test_text import tiny_model, tiny_tokenizer

from fedcanvas import Generator
from server import export
from server.export import export_onnx
from shared import disk
from shared.bundle import verify
from shared.cli import run
from shared.errors import DataError, FedCanvasError, RunDirectoryError, UsageError
from shared.models import draw_latents
from shared.text import FUNCTION_WORDS, TransformersEncoder

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [
    "a large red circle on a white background", "Ein GROSSER roter Kreis!", "红色的圆 🟥", "دائرة حمراء على خلفية",
    "zyzzyva", "the of", "?!", "  ＡＢＣ ﬁ é e\u0301 ❤\ufe0f ß ก็ส้ม 3rd\u00a0of  ", "क्षत्रिय \u200d x" + "y" * 400,
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the released model `model` and its export `onnx`."""
    folder = tmp_path_factory.mktemp("export")
    signed_run(folder / "runs/a", {"privacy.sampling-rate": 1.0}).release(folder / "model")
    assert run(["export", str(folder / "model"), "--format", "onnx", "--out", str(folder / "onnx")]) == 0
    return folder


@pytest.fixture(scope="module")
def generator(place: Path) -> Generator:
    return Generator.load(place / "model")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """The exporter takes seconds; what comes after it does not depend on its work."""
    graph = (place / "onnx/generator.onnx").read_bytes()
    monkeypatch.setattr(export, "_graph", lambda generator: graph)


def drawn_alone(folder: Path, tmp_path: Path, *arguments: str) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Pictures and text entries of the folder's own script, in a process that knows nothing of the project."""
    out = tmp_path / "pictures"
    command = [sys.executable, "-I", "-W", "error", str(folder / "generate.py"), "--out", str(out), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = []
    for path in sorted(out.iterdir()):
        with Image.open(path) as image:
            found.append((np.asarray(image), dict(image.info)))
    return found


def apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


# ---- the same pictures


@pytest.mark.parametrize(("seed", "truncation"), [(0, 1.0), (7, 0.6), (2**63 - 1, 0.0)])
def test_the_folder_alone_draws_the_models_pictures(
    place: Path, generator: Generator, tmp_path: Path, seed: int, truncation: float
) -> None:
    alone = drawn_alone(
        place / "onnx", tmp_path, *PROMPTS, "--n", "3", "--seed", str(seed), "--truncation", str(truncation)
    )
    expected = generator.generate(PROMPTS, n=3, seed=seed, truncation=truncation)
    assert len(alone) == len(expected) == 3 * len(PROMPTS)
    for (pixels, about), picture in zip(alone, expected, strict=True):
        assert apart(pixels, picture.array) <= 1
        assert about == picture.about


@pytest.mark.parametrize("truncation", ["0.12345678", "1e-07", "1"])
def test_a_picture_says_with_how_much_it_was_drawn_to_the_last_digit(
    place: Path, tmp_path: Path, truncation: str
) -> None:
    ((_, about),) = drawn_alone(place / "onnx", tmp_path, "a", "--truncation", truncation)
    assert about["truncation"] == truncation


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "--truncation", "nan"], "--truncation 0 to 1"), (["a", "--truncation", "1.1"], "--truncation 0 to 1"),
        (["a", "--truncation", "-1"], "--truncation 0 to 1"), (["a", "--truncation", "x"], "invalid float"),
        (["a", "--seed", "-1"], "--seed 0 to 2^63 - 1"), (["a", "--seed", str(2**63)], "--seed 0 to 2^63 - 1"),
        (["a", "--seed", "1.5"], "invalid int"), (["a", "--n", "0"], "--n is 1 to"),
        (["a", "--n", "-2"], "--n is 1 to"), (["a", "--n", "100001"], "--n is 1 to"),
        (["a", " "], "no prompt is empty"), ([""], "no prompt is empty"),
    ],
)  # fmt: skip
def test_what_the_script_cannot_draw_it_refuses_as_the_command_does(
    place: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    # Without the exit code of a usage error nothing could tell it from a graph that broke.
    command = [sys.executable, "-I", "-W", "error", str(place / "onnx/generate.py"), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 2, 5, 64, 130])
def test_the_graph_takes_any_number_of_pictures(place: Path, generator: Generator, count: int) -> None:
    session = onnxruntime.InferenceSession(str(place / "onnx/generator.onnx"))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    latents = draw_latents(3, range(count), 8).numpy()
    text = generator.model.encoder.encode(prompts).numpy()
    (pictures,) = session.run(None, {"latents": latents, "text": text})
    assert pictures.dtype == np.uint8
    expected = generator.arrays(prompts, seeds=[3] * count, indices=range(count))
    assert apart(pictures, expected) <= 1


def test_the_scripts_encoder_is_the_models(place: Path, generator: Generator) -> None:
    # Its function alone, without the lines that draw.
    tree = ast.parse((place / "onnx/generate.py").read_text(encoding="utf-8"))
    parts = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)]
    names: dict[str, Any] = {"ENCODER": json.loads((place / "onnx/encoder.json").read_text(encoding="utf-8"))}
    exec(compile(ast.Module(parts, []), "generate.py", "exec"), names)
    rng = np.random.default_rng(0)
    alphabet = [*"abc ABC äß ..,-!", *"红圆の가ก้क्", "🟥", "\ufe0f", "\u200d", "\u0301", "ﬁ", *sorted(FUNCTION_WORDS)]
    texts = ["".join(rng.choice(alphabet, size=rng.integers(1, 30))).strip() or "x" for _ in range(300)]
    rows = generator.model.encoder.encode([*texts, *PROMPTS]).numpy()
    for text, row in zip([*texts, *PROMPTS], rows, strict=True):
        np.testing.assert_array_equal(names["embedding"](text), row, err_msg=repr(text))


def test_the_encoder_table_holds_all_that_the_fingerprint_is_of(place: Path, generator: Generator) -> None:
    table = json.loads((place / "onnx/encoder.json").read_text(encoding="utf-8"))
    parts = ("hashing", table["version"], table["dim"], table["word_weight"], table["pair_weight"],
             table["pair_reach"], table["function_words"])  # fmt: skip
    assert hashlib.sha256(json.dumps(parts).encode()).hexdigest() == table["fingerprint"]
    assert table["fingerprint"] == generator.model.card["public"]["encoder_fingerprint"]


# ---- the folder


def test_the_script_is_short_and_needs_three_packages(place: Path) -> None:
    text = (place / "onnx/generate.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) - 1 <= 40  # but for the docstring, which is one line
    assert max(map(len, code)) <= 120
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name not in sys.stdlib_module_names} == {"numpy", "onnxruntime", "PIL"}


def test_the_folder_holds_card_prompts_and_what_it_cost(place: Path, generator: Generator) -> None:
    folder = place / "onnx"
    assert {path.name for path in folder.iterdir()} == {
        "generator.onnx", "encoder.json", "generate.py", "card.json", "prompts.txt", "README.md",
    }  # fmt: skip
    assert json.loads((folder / "card.json").read_text()) == json.loads((place / "model/card.json").read_text())
    assert (folder / "prompts.txt").read_bytes() == (place / "model/prompts.txt").read_bytes()
    text = (folder / "README.md").read_text()
    assert f"epsilon {generator.privacy['epsilon_max']:.4g} at delta 0.0001, add/remove one example" in text
    assert generator.digest in text
    assert "NOT VERIFIED" not in text


def test_the_graph_is_sound_and_says_nothing_of_the_machine_that_made_it(place: Path, generator: Generator) -> None:
    content = (place / "onnx/generator.onnx").read_bytes()
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props} == generator.provenance
    assert {domain.domain for domain in model.opset_import} == {""}  # no operators but ONNX's own
    for trace in (str(ROOT), "film_generator", "site-packages", "torch"):
        assert trace.encode() not in content
    free = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    assert free == ["pictures"] * 3


@pytest.mark.usefixtures("_quick")
def test_the_command_says_what_was_verified_and_how_near_the_pictures_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(place / "model"), "--out"]
    assert run([*command, str(tmp_path / "one"), "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["difference"] <= 1
    assert told["folder"] == str(tmp_path / "one")
    assert f"{place / 'model'}: signed by " in err
    assert run([*command, str(tmp_path / "two")]) == 0
    assert "of 255 at most\nnext:\n  python " in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_model_gives_the_same_files(place: Path, generator: Generator, tmp_path: Path) -> None:
    export_onnx(generator, tmp_path / "again")
    for path in (place / "onnx").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"data.channels": 1, "data.image-size": 28, "discriminator.name": "front", "generator.width": 16},
        {"generator.attention": True, "data.image-size": 32, "discriminator.name": "front", "text.dim": 37},
    ],
    ids=["grey", "attention"],
)
def test_other_shapes_of_models_are_exported_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0, **changes})
    generator = Generator.load(made.path)
    assert export_onnx(generator, tmp_path / "onnx") <= 1
    alone = drawn_alone(tmp_path / "onnx", tmp_path, *PROMPTS, "--n", "2", "--seed", "4")
    for (pixels, about), picture in zip(alone, generator.generate(PROMPTS, n=2, seed=4), strict=True):
        assert apart(pixels, picture.array) <= 1
        assert about == picture.about


# ---- what is refused


@pytest.mark.slow
def test_an_altered_model_is_exported_only_unverified_and_says_so_from_then_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = Path(shutil.copytree(place / "model", tmp_path / "altered"))
    card = json.loads((altered / "card.json").read_text())
    card["privacy"]["epsilon_max"] = 0.01
    (altered / "card.json").write_text(json.dumps(card))
    command = ["export", str(altered), "--out", str(tmp_path / "onnx")]
    assert run(command) == 10
    assert "card.json is not the file that was released" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()
    assert run([*command, "--unverified"]) == 0
    assert "NOT VERIFIED" in capsys.readouterr().err
    assert "NOT VERIFIED" in (tmp_path / "onnx/README.md").read_text()
    ((_, about),) = drawn_alone(tmp_path / "onnx", tmp_path, "a star")
    assert about["warning"] == "UNVERIFIED"


def test_an_unknown_format_or_a_folder_that_is_there_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(place / "model"), "--format", "onyx", "--out", str(tmp_path / "x")]) == 2
    assert "did you mean 'onnx'?" in capsys.readouterr().err
    assert run(["export", str(place / "model"), "--out", str(tmp_path)]) == 8
    assert "is there already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_quick")
def test_a_disk_that_fills_up_half_way_leaves_nothing(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(path: Path, content: bytes, **options: Any) -> Path:
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, content, **options)

    whole = disk.write_whole
    monkeypatch.setattr(disk, "write_whole", write)
    with pytest.raises(RunDirectoryError, match="onnx cannot be written: No space left on device"):
        export_onnx(generator, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_quick")
def test_a_model_without_prompts_is_not_exported(generator: Generator, tmp_path: Path) -> None:
    # What draws could be had, but neither its README nor the comparison has a prompt then.
    other = Generator(replace(generator.model, prompts=()), name="x", digest="0" * 64, line="")
    with pytest.raises(RunDirectoryError, match="names no prompt"):
        export_onnx(other, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_quick")
def test_a_graph_that_draws_other_pictures_is_not_written(
    place: Path, tmp_path: Path
) -> None:
    other = Generator.load(place / "model")
    for weights in other.model.generator.parameters():
        weights.mul_(1.2)
    with pytest.raises(RunDirectoryError, match="draws other pictures than the model, up to"):
        export_onnx(other, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer, as save_pretrained writes them."""
    from shared.text import quiet_transformers

    quiet_transformers()
    folder = tmp_path_factory.mktemp("clip")
    tiny_model("clip").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_text_encoder_that_lies_elsewhere_is_named_and_another_one_is_refused(
    pretrained: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(pretrained, tmp_path / "clip")
    settings = {"text.encoder": "transformers", "text.path": str(place), "text.max-tokens": 6}
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0, **settings})
    bundle = made.release(tmp_path / "model")
    assert any("is not in this folder" in line for line in verify(bundle, recompute=False).trusted)
    expected = Generator.load(bundle).generate(["a red circle"], seed=4)[0]
    place.rename(tmp_path / "moved")
    for model in (bundle, made.path):
        with pytest.raises(FedCanvasError, match="no folder"):
            Generator.load(model)
        (found,) = Generator.load(model, text_encoder=tmp_path / "moved").generate(["a red circle"], seed=4)
        assert np.array_equal(found.array, expected.array)
    other = tiny_model("clip")
    for weights in other.parameters():
        weights.data += 1
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(FedCanvasError, match="is not the one that"):
        Generator.load(bundle, text_encoder=tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("local_only", [True, False])
def test_settings_that_came_from_elsewhere_make_nobody_ask_a_hub(local_only: bool) -> None:
    """False shows that the question would be heard."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        code = (
            "from shared.config import TextConfig\nfrom shared.text import build_encoder\n"
            f"build_encoder(TextConfig(encoder='transformers', path='somebody/tracker'), local_only={local_only})"
        )
        named = f"http://127.0.0.1:{hub.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": named, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        asking = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        hub.settimeout(0.2)
        asked = False
        while asking.poll() is None and not asked:
            with contextlib.suppress(TimeoutError):
                hub.accept()[0].close()
                asked = True
        asking.kill()
        _, said = asking.communicate()
    assert asked is not local_only
    assert asked or "somebody/tracker is not on this machine" in said


@pytest.mark.slow
def test_a_model_with_a_pretrained_text_encoder_is_exported_with_it(pretrained: Path, tmp_path: Path) -> None:
    settings = {"text.encoder": "transformers", "text.path": str(pretrained), "text.max-tokens": 6}
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0, **settings})
    generator = Generator.load(made.path)
    assert export_onnx(generator, tmp_path / "onnx") <= 1
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {
        "generator.onnx", "text.onnx", "tokenizer.json", "generate.py", "card.json", "prompts.txt", "README.md",
    }  # fmt: skip
    for word in (str(ROOT), "site-packages", str(pretrained)):
        assert word.encode() not in (tmp_path / "onnx/text.onnx").read_bytes()
    shutil.rmtree(pretrained)  # the folder alone
    prompts = ["a red circle", "red red circle a blue star a red circle", "unknown", "红色的圆"]
    alone = drawn_alone(tmp_path / "onnx", tmp_path, *prompts, "--n", "2", "--seed", "4")
    expected = generator.generate(prompts, n=2, seed=4)
    assert len({picture.array.tobytes() for picture in expected}) > 4
    for (pixels, about), picture in zip(alone, expected, strict=True):
        assert apart(pixels, picture.array) <= 1
        assert about == picture.about


def test_both_scripts_draw_in_the_same_way() -> None:
    texts = [(ROOT / f"server/{name}.py").read_text() for name in ("onnx_generate", "onnx_generate_tokens")]
    one, other = (text[text.index("parser = ") :] for text in texts)
    assert one == other
    assert len([line for line in texts[1].splitlines() if line.strip()]) <= 40


@pytest.mark.usefixtures("_quick")
def test_an_encoder_that_cannot_be_exported_is_refused_in_words(generator: Generator, tmp_path: Path) -> None:
    class Other:
        dim = 64

        def encode(self, texts: list[str]) -> Any: ...

    def with_encoder(encoder: Any) -> Generator:
        return Generator(replace(generator.model, encoder=encoder), name="x", digest="0" * 64, line="")

    with pytest.raises(UsageError, match="is none that can be exported"):
        export_onnx(with_encoder(Other()), tmp_path / "onnx")

    class InPython:
        """Has no `backend_tokenizer`."""

        truncation_side = "right"

    slow = TransformersEncoder.__new__(TransformersEncoder)
    slow._tokenizer = InPython()
    with pytest.raises(DataError, match="the tokenizer InPython is of Python code"):
        export_onnx(with_encoder(slow), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_missing_packages_are_named_with_the_command_that_installs_them(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="an export needs onnx, onnxscript, onnxruntime") as caught:
        export_onnx(generator, tmp_path / "onnx")
    assert caught.value.hint == "pip install 'fedcanvas[export]'"
