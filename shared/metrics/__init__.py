"""Figures about generated pictures, by name; each compares with a public reference set and costs no privacy.

Not here: anything that looks at a site's images (PRIVACY rule 16).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from shared.registry import Registry

if TYPE_CHECKING:
    from shared.data import ImageCaptionDataset


class Metric(Protocol):
    """A figure that is prepared once on the reference set and then asked about pictures."""

    @classmethod
    def prepare(
        cls, reference: ImageCaptionDataset, *, cache_dir: Path | None, progress: Callable[[str], None]
    ) -> Self:
        """Raises `DataError` when the reference set does not hold what the metric needs."""
        ...

    def measure(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        """JSON-ready figures of pictures `(N, H, W, C)` uint8, picture i made from `prompts[i]`."""
        ...


METRICS: Registry[type[Metric]] = Registry(
    "metric", {"caption-accuracy": "shared.metrics.caption_accuracy:CaptionAccuracy"}
)
