"""Figures about generated pictures, by name; each compares with a public reference set and costs no privacy.

A metric is prepared once on the parts of the public set (`public_sets`) and then asked about pictures; what it says
is a `Measurement`: figures with their interval, floor and chance (`figure`), and what a report shows beside them.
What turns pictures into features is an extractor (`extractor`), named with its fingerprint beside each figure.
Not here: anything that looks at a site's images (PRIVACY rule 16), and how results are kept and shown (`server`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np

from shared.metrics.figure import Figure, Interval
from shared.metrics.public_sets import Part, PublicSets
from shared.registry import Registry

if TYPE_CHECKING:
    from shared.metrics.extractor import Extractor, Features

T = TypeVar("T")

__all__ = ["METRICS", "Figure", "Gallery", "Interval", "Measurement", "Metric", "Part", "Pictures", "PublicSets",
           "Setting", "Table"]  # fmt: skip



@dataclass(frozen=True, eq=False)
class Pictures:
    """Generated pictures, picture i made from `prompts[i]`.

    Attributes:
        images: `(N, H, W, C)` uint8.
        seed: of their latents.
    """

    images: np.ndarray
    prompts: Sequence[str]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digest(self) -> str:
        content = hashlib.sha256(str(self.images.shape).encode() + np.ascontiguousarray(self.images).tobytes())
        content.update(repr(list(self.prompts)).encode())
        return content.hexdigest()


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures that a report shows: `rows` of (text under them, `(K, H, W, C)` uint8)."""

    name: str
    title: str
    rows: list[tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Table:
    """Rows of cells that a report shows; the first cell of a row names it."""

    title: str
    head: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a metric found.

    Attributes:
        figures: the first is the one that stands for the metric where there is room for one.
        tables: for the report, such as a confusion matrix.
        galleries: pictures for the report.
        notes: sentences that a reader must know, such as how many pictures were left out.
    """

    figures: list[Figure]
    tables: list[Table] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Setting:
    """What a metric may use.

    Attributes:
        public: the parts of the public set.
        build_extractor: the extractor that was asked for; built when a metric first needs one.
        dual_encoder: path or id of a model that embeds pictures and texts in one space; "" where none was named.
        seed: of resampling and of trainings.
        trainings: how many seeds a figure takes that depends on a training.
        cache_dir: where trained models and features of public pictures are kept, by content; `None`: nowhere.
        progress: told a line about what takes long.
        step: told (done, in all) of the work that was last told about.
    """

    public: PublicSets
    build_extractor: Callable[[Setting], Extractor]
    dual_encoder: str = ""
    seed: int = 0
    trainings: int = 3
    cache_dir: Path | None = None
    progress: Callable[[str], None] = lambda line: None
    step: Callable[[int, int], None] = lambda done, total: None
    _kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns; made at the first call with this name, for all metrics of this setting."""
        if name not in self._kept:
            self._kept[name] = make()
        made: T = self._kept[name]
        return made

    @property
    def extractor(self) -> Extractor:
        """Raises `DataError` or `ConfigError` when the extractor that was asked for cannot be had."""
        return self.once("extractor", lambda: self.build_extractor(self))

    def features(self, of: Part | Pictures) -> Features:
        """Of public or generated pictures; computed once, and those of public pictures kept in `cache_dir`."""
        from shared.metrics.extractor import cached_features

        cache = self.cache_dir if isinstance(of, Part) else None
        return self.once(
            f"features {of.digest}",
            lambda: cached_features(self.extractor, of.images, digest=of.digest, cache_dir=cache, step=self.step),
        )


class Metric(Protocol):
    """A figure that is prepared once on public pictures and then asked about generated ones, as often as wanted."""

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        """Raises `DataError` when the public set or the extractor does not have what the metric needs."""
        ...

    def measure(self, pictures: Pictures) -> Measurement:
        """Raises `DataError` when the pictures cannot be measured, with the reason."""
        ...


METRICS: Registry[type[Metric]] = Registry(
    "metric",
    {
        "fid": "shared.metrics.frechet:FrechetDistance",
        "kid": "shared.metrics.kernel_distance:KernelDistance",
        "is": "shared.metrics.inception_score:InceptionScore",
        "prdc": "shared.metrics.manifold:Manifold",
        "caption-accuracy": "shared.metrics.caption_accuracy:CaptionAccuracy",
        "clip-score": "shared.metrics.alignment:ClipScore",
        "retrieval": "shared.metrics.alignment:Retrieval",
        "downstream": "shared.metrics.downstream:Downstream",
        "nearest": "shared.metrics.nearest:Nearest",
    },
)
