"""One generation path: the same pixels from a run, its model folder and its released bundle, alone and in a batch."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from signed_release import signed_run

from fedcanvas import Generator, Picture
from server.generator import MOST_SEED, ROWS
from server.sheet import contact_sheet
from shared.cli import run
from shared.errors import BundleError, PromptError, RunDirectoryError, UsageError

# Slow to load, and of training, accounting, charts or decoding: a first picture waits for none of them.
NOT_FOR_A_PICTURE = (
    "flwr", "ray", "opacus", "dp_accounting", "transformers", "torchvision", "torch_fidelity", "sklearn", "cv2",
    "matplotlib", "scipy.optimize", "scipy.special", "scipy.stats",
)  # fmt: skip
PROMPTS = ["a large red circle on a white background", "红色的圆 🟥", "zyzzyva"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `runs/a` and its released model `bundle`."""
    folder = tmp_path_factory.mktemp("generator")
    # q = 1: epsilon is that of a Gaussian, which costs no time to compute.
    signed_run(folder / "runs/a", {"privacy.sampling-rate": 1.0}).release(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def generator(place: Path) -> Generator:
    return Generator.load(place / "bundle")


@pytest.fixture
def altered(place: Path, tmp_path: Path) -> Path:
    """The bundle with another card that still can be read."""
    folder = tmp_path / "altered"
    shutil.copytree(place / "bundle", folder)
    card = json.loads((folder / "card.json").read_text())
    card["privacy"]["epsilon_max"] = 0.01
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def arrays(pictures: list[Picture]) -> np.ndarray:
    return np.stack([picture.array for picture in pictures]).astype(np.int16)


def apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())


def test_run_model_folder_and_bundle_draw_the_same_pictures(place: Path, generator: Generator) -> None:
    expected = arrays(generator.generate(PROMPTS, n=2, seed=3))
    for path in (place / "runs/a", place / "runs/a/model"):
        assert (arrays(Generator.load(path).generate(PROMPTS, n=2, seed=3)) == expected).all()
    assert (arrays(Generator.from_pretrained(str(place / "bundle")).generate(PROMPTS, n=2, seed=3)) == expected).all()
    assert generator.prompts == Generator.load(place / "runs/a").prompts
    assert generator.size == 8


def test_pictures_come_prompt_by_prompt_as_arrays_and_images(generator: Generator) -> None:
    pictures = generator.generate(PROMPTS, n=2, seed=1)
    assert [(picture.about["prompt"], picture.about["index"]) for picture in pictures] == [
        (prompt, index) for prompt in PROMPTS for index in ("0", "1")
    ]
    for picture in pictures:
        assert picture.array.shape == (8, 8, 3)
        assert picture.array.dtype == np.uint8
        assert picture.image.size == (8, 8)
        assert (np.asarray(picture.image) == picture.array).all()


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(generator: Generator) -> None:
    many = ROWS + 5  # more than the generator takes at once
    together = generator.arrays([PROMPTS[i % 3] for i in range(many)], seeds=[9] * many, indices=range(many))
    for index in (0, 1, ROWS - 1, ROWS, many - 1):
        alone = generator.arrays([PROMPTS[index % 3]], seeds=[9], indices=[index])
        assert apart(alone[0], together[index]) <= 1
    few = generator.generate([PROMPTS[1]], n=2, seed=9)
    assert apart(few[1].array, generator.generate(PROMPTS, n=7, seed=9)[7 + 1].array) <= 1


