"""Sheets and PNG files: pixels as they were, prompts under them, any script, the same bytes every time."""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image

from server import sheet
from server.evaluation import shown_prompts
from server.sheet import BETWEEN, GAP, MARGIN, SheetCell, contact_sheet, wrapped
from shared.data.decoding import decode_image
from shared.data.encoding import encode_png


def picture(value: int, *, side: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(value).integers(256, size=(side, side, channels), dtype=np.uint8)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels_in_their_order(channels: int) -> None:
    image = picture(1, channels=channels)
    again = decode_image(encode_png(image))
    assert np.array_equal(again.reshape(image.shape), image)


def test_every_picture_is_on_the_sheet_enlarged_and_unchanged() -> None:
    cells = [
        SheetCell(f"prompt {place}", np.stack([picture(10 * place + i) for i in range(4)]), np.stack([picture(7)] * 2))
        for place in range(7)
    ]
    sheet = decoded(contact_sheet(cells, title="title"))
    for place, cell in enumerate(cells):
        for image in cell.generated:
            large = image.repeat(2, axis=0).repeat(2, axis=1)
            found = [
                (top, left)
                for top, left in zip(*np.nonzero((sheet == large[0, 0]).all(axis=2)), strict=True)
                if np.array_equal(sheet[top : top + 64, left : left + 64], large)
            ]
            assert len(found) == 1, place


def test_generated_stand_left_of_the_line_and_real_right_of_it() -> None:
    black, white = np.zeros((4, 32, 32, 3), np.uint8), np.full((2, 32, 32, 3), (0, 200, 0), np.uint8)
    sheet = decoded(contact_sheet([SheetCell("a prompt", black, white)], title=""))
    line = np.nonzero((sheet == 150).all(axis=2).sum(axis=0) >= 60)[0]
    assert len(line) == 1
    dark = np.nonzero((sheet == 0).all(axis=2).sum(axis=0) >= 60)[0]
    green = np.nonzero((sheet == (0, 200, 0)).all(axis=2).sum(axis=0) >= 60)[0]
    assert dark.max() < line[0] < green.min()
    assert green.min() - dark.max() == BETWEEN + GAP + 1
    assert dark.min() == MARGIN


@pytest.mark.parametrize("side", [8, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_every_size_come_out_about_as_large(side: int, channels: int) -> None:
    cells = [SheetCell("a prompt", np.stack([picture(i, side=side, channels=channels) for i in range(4)]))]
    height, width, _ = decoded(contact_sheet(cells, title="title", notes=["a note"])).shape
    assert 240 < width < 600
    assert 100 < height < 250


@pytest.mark.parametrize(
    "prompt",
    ["一个红色的大圆", "دائرة حمراء", "ein großer Kreis", "$x^2$ <b>&amp;", "tab\there", "🟥 square", "x" * 500],
)
def test_any_prompt_can_stand_under_its_pictures(prompt: str) -> None:
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    with_text = decoded(contact_sheet([SheetCell(prompt, white)], title=""))
    without = decoded(contact_sheet([SheetCell(" ", white)], title=""))
    height = min(len(with_text), len(without))
    assert (with_text[:height] != without[:height]).any()


def test_letters_that_pillow_draws_are_in_both_fonts_and_stand_where_matplotlib_puts_them() -> None:
    letters = [chr(code) for code in range(0x110000) if sheet._UNSHAPED.fullmatch(chr(code))]
    shown = [letter for letter in letters if letter.isprintable()]
    assert not [letter for letter in shown if unicodedata.combining(letter) or unicodedata.bidirectional(letter) == "R"]
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"):
        assert not [letter for letter in shown if ord(letter) not in FT2Font(fonts / name).get_charmap()]
    canvas = np.full((40, 400, 3), 255, np.uint8)
    for bold in (False, True):
        words = [("gÀñ, Ждy κύκλος “a”…", 20, 25, bold)]
        boxes = []
        for pixels in (np.asarray(sheet._with_words(canvas, words)), sheet._with_shaped_words(canvas, words)):
            rows, columns = np.nonzero((pixels < 128).any(axis=2))
            boxes.append(np.array([rows.min(), rows.max(), columns.min(), columns.max()]))
        assert np.abs(boxes[0] - boxes[1]).max() <= 2, boxes


def test_a_sheet_says_what_it_is_told_to_and_keeps_its_pixels() -> None:
    cells, about = [SheetCell("a prompt", np.stack([picture(1)]))], {"seed": "1", "unit": "红色的圆"}
    with Image.open(io.BytesIO(contact_sheet(cells, title="t", about=about))) as told:
        assert told.info == about
        assert np.array_equal(np.asarray(told), decoded(contact_sheet(cells, title="t")))


def test_equal_pictures_give_equal_bytes() -> None:
    cells = [SheetCell("a prompt", np.stack([picture(1)]))]
    assert contact_sheet(cells, title="t") == contact_sheet(cells, title="t")


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("a small red circle", 40, ["a small red circle"]),
        ("a small red circle on white", 18, ["a small red circle", "on white"]),
        ("a small red circle on a white background", 20, ["a small red circle", "on a white…"]),
        ("abcdefghijklmnop", 10, ["abcdefghij", "klmnop"]),
        ("abcdefghijklmnopqrstuvwxyz", 10, ["abcdefghij", "klmnopqrs…"]),
        ("一个红色的大圆", 10, ["一个红色的", "大圆"]),  # each of them is two columns wide
        ("一个红色的大圆在白色背景上", 10, ["一个红色的", "大圆在白…"]),
        ("", 10, [""]),
    ],
)
def test_long_prompts_are_wrapped_between_words_and_end_in_an_ellipsis(
    text: str, columns: int, lines: list[str]
) -> None:
    assert wrapped(text, columns) == lines


def test_prompts_to_show_are_spread_keep_their_order_and_do_not_change() -> None:
    prompts = [f"prompt {place}" for place in range(96)]
    shown = shown_prompts(prompts, 24)
    assert len(shown) == 24
    assert shown == sorted(shown, key=prompts.index)
    assert shown == shown_prompts(prompts, 24)
    assert min(map(prompts.index, shown)) < 24 < 72 < max(map(prompts.index, shown))
    assert shown_prompts(prompts[:5], 24) == prompts[:5]
