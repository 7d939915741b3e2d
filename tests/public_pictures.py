"""Public pictures for tests of metrics: shapes that are learned in seconds, and settings around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from shared.data import ImageCaptionDataset
from shared.metrics import Pictures, Setting
from shared.metrics.extractor import Extractor
from shared.metrics.local import build as build_local
from shared.metrics.public_sets import divide
from simulations.shapes import Kind, draw, grammar

# Colour and background alone, so that a classifier learns them in a moment.
PLAIN = [kind for kind in grammar() if kind.shape == "circle" and kind.size == "large"]


def shapes(
    count: int, *, size: int = 8, channels: int = 3, seed: int = 0, kinds: Sequence[Kind] = PLAIN, name: str = "shapes"
) -> ImageCaptionDataset:
    rng = np.random.default_rng(seed)
    picks = [kinds[place] for place in rng.integers(len(kinds), size=count)]
    images = np.stack([draw(kind, image_size=size, rng=rng) for kind in picks])
    if channels == 1:
        images = np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])[..., None]
    names = ("background",) if channels == 1 else ("colour", "background")
    attributes = {column: [getattr(kind, column) for kind in picks] for column in names}
    captions = [(kind.caption,) for kind in picks]
    return ImageCaptionDataset(images=images, captions=captions, attributes=attributes, name=name)


def setting_of(
    dataset: ImageCaptionDataset, *, n: int = 200, test: ImageCaptionDataset | None = None,
    cache_dir: Path | None = None, told: Callable[[str], None] = lambda line: None, trainings: int = 2,
    build_extractor: Callable[[Setting], Extractor] = lambda setting: build_local(setting, ""),
) -> Setting:  # fmt: skip
    public = divide(dataset, n=n, test=test)
    return Setting(public, build_extractor, cache_dir=cache_dir, progress=told, trainings=trainings)


def as_pictures(dataset: ImageCaptionDataset, seed: int = 1) -> Pictures:
    """Real pictures in the place of generated ones, each with its first caption as prompt."""
    return Pictures(dataset.images, [captions[0] for captions in dataset.captions], seed)
