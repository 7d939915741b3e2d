"""How near do generated pictures come to single public ones? Nearest neighbours in an extractor's features.

Real pictures of the part `floor` say what is near: a generator that copies comes nearer to the pictures of the public
set than other real pictures do. Where a simulation trained on this very set, that is what memorising would look like;
where sites trained on other pictures, it only says that nothing looks copied from here.
Not covered: whether private pictures were memorised. Nobody but a site could look that up; the privacy guarantee is
what bounds it (PRIVACY rule 16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from shared.errors import DataError
from shared.metrics import Gallery, Measurement, Pictures
from shared.metrics.figure import Better, Figure, Interval, mean_interval

if TYPE_CHECKING:
    from shared.metrics import Setting

RARE = 0.01  # the share of real pictures that is nearer than "very near"
NEIGHBOURS = 3  # shown beside a picture
SHOWN = 10
BLOCK = 1000  # pictures whose distances are held at one time


@dataclass(frozen=True, eq=False)
class Nearest:
    """The metric, ready to measure.

    Attributes:
        index: scikit-learn's exact neighbours over the features of the part `reference`.
        real: distance of each picture of the part `floor` to its nearest one.
    """

    setting: Setting
    index: object
    real: np.ndarray

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        from sklearn.neighbors import NearestNeighbors

        reference = setting.features(setting.public.reference).pooled
        index = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(reference)), algorithm="brute").fit(reference)
        real, _ = _neighbours(index, setting.features(setting.public.floor).pooled)
        return cls(setting, index, real[:, 0])

    def measure(self, pictures: Pictures) -> Measurement:
        """The share of pictures that lie nearer than all but 1 % of real ones, and the typical distance.

        Raises:
            DataError: features are not finite.
        """
        setting, reference = self.setting, self.setting.public.reference
        features = setting.features(pictures).pooled
        if not np.isfinite(features).all():
            raise DataError("features of generated pictures are not finite, so nothing is near to them")
        found, rows = _neighbours(self.index, features)
        nearest = found[:, 0]
        # What is very near, one half of the real pictures says; how many others are, the other half.
        judges, judged = self.real[::2], self.real[1::2]
        very_near = float(np.quantile(judges, RARE))
        typical = float(np.median(self.real))
        near = (nearest <= very_near).astype(float)

        def figure(
            name: str, value: float, interval: Interval, better: Better, floor: float, floor_n: int
        ) -> Figure:
            return Figure(
                name, value, interval, better, len(pictures), reference.name, len(reference),
                extractor=setting.extractor.name, floor=floor, floor_n=floor_n,
                seeds={"pictures": [pictures.seed], "resampling": [setting.seed]},
            )  # fmt: skip

        ratio = float(np.median(nearest)) / typical if typical > 0 else float("nan")
        interval = mean_interval(near, seed=setting.seed)
        floor = float((judged <= very_near).mean())
        figures = [figure("very near", float(near.mean()), interval, "neither", floor, len(judged))]
        notes = [
            f"very near: nearer to a public picture than {1 - RARE:.0%} of {len(judges):,} other real pictures are:"
            " above the share of real pictures it looks like copying, below it like blur or few kinds of pictures;"
            " median distance: 1 is that of real pictures, well below 1 looks like copying or like blur",
        ]
        if np.isfinite(ratio):
            ratios = self._ratio_interval(nearest)
            figures.append(figure("median distance", ratio, ratios, "neither", 1.0, len(self.real)))
        else:
            notes.append("no median distance: most real pictures stand in the reference set themselves")
        return Measurement(figures, galleries=[self._gallery(pictures, rows, nearest)], notes=notes)

    def _ratio_interval(self, nearest: np.ndarray) -> Interval:
        rng = np.random.Generator(np.random.Philox(self.setting.seed))
        ratios = []
        for _ in range(200):
            real = np.median(self.real[rng.integers(len(self.real), size=len(self.real))])
            ratios.append(np.median(nearest[rng.integers(len(nearest), size=len(nearest))]) / max(real, 1e-12))
        low, high = np.quantile(ratios, [0.025, 0.975])
        return Interval(float(low), float(high), "bootstrap of both sides, 200 times")

    def _gallery(self, pictures: Pictures, rows: np.ndarray, nearest: np.ndarray) -> Gallery:
        reference = self.setting.public.reference
        shown = [
            (f"{pictures.prompts[row]}: {nearest[row]:.3g}",
             np.concatenate([pictures.images[row][None], reference.images[rows[row]]]))
            for row in np.argsort(nearest, kind="stable")[:SHOWN]
        ]  # fmt: skip
        title = f"the {len(shown)} generated pictures (left) that come nearest to public ones (right)"
        return Gallery("nearest", title, shown)


def _neighbours(index: object, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances and rows, each `(N, neighbours)`, nearest first."""
    parts = [
        index.kneighbors(features[start : start + BLOCK])  # type: ignore[attr-defined]
        for start in range(0, len(features), BLOCK)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
