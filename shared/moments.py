"""The warm start's statistics: caption-conditioned moments of the fixed features, one bounded vector a record.

A record with flattened features f (F values) and text t = (1, caption embedding) gives the vector
(f t^T, rho t t^T), divided by a public scale and clipped jointly to norm 1. It holds every statistic and,
as the first entry of t t^T, the constant that stands for the record, so that all normalisers come from the
noised constant (PRIVACY rule 26). The server reads from the noised sum what features to expect of a prompt.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Public. Features are of the order of one half; records near this size are not clipped.
FEATURE_RMS = 0.6
TEXT_WEIGHT = 4.0  # rho, in units of FEATURE_RMS * sqrt(F) / sqrt(E + 1)
CLIPPING_NORM = 1.0
ROWS = 1000


def moment_size(feature_count: int, embedding_dim: int) -> int:
    """Length of the vector: F (E + 1) feature moments, then (E + 1)^2 text moments."""
    return (feature_count + embedding_dim + 1) * (embedding_dim + 1)


def clipped_moment_sum(features: Tensor, captions: Tensor) -> Tensor:
    """Sum over records of their moment vectors, each of L2 norm at most 1.

    Args:
        features: `(N, h, w, c)`, any float type; N may be 0.
        captions: `(N, E)`.
    Returns:
        `(moment_size,)` float64. A record that is not finite contributes zero.
    """
    count, feature_count, columns = len(features), features.shape[1:].numel(), captions.shape[1] + 1
    scale, rho = _public_scales(feature_count, columns)
    of_features = torch.zeros(feature_count, columns, dtype=torch.float64)
    of_text = torch.zeros(columns, columns, dtype=torch.float64)
    for start in range(0, count, ROWS):
        f = features[start : start + ROWS].flatten(1).float().cpu() / scale
        t = torch.cat([torch.ones(len(f), 1), captions[start : start + ROWS].float().cpu()], dim=1)
        text = t.square().sum(dim=1)
        norms = (text * f.square().sum(dim=1) + (rho / scale * text).square()).sqrt()
        factors = torch.where(norms.isfinite(), (CLIPPING_NORM / norms.clamp(min=1e-12)).clamp(max=1), 0)
        f, t = f.nan_to_num(0, 0, 0), t.nan_to_num(0, 0, 0)
        of_features += (f.t() @ (factors[:, None] * t)).double()
        of_text += rho / scale * (t.t() @ (factors[:, None] * t)).double()
    return torch.cat([of_features.reshape(-1), of_text.reshape(-1)])


class MomentFit:
    """What the noised sum says of the features that a prompt should have; post-processing, no further cost.

    Args:
        total: `(moment_size,)` float64, the sum over all sites.
        noise_std: of each coordinate of `total`, over all sites; 0 without privacy.
    """

    def __init__(self, total: np.ndarray, *, feature_count: int, embedding_dim: int, noise_std: float) -> None:
        columns = embedding_dim + 1
        scale, rho = _public_scales(feature_count, columns)
        of_features = torch.from_numpy(total[: feature_count * columns]).view(feature_count, columns)
        of_text = torch.from_numpy(total[feature_count * columns :]).view(columns, columns) * (scale / rho)
        of_text = (of_text + of_text.t()) / 2
        text_noise = noise_std * scale / rho
        values, directions = torch.linalg.eigh(of_text)
        # Directions of the text that the captions do not fill carry noise only.
        kept = values > max(2 * text_noise * columns**0.5, 1e-6 * float(values[-1]))
        if not kept.any():
            kept[-1] = True
        values, directions = values[kept].clamp(min=1e-9), directions[:, kept]
        left, singular, right = torch.linalg.svd(of_features @ directions, full_matrices=False)
        floor = noise_std * (feature_count**0.5 + len(values) ** 0.5)
        self.directions_kept = int((singular > floor).sum())
        singular = torch.where(singular > floor, singular, 0)
        regression = (left * singular) @ right / values @ directions.t() * scale
        self.regression = regression.float()  # (F, E + 1)

    def expected_features(self, conditioning: Tensor) -> Tensor:
        """Mean features `(B, F)` that real images with the captions of `conditioning` `(B, E)` have."""
        return conditioning @ self.regression[:, 1:].t() + self.regression[:, 0]


def _public_scales(feature_count: int, columns: int) -> tuple[float, float]:
    """(scale of the vector, rho): the typical record has norm about 1 after division by the scale."""
    rho = TEXT_WEIGHT * FEATURE_RMS * (feature_count / columns) ** 0.5
    scale = float((2 * FEATURE_RMS**2 * feature_count + (2 * rho) ** 2) ** 0.5)
    return scale, rho
