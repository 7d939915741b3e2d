"""The private gradient against a slow loop over single records with plain autograd (PRIVACY rules 2, 3, 5, 8)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from shared.adversarial import build_loss, real_record_loss
from shared.config import DiscriminatorConfig, RunConfig
from shared.models import DISCRIMINATORS, Discriminator, build_discriminator
from shared.privacy.dpsgd import ClippedSum, clipped_gradient_sum

EMBEDDING = 6
CLIP = 0.5
# One shape of image per discriminator, small enough for the loop; every size is covered in test_models.
CASES = {"front": (28, 1), "conv": (28, 3), "toy": (8, 3)}


def build(name: str, *, width: int = 4, hidden: int = 8) -> Discriminator:
    size, channels = CASES[name]
    config = RunConfig.from_flat(
        {
            "privacy.delta": 1e-5, "privacy.sampling-rate": 0.1, "federation.published-records": 1000,
            "data.image-size": size, "data.channels": channels,
            "discriminator.name": name, "discriminator.width": width, "discriminator.hidden": hidden,
        }
    )  # fmt: skip
    return build_discriminator(config, embedding_dim=EMBEDDING)


def batch(discriminator: Discriminator, count: int, *, views: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    # A wide range of scales, so that some records are clipped hard and others are not clipped at all.
    scales = 10 ** torch.empty(count, 1, 1, 1, 1).uniform_(-3, 1, generator=rng)
    features = torch.randn(count, views, *discriminator.feature_shape, generator=rng) * scales
    return features, torch.randn(count, 2, EMBEDDING, generator=rng)


def record_loss(logits: Tensor) -> Tensor:
    return real_record_loss(build_loss(DiscriminatorConfig()), wrong_prompt_weight=0.5)(logits)


def loop(discriminator: Discriminator, features: Tensor, conditioning: Tensor, *, clip: float = CLIP) -> Tensor:
    """The definition: one record at a time, written-out loss, float64, flatten, scale, add."""
    model = copy.deepcopy(discriminator).double().requires_grad_(True)
    names = sorted(name for name, _ in model.named_parameters())
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(features)):
        logits = model(features[row : row + 1].double(), conditioning[row : row + 1].double())[0]  # (V, 2)
        real, wrong = logits[:, 0], logits[:, 1]
        loss = (torch.log1p(torch.exp(-real)) + 0.5 * torch.log1p(torch.exp(wrong))).mean()
        model.zero_grad()
        loss.backward()
        gradient = torch.cat([dict(model.named_parameters())[name].grad.reshape(-1) for name in names])
        total += gradient * min(1.0, clip / gradient.norm().item())
    return total


@pytest.mark.parametrize("kernel", ["fused", "opacus"])
@pytest.mark.parametrize("count", [0, 1, 2, 33])
@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_clipped_sum_equals_a_loop_over_single_records(name: str, count: int, kernel: str) -> None:
    discriminator = build(name)
    features, conditioning = batch(discriminator, count, views=2)
    result = clipped_gradient_sum(discriminator, features, conditioning, record_loss, clipping_norm=CLIP, kernel=kernel)
    expected = loop(discriminator, features, conditioning)
    assert torch.allclose(result.total, expected, atol=2e-5 * max(1, count) ** 0.5)
    assert len(result.norms) == count


@pytest.mark.parametrize("loss", ["non-saturating", "hinge"])
@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_the_fused_kernel_equals_opacus_on_a_large_batch(name: str, loss: str) -> None:
    discriminator = build(name)
    features, conditioning = batch(discriminator, 512)
    of_records = real_record_loss(build_loss(DiscriminatorConfig(loss=loss)), wrong_prompt_weight=0.5)

    def compute(kernel: str) -> ClippedSum:
        return clipped_gradient_sum(
            discriminator, features, conditioning, of_records, clipping_norm=CLIP, kernel=kernel
        )

    fused, opacus = compute("fused"), compute("opacus")
    assert torch.allclose(fused.total, opacus.total, rtol=1e-4, atol=1e-4)
    assert torch.allclose(fused.norms, opacus.norms, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_a_neighbour_moves_the_sum_by_at_most_the_clipping_norm(name: str) -> None:
    discriminator = build(name)
    for seed in range(200):
        features, conditioning = batch(discriminator, 4, seed=seed)
        whole = clipped_gradient_sum(discriminator, features, conditioning, record_loss, clipping_norm=CLIP).total
        without = clipped_gradient_sum(
            discriminator, features[:-1], conditioning[:-1], record_loss, clipping_norm=CLIP
        ).total
        assert (whole - without).norm() <= CLIP * (1 + 1e-9)  # eta is larger; a float32 sum would be as well


@pytest.mark.parametrize("kernel", ["fused", "opacus"])
def test_changing_any_other_record_leaves_a_records_share_unchanged(kernel: str) -> None:
    discriminator = build("front")
    features, conditioning = batch(discriminator, 5, views=2)

    def share_of_last(features: Tensor, conditioning: Tensor) -> Tensor:
        whole = clipped_gradient_sum(
            discriminator, features, conditioning, record_loss, clipping_norm=CLIP, kernel=kernel
        )
        rest = clipped_gradient_sum(
            discriminator, features[:-1], conditioning[:-1], record_loss, clipping_norm=CLIP, kernel=kernel
        )
        return whole.total - rest.total

    before = share_of_last(features, conditioning)
    features, conditioning = features.clone(), conditioning.clone()
    features[:-1] = torch.randn_like(features[:-1])
    conditioning[:-1] = torch.randn_like(conditioning[:-1])
    assert torch.allclose(share_of_last(features, conditioning), before, atol=1e-5)


@pytest.mark.parametrize("kernel", ["fused", "opacus"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_record_without_a_finite_gradient_contributes_zero(poison: float, kernel: str) -> None:
    discriminator = build("front")
    features, conditioning = batch(discriminator, 6)
    clean = clipped_gradient_sum(
        discriminator, features[1:], conditioning[1:], record_loss, clipping_norm=CLIP, kernel=kernel
    )
    features[0] = poison
    result = clipped_gradient_sum(
        discriminator, features, conditioning, record_loss, clipping_norm=CLIP, kernel=kernel
    )
    assert torch.allclose(result.total, clean.total, atol=1e-5)


def test_views_share_one_clip() -> None:
    """A record with many views weighs no more than a record with one."""
    discriminator = build("front")
    features, conditioning = batch(discriminator, 1, views=16)
    total = clipped_gradient_sum(discriminator, features, conditioning, record_loss, clipping_norm=1e-3).total
    assert total.norm().item() == pytest.approx(1e-3, rel=1e-4)
