"""The warm start's statistics: caption-conditioned moments of the fixed features, one bounded vector a unit.

A record with moment features f (F values) and text t = (1, caption embedding) gives the vector
(f t^T, rho t t^T), divided by a public scale and clipped jointly to norm 1. It holds every statistic and,
as the first entry of t t^T, the constant that stands for the record, so that all normalisers come from the
noised constant (PRIVACY rule 26). The server reads from the noised sum what features to expect of a prompt.
Where the unit is the subject, its vector is the mean of its records' vectors, clipped as one.

What f is, `MomentFeatures` says: the discriminator's map averaged over 2 x 2 cells (a quarter of the coordinates
halves the noise against the signal), and as many random Fourier features of the map as the settings ask for. Means
of the former say what a prompt's pictures look like on average; means of the latter, how they are distributed.
Sources: random Fourier features from Rahimi & Recht 2007; their private means from Harder et al. 2021, "DP-MERF"
(arXiv 2002.11603), there of pixels, here of features that know edges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shared.config import RunConfig
from shared.privacy.arithmetic import BLOCK

# Public. Of the front end's features on natural pictures and shapes; records near this size are not clipped.
FEATURE_RMS = 0.33
TEXT_WEIGHT = 2.0  # rho, in units of FEATURE_RMS * sqrt(F) / sqrt(E + 1)
CLIPPING_NORM = 1.0
WINDOW = 3  # cells a side
# Public: how far two pictures' maps lie apart, a value of the map; of garments .73. It sets what counts as near.
MAP_SPREAD = 0.73
ROWS = 1000


class MomentFeatures:
    """What the moments are of: `(B, h, w, c)` maps to `(B, F)` values of about the same size `FEATURE_RMS`.

    First the map averaged over 2 x 2 cells, then random Fourier features, half of them of the whole map and half of
    windows of 3 x 3 cells. Frequencies are public constants: they come from a fixed seed and no data.

    Attributes:
        feature_shape: `(h, w, c)` of the discriminator's map.
        random: how many random Fourier features, rounded so that each window has equally many.
        pooled: how many values the averaged map has.
    """

    def __init__(self, feature_shape: Sequence[int], random: int = 0) -> None:
        height, width, channels = self.feature_shape = tuple(feature_shape)
        side = (height + 1) // 2
        self.pooled = side * side * channels
        self._window = min(WINDOW, height, width)
        self._windows = (height - self._window + 1) * (width - self._window + 1)
        self._of_window = max(1, random // 2 // self._windows) if random else 0
        self._of_map = max(1, random - self._windows * self._of_window) if random else 0
        self.random = self._of_map + self._windows * self._of_window

    @property
    def size(self) -> int:
        return self.pooled + self.random

    @cached_property
    def _waves(self) -> tuple[_Waves, _Waves]:
        height, width, channels = self.feature_shape
        return (
            _Waves("map", height * width * channels, 1, self._of_map),
            _Waves("windows", self._window**2 * channels, self._windows, self._of_window),
        )

    def __call__(self, maps: Tensor) -> Tensor:
        """`(B, h, w, c)` to `(B, F)`, in the type of `maps`; differentiable."""
        parts = [self.averaged(maps)]
        if self.random:
            of_map, of_windows = self._waves
            cut = maps.unfold(1, self._window, 1).unfold(2, self._window, 1)  # (B, rows, columns, c, 3, 3)
            parts += [of_map(maps.flatten(1)[None]), of_windows(cut.flatten(1, 2).flatten(2).transpose(0, 1))]
        return torch.cat(parts, dim=1)

    @staticmethod
    def averaged(maps: Tensor) -> Tensor:
        """`(B, h, w, c)` to `(B, pooled)`: averaged over 2 x 2 cells (`h` rounded up), flattened."""
        side = (maps.shape[1] + 1) // 2
        return functional.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), side).flatten(1)

    def unaveraged(self, values: Tensor) -> Tensor:
        """`(B, pooled)` back to `(B, h, w, c)`: each cell takes the value of the window that it was averaged into.

        At an odd number of cells a side those windows overlap, and the means are met about, not exactly.
        """
        height, width, channels = self.feature_shape
        side = (height + 1) // 2
        maps = values.view(len(values), channels, side, side)
        return functional.interpolate(maps, size=(height, width)).permute(0, 2, 3, 1)


class _Waves:
    """Random Fourier features of some groups of values: cos(w . v + b), of root mean square `FEATURE_RMS`."""

    def __init__(self, name: str, inputs: int, groups: int, count: int) -> None:
        key = np.frombuffer(hashlib.sha256(f"{name}|{inputs}|{groups}|{count}".encode()).digest()[:16], dtype="<u8")
        rng = np.random.Generator(np.random.Philox(key=key))
        frequencies = rng.standard_normal((groups, inputs, count), dtype=np.float32) / (MAP_SPREAD * inputs**0.5)
        self.frequencies = torch.from_numpy(frequencies)
        self.phases = torch.from_numpy(2 * math.pi * rng.random((groups, 1, count), dtype=np.float32))

    def __call__(self, values: Tensor) -> Tensor:
        """`(groups, B, inputs)` to `(B, groups * count)`."""
        turns = torch.bmm(values, self.frequencies.to(values)) + self.phases.to(values)
        return (FEATURE_RMS * 2**0.5 * turns.cos()).transpose(0, 1).flatten(1)


def moment_features(config: RunConfig, feature_shape: Sequence[int]) -> MomentFeatures:
    """What the moments of a run are of; `feature_shape` is that of its discriminator's map."""
    return MomentFeatures(feature_shape, config.warm_start.random_features)


