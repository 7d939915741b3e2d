"""The local extractor: features of the measuring classifier, trained on the public set itself.

For where Inception's weights are out of reach, or say little: 28 px digits are no photographs. Distances in its
features compare generators that were measured with the same public set; they are no published FID, and figures
carry its fingerprint. It was trained on the part `fit` only, which no distance compares with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import ConfigError, DataError
from shared.metrics.attributes import MeasuringClassifier, measuring_classifier
from shared.metrics.extractor import Features

if TYPE_CHECKING:
    from shared.metrics import Setting


@dataclass(frozen=True, eq=False)
class LocalExtractor:
    """128 features, and logits over the values of the first attribute."""

    classifier: MeasuringClassifier
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"local {self.fingerprint[:8]}"

    @property
    def fingerprint(self) -> str:
        return self.classifier.fingerprint

    @property
    def published(self) -> bool:
        return False

    def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
        if images.shape[1:] != self.shape:
            raise DataError(f"the local extractor reads pictures of shape {self.shape}, not {images.shape[1:]}")
        pooled, told = self.classifier.read(images, step)
        return Features(pooled, next(iter(told.values())))


def build(setting: Setting, path: str) -> LocalExtractor:
    """Trained on `setting.public.fit`; `ConfigError` where a path was named, which could only be misunderstood."""
    if path:
        raise ConfigError(
            f"the local extractor is trained on the public set, it takes no path: {path}",
            hint="--extractor local, or a file with Inception weights, or a folder with a transformers model",
        )
    return LocalExtractor(measuring_classifier(setting), setting.public.fit.images.shape[1:])
