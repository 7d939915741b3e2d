"""Pictures of uint8 pixels to PNG bytes, and words onto them. For generated and public pictures."""

from __future__ import annotations

import cv2
import numpy as np

# Everyone who has the pixels has the same bytes: no time, no software name, one compression level.
PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 6)


def encode_png(image: np.ndarray) -> bytes:
    """`(h, w)`, `(h, w, 1)` grey or `(h, w, 3)` RGB, uint8, to a PNG file's bytes."""
    assert image.dtype == np.uint8, image.dtype
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 and image.shape[2] == 3 else image
    done, png = cv2.imencode(".png", pixels, PNG_OPTIONS)
    assert done
    return png.tobytes()


def write_words(canvas: np.ndarray, text: str, *, left: int, baseline: int, pixels: int) -> None:
    """Draws black `text` onto `(h, w, 3)` in place, with OpenCV's own font, which knows Chinese and Japanese.

    Args:
        pixels: height of the font.
    """
    if hasattr(cv2, "FontFace"):  # OpenCV 5; before it had only Latin strokes
        cv2.putText(canvas, text, (left, baseline), (0, 0, 0), cv2.FontFace("sans"), pixels)
    else:
        cv2.putText(canvas, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, pixels / 30, (0, 0, 0), 1, cv2.LINE_AA)