def with_constant(embeddings: Tensor) -> Tensor:
    """t `(B, E + 1)` = (1, embedding) of embeddings `(B, E)`."""
    return torch.cat([embeddings.new_ones(len(embeddings), 1), embeddings], dim=1)


def moment_size(features: int, embedding_dim: int) -> int:
    """Length of the vector: F (E + 1) feature moments, then (E + 1)^2 text moments."""
    return (features + embedding_dim + 1) * (embedding_dim + 1)


def clipped_moment_sum(maps: Tensor, captions: Tensor, of: MomentFeatures) -> Tensor:
    """Sum over records of their moment vectors, each of L2 norm at most 1.

    Args:
        maps: `(N, h, w, c)`, any float type; N may be 0.
        captions: `(N, E)`.
    Returns:
        `(moment_size,)` float64. A record that is not finite contributes zero.
    """
    size, columns = of.size, captions.shape[1] + 1
    scale, rho = _public_scales(size, columns)
    of_features = torch.zeros(size, columns, dtype=torch.float64)
    of_text = torch.zeros(columns, columns, dtype=torch.float64)
    for start in range(0, len(maps), ROWS):
        f, t = _vector_factors(maps[start : start + ROWS], captions[start : start + ROWS], of, scale)
        text = t.square().sum(dim=1)
        norms = (text * f.square().sum(dim=1) + (rho / scale * text).square()).sqrt()
        factors = torch.where(norms.isfinite(), (CLIPPING_NORM / norms.clamp(min=1e-12)).clamp(max=1), 0)
        f, t = f.nan_to_num(0, 0, 0), t.nan_to_num(0, 0, 0)
        of_features += f.t() @ (factors[:, None] * t)
        of_text += rho / scale * (t.t() @ (factors[:, None] * t))
    return torch.cat([of_features.reshape(-1), of_text.reshape(-1)])


