"""The fixed public front end: hand-made, parameterless, differentiable features of an image.

A discriminator on these features has few parameters to noise, and a site computes its records' features
once. Every constant is written down here and fingerprinted; none is fitted on data, public or private.
Each of the cells of a grid (8 x 8 of a 32 px image, 7 x 7 of 28 px, 8 x 8 of 64 px) holds the mean colour,
oriented energies (modulus of complex Morlet filters at 8 angles, on the grey image at full and half
resolution) and a soft colour histogram.
Sources: Morlet filters as in Bruna & Mallat 2013 (arXiv 1203.1513); handcrafted features for private
learning as in Tramer & Boneh 2021 (arXiv 2011.11660).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ANGLES = 8
FILTER_SIZE = 5  # pixels
FILTER_SIGMA = 0.9  # pixels, of the Gaussian envelope
FILTER_SLANT = 0.7  # envelope ratio across / along
FILTER_FREQUENCY = 3 * math.pi / 4  # radians a pixel
ENERGY_FLOOR = 1e-4  # inside the square root, so that its gradient is bounded
COLOUR_BINS = 3  # an axis, trilinear: 27 bins
GREY_BINS = 5
FULL_SCALE, HALF_SCALE = 9.0, 12.0  # factors on the energies, to the size of the colour means
COLOUR_SCALE, GREY_SCALE = 2.0, 1.5  # factors on the histogram


def grid_side(image_size: int) -> int:
    """Cells a side: 32 and 64 px give 8, 28 px gives 7, 8 px gives 2."""
    return image_size // cell_size(image_size)


def cell_size(image_size: int) -> int:
    """Pixels a side of a cell."""
    return 8 if image_size >= 64 else 4


def morlet_filters() -> np.ndarray:
    """`(2 * ANGLES, FILTER_SIZE, FILTER_SIZE)` float64: real parts, then imaginary; zero mean, L1 norm 1."""
    radius = FILTER_SIZE // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(float)
    filters = []
    for angle in np.pi * np.arange(ANGLES) / ANGLES:
        along = np.cos(angle) * x + np.sin(angle) * y
        across = -np.sin(angle) * x + np.cos(angle) * y
        envelope = np.exp(-(along**2 + (across * FILTER_SLANT) ** 2) / (2 * FILTER_SIGMA**2))
        wave = np.exp(1j * FILTER_FREQUENCY * along)
        wavelet = envelope * (wave - (envelope * wave).sum() / envelope.sum())
        filters.append(wavelet / np.abs(wavelet).sum())
    return np.stack([f.real for f in filters] + [f.imag for f in filters])


class FrontEnd(nn.Module):
    """`(B, C, H, W)` images in [-1, 1] to `(B, h, w, channels)` features.

    The filters are a constant buffer that no training changes; `fingerprint` names all constants.
    """

    filters: Tensor

    def __init__(self, *, image_size: int, image_channels: int) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.cell = cell_size(image_size)
        self.side = grid_side(image_size)
        bins = COLOUR_BINS**3 if image_channels == 3 else GREY_BINS
        self.channels = image_channels + 2 * ANGLES + bins
        filters = torch.tensor(morlet_filters(), dtype=torch.float32)[:, None]
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(dim=1, keepdim=True)  # (B, 1, H, W)
        parts = [
            functional.avg_pool2d(images, self.cell),
            functional.avg_pool2d(self._energies(grey), self.cell) * FULL_SCALE,
            functional.avg_pool2d(self._energies(functional.avg_pool2d(grey, 2)), self.cell // 2) * HALF_SCALE,
            self._histogram(images),
        ]
        return torch.cat(parts, dim=1).permute(0, 2, 3, 1)  # (B, h, w, channels)

    def _energies(self, grey: Tensor) -> Tensor:
        radius = FILTER_SIZE // 2
        padded = functional.pad(grey, (radius,) * 4, mode="replicate")
        real, imaginary = functional.conv2d(padded, self.filters).chunk(2, dim=1)
        return (real.square() + imaginary.square() + ENERGY_FLOOR).sqrt() - math.sqrt(ENERGY_FLOOR)

    def _histogram(self, images: Tensor) -> Tensor:
        """Share of each cell's pixels that falls softly into each bin; the bins of a pixel sum to one."""
        if self.image_channels == 1:
            centres = torch.linspace(-1, 1, GREY_BINS, device=images.device)[None, :, None, None]
            width = 2 / (GREY_BINS - 1)
            bins = functional.relu(1 - (images - centres).abs() / width)
            return functional.avg_pool2d(bins, self.cell) * GREY_SCALE
        count, cells, pixels = len(images), self.side**2, self.cell**2
        # Pixel by pixel of each cell, so that the sum over pixels of a product of bins is a small matrix product:
        # three times faster than 27 maps of the image's size.
        grouped = images.view(count, 3, self.side, self.cell, self.side, self.cell)
        values = grouped.permute(0, 2, 4, 1, 3, 5).reshape(count * cells, 3, pixels)
        bins = torch.stack([functional.relu(-values), 1 - values.abs(), functional.relu(values)], dim=2)
        red, green, blue = bins.unbind(dim=1)  # each (B cells, 3, pixels)
        pairs = (red[:, :, None] * green[:, None]).flatten(1, 2)  # (B cells, 9, pixels)
        shares = torch.bmm(pairs, blue.transpose(1, 2)) * (COLOUR_SCALE / pixels)  # (B cells, 9, 3)
        return shares.view(count, self.side, self.side, 27).permute(0, 3, 1, 2)


def fingerprint() -> str:
    """SHA-256 over all constants of the front end, 64 hex digits; sites compare it before they train."""
    constants = (
        ANGLES, FILTER_SIZE, FILTER_SIGMA, FILTER_SLANT, FILTER_FREQUENCY, ENERGY_FLOOR,
        COLOUR_BINS, GREY_BINS, FULL_SCALE, HALF_SCALE, COLOUR_SCALE, GREY_SCALE,
    )  # fmt: skip
    # Rounded to what float32 keeps, so that the last bits of another libm do not matter.
    table = np.round(morlet_filters(), 7) + 0.0
    return hashlib.sha256(repr(constants).encode() + table.astype("<f4").tobytes()).hexdigest()
