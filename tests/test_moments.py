"""What the warm start's moments are of, and the generator's loss against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from server.moment_matching import MomentMatching
from shared.moments import (
    FEATURE_RMS,
    MAP_SPREAD,
    MomentFeatures,
    MomentFit,
    _vector_factors,
    clipped_moment_sum,
)

TEXTS = torch.eye(3)


def maps(count: int, *, seed: int = 0, side: int = 4, channels: int = 5) -> Tensor:
    return torch.randn(count, side, side, channels, generator=torch.Generator().manual_seed(seed)) / 2


def random_part(of: MomentFeatures, maps: Tensor) -> Tensor:
    return of(maps)[:, of.pooled :] / (FEATURE_RMS * of.random**0.5)


def test_random_features_have_the_products_of_gaussian_kernels() -> None:
    """Half of the whole map, half the mean over windows of 3 x 3 cells; the kernels by numpy (Rahimi & Recht 2007)."""
    x, y = maps(6), maps(6, seed=1) * 0.3
    of = MomentFeatures((4, 4, 5), random=16_000)
    got = random_part(of, x) @ random_part(of, y).t()

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        apart = ((a[:, None] - b[None]) ** 2).sum(axis=2)
        return np.asarray(np.exp(-apart / (2 * MAP_SPREAD**2 * a.shape[1])))

    a, b = x.numpy(), y.numpy()
    corners = [(row, column) for row in range(2) for column in range(2)]
    windows = [[m[:, r : r + 3, c : c + 3].reshape(6, -1) for m in (a, b)] for r, c in corners]
    expected = kernel(a.reshape(6, -1), b.reshape(6, -1)) / 2 + sum(kernel(*window) for window in windows) / 8
    assert np.abs(got.numpy() - expected).max() < 0.04  # 16,000 draws: about 4 / sqrt(16,000)


@pytest.mark.parametrize("random", [1, 5, 100])
def test_every_value_is_bounded_and_counted(random: int) -> None:
    of = MomentFeatures((4, 4, 5), random)
    made = of(1e4 * maps(3))
    assert made.shape == (3, of.size) == (3, 2 * 2 * 5 + of.random)
    assert made[:, of.pooled :].abs().max() <= FEATURE_RMS * 2**0.5 + 1e-6
    assert max(random, 1 + 4) >= of.random >= min(random, 5)


def test_frequencies_are_the_same_everywhere_and_of_no_data() -> None:
    first, second = (MomentFeatures((4, 4, 5), 50)(maps(2)) for _ in range(2))
    assert torch.equal(first, second)
    # Frozen: sites and server draw them apart from each other, and a stored run must mean the same tomorrow.
    values = MomentFeatures((2, 2, 1), 4)(torch.ones(1, 2, 2, 1, dtype=torch.float64))
    assert np.allclose(values.numpy(), FROZEN, atol=1e-6)


FROZEN = [[1.0, -0.32691597, 0.04556693, 0.06325912, -0.43645434]]


@pytest.mark.parametrize("random", [0, 300])
def test_what_a_record_gives_does_not_depend_on_those_beside_it(random: int) -> None:
    """Bit for bit: alone, first, last, and in blocks that are full or not."""
    of, texts = MomentFeatures((7, 7, 22), random), torch.ones(150, 2)
    made = maps(150, side=7, channels=22)
    together, _ = _vector_factors(made, texts, of, 3.0)
    for rows in ([0], [149], [5, 140], list(range(30, 150))):
        apart, _ = _vector_factors(made[rows], texts[rows], of, 3.0)
        assert torch.equal(apart, together[rows])


def fit_of(reals: Tensor, texts: Tensor, of: MomentFeatures) -> MomentFit:
    total = clipped_moment_sum(reals, texts, of).numpy()
    return MomentFit.of_sum(total, features=of.size, embedding_dim=texts.shape[1], noise_std=0.0)


def test_the_distance_is_the_mean_over_prompts_of_the_squared_difference_of_means() -> None:
    """Prompts whose embeddings are independent: the oracle takes means prompt by prompt."""
    of = MomentFeatures((4, 4, 5), 100)
    texts = TEXTS.repeat_interleave(50, dim=0)
    reals, fakes = maps(150) * 0.5, maps(150, seed=1) * 0.5 + 0.2
    matching = MomentMatching(of, fit_of(reals, texts, of), TEXTS)
    matching.loss(fakes, texts)
    apart = of(fakes).view(3, 50, -1).mean(dim=1) - of(reals).view(3, 50, -1).mean(dim=1)
    expected = apart.square().sum(dim=1).mean() / (FEATURE_RMS**2 * of.size)
    assert matching.distance == pytest.approx(float(expected), rel=1e-3)


def test_the_gradient_is_that_of_the_squared_difference() -> None:
    """Two halves that are the same pictures: each is told by the other what it would be told by itself."""
    of = MomentFeatures((4, 4, 5), 100)
    texts, half = TEXTS.repeat_interleave(20, dim=0), maps(60, seed=1).requires_grad_()
    reals = maps(60)
    matching = MomentMatching(of, fit_of(reals, texts, of), TEXTS)
    (got,) = torch.autograd.grad(matching.loss(half.repeat(2, 1, 1, 1), texts.repeat(2, 1)), half)
    apart = of(half).view(3, 20, -1).mean(dim=1) - of(reals).view(3, 20, -1).mean(dim=1)
    (whole,) = torch.autograd.grad(apart.square().sum(dim=1).mean() / (2 * FEATURE_RMS**2 * of.size), half)
    assert torch.allclose(got, whole, atol=1e-2 * float(whole.abs().max()))


def test_a_batch_does_not_ask_its_own_pictures_to_be_alike() -> None:
    """Pictures from the right distribution have no gradient on average, however few they are."""
    of = MomentFeatures((4, 4, 5), 100)
    text = torch.ones(4, 1)
    fit = fit_of(maps(4000), torch.ones(4000, 1), of)
    shrink = []
    for seed in range(1, 300):
        scale = torch.ones((), requires_grad=True)
        matching = MomentMatching(of, fit, text[:1])
        (slope,) = torch.autograd.grad(matching.loss(scale * maps(4, seed=seed), text), scale)
        shrink.append(float(slope))
    error = np.std(shrink) / len(shrink) ** 0.5
    assert abs(np.mean(shrink)) < 4 * error


@pytest.mark.parametrize(("random", "varied"), [(0, False), (200, True)])
def test_random_features_ask_for_the_variety_that_means_do_not_see(random: int, varied: bool) -> None:
    """Real pictures of one prompt are all dark or all bright; a grey one has the right mean and is wrong."""
    of = MomentFeatures((4, 4, 1), random)
    sign = torch.tensor([-1.0, 1.0]).repeat(50)[:, None, None, None]
    text = torch.ones(100, 1)
    fit = fit_of(sign * torch.ones(100, 4, 4, 1), text, of)
    found = []
    for fakes in (torch.zeros(100, 4, 4, 1), sign * torch.ones(100, 4, 4, 1)):
        matching = MomentMatching(of, fit, text[:1])
        matching.loss(fakes, text)
        found.append(matching.distance)
    grey, both = found
    assert both < 1e-4
    assert (grey > 0.1) is varied
