"""Bytes of an image file to 8-bit RGB or grey, the way a viewer would show it.

Transparency is composited on white, 16 bits are scaled to 8 over their full range (never to the range that a
picture happens to use), the EXIF orientation is applied, an animation gives its first frame. Any format that
OpenCV reads: PNG, JPEG, WebP, TIFF, BMP, GIF, ...
Not covered: colour profiles (all colours are taken as sRGB), and pixels of other types than 8 and 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from shared.data.source import UnusableRow

MAX_FILE_BYTES = 256 * 2**20
ORIENTATION_TAG = 0x0112


def decode_image(data: bytes) -> np.ndarray:
    """The picture in `data`.

    Returns:
        `(h, w)` grey or `(h, w, 3)` RGB, uint8.
    Raises:
        UnusableRow: empty, truncated or damaged, too large, or not 8 or 16 bit.
    """
    if not data:
        raise UnusableRow("the file is empty")
    try:
        pixels, kinds, blocks = cv2.imdecodeWithMetadata(
            np.frombuffer(data, dtype=np.uint8), flags=cv2.IMREAD_UNCHANGED
        )
    except (cv2.error, MemoryError):
        raise UnusableRow("it cannot be decoded as an image") from None
    if pixels is None:
        raise UnusableRow("it cannot be decoded as an image")
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257, rounded
    if pixels.dtype != np.uint8:
        raise UnusableRow(f"its pixels are {pixels.dtype}, not 8 or 16 bit")
    if pixels.ndim == 3:
        pixels = _to_rgb(pixels)
    exif = next((bytes(b) for k, b in zip(kinds, blocks, strict=True) if k == cv2.IMAGE_METADATA_EXIF), b"")
    return _upright(pixels, _orientation(exif))


def _to_rgb(pixels: np.ndarray) -> np.ndarray:
    """`(h, w, 3 | 4)` as OpenCV orders it, blue first, to `(h, w, 3)` RGB on white."""
    if pixels.shape[2] == 3:
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    if pixels.shape[2] != 4:
        raise UnusableRow(f"it has {pixels.shape[2]} channels")
    rgb, alpha = pixels[:, :, 2::-1].astype(np.uint32), pixels[:, :, 3:].astype(np.uint32)
    # Before any resizing: the colour below full transparency is arbitrary and must not bleed into edges.
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _orientation(exif: bytes) -> int:
    """The orientation 1..8 in an EXIF block (a TIFF header and its first directory); 1 when there is none.

    Source: CIPA DC-008 (Exif 2.32), section 4.6.4, tag 274.
    """
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return 1

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], "little" if exif[:1] == b"I" else "big")

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(exif) - 11), 12):
        if number(entry, 2) == ORIENTATION_TAG:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the camera's position: orientations 5 to 8 are stored transposed, the others are mirrored or turned."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@contextmanager
def quiet_codecs() -> Iterator[None]:
    """Keeps OpenCV's warnings about damaged files off the terminal: the skipped rows say it better."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
