"""One step of the discriminator, as the server takes it and, with several local steps, a site.

Its gradient has two parts: the real rows' clipped and noised sum, and the fakes' sum, clipped row by row
to the same norm so that unclipped fakes do not drown clipped reals, and without noise, since fakes are public.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn, optim

from shared.config import DiscriminatorConfig
from shared.losses import LOSSES, AdversarialLoss
from shared.models import Discriminator
from shared.privacy.dpsgd import ClippedSum, RecordLoss, clipped_gradient_sum

# A site's update of several steps is post-processing of noised sums: its rounding costs nothing.
UPDATE_LATTICE = 2.0**-30


def build_loss(settings: DiscriminatorConfig) -> AdversarialLoss:
    return LOSSES.get(settings.loss)()


def real_record_loss(loss: AdversarialLoss, *, wrong_prompt_weight: float) -> RecordLoss:
    """Loss of one unit's M images (M = 1 for an example): (image, caption) is real, (image, wrong prompt) is not.

    Returns:
        A function from logits `(B, M V, 2 M)` to `(B,)`, the mean over images and views. Image m has the views
        m V to (m + 1) V and the prompts 2 m, matched, and 2 m + 1, wrong; its logits with others' prompts do not count.
    """

    def of_units(logits: Tensor) -> Tensor:
        images = logits.shape[2] // 2
        pairs = logits.unflatten(2, (images, 2)).unflatten(1, (images, -1))  # (B, M, V, M, 2)
        own = pairs.diagonal(dim1=1, dim2=3)  # (B, V, 2, M)
        matched, wrong = own.unbind(dim=2)  # each (B, V, M)
        return (loss.real(matched) + wrong_prompt_weight * loss.fake(wrong)).flatten(1).mean(dim=1)

    return of_units


def fakes_gradient(
    discriminator: Discriminator, features: Tensor, conditioning: Tensor, loss: AdversarialLoss,
    *, clipping_norm: float,
) -> ClippedSum:  # fmt: skip
    """Clipped gradient sum of fakes by their features `(F, h, w, c)` and their prompts' embeddings `(F, E)`."""
    return clipped_gradient_sum(
        discriminator, features[:, None], conditioning[:, None], lambda logits: loss.fake(logits).mean(dim=(1, 2)),
        clipping_norm=clipping_norm,
    )  # fmt: skip


def take_step(module: nn.Module, optimizer: optim.Optimizer, gradient: Tensor) -> None:
    """Applies a flat gradient `(num_parameters,)`, in the order of parameter names."""
    offset = 0
    for _, parameter in sorted(module.named_parameters()):
        part = gradient[offset : offset + parameter.numel()]
        parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        offset += parameter.numel()
    optimizer.step()
    for parameter in module.parameters():
        parameter.grad = None


def to_unit_range(images: np.ndarray) -> Tensor:
    """`(..., H, W, C)` uint8 to `(..., C, H, W)` float32 in [-1, 1]: the fixed public normalisation."""
    return (torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1).movedim(-1, -3)


def to_bytes(images: Tensor) -> np.ndarray:
    """`(B, C, H, W)` in [-1, 1] to `(B, H, W, C)` uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
