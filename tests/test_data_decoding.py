"""Image bytes come out as a viewer shows them, and as squares by the documented rule."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from picture_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, chunk, exif, jpeg, png

from shared.config import DataConfig
from shared.data.decoding import decode_image, quiet_codecs
from shared.data.preprocessing import pipeline_fingerprint, to_square
from shared.data.source import UnusableRow

TWO_COLOURS = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png([[10, 200]], width=2, kind=GREY), [[10, 200]]),
        (png([[0b1010_0000]], width=4, kind=GREY, bits=1), [[255, 0, 255, 0]]),
        (png([[255, 0, 0, 1, 2, 3]], width=2, kind=RGB), [[[255, 0, 0], [1, 2, 3]]]),
        (png([[0, 1]], width=2, kind=PALETTE, extra=TWO_COLOURS), [[[255, 0, 0], [0, 0, 255]]]),
    ],
    ids=["grey", "one bit", "colour", "palette"],
)  # fmt: skip
def test_plain_pictures_keep_their_values_in_the_order_red_green_blue(data: bytes, expected: list) -> None:
    assert decode_image(data).tolist() == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # Weight a / 255 of the colour and the rest of white: 200 * 0.2 + 255 * 0.8 = 244.
        (png([[200, 0, 0, 51]], width=1, kind=RGBA), [244, 204, 204]),
        (png([[9, 99, 199, 0]], width=1, kind=RGBA), [255, 255, 255]),
        (png([[9, 99, 199, 255]], width=1, kind=RGBA), [9, 99, 199]),
        (png([[0, 51]], width=1, kind=GREY_ALPHA), [204, 204, 204]),
        (png([[1]], width=1, kind=PALETTE, extra=TWO_COLOURS + chunk(b"tRNS", bytes([255, 51]))), [204, 204, 255]),
        (png([[7, 8, 9]], width=1, kind=RGB, extra=chunk(b"tRNS", bytes([0, 7, 0, 8, 0, 9]))), [255, 255, 255]),
        (png([[65535, 0, 0, 13107]], width=1, kind=RGBA, bits=16), [255, 204, 204]),
    ],
    ids=["partly", "hidden", "opaque", "grey", "palette", "key colour", "16 bit"],
)  # fmt: skip
def test_transparency_lies_on_white(data: bytes, expected: list[int]) -> None:
    assert decode_image(data).tolist() == [[expected]]


def test_sixteen_bits_become_eight_over_the_full_range_whatever_a_picture_uses() -> None:
    samples = [0, 128, 129, 1000, 32768, 65406, 65407, 65535]
    decoded = decode_image(png([samples], width=8, kind=GREY, bits=16))
    assert decoded.tolist() == [[round(sample * 255 / 65535) for sample in samples]]


# Where the first stored row and the first stored column are seen, CIPA DC-008 section 4.6.4, tag 274.
SEEN = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


def edge(picture: np.ndarray, side: str) -> np.ndarray:
    """`(length, 3)`: the pixels along one side."""
    return {"top": picture[0], "bottom": picture[-1], "left": picture[:, 0], "right": picture[:, -1]}[side]


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("form", ["jpeg", "png", "png with alpha"])
def test_the_exif_orientation_is_applied(orientation: int, big_endian: bool, form: str) -> None:
    stored = np.full((16, 32, 3), 255, np.uint8)
    stored[:4, :] = (255, 0, 0)  # the first rows are red, the other first columns are blue
    stored[4:, :4] = (0, 0, 255)
    block = exif(orientation, big_endian=big_endian)
    if form == "jpeg":
        data = jpeg(stored, exif_block=block)
    else:
        opaque = np.full((16, 32, 1), 255, np.uint8)
        samples = np.concatenate([stored, opaque], axis=2) if form == "png with alpha" else stored
        kind = RGBA if form == "png with alpha" else RGB
        data = png(samples.reshape(16, -1).tolist(), width=32, kind=kind, extra=chunk(b"eXIf", block))
    picture = decode_image(data).astype(int)
    assert picture.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    row_side, column_side = SEEN[orientation]
    red, blue = edge(picture, row_side), edge(picture, column_side)
    assert (abs(red - (255, 0, 0)) < 80).all()
    assert (abs(blue[len(blue) // 2] - (0, 0, 255)) < 80).all()


@pytest.mark.parametrize("block", [b"", b"II*\0", b"junk", exif(9), exif(0), exif(6)[:20]])
def test_a_broken_exif_block_leaves_the_picture_as_it_is_stored(block: bytes) -> None:
    stored = np.zeros((8, 16, 3), np.uint8)
    assert decode_image(jpeg(stored, exif_block=block)).shape == (8, 16, 3)


NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
WHOLE_JPEG = jpeg(NOISE, exif_block=exif(6))
WHOLE_PNG = png(NOISE.reshape(24, -1).tolist(), width=40, kind=RGB)


@given(part=st.floats(0, 1, exclude_max=True), data=st.sampled_from([WHOLE_JPEG, WHOLE_PNG]))
@example(part=0.0, data=WHOLE_PNG)
@example(part=1 - 1e-9, data=WHOLE_PNG)
@example(part=1 - 1e-9, data=WHOLE_JPEG)
def test_a_file_that_was_cut_short_anywhere_is_unusable(part: float, data: bytes) -> None:
    with quiet_codecs(), pytest.raises(UnusableRow):
        decode_image(data[: int(part * len(data))])


@given(position=st.integers(0, len(WHOLE_PNG) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_never_ends_in_another_error(position: int, bit: int) -> None:
    data = bytearray(WHOLE_PNG)
    data[position] ^= 1 << bit
    with quiet_codecs():
        try:
            picture = decode_image(bytes(data))
        except UnusableRow:
            return
    assert picture.dtype == np.uint8


def test_other_things_are_unusable_with_a_reason() -> None:
    _, floats = cv2.imencode(".tiff", np.full((4, 4), 0.5, np.float32))
    for data, reason in [(b"", "empty"), (b"no picture", "cannot be decoded"), (floats.tobytes(), "float32")]:
        with quiet_codecs(), pytest.raises(UnusableRow, match=reason):
            decode_image(data)


def test_a_header_that_promises_a_giant_picture_is_unusable() -> None:
    giant = png([[0]], width=2**31 - 1, kind=GREY)
    with quiet_codecs(), pytest.raises(UnusableRow):
        decode_image(giant)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    # Phones append a second picture or a film.
    assert np.array_equal(decode_image(WHOLE_JPEG + b"more" * 9), decode_image(WHOLE_JPEG))


def test_the_largest_centred_square_is_kept_and_the_odd_rest_falls_at_the_bottom_or_right() -> None:
    wide = np.arange(2 * 5, dtype=np.uint8).reshape(2, 5)
    assert to_square(wide, image_size=2, channels=1)[:, :, 0].tolist() == wide[:, 1:3].tolist()
    assert to_square(wide.T.copy(), image_size=2, channels=1)[:, :, 0].tolist() == wide.T[1:3].tolist()


def test_shrinking_averages_areas() -> None:
    large = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    cells = large.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    assert abs(to_square(large, image_size=8, channels=3) - cells).max() <= 0.5


def test_growing_keeps_flat_pictures_flat_and_ramps_rising() -> None:
    flat = np.full((8, 8, 3), 77, np.uint8)
    assert (to_square(flat, image_size=28, channels=3) == 77).all()
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 30, (8, 1))
    grown = to_square(ramp, image_size=32, channels=1)[:, :, 0].astype(int)
    assert (np.diff(grown, axis=1)[:, 2:-2] >= 0).all()
    assert abs(grown[:, 14:18].mean() - 105) < 1  # the middle stays the middle


def test_colour_becomes_grey_by_luma_and_grey_becomes_colour_by_repetition() -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)
    luma = colours @ np.array([0.299, 0.587, 0.114])
    assert abs(to_square(colours, image_size=2, channels=1)[:, :, 0] - luma).max() <= 1
    grey = np.array([[1, 2], [3, 4]], np.uint8)
    assert to_square(grey, image_size=2, channels=3).tolist() == [[[v] * 3 for v in row] for row in grey.tolist()]


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 2), (8, 8), (28, 28, 3), (640, 480, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_shape_comes_out_square(shape: tuple[int, ...], channels: int) -> None:
    square = to_square(np.zeros(shape, np.uint8), image_size=8, channels=channels)
    assert square.shape == (8, 8, channels)
    assert square.dtype == np.uint8


def test_the_pipeline_of_this_version_gives_these_values() -> None:
    # Computed by hand. When they change, PIPELINE_VERSION must be raised: old caches would be taken for new ones.
    rows = [[65535, 0, 0, 65535, 0, 0, 0, 0], [0, 65535, 0, 65535, 0, 0, 65535, 13107]]
    picture = decode_image(png(rows, width=2, kind=RGBA, bits=16))
    assert picture.tolist() == [[[255, 0, 0], [255, 255, 255]], [[0, 255, 0], [204, 204, 255]]]
    assert to_square(picture, image_size=1, channels=3).tolist() == [[[179, 179, 128]]]
    assert pipeline_fingerprint(DataConfig()) == "4481f184a0cd6adb1b8c7399015eee55de73249e7d0c4fc874308f80f86a06a3"


def test_the_fingerprint_depends_on_the_preparation_alone() -> None:
    default = pipeline_fingerprint(DataConfig())
    assert default == pipeline_fingerprint(DataConfig(views=4, crop=0.1, flip=True))  # views are not prepared
    others = [DataConfig(image_size=28), DataConfig(channels=1), DataConfig(max_caption_characters=9)]
    assert len({default, *map(pipeline_fingerprint, others)}) == 4
