"""The warm start's statistics: caption-conditioned moments of the fixed features, one bounded vector a unit.

A record with features f (F values) and text t = (1, caption embedding) gives the vector
(f t^T, rho t t^T), divided by a public scale and clipped jointly to norm 1. It holds every statistic and,
as the first entry of t t^T, the constant that stands for the record, so that all normalisers come from the
noised constant (PRIVACY rule 26). Features are first averaged over 2 x 2 cells: a quarter of the coordinates
halves the noise against the signal. The server reads from the noised sum what features to expect of a prompt.
Where the unit is the subject, its vector is the mean of its records' vectors, clipped as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Public. Of the front end's features on natural pictures and shapes; records near this size are not clipped.
FEATURE_RMS = 0.33
TEXT_WEIGHT = 2.0  # rho, in units of FEATURE_RMS * sqrt(F) / sqrt(E + 1)
CLIPPING_NORM = 1.0
ROWS = 1000


def pooled_features(features: Tensor) -> Tensor:
    """`(B, h, w, c)` to `(B, F)`: averaged over 2 x 2 cells (`h` rounded up), flattened."""
    side = (features.shape[1] + 1) // 2
    return functional.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), side).flatten(1)


def unpooled_features(pooled: Tensor, feature_shape: Sequence[int]) -> Tensor:
    """`(B, F)` back to `(B, h, w, c)`: each cell takes the value of the window that it was averaged into.

    At an odd number of cells a side those windows overlap, and the means are met about, not exactly.
    """
    height, width, channels = feature_shape
    side = (height + 1) // 2
    maps = pooled.view(len(pooled), channels, side, side)
    return functional.interpolate(maps, size=(height, width)).permute(0, 2, 3, 1)


def moment_size(feature_shape: tuple[int, ...], embedding_dim: int) -> int:
    """Length of the vector for maps `(h, w, c)`: F (E + 1) feature moments, then (E + 1)^2 text moments."""
    return (_feature_count(feature_shape) + embedding_dim + 1) * (embedding_dim + 1)


def clipped_moment_sum(features: Tensor, captions: Tensor) -> Tensor:
    """Sum over records of their moment vectors, each of L2 norm at most 1.

    Args:
        features: `(N, h, w, c)`, any float type; N may be 0.
        captions: `(N, E)`.
    Returns:
        `(moment_size,)` float64. A record that is not finite contributes zero.
    """
    size, columns = _feature_count(tuple(features.shape[1:])), captions.shape[1] + 1
    scale, rho = _public_scales(size, columns)
    of_features = torch.zeros(size, columns, dtype=torch.float64)
    of_text = torch.zeros(columns, columns, dtype=torch.float64)
    for start in range(0, len(features), ROWS):
        f, t = _vector_factors(features[start : start + ROWS], captions[start : start + ROWS], scale)
        text = t.square().sum(dim=1)
        norms = (text * f.square().sum(dim=1) + (rho / scale * text).square()).sqrt()
        factors = torch.where(norms.isfinite(), (CLIPPING_NORM / norms.clamp(min=1e-12)).clamp(max=1), 0)
        f, t = f.nan_to_num(0, 0, 0), t.nan_to_num(0, 0, 0)
        of_features += f.t() @ (factors[:, None] * t)
        of_text += rho / scale * (t.t() @ (factors[:, None] * t))
    return torch.cat([of_features.reshape(-1), of_text.reshape(-1)])


def clipped_subject_moment_sum(features: Tensor, captions: Tensor, subject_rows: Sequence[np.ndarray]) -> Tensor:
    """Sum over subjects of the mean moment vector of their images, each mean of L2 norm at most 1.

    One subject at a time and its images in parts: two vectors in memory, however many there are of both.

    Args:
        features: `(N, h, w, c)`, any float type.
        captions: `(N, E)`.
        subject_rows: for each subject the rows that are its own, at least one.
    Returns:
        `(moment_size,)` float64. A subject that is not finite contributes zero.
    """
    size, columns = _feature_count(tuple(features.shape[1:])), captions.shape[1] + 1
    scale, rho = _public_scales(size, columns)
    total = torch.zeros((size + columns) * columns, dtype=torch.float64)
    for rows in subject_rows:
        mean = torch.zeros_like(total)
        for start in range(0, len(rows), ROWS):
            part = torch.from_numpy(rows[start : start + ROWS])
            f, t = _vector_factors(features[part], captions[part], scale)
            mean += torch.cat([(f.t() @ t).reshape(-1), (rho / scale * (t.t() @ t)).reshape(-1)]) / len(rows)
        # The norm of what is added, as rounded: images that cancel out leave a mean that no formula knows as well.
        norm = float(mean.norm())
        if math.isfinite(norm):
            total.add_(mean, alpha=min(1.0, CLIPPING_NORM / max(norm, 1e-12)))
    return total


class MomentFit:
    """What the noised sum says of the features that a prompt should have; post-processing, no further cost.

    Args:
        total: `(moment_size,)` float64, the sum over all sites.
        feature_shape: of the discriminator's map, `(h, w, c)`.
        noise_std: of each coordinate of `total`, over all sites; 0 without privacy.
    """

    def __init__(
        self, total: np.ndarray, *, feature_shape: tuple[int, ...], embedding_dim: int, noise_std: float
    ) -> None:  # fmt: skip
        features, columns = _feature_count(feature_shape), embedding_dim + 1
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
        self.directions_kept = int((singular > floor).sum())
        singular = torch.where(singular > floor, singular, 0)
        regression = (left * singular) @ right / values @ directions.t() * scale
        self.regression = regression.float()  # (F, E + 1)

    def expected_features(self, conditioning: Tensor) -> Tensor:
        """Mean pooled features `(B, F)` that real images with the captions of `conditioning` `(B, E)` have."""
        regression = self.regression.to(conditioning)
        expected: Tensor = conditioning @ regression[:, 1:].t() + regression[:, 0]
        return expected


def _vector_factors(features: Tensor, captions: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """f `(B, F)`, scaled, and t `(B, E + 1)`: the vectors of B records are their outer products.

    float64 throughout: how sums are rounded depends on the other records, and is charged (`shared.privacy.arithmetic`).
    """
    f = pooled_features(features.double()).cpu() / scale
    return f, torch.cat([f.new_ones(len(f), 1), captions.double().cpu()], dim=1)


def _feature_count(feature_shape: tuple[int, ...]) -> int:
    side = (feature_shape[0] + 1) // 2
    return side * side * feature_shape[2]


def _public_scales(features: int, columns: int) -> tuple[float, float]:
    """(scale of the vector, rho): the typical record has norm about 1 after division by the scale."""
    rho = TEXT_WEIGHT * FEATURE_RMS * (features / columns) ** 0.5
    scale = float((2 * FEATURE_RMS**2 * features + (2 * rho) ** 2) ** 0.5)
    return scale, rho
