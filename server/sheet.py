"""Contact sheets: prompts under their pictures, generated ones beside real ones of a public reference set.

One PNG, readable as it is: small pictures are enlarged by whole factors, so that every pixel stays square.
Never given a site's images: real pictures come from the public reference set only.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

SIDE = 64  # a picture is enlarged to about this many pixels
GAP = 4
MARGIN = 16
DOTS = 100  # per inch
FONT_PIXELS = 13
LETTER = 7.1  # pixels of an average one
LINE = 18  # from one line of text to the next
MOST_COLUMNS = 4
TARGET_WIDTH = 1330
BETWEEN = 14  # generated | real
# Latin, Greek, Cyrillic and what stands between words: all in DejaVu, and no letter changes with its neighbours.
_UNSHAPED = re.compile("[ -\u02af\u0386-\u0482\u2010-\u2026\ufffd]*")


@dataclass(frozen=True)
class SheetCell:
    """One prompt with its pictures.

    Attributes:
        generated: `(n, H, W, C)` uint8.
        real: `(m, H, W, C)` uint8 of the reference set; `None` or empty where it has none.
    """

    prompt: str
    generated: np.ndarray
    real: np.ndarray | None = None


def contact_sheet(
    cells: Sequence[SheetCell], *, title: str, notes: Sequence[str] = (), least_width: int = 0,
    about: Mapping[str, str] | None = None,
) -> bytes:  # fmt: skip
    """A PNG of all cells in reading order, `title` and `notes` above them.

    Args:
        about: text entries of the file.
        least_width: of a cell, in pixels: a single picture is narrower than most prompts.
    """
    assert cells
    side = cells[0].generated.shape[1]
    scale = max(1, round(SIDE / side))
    step = side * scale + GAP
    generated = max(len(cell.generated) for cell in cells)
    real = max(0 if cell.real is None else len(cell.real) for cell in cells)
    cell_width = max((generated + real) * step + (BETWEEN if real else 0), least_width)
    columns = max(1, min(MOST_COLUMNS, len(cells), TARGET_WIDTH // (cell_width + MARGIN)))
    width = max(columns * (cell_width + MARGIN) + MARGIN, 480)
    lines = [wrapped(cell.prompt, int(cell_width / LETTER)) for cell in cells]
    notes = [piece for note in notes for piece in wrapped(note, int((width - 2 * MARGIN) / LETTER), most=3)]
    # Each row is as high as its longest prompt needs.
    tops = [MARGIN + LINE + 12 + LINE * len(notes)]
    for start in range(0, len(cells), columns):
        tops.append(tops[-1] + step + LINE * max(map(len, lines[start : start + columns])) + MARGIN)
    canvas = np.full((tops[-1] + MARGIN // 2, width, 3), 255, np.uint8)
    words = [(title, MARGIN, MARGIN + 14, True)]
    words += [(note, MARGIN, MARGIN + 18 + LINE * (place + 1), False) for place, note in enumerate(notes)]
    for place, (cell, text) in enumerate(zip(cells, lines, strict=True)):
        top, left = tops[place // columns], MARGIN + place % columns * (cell_width + MARGIN)
        after = left + generated * step + BETWEEN
        for number, image in enumerate(cell.generated):
            _paste(canvas, image, scale, top=top, left=left + number * step)
        for number, image in enumerate(() if cell.real is None else cell.real):
            _paste(canvas, image, scale, top=top, left=after + number * step)
        if real:
            canvas[top : top + step - GAP, after - (BETWEEN + GAP) // 2] = 150  # the line between the two
        words += [(part, left, top + step + LINE * (line + 1) - 6, False) for line, part in enumerate(text)]
    entries = PngInfo()
    for key, value in (about or {}).items():
        entries.add_itxt(key, value)
    out = io.BytesIO()
    _with_words(canvas, words).save(out, "PNG", pnginfo=entries)
    return out.getvalue()


def wrapped(text: str, columns: int, *, most: int = 2) -> list[str]:
    """`text` in at most `most` lines of `columns` Latin letters; what is left over becomes an ellipsis."""
    lines = [""]
    for word in _breakable(text):
        if lines[-1] and _columns(lines[-1] + word.rstrip()) > columns:
            lines.append("")
        for character in word:  # a word longer than a line is broken where it must be
            if _columns(lines[-1] + character) > columns and character != " ":
                lines.append("")
            lines[-1] += character
    lines = [line.strip() for line in lines]
    if len(lines) > most:
        last = lines[most - 1]
        while _columns(last) > columns - 1:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def _breakable(text: str) -> list[str]:
    """Words with the blank after them; scripts without blanks break anywhere."""
    parts: list[str] = []
    for character in " ".join(text.split()):
        if not parts or parts[-1].endswith(" ") or _columns(character) > 1 or _columns(parts[-1][-1]) > 1:
            parts.append(character)
        else:
            parts[-1] += character
    return parts


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _paste(canvas: np.ndarray, image: np.ndarray, scale: int, *, top: int, left: int) -> None:
    large = image.repeat(scale, axis=0).repeat(scale, axis=1)
    canvas[top : top + large.shape[0], left : left + large.shape[1]] = large  # grey spreads over three channels


def _with_words(canvas: np.ndarray, words: Sequence[tuple[str, int, int, bool]]) -> Image.Image:
    """`canvas` with (text, left, baseline, bold), by Pillow where no letter depends on its neighbours."""
    image = Image.fromarray(canvas)
    draw, others = ImageDraw.Draw(image), []
    for text, left, baseline, bold in words:
        text = "".join(character if character.isprintable() else "�" for character in text)
        if _UNSHAPED.fullmatch(text):
            draw.text((left, baseline), text, fill=(0, 0, 0), font=_font(bold), anchor="ls")
        else:
            others.append((text, left, baseline, bold))
    return Image.fromarray(_with_shaped_words(np.asarray(image), others)) if others else image


@cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    # Of matplotlib's files: to load the library for a line of Latin takes a quarter of the time of a first picture.
    found = find_spec("matplotlib")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0]) / "mpl-data/fonts/ttf"
    file = folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    return ImageFont.truetype(file, FONT_PIXELS, layout_engine=ImageFont.Layout.BASIC)  # alike with and without Raqm


def _with_shaped_words(canvas: np.ndarray, words: Sequence[tuple[str, int, int, bool]]) -> np.ndarray:
    """The same for any script. Matplotlib shapes letters; OpenCV has those that it lacks."""
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

    from shared.data.encoding import write_words

    known = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / DOTS, height / DOTS), dpi=DOTS, facecolor="white")
    figure.figimage(canvas, 0, 0, origin="upper")
    lacking = []
    for text, left, baseline, bold in words:
        if all(ord(character) in known for character in text):
            figure.text(
                left / width, 1 - baseline / height, text, fontsize=FONT_PIXELS * 72 / DOTS,
                fontweight="bold" if bold else "normal", family="DejaVu Sans", parse_math=False,
            )  # fmt: skip
        else:
            lacking.append((text, left, baseline))
    drawing: Any = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that no font has is drawn as a box
        drawing.draw()
    pixels = np.ascontiguousarray(np.asarray(drawing.buffer_rgba())[:, :, :3])
    for text, left, baseline in lacking:
        write_words(pixels, text, left=left, baseline=baseline, pixels=FONT_PIXELS)
    return pixels
