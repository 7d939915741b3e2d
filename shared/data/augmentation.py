"""Random views of images, for inside the per-record loss: geometry in one warp, colour in one matrix.

Every view draws for itself, and every kind of change has its own draws, so switching one on leaves the others as
they are. What a warp reaches for outside the image repeats its border. A view of one record depends on no other.
"""

from __future__ import annotations

import cv2
import numpy as np

from shared.config import DataConfig

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
MID_GREY = 127.5


def augment(images: np.ndarray, *, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """`config.views` views of each image.

    Args:
        images: `(B, H, W, C)` uint8, H = W, C = 1 or 3; B may be 0.
        rng: draws 8 numbers a view, whatever is switched on.
    Returns:
        `(B, V, H, W, C)` uint8; equal copies where nothing is switched on.
    """
    count, side, _, channels = images.shape
    draws = rng.random((count, config.views, 8))
    geometry = bool(config.crop or config.flip or config.rotation)
    colour = bool(config.brightness or config.contrast or config.saturation)
    views = np.empty((count, config.views, side, side, channels), dtype=np.uint8)
    for image, own_views, own_draws in zip(images, views, draws, strict=True):
        for view, draw in zip(own_views, own_draws, strict=True):
            changed = image
            if geometry:
                changed = cv2.warpAffine(
                    changed, _warp(side, draw[:5], config), (side, side), borderMode=cv2.BORDER_REPLICATE,
                    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                )  # fmt: skip
            if colour:
                changed = cv2.transform(changed, _colour_matrix(channels, draw[5:], config))
            view[...] = changed.reshape(side, side, channels)  # OpenCV drops a single channel
    return views


def _warp(side: int, draw: np.ndarray, config: DataConfig) -> np.ndarray:
    """`(2, 3)`: from a pixel of the view to the point of the image that it shows.

    The view shows a square of the image that is smaller by up to `crop`, anywhere inside it, turned about the
    centre of that square by up to `rotation` degrees either way, and mirrored in half of the cases.
    """
    part = 1.0 - config.crop * draw[0]
    free = side * (1.0 - part)
    centre = np.array([draw[1], draw[2]]) * free + (side * part - 1) / 2
    angle = np.deg2rad(config.rotation * (2 * draw[3] - 1))
    mirror = -1.0 if config.flip and draw[4] < 0.5 else 1.0
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = part * turn @ np.diag([mirror, 1.0])
    middle = np.full(2, (side - 1) / 2)
    return np.column_stack([matrix, centre - matrix @ middle])


def _colour_matrix(channels: int, draw: np.ndarray, config: DataConfig) -> np.ndarray:
    """`(C, C + 1)`: saturation about the pixel's grey, then brightness as a factor, then contrast about mid-grey."""
    largest = np.array([config.brightness, config.contrast, config.saturation])
    brightness, contrast, saturation = 1.0 + largest * (2 * draw - 1)
    mix = np.eye(channels)
    if channels == 3:
        mix = saturation * mix + (1.0 - saturation) * np.tile(LUMA, (3, 1))
    offset = np.full((channels, 1), (1.0 - contrast) * MID_GREY)
    return np.hstack([contrast * brightness * mix, offset])
