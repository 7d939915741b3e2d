"""Precision, recall, density, coverage: whether generated pictures lie among real ones, and real among generated.

Each set is taken for the union of balls around its pictures, as wide as the way to their k-th neighbour.

    precision   generated pictures in a ball of a real one                    k = 3, torch-fidelity's; at the rim counts
    recall      real pictures in a ball of a generated one                    k = 3, torch-fidelity's; at the rim counts
    density     balls of real pictures that a generated one is in, over k     k = 5, inside the rim; can pass 1
    coverage    real pictures with a generated one in their ball              k = 5, inside the rim

Identical sets have precision, recall, coverage and density 1. A real picture with k equal ones beside it has a ball
of no width, in which density and coverage count nothing.
Not covered: how sure the balls are; intervals hold one set fixed, and say so. Source: Kynkaanniemi et al. 2019,
https://arxiv.org/abs/1904.06991; Naeem et al. 2020, https://arxiv.org/abs/2002.09797.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from shared.metrics import Figure, Measurement, Pictures, Setting
from shared.metrics.feature_sets import FeatureSets, one_thread
from shared.metrics.figure import mean_interval

PRECISION_K, DENSITY_K = 3, 5
BLOCK = 250  # rows at a time: a block against 10,000 pictures is 10 MB, which caches hold

Name = Literal["precision", "recall", "density", "coverage"]
NAMES: tuple[Name, ...] = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True, eq=False)
class Balls:
    """Around each of N pictures.

    Attributes:
        centres: `(N, D)` float32.
        k: of the radii, in order; fewer than asked where there are too few pictures.
        radii: `(2, N)`, for precision and recall, for density and coverage.
    """

    centres: Tensor
    k: tuple[int, int]
    radii: Tensor

    @classmethod
    def around(cls, features: Tensor) -> Self:
        wanted = tuple(min(k, len(features) - 1) for k in (PRECISION_K, DENSITY_K))
        rows = [
            torch.cdist(block, features).topk(max(wanted) + 1, largest=False).values  # itself is among them
            for block in features.split(BLOCK)
        ]
        nearest = torch.cat(rows)  # (N, k + 1)
        first, second = wanted
        return cls(features, (first, second), torch.stack([nearest[:, first], nearest[:, second]]))


@dataclass(frozen=True, eq=False)
class Manifold:
    """The metric, ready to measure.

    Attributes:
        centre: subtracted from all features, so that less is lost in rounding; distances stay.
    """

    sets: FeatureSets
    centre: np.ndarray
    reference: Balls

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        sets = FeatureSets.prepare(setting)
        centre = sets.reference.pooled.mean(axis=0, dtype=np.float64)
        with one_thread():
            return cls(sets, centre, Balls.around(_centred(sets.reference.pooled, centre)))

    def measure(self, pictures: Pictures) -> Measurement:
        generated, floor_n = _centred(self.sets.of(pictures).pooled, self.centre), self.sets.floor_n(pictures)
        with one_thread():
            found = compare(self.reference, generated)
            floor = compare(self.reference, _centred(self.sets.floor.pooled[:floor_n], self.centre))
            at_floor_n = compare(self.reference, generated[:floor_n]) if floor_n < len(generated) else None
        figures = [self._figure(name, found, floor, at_floor_n, self.sets.about(pictures)) for name in NAMES]
        notes = []
        if min(len(generated), len(self.reference.centres)) <= DENSITY_K:
            notes.append(f"too few pictures for {PRECISION_K} or {DENSITY_K} neighbours: as many as there are")
        return Measurement(figures, notes=notes)

    def _figure(
        self, name: Name, found: dict[Name, np.ndarray], floor: dict[Name, np.ndarray],
        at_floor_n: dict[Name, np.ndarray] | None, about: dict[str, Any],
    ) -> Figure:  # fmt: skip
        interval = mean_interval(found[name], seed=self.sets.setting.seed)
        drawn, fixed = ("generated", "real") if name in ("precision", "density") else ("real", "generated")
        return Figure(
            name=name,
            value=float(found[name].mean()),
            interval=replace(interval, how=f"{interval.how}, {drawn} ones; the {fixed} pictures held fixed"),
            better="higher",
            floor=float(floor[name].mean()),
            at_floor_n=None if at_floor_n is None else float(at_floor_n[name].mean()),
            warning=self.sets.not_comparable(name),
            **about,
        )


def compare(real: Balls, generated: Tensor) -> dict[Name, np.ndarray]:
    """What each picture says: of the generated ones for precision and density, of the real ones for the others.

    One pass over the distances, a block of real pictures at a time.
    """
    narrow = Balls.around(generated).radii[0]  # (N,)
    precise = torch.zeros(len(generated), dtype=torch.bool)
    density = torch.zeros(len(generated), dtype=torch.int32)
    recalled, covered = [], []
    for rows in torch.arange(len(real.centres)).split(BLOCK):
        distances = torch.cdist(real.centres[rows], generated)  # (B, N)
        precise |= (distances <= real.radii[0, rows, None]).any(dim=0)
        density += (distances < real.radii[1, rows, None]).sum(dim=0, dtype=torch.int32)
        recalled.append((distances <= narrow).any(dim=1))
        covered.append(distances.amin(dim=1) < real.radii[1, rows])
    return {
        "precision": precise.double().numpy(),
        "recall": torch.cat(recalled).double().numpy(),
        "density": (density.double() / real.k[1]).numpy(),
        "coverage": torch.cat(covered).double().numpy(),
    }


def _centred(features: np.ndarray, centre: np.ndarray) -> Tensor:
    return torch.from_numpy((features - centre).astype(np.float32))