def test_the_command_writes_the_pictures_of_the_python_call(
    place: Path, generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", *PROMPTS, "--model", str(place / "bundle"), "--n", "2", "--seed", "5", "--truncation", "0.5"]
    assert run([*given, "--out", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"{place / 'bundle'}: signed by " in err  # verified first, and it says so
    assert "2 simulated sites, epsilon " in err
    assert "unaltered since" in err
    files = [Path(file) for made in json.loads(out)["pictures"] for file in made["files"]]
    pictures = generator.generate(PROMPTS, n=2, seed=5, truncation=0.5)
    assert len(files) == len(pictures) == 6
    for file, picture in zip(files, pictures, strict=True):
        with Image.open(file) as read:
            assert apart(np.asarray(read), picture.array) <= 1
            assert read.info == picture.about
    with Image.open(tmp_path / "sheet.png") as sheet:  # what all of them share
        assert sheet.info == {key: value for key, value in pictures[0].about.items() if key not in ("prompt", "index")}
        assert {"seed", "truncation", "model", "epsilon", "delta", "unit", "software"} == sheet.info.keys()


def test_a_png_says_which_prompt_seed_and_model_made_it_at_which_epsilon(generator: Generator) -> None:
    (picture,) = generator.generate([PROMPTS[1]], seed=MOST_SEED)
    with Image.open(io.BytesIO(picture.png())) as read:
        assert (np.asarray(read) == picture.array).all()
        assert read.info == {
            "prompt": "红色的圆 🟥", "seed": "9223372036854775807", "index": "0", "truncation": "1",
            "model": generator.digest, "epsilon": f"{generator.privacy['epsilon_max']:.4g}", "delta": "0.0001",
            "unit": "example", "software": "fedcanvas",
        }  # fmt: skip
    assert picture.png() == generator.generate([PROMPTS[1]], seed=MOST_SEED)[0].png()


@pytest.mark.parametrize(
    ("seed", "truncation", "said"),
    [
        (True, 1, ("1", "1")), (np.int64(7), 0.12345678, ("7", "0.12345678")), (7, 0.0, ("7", "0")),
        (3, np.float32(0.3), ("3", "0.30000001192092896")), (3, 1 / 3, ("3", "0.3333333333333333")),
        (3, 1e-7, ("3", "1e-07")), (3, True, ("3", "1")),
    ],
)  # fmt: skip
def test_a_picture_can_be_drawn_again_from_what_its_file_says(
    generator: Generator, seed: Any, truncation: Any, said: tuple[str, str]
) -> None:
    *_, picture = generator.generate([PROMPTS[0]], n=2, seed=seed, truncation=truncation)
    about = picture.about
    assert (about["seed"], about["truncation"]) == said
    # As a person would: the texts of the file, read as numbers.
    again = generator.generate(
        [about["prompt"]], n=int(about["index"]) + 1, seed=int(about["seed"]), truncation=float(about["truncation"])
    )
    assert again[-1].png() == picture.png()


def test_the_seed_changes_pictures_and_truncation_0_gives_one_picture_for_all_seeds(generator: Generator) -> None:
    one, other = (arrays(generator.generate(PROMPTS, n=3, seed=seed)) for seed in (1, 2))
    assert apart(one, other) > 1
    typical = [arrays(generator.generate(PROMPTS[:1], n=3, seed=seed, truncation=0.0)) for seed in (1, 2)]
    assert all(apart(picture, typical[0][0]) <= 1 for pictures in typical for picture in pictures)
    # Of the latents it is a factor: half of it lies in between, and is neither.
    half = arrays(generator.generate(PROMPTS[:1], n=1, seed=1, truncation=0.5))[0]
    assert apart(half, one[0]) > 0
    assert apart(half, typical[0][0]) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seed": -1}, "a seed of -1 is not between 0 and"),
        ({"seed": 2**63}, "a seed of 9223372036854775808 is not between"),
        ({"seed": 1.5}, "a seed is a whole number, not 1.5"),
        ({"seed": "1"}, "a seed is a whole number, not '1'"),
        ({"n": 0}, "a number of pictures of 0"),
        ({"n": 50_001}, "2 prompts times 50001 pictures"),
        ({"truncation": 1.01}, "a truncation of 1.01"),
        ({"truncation": -0.1}, "a truncation of -0.1"),
        ({"truncation": float("nan")}, "a truncation of nan"),
        ({"truncation": "0.5"}, "a truncation of 0.5"),
    ],
)
def test_arguments_out_of_range_are_named(generator: Generator, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        generator.generate(["a", "b"], **arguments)


@pytest.mark.parametrize(("prompt", "said"), [("", "empty"), ("x" * 513, "513 characters"), ("a\nb", "one line")])
def test_a_prompt_that_is_none_is_named(generator: Generator, prompt: str, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        generator.generate(["a", prompt])


@pytest.mark.parametrize("prompts", ["a red circle", b"a red circle", [3], iter([3]), [b"a"], [None], None, 3])
def test_one_text_in_place_of_a_list_is_not_taken_letter_by_letter(generator: Generator, prompts: Any) -> None:
    with pytest.raises(UsageError, match="no list of texts"):
        generator.generate(prompts)


def test_prompts_may_come_one_after_another(generator: Generator) -> None:
    expected = arrays(generator.generate(PROMPTS, n=2, seed=3))
    for prompts in ((prompt for prompt in PROMPTS), iter(PROMPTS), dict.fromkeys(PROMPTS), tuple(PROMPTS)):
        assert (arrays(generator.generate(prompts, n=2, seed=3)) == expected).all()


def test_no_prompts_give_no_pictures(generator: Generator) -> None:
    assert generator.generate([]) == []
    assert generator.arrays([], seeds=[], indices=[]).shape == (0, 8, 8, 3)


def test_threads_get_the_pictures_that_one_alone_gets(generator: Generator) -> None:
    expected = {seed: arrays(generator.generate(PROMPTS, n=2, seed=seed)) for seed in range(4)}
    found: dict[tuple[int, int], np.ndarray] = {}
    start = threading.Barrier(8)

    def draw(place: int) -> None:
        start.wait()
        for seed in range(4):
            found[place, seed] = arrays(generator.generate(PROMPTS, n=2, seed=(seed + place) % 4))

    threads = [threading.Thread(target=draw, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    assert all((pixels == expected[(seed + place) % 4]).all() for (place, seed), pixels in found.items())


def test_an_altered_bundle_draws_nothing(
    altered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match="is not the file that was released"):
        Generator.load(altered)
    assert run(["generate", "a star", "--model", str(altered), "--out", str(tmp_path / "p")]) == 10
    assert "card.json is not the file that was released" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_unverified_takes_it_and_marks_every_picture(
    altered: Path, place: Path, generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    notes: list[str] = []
    monkeypatch.setattr(
        "server.sheet.contact_sheet", lambda *a, **k: (notes.extend(k["notes"]), contact_sheet(*a, **k))[1]
    )
    given = ["generate", *PROMPTS, "--model", str(altered), "--out", str(tmp_path / "p"), "--n", "2"]
    assert run([*given, "--unverified"]) == 0
    assert f"{altered}: NOT VERIFIED" in capsys.readouterr().err
    assert notes[0].startswith("NOT VERIFIED")
    files = [file for file in (tmp_path / "p").iterdir() if file.name != "sheet.png"]
    assert len(files) == 6
    for file in [*files, tmp_path / "p/sheet.png"]:
        with Image.open(file) as read:
            assert read.info["warning"] == "UNVERIFIED"
            assert read.info["model"] != generator.digest
    # A bundle that would verify is marked as well: nobody looked.
    assert Generator.load(place / "bundle", unverified=True).generate(["a"])[0].about["warning"] == "UNVERIFIED"
    assert "warning" not in generator.generate(["a"])[0].about
    assert not Generator.load(place / "bundle", unverified=True).verified
    assert generator.verified


def test_what_an_unverified_picture_names_is_the_weights_that_drew_it(altered: Path, place: Path) -> None:
    honest = Generator.load(place / "bundle", unverified=True)
    assert Generator.load(altered, unverified=True).digest == honest.digest
    weights = altered / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a mantissa or a sign: still a finite number
    weights.write_bytes(content)
    assert Generator.load(altered, unverified=True).digest != honest.digest


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("card.json", b"[]"), ("card.json", b"{"), ("card.json", b'{"privacy": {"epsilon_max": "none"}}'),
        ("config.json", b'{"run": 3}'), ("model.safetensors", b"\x80\x04."), ("prompts.txt", b"\xff\xfe"),
    ],
)  # fmt: skip
def test_what_cannot_even_be_read_is_refused_unverified_too(altered: Path, name: str, content: bytes) -> None:
    (altered / name).write_bytes(content)
    with pytest.raises(BundleError):
        Generator.load(altered, unverified=True)


def test_a_model_without_privacy_says_so_on_every_picture(tmp_path: Path) -> None:
    loaded = Generator.load(signed_run(tmp_path / "a", {"privacy.name": "none"}).release(tmp_path / "bundle"))
    assert loaded.generate(["a"])[0].about["epsilon"] == "inf"
    assert "no privacy" in loaded.line


def test_grey_pictures_have_no_axis_of_colours(tmp_path: Path) -> None:
    grey = {"data.channels": 1, "privacy.sampling-rate": 1.0}
    loaded = Generator.load(signed_run(tmp_path / "a", grey).path)
    assert loaded.generate(["a"])[0].array.shape == (8, 8)
    assert loaded.generate(["a"])[0].image.mode == "L"
    assert loaded.arrays([], seeds=[], indices=[]).shape == (0, 8, 8)


def test_where_there_is_no_model_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no model at"):
        Generator.load(tmp_path / "nowhere")


def loaded_by(arguments: list[str], names: Sequence[str]) -> list[str]:
    """Those of the modules `names` that a fresh process has loaded after this command line, which did its work."""
    script = (
        "import sys; from shared.cli import run\n"
        f"assert run({arguments!r}) == 0\n"
        f"print(*[name for name in {names!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize("model", ["runs/a", "bundle"])
def test_a_picture_waits_for_no_library_that_draws_none(place: Path, tmp_path: Path, model: str) -> None:
    # n = 1: its cell is so narrow that the prompt on the sheet is cut and gets an ellipsis.
    prompt = "ein großer roter Kreis, «Круг», “κύκλος”"
    arguments = ["generate", prompt, "--model", str(place / model), "--n", "1", "--out", str(tmp_path / "pictures")]
    assert loaded_by(arguments, ("torch", *NOT_FOR_A_PICTURE)) == ["torch"]
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_a_prompt_in_the_models_words_waits_for_no_table_of_words(place: Path, tmp_path: Path) -> None:
    arguments = ["generate", "a large red circle", "--model", str(place / "bundle"), "--out", str(tmp_path)]
    assert loaded_by(arguments, ("server.prompting", "server.thesaurus")) == []
    arguments[1] = "a large crimson circle"
    assert loaded_by(arguments, ("server.prompting", "server.thesaurus")) == ["server.prompting", "server.thesaurus"]


@pytest.mark.parametrize("model", ["runs/a", "bundle"])
def test_words_wait_for_no_model(place: Path, model: str) -> None:
    arguments = ["describe", "a circle", "--model", str(place / model)]
    assert loaded_by(arguments, ("numpy", "torch", *NOT_FOR_A_PICTURE)) == ["numpy"]
