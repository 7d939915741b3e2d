"""Image files built byte by byte, so that what they hold is known without any decoder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types, PNG specification section 11.2.1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: Sequence[Sequence[int]], *, width: int, kind: int, bits: int = 8, extra: bytes = b"") -> bytes:
    """A PNG whose samples are `rows`, in the order of the colour type; `extra` chunks come before the pixels."""
    code = ">H" if bits == 16 else ">B"
    raw = b"".join(b"\0" + b"".join(struct.pack(code, sample) for sample in row) for row in rows)
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def plain_png(colour: tuple[int, int, int], *, side: int = 8) -> bytes:
    return png([list(colour) * side] * side, width=side, kind=RGB)


def exif(orientation: int, *, big_endian: bool = False) -> bytes:
    """A TIFF header with a directory of two entries, the second of them the orientation."""
    order = ">" if big_endian else "<"
    entries = struct.pack(order + "HHIHH", 0x0100, 3, 1, 99, 0) + struct.pack(
        order + "HHIHH", 0x0112, 3, 1, orientation, 0
    )
    head = (b"MM" if big_endian else b"II") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "H", 2) + entries + bytes(4)


def jpeg(image: np.ndarray, *, exif_block: bytes | None = None) -> bytes:
    """`(h, w, 3)` RGB as JPEG at full quality, with an APP1 segment when a block is given."""
    _, coded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])
    data = coded.tobytes()
    if exif_block is None:
        return data
    payload = b"Exif\0\0" + exif_block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]


def captions_folder(folder: Path, rows: Sequence[tuple[str, str]], *, images: str = "") -> Path:
    """A data set of plain pictures, one for each row's file name, with a `captions.csv`."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    for place, (name, _) in enumerate(rows):
        (folder / images / name).write_bytes(plain_png((place % 256, place // 256, 7)))
    lines = ["file_name,text", *(f"{name},{text}" for name, text in rows)]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
