"""The smallest real discriminator, for 8 px images and fast tests: one convolution, then the head."""

from __future__ import annotations

from torch import Tensor

from shared.config import DataConfig, DiscriminatorConfig
from shared.models.discriminator import Discriminator, Window


class ToyDiscriminator(Discriminator):
    """One 4 x 4 convolution; larger images are covered by a larger stride, so that 4 cells a side remain
    before the head averages them.
    """

    def __init__(self, *, data: DataConfig, settings: DiscriminatorConfig, embedding_dim: int) -> None:
        stride = data.image_size // 4
        super().__init__(
            feature_side=data.image_size,
            feature_channels=data.channels,
            stack=[Window(max(4, stride), stride, 1, settings.width)],
            settings=settings,
            embedding_dim=embedding_dim,
        )

    def features(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1)

    @property
    def features_fingerprint(self) -> str:
        return "pixels in [-1, 1]"
