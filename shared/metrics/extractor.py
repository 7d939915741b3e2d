"""Pictures to features: which networks there are for it, and what they must say of themselves.

    inception   Inception-v3 as every published FID uses it; weights from a file, or torch-fidelity's own download
    clip        the image side of a CLIP-like model of `transformers`, by id or path
    local       a small network trained on the public set itself (`local.py`)

A path stands for one of them: a file for Inception weights, a folder for a `transformers` model. Only figures of
Inception with the published weights may be called by their plain names; all others name their extractor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shared.registry import Registry

if TYPE_CHECKING:
    from shared.metrics import Setting


@dataclass(frozen=True, eq=False)
class Features:
    """Of N pictures.

    Attributes:
        pooled: `(N, D)` float32.
        logits: `(N, K)` float32 of K classes; `None` where the extractor tells no classes.
    """

    pooled: np.ndarray
    logits: np.ndarray | None


class Extractor(Protocol):
    """A fixed network."""

    @property
    def name(self) -> str:
        """Kind and fingerprint, as figures quote it, such as "local 3f9a01c2"."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights and everything else that decides the features, 64 hex digits."""
        ...

    @property
    def published(self) -> bool:
        """Whether figures may be called by their plain names: Inception-v3 with the published weights."""
        ...

    def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
        """Of `(N, H, W, C)` uint8, grey or colour, any size; one picture's do not depend on the others."""
        ...


EXTRACTORS: Registry[Callable[[Setting, str], Extractor]] = Registry(
    "extractor",
    {
        "inception": "shared.metrics.inception:build",
        "clip": "shared.metrics.vision_model:build",
        "local": "shared.metrics.local:build",
    },
)
"""Each entry: (setting, path or model id, "" where none was named) to an extractor."""


def cached_features(
    extractor: Extractor, images: np.ndarray, *, digest: str, cache_dir: Path | None,
    step: Callable[[int, int], None],
) -> Features:  # fmt: skip
    """Features of public pictures, kept by content: `features-<extractor>-<pictures>.safetensors`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save

    from shared.rundir import write_whole

    path = cache_dir / f"features-{extractor.fingerprint[:16]}-{digest[:24]}.safetensors" if cache_dir else None
    if path is not None and path.is_file():
        try:
            kept = load_file(path)
            if len(kept["pooled"]) == len(images):
                return Features(kept["pooled"], kept.get("logits"))
        except (SafetensorError, OSError, KeyError):
            pass  # damaged: made again
    made = extractor.features(images, step=step)
    if path is not None:
        arrays = {"pooled": made.pooled} if made.logits is None else {"pooled": made.pooled, "logits": made.logits}
        write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    return made
