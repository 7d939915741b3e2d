"""Convolution windows as rows, so that a convolution is one `nn.Linear` with the record axis first.

Opacus and the fused kernel both see a plain linear layer over (records, views x positions, values);
neither has to know of convolutions. Channels stay last throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _Windows(torch.autograd.Function):
    """Strided windows of a padded map; the backward pass adds the windows back, one offset at a time."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        padded = functional.pad(maps, (0, 0, padding, padding, padding, padding)) if padding else maps
        padded = padded.contiguous()
        n, height, width, channels = padded.shape
        rows, columns = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        ctx.geometry = (kernel, stride, padding, padded.shape)
        # One window row is `kernel * channels` values in a run, which makes this copy cheap.
        windows = padded.as_strided(
            (n, rows, columns, kernel, kernel * channels),
            (height * width * channels, stride * width * channels, stride * channels, width * channels, 1),
        )
        return windows.reshape(n, rows * columns, kernel * kernel * channels)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        kernel, stride, padding, shape = ctx.geometry
        n, height, width, channels = shape
        rows, columns = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        windows = gradients[0].reshape(n, rows, columns, kernel, kernel, channels)
        padded = windows.new_zeros(shape)
        for i in range(kernel):
            for j in range(kernel):
                target = padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
                target += windows[:, :, :, i, j]
        return padded[:, padding : height - padding, padding : width - padding], None, None, None


def windows(maps: Tensor, *, kernel: int, stride: int = 1, padding: int = 0) -> Tensor:
    """All `kernel` x `kernel` windows of channels-last maps, zero padded.

    Args:
        maps: `(N, H, W, C)`.
    Returns:
        `(N, positions, kernel * kernel * C)`, positions in reading order, values in order (row, column, channel).
    """
    return _Windows.apply(maps, kernel, stride, padding)  # type: ignore[no-untyped-call, no-any-return]
