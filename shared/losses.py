"""Adversarial losses, example by example: DP-SGD clips before anything is reduced.

Every function takes logits of any shape, positive meaning "real", and returns the same shape, >= 0
except where said.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional

from shared.registry import Registry


class AdversarialLoss(Protocol):
    def real(self, logits: Tensor) -> Tensor:
        """Of the discriminator on real pairs."""

    def fake(self, logits: Tensor) -> Tensor:
        """Of the discriminator on fakes, and on real images with a wrong prompt."""

    def generator(self, logits: Tensor) -> Tensor:
        """Of the generator on its own fakes."""


class NonSaturating:
    """Logistic loss. Source: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661."""

    def real(self, logits: Tensor) -> Tensor:
        return functional.softplus(-logits)

    def fake(self, logits: Tensor) -> Tensor:
        return functional.softplus(logits)

    def generator(self, logits: Tensor) -> Tensor:
        return functional.softplus(-logits)


class Hinge:
    """Source: Lim & Ye, "Geometric GAN", https://arxiv.org/abs/1705.02894."""

    def real(self, logits: Tensor) -> Tensor:
        return functional.relu(1 - logits)

    def fake(self, logits: Tensor) -> Tensor:
        return functional.relu(1 + logits)

    def generator(self, logits: Tensor) -> Tensor:
        """Unbounded below, as in the source."""
        return -logits


LOSSES: Registry[type[AdversarialLoss]] = Registry(
    "loss", {"non-saturating": "shared.losses:NonSaturating", "hinge": "shared.losses:Hinge"}
)
