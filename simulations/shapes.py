"""A captioned synthetic data set in the standard on-disk form, and the public grammar of its captions.

    FOLDER/images/000000.png ...   one shape each; position, size, tilt and shade vary
    FOLDER/captions.csv            file_name,text,colour,shape,size,background
    FOLDER/prompts.txt             all 96 sentences of the grammar, one a line: public prompts

Picture i depends on (seed, i) alone, so a larger set begins with the smaller one of the same seed. The folder appears
whole or not at all when its maker is killed; its files are not flushed one by one for a power cut.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from shared.data.whole_folder import whole_folder
from shared.errors import DataError

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 180),
    "orange": (245, 140, 30),
}  # RGB
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": (4.5, 6.0), "large": (9.0, 11.0)}  # smallest and largest radius on a picture of 32 pixels
BACKGROUNDS = {"white": 245, "black": 12}

UNIT = 32.0  # lengths below are in pixels of a picture of this side
OVERSAMPLING = 4
MAX_TILT = 0.2  # radians
SHADE = 12  # a colour's channels vary by as much, in levels of 255
PROGRESS_EVERY = 250


class Kind(NamedTuple):
    """One sentence of the grammar: what a caption says, and nothing else about a picture."""

    colour: str
    shape: str
    size: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


def grammar() -> tuple[Kind, ...]:
    """All 96 kinds, in a fixed order: every prompt that exists is the caption of one of them."""
    return tuple(itertools.starmap(Kind, itertools.product(COLOURS, SHAPES, SIZES, BACKGROUNDS)))


def make_shapes(
    folder: Path, *, count: int = 20_000, seed: int = 1, image_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Writes `count` pictures of kinds drawn evenly, their captions and the prompts to the new `folder`.

    Raises:
        DataError: `folder` is there already, or cannot be written, or there is nothing to draw.
    """
    if count < 1 or image_size < 8:
        raise DataError(f"{count} pictures of {image_size} pixels cannot be", hint="at least 1 of at least 8 pixels")
    try:
        with whole_folder(folder) as draft:
            if draft is None:
                raise DataError(f"{folder} is there already", hint="use it, remove it, or name another folder")
            _fill(draft, count, seed, image_size, progress)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}", hint="name another folder") from None


def _fill(folder: Path, count: int, seed: int, image_size: int, progress: Callable[[int, int], None] | None) -> None:
    kinds = grammar()
    (folder / "images").mkdir()
    (folder / "prompts.txt").write_text("".join(f"{kind.caption}\n" for kind in kinds), encoding="utf-8")
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "text", *Kind._fields))
        for index in range(count):
            rng = np.random.default_rng((seed, index))
            kind = kinds[rng.integers(len(kinds))]
            name = f"{index:06d}.png"
            _, png = cv2.imencode(".png", cv2.cvtColor(draw(kind, image_size=image_size, rng=rng), cv2.COLOR_RGB2BGR))
            (folder / "images" / name).write_bytes(png.tobytes())
            table.writerow((f"images/{name}", kind.caption, *kind))
            if progress is not None and ((index + 1) % PROGRESS_EVERY == 0 or index + 1 == count):
                progress(index + 1, count)


def draw(kind: Kind, *, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of `kind`, `(image_size, image_size, 3)` uint8 RGB, drawn larger and averaged down."""
    radius = rng.uniform(*SIZES[kind.size])
    room = max(UNIT / 2 - 1.3 * radius, 0.0)
    centre = UNIT / 2 + rng.uniform(-1, 1, 2) * room * 0.8
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    shade = np.clip(np.array(COLOURS[kind.colour]) + rng.integers(-SHADE, SHADE + 1, 3), 0, 255).tolist()

    side = OVERSAMPLING * image_size
    scale = side / UNIT
    canvas = np.full((side, side, 3), BACKGROUNDS[kind.background], np.uint8)
    if kind.shape == "circle":
        middle = np.rint(centre * scale).astype(int).tolist()
        cv2.circle(canvas, middle, int(radius * scale), shade, cv2.FILLED, cv2.LINE_AA)
    else:
        corners = centre + _corners(kind.shape, radius, tilt)
        cv2.fillPoly(canvas, [np.rint(corners * scale).astype(np.int32)], shade, cv2.LINE_AA)
    return np.asarray(cv2.resize(canvas, (image_size, image_size), interpolation=cv2.INTER_AREA))


def _corners(shape: str, radius: float, tilt: float) -> np.ndarray:
    """`(corners, 2)` x and y about the centre, y downwards; the factors make the areas of the shapes alike."""
    reach, first = {
        "square": ([1.15] * 4, np.pi / 4),
        "triangle": ([1.25] * 3, -np.pi / 2),
        "star": ([1.25, 0.5] * 5, -np.pi / 2),
    }[shape]
    angles = first + tilt + 2 * np.pi * np.arange(len(reach)) / len(reach)
    return np.column_stack([np.cos(angles), np.sin(angles)]) * (radius * np.array(reach)[:, None])
