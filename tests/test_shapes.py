"""The shapes data: pictures that show what their captions say, one public grammar, whole or absent."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared.config import DataConfig
from shared.data import open_dataset
from shared.errors import DataError
from simulations.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, draw, grammar, make_shapes

SENTENCES = [
    f"a {size} {colour} {shape} on a {background} background"
    for colour in ("red", "green", "blue", "yellow", "purple", "orange")
    for shape in ("circle", "square", "triangle", "star")
    for size in ("small", "large")
    for background in ("white", "black")
]


def test_the_grammar_has_ninety_six_sentences_and_prompts_txt_holds_all_of_them(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", count=3, image_size=8)
    lines = (tmp_path / "shapes/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 96
    assert lines == SENTENCES
    assert [kind.caption for kind in grammar()] == SENTENCES


def test_the_folder_is_a_data_set_whose_captions_and_attributes_agree(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    make_shapes(tmp_path / "shapes", count=40, seed=3, progress=lambda done, total: told.append((done, total)))
    assert told == [(40, 40)]
    dataset = open_dataset(tmp_path / "shapes", config=DataConfig())
    assert dataset.images.shape == (40, 32, 32, 3)
    assert dataset.skipped == []
    assert list(dataset.attributes) == ["colour", "shape", "size", "background"]
    for place, (caption,) in enumerate(dataset.captions):
        words = {name: values[place] for name, values in dataset.attributes.items()}
        assert caption == "a {size} {colour} {shape} on a {background} background".format(**words)
        corner = dataset.images[place, 0, 0].tolist()
        assert corner == [{"white": 245, "black": 12}[words["background"]]] * 3


@pytest.mark.parametrize("kind", grammar(), ids=lambda kind: "-".join(kind))
def test_a_picture_shows_what_its_caption_says(kind: tuple[str, str, str, str]) -> None:
    colour, shape, size, background = kind
    image = draw(kind, image_size=64, rng=np.random.default_rng(5))  # type: ignore[arg-type]
    back = BACKGROUNDS[background]
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == back).all()

    inside = (abs(image.astype(int) - back).max(axis=2) > 40).astype(np.uint8)
    whole = cv2.erode(inside, np.ones((3, 3), np.uint8)).astype(bool)  # without the mixed pixels of the edge
    shown = image[whole].mean(axis=0)
    assert min(COLOURS, key=lambda name: float(np.square(shown - COLOURS[name]).sum())) == colour

    (contour,), _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    area, hull = float(inside.sum()), float(cv2.contourArea(cv2.convexHull(contour)))
    # Width and height of the tightest turned box. Shares of it: square 1, circle pi / 4, triangle 1 / 2.
    width, height = (length + 1 for length in cv2.minAreaRect(contour)[1])
    full = area / (width * height)
    seen = "star" if area / hull < 0.75 else "triangle" if full < 0.65 else "circle" if full < 0.88 else "square"
    assert seen == shape

    small_or_large = "small" if max(width, height) < 34 else "large"  # of 64 pixels; radii reach 15 or start at 18
    assert small_or_large == size


@pytest.mark.parametrize("size", SIZES)
def test_circles_have_the_radii_of_their_size(size: str) -> None:
    smallest, largest = {"small": (4.5, 6.0), "large": (9.0, 11.0)}[size]
    kind = next(kind for kind in grammar() if kind.shape == "circle" and kind.size == size)
    radii = []
    for seed in range(60):
        image = draw(kind, image_size=32, rng=np.random.default_rng(seed)).astype(float)
        # Blue of red on white: the darkened area is that of the circle, mixed pixels by their share.
        blue = image[..., 2]
        radii.append(math.sqrt((245 - blue).sum() / (245 - blue.min()) / math.pi))
    assert smallest - 0.4 < min(radii) < smallest + 0.5
    assert largest - 0.7 < max(radii) < largest + 0.2


def test_kinds_are_drawn_evenly(tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", count=1200, image_size=8)
    lines = (tmp_path / "shapes/captions.csv").read_text().splitlines()[1:]
    cells = [line.split(",")[2:] for line in lines]
    for column, values in enumerate((COLOURS, SHAPES, SIZES, BACKGROUNDS)):
        for value in values:
            count, share = sum(row[column] == value for row in cells), 1 / len(values)
            # Binomial(1200, share): five standard deviations; 14 checks, false alarm < 1e-5.
            assert abs(count - 1200 * share) < 5 * math.sqrt(1200 * share * (1 - share))
    assert len({line.split(",")[1] for line in lines}) == 96


def test_a_picture_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    make_shapes(tmp_path / "few", count=3, seed=4)
    make_shapes(tmp_path / "many", count=6, seed=4)
    make_shapes(tmp_path / "other", count=3, seed=5)
    names = [f"images/{i:06d}.png" for i in range(3)]
    few, many, other = (
        [(tmp_path / folder / name).read_bytes() for name in names] for folder in ("few", "many", "other")
    )
    assert few == many
    assert not set(few) & set(other)
    assert (tmp_path / "many/captions.csv").read_text().startswith((tmp_path / "few/captions.csv").read_text())


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    make_shapes(folder, count=2)
    before = sorted(folder.rglob("*"))
    with pytest.raises(DataError, match="is there already") as caught:
        make_shapes(folder, count=5)
    assert caught.value.hint
    assert sorted(folder.rglob("*")) == before


def test_an_interrupted_making_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", count=300, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        make_shapes(tmp_path / "file/shapes", count=1)
    with pytest.raises(DataError, match="0 pictures of 32 pixels"):
        make_shapes(tmp_path / "shapes", count=0)
