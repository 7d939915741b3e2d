"""What every discriminator is: fixed features, windows into linear layers, pooling, a projection on the text.

Every layer with parameters is an `nn.Linear` called once a forward with the record axis first, so that
one record's gradient is exact under Opacus's ghost clipping and under the fused kernel, with all views
and prompts of the record inside its one clip. No layer looks across records, nothing has running
statistics (PRIVACY rule 4); `check_examples_independent` refuses a model that does.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.config import DiscriminatorConfig
from shared.errors import ConfigError
from shared.models.patches import windows

SLOPE = 0.2  # of the leaky ReLU below zero
PROJECTION_SCALE = 3.0  # on the projection, so that its gradient is of the size of the other layers'


class Window(NamedTuple):
    """One convolution as windows into a linear layer."""

    kernel: int
    stride: int
    padding: int
    channels: int

    def side(self, before: int) -> int:
        return (before + 2 * self.padding - self.kernel) // self.stride + 1


class Discriminator(nn.Module):
    """`features` is fixed and public, `forward` holds all parameters.

    Args:
        feature_side, feature_channels: of the square map that `features` returns.
        stack: the convolutions of the head, first to last.
    """

    def __init__(
        self, *, feature_side: int, feature_channels: int, stack: list[Window],
        settings: DiscriminatorConfig, embedding_dim: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.feature_shape = (feature_side, feature_side, feature_channels)
        self.embedding_dim = embedding_dim
        self.stack = stack
        side, channels = feature_side, feature_channels
        self.convolutions = nn.ModuleList()
        for window in stack:
            self.convolutions.append(nn.Linear(window.kernel**2 * channels, window.channels))
            side, channels = window.side(side), window.channels
        self.pooled_side = min(settings.pooled_side, side) or side
        self.hidden = nn.Linear(channels * self.pooled_side**2, settings.hidden)
        self.output = nn.Linear(settings.hidden, 1)
        self.projection = nn.Linear(embedding_dim, settings.hidden, bias=False)
        nn.init.normal_(self.projection.weight, std=0.3 / math.sqrt(settings.hidden))

    def features(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` in [-1, 1] to `(B, h, w, c)`: differentiable, without parameters, record by record."""
        raise NotImplementedError

    @property
    def features_fingerprint(self) -> str:
        """Names the fixed map; sites compare it, for a cached feature of another map would be rubbish."""
        raise NotImplementedError

    def forward(self, features: Tensor, conditioning: Tensor) -> Tensor:
        """Logits of every view with every prompt.

        Args:
            features: `(B, V, h, w, c)`.
            conditioning: `(B, P, E)`.
        Returns:
            `(B, V, P)`, unbounded; positive means "real, and as the prompt says".
        """
        records, views = features.shape[:2]
        maps = features.flatten(0, 1)  # (B V, h, w, c)
        for window, layer in zip(self.stack, self.convolutions, strict=True):
            side = window.side(maps.shape[1])
            rows = windows(maps, kernel=window.kernel, stride=window.stride, padding=window.padding)
            rows = rows.view(records, views * side * side, -1)
            maps = functional.leaky_relu(layer(rows), SLOPE).view(records * views, side, side, window.channels)
        if maps.shape[1] != self.pooled_side:
            # A star is a star wherever it lies: shared places cost a fraction of the parameters, so of the noise.
            pooled = _pooling(maps.shape[1], self.pooled_side).to(maps) @ maps.flatten(1, 2)  # (B V, cells, C)
            maps = pooled.transpose(1, 2)
        hidden = functional.leaky_relu(self.hidden(maps.reshape(records, views, -1)), SLOPE)  # (B, V, hidden)
        text = self.projection(conditioning)  # (B, P, hidden)
        return self.output(hidden) + PROJECTION_SCALE * torch.einsum("bvh,bph->bvp", hidden, text)  # type: ignore[no-any-return]


@lru_cache
def _pooling(side: int, pooled_side: int) -> Tensor:
    """`(pooled_side**2, side**2)`: the mean of each cell's window, as a matrix, since its gradient then is cheap.

    Scaled so that the gradient keeps its size against the layers after it.
    """
    cells = torch.eye(side * side, dtype=torch.float64).view(-1, 1, side, side)
    return functional.adaptive_avg_pool2d(cells, pooled_side).flatten(1).t() * (side / pooled_side)


def check_examples_independent(discriminator: Discriminator) -> None:
    """Refuse a model in which one record can change another's logits (PRIVACY rule 4).

    Looks at what is declared (buffers that training could change, layers other than `nn.Linear` that hold
    parameters) and at what happens (one record perturbed, all others' logits must be bit-equal).

    Raises:
        ConfigError: naming the layer, or saying that logits moved.
    """
    name = type(discriminator).__name__
    for path, module in discriminator.named_modules():
        if getattr(module, "track_running_stats", False) or hasattr(module, "running_mean"):
            raise ConfigError(f"discriminator {name}: layer '{path}' keeps batch statistics")
        if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False)):
            raise ConfigError(
                f"discriminator {name}: layer '{path}' ({type(module).__name__}) holds parameters outside nn.Linear",
                hint="write it as windows into nn.Linear, or the private gradient of it is not known to be exact",
            )
    allowed = set(getattr(discriminator, "public_constants", ()))
    for path, _ in discriminator.named_buffers():
        if path not in allowed:
            raise ConfigError(f"discriminator {name}: buffer '{path}' is not a declared public constant")
    generator = torch.Generator().manual_seed(20)
    features = torch.randn(5, 2, *discriminator.feature_shape, generator=generator)
    conditioning = torch.randn(5, 2, discriminator.embedding_dim, generator=generator)
    with torch.no_grad():
        before = discriminator(features, conditioning)
        for scale in (1.0, 1e3):
            changed = features.clone()
            changed[2] = scale * torch.randn(changed[2].shape, generator=generator)
            moved = (discriminator(changed, conditioning) - before).abs().amax(dim=(1, 2))
            moved[2] = 0
            # Matrix products may sum in another order for other values of the batch, never by this much.
            if moved.max() > 1e-4:
                raise ConfigError(f"discriminator {name}: one record changes the logits of others")