def clipped_subject_moment_sum(
    maps: Tensor, captions: Tensor, subject_rows: Sequence[np.ndarray], of: MomentFeatures
) -> Tensor:
    """Sum over subjects of the mean moment vector of their images, each mean of L2 norm at most 1.

    One subject at a time and its images in parts: two vectors in memory, however many there are of both.

    Args:
        maps: `(N, h, w, c)`, any float type.
        captions: `(N, E)`.
        subject_rows: for each subject the rows that are its own, at least one.
    Returns:
        `(moment_size,)` float64. A subject that is not finite contributes zero.
    """
    size, columns = of.size, captions.shape[1] + 1
    scale, rho = _public_scales(size, columns)
    total = torch.zeros((size + columns) * columns, dtype=torch.float64)
    for rows in subject_rows:
        mean = torch.zeros_like(total)
        for start in range(0, len(rows), ROWS):
            part = torch.from_numpy(rows[start : start + ROWS])
            f, t = _vector_factors(maps[part], captions[part], of, scale)
            mean += torch.cat([(f.t() @ t).reshape(-1), (rho / scale * (t.t() @ t)).reshape(-1)]) / len(rows)
        # The norm of what is added, as rounded: images that cancel out leave a mean that no formula knows as well.
        norm = float(mean.norm())
        if math.isfinite(norm):
            total.add_(mean, alpha=min(1.0, CLIPPING_NORM / max(norm, 1e-12)))
    return total


@dataclass(frozen=True, eq=False)
class MomentFit:
    """What the noised sum says of the features that a prompt should have; post-processing, no further cost.

    Attributes:
        regression: `(F, E + 1)`, of the features on (1, embedding).
        directions_kept: singular directions of the feature moments that stand out of the noise.
    """

    regression: Tensor
    directions_kept: int

    @classmethod
    def of_sum(cls, total: np.ndarray, *, features: int, embedding_dim: int, noise_std: float) -> MomentFit:
        """Least squares from the noised sums.

        Args:
            total: `(moment_size,)` float64, the sum over all sites.
            features: F.
            noise_std: of each coordinate of `total`, over all sites; 0 without privacy.
        """
        columns = embedding_dim + 1
        scale, rho = _public_scales(features, columns)
        of_features = torch.from_numpy(total[: features * columns]).view(features, columns)
        of_text = torch.from_numpy(total[features * columns :]).view(columns, columns) * (scale / rho)
        of_text = (of_text + of_text.t()) / 2
        text_noise = noise_std * scale / rho
        values, directions = torch.linalg.eigh(of_text)
        # Directions of the text that the captions do not fill carry noise only.
        kept = values > max(2 * text_noise * columns**0.5, 1e-6 * float(values[-1]))
        if not kept.any():
            kept[-1] = True
        values, directions = values[kept].clamp(min=1e-9), directions[:, kept]
        left, singular, right = torch.linalg.svd(of_features @ directions, full_matrices=False)
        floor = noise_std * (features**0.5 + len(values) ** 0.5)
        clear = singular > floor
        regression = (left * torch.where(clear, singular, 0)) @ right / values @ directions.t() * scale
        return cls(regression.float(), int(clear.sum()))

    def expected_features(self, conditioning: Tensor) -> Tensor:
        """Mean moment features `(B, F)` that real images with the captions of `conditioning` `(B, E)` have."""
        regression = self.regression.to(conditioning)
        expected: Tensor = conditioning @ regression[:, 1:].t() + regression[:, 0]
        return expected


def _vector_factors(maps: Tensor, captions: Tensor, of: MomentFeatures, scale: float) -> tuple[Tensor, Tensor]:
    """f `(B, F)`, scaled, and t `(B, E + 1)`: the vectors of B records are their outer products.

    float64 throughout: how sums are rounded depends on the other records, and is charged (`shared.privacy.arithmetic`).
    What is summed does not: features are made in blocks of one shape, filled up with zeros, so that no record's are
    computed in another way because more or fewer stand beside it.
    """
    count = len(maps)
    maps = torch.cat([maps, maps.new_zeros(-count % BLOCK, *maps.shape[1:])])
    f = torch.cat([of(block.double()).cpu() for block in maps.split(BLOCK)])[:count] / scale
    return f, with_constant(captions.double().cpu())


def _public_scales(features: int, columns: int) -> tuple[float, float]:
    """(scale of the vector, rho): the typical record has norm about 1 after division by the scale."""
    rho = TEXT_WEIGHT * FEATURE_RMS * (features / columns) ** 0.5
    scale = float((2 * FEATURE_RMS**2 * features + (2 * rho) ** 2) ** 0.5)
    return scale, rho
