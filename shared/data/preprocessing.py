"""A picture of any size to the run's square of pixels, and the fingerprint of all that is done to a record.

The rule: grey or colour first, then the largest centred square is cut out (an odd rest stays at the bottom or
right), then it is resized: averaged by area when it shrinks, cubic when it grows, untouched when it fits.
Normalisation to [-1, 1] is by constants, where tensors are made. Nothing depends on another record.
"""

from __future__ import annotations

import hashlib
import json

import cv2
import numpy as np

from shared.config import DataConfig

# Raise it whenever the same file or caption would come out differently: caches and fingerprints depend on it.
PIPELINE_VERSION = 1


def to_square(image: np.ndarray, *, image_size: int, channels: int) -> np.ndarray:
    """`(h, w)` grey or `(h, w, 3)` RGB uint8 to `(image_size, image_size, channels)` uint8.

    Colour becomes grey by 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601); grey becomes colour by repetition.
    """
    if image.ndim == 3 and channels == 1:
        image = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    if side != image_size:
        how = cv2.INTER_AREA if side > image_size else cv2.INTER_CUBIC
        image = np.asarray(cv2.resize(image, (image_size, image_size), interpolation=how))
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], channels, axis=2)
    return image


def pipeline_fingerprint(config: DataConfig) -> str:
    """SHA-256, 64 hex digits, of what decides how a record is prepared: public, so equal at every site."""
    settings = {
        "version": PIPELINE_VERSION,
        "image-size": config.image_size,
        "channels": config.channels,
        "max-caption-characters": config.max_caption_characters,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
