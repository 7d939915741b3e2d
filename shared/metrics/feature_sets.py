"""Features of generated, reference and floor pictures, checked, and what every figure over them says of itself.

Not covered: the figures themselves; each of `frechet`, `kernel_distance`, `inception_score`, `manifold` is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from shared.errors import DataError
from shared.metrics import Part, Pictures, Setting
from shared.metrics.extractor import Features

FEWEST = 2  # pictures: one has no spread


@dataclass(frozen=True, eq=False)
class FeatureSets:
    """Of the public pictures; `of` adds those of generated ones.

    Attributes:
        reference: what generated pictures are compared with.
        floor: of real pictures in their place.
    """

    setting: Setting
    reference: Features
    floor: Features

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        """Raises `DataError` for too few public pictures, or features that are not finite."""
        public = setting.public
        return cls(setting, checked(setting, public.reference, public.reference.name),
                   checked(setting, public.floor, public.floor.name))  # fmt: skip

    def of(self, pictures: Pictures) -> Features:
        return checked(self.setting, pictures, "the generated pictures")

    def floor_n(self, pictures: Pictures) -> int:
        return min(len(pictures), len(self.floor.pooled))

    def about(self, pictures: Pictures) -> dict[str, Any]:
        """Fields of `Figure` that do not depend on which."""
        return {
            "n": len(pictures),
            "reference": self.setting.public.reference.name,
            "reference_n": len(self.reference.pooled),
            "extractor": self.setting.extractor.name,
            "seeds": {"pictures": [pictures.seed], "resampling": [self.setting.seed]},
            "floor_n": self.floor_n(pictures),
        }

    def called(self, plain: str, words: str) -> str:
        """The plain name of a figure belongs to Inception with the published weights; others name their extractor."""
        by = self.setting.extractor
        return plain if by.published else f"{words} by {by.name}"

    def not_comparable(self, figure: str) -> str:
        """Why `figure` must not stand beside published ones; "" where it may."""
        by = self.setting.extractor
        return "" if by.published else f"not comparable with published {figure}: features are of {by.name}"


def checked(setting: Setting, pictures: Part | Pictures, what: str) -> Features:
    """Features of at least two pictures, all of them finite."""
    if len(pictures) < FEWEST:
        raise DataError(f"{what}: {len(pictures)} pictures, and no figure over features can be had from fewer than"
                        f" {FEWEST}", hint="a thousand or more give figures that say something")  # fmt: skip
    features = setting.features(pictures)
    for kind, rows in (("features", features.pooled), ("logits", features.logits)):
        bad = 0 if rows is None else int((~np.isfinite(rows).all(axis=1)).sum())
        if bad:
            raise DataError(
                f"{what}: {kind} of {bad} of {len(pictures)} pictures by {setting.extractor.name} are not finite",
                hint="the extractor's weights are damaged, or it does not fit such pictures; name another one",
            )
    return features


def joined(*sentences: str) -> str:
    return "; ".join(sentence for sentence in sentences if sentence)


@contextmanager
def one_thread() -> Iterator[None]:
    """For many short products: beside other work, threads that wait for each other take several times as long."""
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):  # those of NumPy
            yield
    finally:
        torch.set_num_threads(threads)
