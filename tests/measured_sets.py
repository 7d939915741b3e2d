"""Settings of metrics whose features are chosen: a picture is the number of its row in a table of features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shared.metrics import Part, Pictures, PublicSets, Setting
from shared.metrics.extractor import Features


@dataclass(eq=False)
class Rows:
    """An extractor whose features are the rows that pictures name."""

    pooled: np.ndarray
    logits: np.ndarray | None = None
    published: bool = False
    name: str = "rows 01234567"
    fingerprint: str = "0" * 64
    seen: list[int] = field(default_factory=list)

    def features(self, images: np.ndarray, *, step: Callable[[int, int], None]) -> Features:
        rows = np.ascontiguousarray(images).reshape(len(images), 4).view("<u4")[:, 0]
        self.seen.append(len(rows))
        return Features(self.pooled[rows], None if self.logits is None else self.logits[rows])


def numbered(start: int, count: int) -> np.ndarray:
    """`(count, 1, 1, 4)` uint8 pictures that name the rows from `start`."""
    return np.arange(start, start + count, dtype="<u4").view(np.uint8).reshape(count, 1, 1, 4)


def part(name: str, images: np.ndarray) -> Part:
    digest = hashlib.sha256(name.encode() + images.tobytes()).hexdigest()
    return Part(f"made, {name}", images, [("a caption",)] * len(images), {}, digest)


def setting_of(
    *, generated: np.ndarray, reference: np.ndarray, floor: np.ndarray,
    logits: Callable[[np.ndarray], np.ndarray] | None = None, published: bool = True, seed: int = 0,
) -> tuple[Setting, Pictures]:  # fmt: skip
    """A setting and generated pictures whose features are given; `logits` are made from the features."""
    table = np.concatenate([generated, reference, floor]).astype(np.float32)
    extractor = Rows(table, None if logits is None else logits(table).astype(np.float32), published)
    first, second = len(generated), len(generated) + len(reference)
    parts = {"reference": part("reference", numbered(first, len(reference))),
             "floor": part("floor", numbered(second, len(floor)))}  # fmt: skip
    unused = part("unused", numbered(0, 2))
    public = PublicSets(fit=unused, test=unused, **parts)
    pictures = Pictures(numbered(0, first), ["a prompt"] * first, seed=seed)
    return Setting(public=public, build_extractor=lambda setting: extractor, seed=seed), pictures
