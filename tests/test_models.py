"""Discriminators and generators: shapes for every size, independence of records, fixed features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.config import RunConfig
from shared.errors import ConfigError
from shared.models import (
    DISCRIMINATORS,
    GENERATORS,
    Discriminator,
    build_discriminator,
    build_generator,
    check_examples_independent,
    draw_latents,
    flat_parameters,
    front,
    load_flat_parameters,
)
from shared.models.patches import windows

FRONT_FINGERPRINT = "3be27e84b5e44653614c36a66c2a8e6ff1ca1d5bfef5f448a2e87a9791beddc2"
SIZES = [(8, 3), (28, 1), (28, 3), (32, 1), (32, 3), (64, 1), (64, 3)]


def config(**changes: object) -> RunConfig:
    flat = {"privacy.delta": 1e-5, "privacy.sampling-rate": 0.1, "federation.published-records": 1000}
    return RunConfig.from_flat({**flat, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "channels"), SIZES)
@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_every_discriminator_takes_every_size(name: str, size: int, channels: int) -> None:
    settings = config(**{"discriminator.name": name, "data.image-size": size, "data.channels": channels})
    discriminator = build_discriminator(settings, embedding_dim=5)
    features = discriminator.features(torch.rand(3, channels, size, size) * 2 - 1)
    assert tuple(features.shape[1:]) == discriminator.feature_shape
    assert discriminator(features[:, None], torch.randn(3, 2, 5)).shape == (3, 1, 2)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("size", "channels"), SIZES)
@pytest.mark.parametrize("name", GENERATORS.names())
def test_every_generator_makes_every_size(name: str, size: int, channels: int, attention: bool) -> None:
    settings = config(
        **{"generator.name": name, "data.image-size": size, "data.channels": channels,
           "generator.attention": attention, "generator.width": 8}
    )  # fmt: skip
    generator = build_generator(settings, embedding_dim=5)
    images = generator(draw_latents(0, range(3), generator.latent_dim), torch.randn(3, 5))
    assert images.shape == (3, channels, size, size)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_changing_one_record_leaves_other_logits_unchanged(name: str) -> None:
    discriminator = build_discriminator(config(**{"discriminator.name": name}), embedding_dim=5)
    features = torch.randn(6, 2, *discriminator.feature_shape)
    conditioning = torch.randn(6, 2, 5)
    before = discriminator(features, conditioning)
    features[3] = 100 * torch.randn_like(features[3])
    after = discriminator(features, conditioning)
    others = [0, 1, 2, 4, 5]
    assert torch.allclose(before[others], after[others], atol=1e-5)
    assert not torch.allclose(before[3], after[3])


class _MinibatchDeviation(Discriminator):
    """A plausible mistake: the deviation over the batch as one more feature (Karras et al. 2018)."""

    def __init__(self, source: Discriminator) -> None:
        nn.Module.__init__(self)
        self.source = source
        self.feature_shape, self.embedding_dim = source.feature_shape, source.embedding_dim

    def forward(self, features: Tensor, conditioning: Tensor) -> Tensor:
        return self.source(features + features.std(dim=0, keepdim=True), conditioning)  # type: ignore[no-any-return]


def _planted(kind: str) -> Discriminator:
    discriminator = build_discriminator(config(**{"discriminator.name": "toy"}), embedding_dim=5)
    if kind == "minibatch deviation":
        return _MinibatchDeviation(discriminator)
    if kind == "batch norm":
        discriminator.norm = nn.BatchNorm2d(4)
    elif kind == "batch norm without parameters":
        discriminator.norm = nn.BatchNorm2d(4, affine=False)
    elif kind == "convolution":
        discriminator.extra = nn.Conv2d(3, 3, 1)
    else:
        discriminator.register_buffer("seen", torch.zeros(1))
    return discriminator


@pytest.mark.parametrize(
    "kind", ["minibatch deviation", "batch norm", "batch norm without parameters", "convolution", "buffer"]
)
def test_a_discriminator_that_mixes_records_or_keeps_statistics_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError):
        check_examples_independent(_planted(kind))


def test_windows_are_the_patches_that_unfold_takes() -> None:
    maps = torch.randn(2, 7, 9, 3)
    for kernel, stride, padding in [(3, 1, 1), (3, 2, 1), (4, 2, 1), (1, 1, 0), (5, 3, 2)]:
        ours = windows(maps, kernel=kernel, stride=stride, padding=padding)
        theirs = torch.nn.functional.unfold(maps.permute(0, 3, 1, 2), kernel, padding=padding, stride=stride)
        theirs = theirs.unflatten(1, (3, kernel * kernel)).permute(0, 3, 2, 1).flatten(2)
        assert torch.equal(ours, theirs)


def test_the_gradient_of_windows_is_that_of_finite_differences() -> None:
    maps = torch.randn(1, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: windows(m, kernel=3, stride=2, padding=1), (maps,))


def test_a_head_of_windows_is_the_convolution_it_stands_for() -> None:
    settings = config(**{"discriminator.name": "conv", "data.image-size": 28, "discriminator.pooled-side": 0})
    discriminator = build_discriminator(settings, embedding_dim=5)
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    conditioning = torch.randn(2, 1, 5)
    maps = images
    for window, layer in zip(discriminator.stack, discriminator.convolutions, strict=True):
        weight = layer.weight.view(window.channels, window.kernel, window.kernel, -1).permute(0, 3, 1, 2)
        maps = torch.nn.functional.conv2d(maps, weight, layer.bias, window.stride, window.padding)
        maps = torch.nn.functional.leaky_relu(maps, 0.2)
    hidden = torch.nn.functional.leaky_relu(discriminator.hidden(maps.permute(0, 2, 3, 1).flatten(1)), 0.2)
    expected = discriminator.output(hidden)[:, 0] + 3 * (hidden * discriminator.projection(conditioning[:, 0])).sum(1)
    logits = discriminator(discriminator.features(images)[:, None], conditioning)
    assert torch.allclose(logits[:, 0, 0], expected, atol=1e-4)


def test_a_pooled_head_does_not_see_where_in_a_quarter_something_lies() -> None:
    settings = config(**{"discriminator.name": "conv", "data.image-size": 32, "discriminator.pooled-side": 1})
    discriminator = build_discriminator(settings, embedding_dim=5)
    discriminator.stack = [discriminator.stack[0]._replace(padding=0)]
    discriminator.convolutions = discriminator.convolutions[:1]
    discriminator.hidden = nn.Linear(discriminator.stack[0].channels, discriminator.hidden.out_features)
    image, moved = torch.zeros(2, 1, 3, 32, 32)
    image[:, :, 4:8, 4:8] = 1
    moved[:, :, 20:24, 12:16] = 1  # by a multiple of the stride, away from the border
    conditioning = torch.randn(1, 1, 5)
    logits = [discriminator(discriminator.features(x)[:, None], conditioning) for x in (image, moved)]
    assert torch.allclose(*logits, atol=1e-5)


def test_latents_do_not_depend_on_the_batch_and_come_from_philox() -> None:
    whole = draw_latents(7, range(10), 4)
    assert torch.equal(draw_latents(7, [6], 4)[0], whole[6])
    rng = np.random.Generator(np.random.Philox(key=np.array([7, 6], dtype=np.uint64)))
    assert np.array_equal(whole[6].numpy(), rng.standard_normal(4).astype(np.float32))


def test_flat_parameters_return_whole_and_in_the_order_of_names() -> None:
    discriminator = build_discriminator(config(**{"discriminator.name": "toy"}), embedding_dim=5)
    vector = flat_parameters(discriminator)
    first = sorted(dict(discriminator.named_parameters()))[0]
    assert np.array_equal(vector[: dict(discriminator.named_parameters())[first].numel()],
                          dict(discriminator.named_parameters())[first].reshape(-1).numpy())  # fmt: skip
    load_flat_parameters(discriminator, vector + 1)
    assert np.allclose(flat_parameters(discriminator), vector + 1)


def test_the_front_end_is_fixed() -> None:
    """A released model and every cached feature depend on these constants: a change needs a new version."""
    assert front.fingerprint() == FRONT_FINGERPRINT
    end = front.FrontEnd(image_size=32, image_channels=3)
    assert not list(end.parameters())
    grey = torch.zeros(1, 3, 32, 32)
    features = end(grey)[0, 0, 0]
    # Flat grey: no colour, no energy, all of the histogram in the middle bin.
    expected = torch.zeros(46)
    expected[3 + 16 + 13] = front.COLOUR_SCALE
    assert torch.allclose(features, expected, atol=1e-3)


def test_an_edge_excites_the_filters_across_it() -> None:
    image = torch.ones(1, 1, 28, 28)
    image[:, :, :, 14:] = -1  # a vertical edge: the image changes along x, the direction of angle 0
    energies = front.FrontEnd(image_size=28, image_channels=1)(image)[0, 3, 3, 1 : 1 + front.ANGLES]
    assert energies.argmax() == 0
    assert energies[front.ANGLES // 2] < 0.2 * energies[0]
