"""The default generator: blocks at growing resolution, each conditioned on latents and text.

Feature-wise affine conditioning (FiLM, Perez et al. 2017, arXiv 1709.07871) after a GroupNorm without own
parameters; optional self-attention (Zhang et al. 2018, arXiv 1805.08318) behind a gate that starts at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import DataConfig, GeneratorConfig
from shared.models.generator import Generator

CONDITIONING = 128  # K, the size of the vector that steers every block
TEXT_SCALE = 4.0  # a unit-norm embedding beside unit-variance latents would be drowned
MAX_FACTOR = 4  # channels of the first block, as a multiple of the last block's
ATTENTION_SIDES = (16, 14)


class FilmGenerator(Generator):
    def __init__(self, *, data: DataConfig, settings: GeneratorConfig, embedding_dim: int) -> None:
        super().__init__()
        self.latent_dim, self.embedding_dim = settings.latent_dim, embedding_dim
        self.base = 7 if data.image_size % 7 == 0 else 4
        doublings = (data.image_size // self.base).bit_length() - 1
        width = settings.width
        inputs = settings.latent_dim + embedding_dim
        self.mapping = nn.Sequential(
            nn.Linear(inputs, CONDITIONING), nn.SiLU(), nn.Linear(CONDITIONING, CONDITIONING), nn.SiLU()
        )
        channels = MAX_FACTOR * width
        self.start = nn.Linear(inputs, channels * self.base**2)
        self.blocks = nn.ModuleList([FilmBlock(channels, channels, upsample=False)])
        side, attended = self.base, False
        for step in range(doublings):
            after = max(width, channels // 2) if step < doublings - 1 else width
            self.blocks.append(FilmBlock(channels, after, upsample=True))
            channels, side = after, 2 * side
            if settings.attention and not attended and (side in ATTENTION_SIDES or step == doublings - 1):
                self.blocks.append(SelfAttention(channels))
                attended = True
        self.paint = nn.Conv2d(channels, data.channels, 3, padding=1)

    def forward(self, latents: Tensor, conditioning: Tensor) -> Tensor:
        joint = torch.cat([latents, TEXT_SCALE * conditioning], dim=1)
        style = self.mapping(joint)  # (B, K)
        maps = self.start(joint).view(joint.shape[0], -1, self.base, self.base)
        maps = maps.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            maps = block(maps, style)
        return torch.tanh(self.paint(maps))


class FilmBlock(nn.Module):
    """`(B, before, h, w)` to `(B, after, h or 2h, w or 2w)`."""

    def __init__(self, before: int, after: int, *, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.convolution = nn.Conv2d(before, after, 3, padding=1)
        groups = next(g for g in (8, 4, 2, 1) if (after % g == 0 and after // g >= 4) or g == 1)
        self.norm = nn.GroupNorm(groups, after, affine=False)
        self.affine = nn.Linear(CONDITIONING, 2 * after)
        nn.init.zeros_(self.affine.bias)

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        if self.upsample:
            maps = functional.interpolate(maps, scale_factor=2)
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, dim=1)
        return functional.silu(self.norm(self.convolution(maps)) * (1 + scale) + shift)


class SelfAttention(nn.Module):
    """Each position attends to all positions of its own picture; `(B, channels, h, w)` to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(4, channels // 4)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        query, key, value = (layer(maps).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(query, key, value)  # (B, h w, channels)
        return maps + self.gate * attended.transpose(1, 2).reshape(maps.shape)
