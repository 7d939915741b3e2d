"""Pictures to features: which networks there are for it, and what they must say of themselves.

    inception   Inception-v3 as every published FID uses it; weights from a file, or torch-fidelity's own download
    clip        the image side of a CLIP-like model of `transformers`, by id or path
    local       a small network trained on the public set itself (`local.py`)

A path stands for one of them: a file for Inception weights, a folder for a `transformers` model. Only figures of
Inception with the published weights may be called by their plain names; all others name their extractor.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shared.errors import UsageError
from shared.registry import Registry, nearest_name_hint

if TYPE_CHECKING:
    from torch import Tensor

    from shared.metrics import Setting

LONG = 20.0  # seconds; what takes longer is announced


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


def named(text: str) -> tuple[Callable[[Setting, str], Extractor], str]:
    """What `--extractor TEXT` means: an entry of `EXTRACTORS`, and the path or id for it ("" where none was named).

    A known name comes first, also where a file is called so (`./local` is the file), then `NAME:PATH`, then a file
    (Inception weights) or a folder (a model of `transformers`).

    Raises:
        UsageError: none of them.
    """
    if text in EXTRACTORS:
        return EXTRACTORS.get(text), ""
    kind, colon, path = text.partition(":")
    if colon and path and kind in EXTRACTORS:
        return EXTRACTORS.get(kind), path
    if Path(text).is_file():
        return EXTRACTORS.get("inception"), text
    if text and Path(text).is_dir():
        return EXTRACTORS.get("clip"), text
    raise UsageError(
        f"unknown extractor '{text}', and no file or folder of that name",
        hint=f"{nearest_name_hint(kind, EXTRACTORS.names())}; or a file with Inception weights, a folder with a"
        " transformers model, clip:MODEL-ID",
    )


def cached_features(
    extractor: Extractor, images: np.ndarray, *, digest: str, cache_dir: Path | None,
    step: Callable[[int, int], None],
) -> Features:  # fmt: skip
    """Features of public pictures, kept by content: `features-<extractor>-<pictures>.safetensors`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save

    from shared.disk import write_whole

    path = cache_dir / f"features-{extractor.fingerprint[:16]}-{digest[:24]}.safetensors" if cache_dir else None
    if path is not None and path.is_file():
        try:
            kept = load_file(path)
            if len(kept["pooled"]) == len(images):
                return Features(kept["pooled"], kept.get("logits"))
        except (SafetensorError, OSError, KeyError):
            pass  # damaged: made again
    made = extractor.features(images, step=step)
    if path is not None and np.isfinite(made.pooled).all():  # others are refused, and made again when that is mended
        arrays = {"pooled": made.pooled} if made.logits is None else {"pooled": made.pooled, "logits": made.logits}
        write_whole(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    return made


def in_batches(
    images: np.ndarray, network: Callable[[np.ndarray], tuple[Tensor, Tensor | None]], *, size: int, what: str,
    progress: Callable[[str], None], step: Callable[[int, int], None],
) -> Features:  # fmt: skip
    """Features of all `images`, `size` at a time. Where it will take long, the first batch tells how long.

    Args:
        network: `(B, H, W, C)` uint8 to pooled `(B, D)` and logits `(B, K)` or `None`.
        what: is made, for the line about the time.
    """
    import torch

    pooled: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    for start in range(0, len(images), size):
        began = time.monotonic()
        batch = np.array(images[start : start + size])  # a copy: PyTorch warns of what is read-only
        with torch.inference_mode():
            rows, of_classes = network(batch)
        pooled.append(rows.float().numpy())
        logits += [] if of_classes is None else [of_classes.float().numpy()]
        left = (time.monotonic() - began) * (len(images) / size - 1)
        if start == 0 and left > LONG:
            progress(f"{what} of {len(images):,} pictures: about {in_words(left)} on this machine")
        step(min(start + size, len(images)), len(images))
    return Features(np.concatenate(pooled), np.concatenate(logits) if logits else None)


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def fingerprint_of(weights: Mapping[str, Tensor], *about: object) -> str:
    """SHA-256, 64 hex digits, over weights by sorted name with their shapes, and over the texts of `about`."""
    total = hashlib.sha256(repr([str(part) for part in about]).encode())
    for name, tensor in sorted(weights.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
