"""A small private head on the fixed public front end: the default discriminator."""

from __future__ import annotations

from torch import Tensor

from shared.config import DataConfig, DiscriminatorConfig
from shared.models import front
from shared.models.discriminator import Discriminator, Window


class FrontDiscriminator(Discriminator):
    """Sees no pixels but the features of `shared.models.front`, which a site computes once a record.

    One convolution over 4 x 4 cells: every noised parameter costs signal. With the warm start it learns faster
    than two, and a round costs less (docs/results.md).
    """

    public_constants = ("front.filters",)

    def __init__(self, *, data: DataConfig, settings: DiscriminatorConfig, embedding_dim: int) -> None:
        end = front.FrontEnd(image_size=data.image_size, image_channels=data.channels)
        super().__init__(
            feature_side=end.side,
            feature_channels=end.channels,
            stack=[Window(4, 2, 1, settings.width)],
            settings=settings,
            embedding_dim=embedding_dim,
        )
        self.front = end

    def features(self, images: Tensor) -> Tensor:
        return self.front(images)  # type: ignore[no-any-return]

    @property
    def features_fingerprint(self) -> str:
        return f"front {front.fingerprint()}"
