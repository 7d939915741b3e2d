"""A plain convolutional discriminator on pixels: the reference that the front end is compared with."""

from __future__ import annotations

from torch import Tensor

from shared.config import DataConfig, DiscriminatorConfig
from shared.models.discriminator import Discriminator, Window

MAX_FACTOR = 4  # channels of the deepest layer, as a multiple of the first layer's
FIRST_SHARE = 4  # the first layer has `width` / 4 channels, so that the deepest has `width`


class ConvDiscriminator(Discriminator):
    """4 x 4 convolutions of stride 2, doubling channels, until the map is at most 4 cells a side;
    the head averages those.
    """

    def __init__(self, *, data: DataConfig, settings: DiscriminatorConfig, embedding_dim: int) -> None:
        stack: list[Window] = []
        side: int = data.image_size
        factor = 1
        while side > 4:
            stack.append(Window(4, 2, 1, factor * max(4, settings.width // FIRST_SHARE)))
            side, factor = stack[-1].side(side), min(2 * factor, MAX_FACTOR)
        super().__init__(
            feature_side=data.image_size,
            feature_channels=data.channels,
            stack=stack,
            settings=settings,
            embedding_dim=embedding_dim,
        )

    def features(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1)

    @property
    def features_fingerprint(self) -> str:
        return "pixels in [-1, 1]"
