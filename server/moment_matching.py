"""The generator's loss against the released moments; post-processing, so that any number of steps costs nothing.

Its expected gradient is that of the maximum mean discrepancy between generated and real pairs of picture and prompt,
in the kernel of the moment features (Gretton et al. 2012, https://jmlr.org/papers/v13/gretton12a.html). How far the
generator's moments are off is a moving average over steps, as in dos Santos et al. 2019, "Learning Implicit
Generative Models by Matching Perceptual Features" (arXiv 1904.02762): one batch alone knows it badly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.moments import FEATURE_RMS, MomentFeatures, MomentFit, with_constant

MEMORY = 0.9  # of the moving average


class MomentMatching:
    """What is off, and the loss that mends it.

    Args:
        prompt_embeddings: `(P, E)` of all public prompts, which are drawn alike.
    """

    def __init__(self, of: MomentFeatures, fit: MomentFit, prompt_embeddings: Tensor) -> None:
        self.of, self.fit = of, fit
        texts = with_constant(prompt_embeddings).double()
        # Directions that no prompt has stay out.
        inverse = torch.linalg.pinv(texts.t() @ texts / len(texts), rtol=1e-6, hermitian=True)
        self.inverse = inverse.to(prompt_embeddings)
        self.off = torch.zeros_like(fit.regression).to(prompt_embeddings)  # (F, E + 1): generated minus real, of f t^T
        self.steps = 0

    def loss(self, maps: Tensor, conditioning: Tensor) -> Tensor:
        """Scalar, of fakes' maps `(B, h, w, c)` and their prompts' embeddings `(B, E)`; notes how far they are off."""
        made, texts = self.of(maps), with_constant(conditioning)
        half, new = len(made) // 2, 1 - min(MEMORY, self.steps / (self.steps + 1))
        with torch.no_grad():
            apart = made - self.fit.expected_features(conditioning)
            first, second = (apart[part].t() @ texts[part] for part in (slice(half), slice(half, None)))  # (F, E + 1)
            # Each half is judged by the other: one that judges itself would reward pictures for being alike. Earlier
            # batches alone would be too late, and what they ask for would be overshot.
            judges = (self.off.lerp(second / (len(made) - half), new), self.off.lerp(first / half, new))
            self.off.lerp_((first + second) / len(made), new)
        self.steps += 1
        parts = zip((texts[:half], texts[half:]), judges, strict=True)
        witness = torch.cat([part @ (self.inverse @ judge.t()) for part, judge in parts])  # (B, F)
        return (witness * made).sum(dim=1).mean() / (FEATURE_RMS**2 * self.of.size)

    def state_dict(self) -> dict[str, Any]:
        return {"fit": vars(self.fit), "off": self.off, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave, but for the fit, which `MomentMatching` is made with."""
        self.off, self.steps = state["off"].to(self.off), int(state["steps"])

    @property
    def distance(self) -> float:
        """Squared discrepancy that the moving average knows of, in units of one picture's squared length."""
        each = (self.off @ self.inverse * self.off).sum()
        return float(each) / (FEATURE_RMS**2 * self.of.size)
