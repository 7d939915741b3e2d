"""A small private head on the fixed public front end: the default discriminator."""

from __future__ import annotations

from torch import Tensor

from shared.config import DataConfig, DiscriminatorConfig
from shared.models import front
from shared.models.discriminator import Discriminator, HeadScales, Window


class FrontDiscriminator(Discriminator):
    """Sees no pixels but the features of `shared.models.front`, which a site computes once a record.

    Two convolutions of 3 x 3 cells, the second with stride 2. One of 4 x 4 cells costs less a round and ended
    lower under noise (docs/results.md).
    """

    public_constants = ("front.filters",)

    def __init__(self, *, data: DataConfig, settings: DiscriminatorConfig, embedding_dim: int) -> None:
        end = front.FrontEnd(image_size=data.image_size, image_channels=data.channels)
        super().__init__(
            feature_side=end.side,
            feature_channels=end.channels,
            stack=[
                Window(3, 1, 1, settings.width // 2, gradient_scale=1.5),
                Window(3, 2, 1, settings.width, gradient_scale=1.2),
            ],
            scales=HeadScales(output=0.3, projection=0.7),
            settings=settings,
            embedding_dim=embedding_dim,
        )
        self.front = end

    def features(self, images: Tensor) -> Tensor:
        return self.front(images)  # type: ignore[no-any-return]

    @property
    def features_fingerprint(self) -> str:
        return f"front {front.fingerprint()}"
