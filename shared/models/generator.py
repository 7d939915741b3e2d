"""What every generator is. It sees latents and public prompts only, so it may be large and is never noised."""

from __future__ import annotations

from torch import Tensor, nn


class Generator(nn.Module):
    """`latent_dim` and `embedding_dim` are public attributes of every entry."""

    latent_dim: int
    embedding_dim: int

    def forward(self, latents: Tensor, conditioning: Tensor) -> Tensor:
        """`(B, Z)` standard normal latents and `(B, E)` prompt embeddings to `(B, C, H, W)` in [-1, 1]."""
        raise NotImplementedError
