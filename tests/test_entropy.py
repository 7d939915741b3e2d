"""Draws and noise: their distribution, and that nobody can repeat a deployed site's."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from scipy import stats

from shared.privacy.entropy import Entropy, SeededEntropy, SystemEntropy

SOURCES = [SystemEntropy(), SeededEntropy(5, "site", 1)]
ids = [type(source).__name__ for source in SOURCES]


@pytest.mark.parametrize("entropy", SOURCES, ids=ids)
def test_batch_sizes_are_binomial(entropy: Entropy) -> None:
    count, rate, draws = 1000, 0.1, 3000
    sizes = np.array([len(entropy.poisson_draw(count, rate, "draw", i)) for i in range(draws)])
    binomial = stats.binom(count, rate)
    edges = binomial.ppf(np.linspace(0, 1, 11)[1:-1])  # ten classes of about 300 draws
    observed = np.bincount(np.searchsorted(edges, sizes), minlength=10)
    expected = np.diff(np.concatenate([[0], binomial.cdf(edges), [1]])) * draws
    assert stats.chisquare(observed, expected).pvalue > 1e-6  # false alarm 1e-6; a fixed size gives 0


@pytest.mark.parametrize("entropy", SOURCES, ids=ids)
def test_every_record_is_drawn_at_the_rate_on_its_own(entropy: Entropy) -> None:
    count, rate, draws = 40, 0.3, 5000
    drawn = np.zeros((draws, count), dtype=bool)
    for i in range(draws):
        drawn[i, entropy.poisson_draw(count, rate, "each", i)] = True
    z = (drawn.sum(axis=0) - draws * rate) / np.sqrt(draws * rate * (1 - rate))
    assert stats.chi2(count).sf((z**2).sum()) > 1e-6  # false alarm 1e-6
    correlation = np.corrcoef(drawn.T)[np.triu_indices(count, 1)] * np.sqrt(draws)  # 780 values, each ~ N(0, 1)
    assert np.abs(correlation).max() < 6.2  # false alarm below 5e-7 for all pairs


@pytest.mark.parametrize("entropy", SOURCES, ids=ids)
def test_draws_are_ascending_indices_and_may_be_empty(entropy: Entropy) -> None:
    assert entropy.poisson_draw(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert len(entropy.poisson_draw(1000, 0.0)) == 0
    assert len(entropy.poisson_draw(0, 0.5)) == 0
    drawn = entropy.poisson_draw(1000, 0.5)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()


@pytest.mark.parametrize("entropy", SOURCES, ids=ids)
def test_noise_has_the_standard_deviation_that_was_asked_for(entropy: Entropy) -> None:
    n, std = 200_001, 3.5
    noise = entropy.gaussian(n, std, "noise", 1)
    assert noise.shape == (n,)
    assert noise.dtype == np.float64
    z = ((noise**2).sum() / std**2 - n) / np.sqrt(2 * n)
    assert abs(z) < 5  # false alarm 6e-7; a standard deviation that is 1 % wrong gives 6.3
    assert abs(noise.mean() / std * np.sqrt(n)) < 5  # false alarm 6e-7


@pytest.mark.parametrize("entropy", SOURCES, ids=ids)
def test_noise_is_normal_and_neighbours_are_independent(entropy: Entropy) -> None:
    n = 200_000
    noise = entropy.gaussian(n, 1.0, "shape")
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-6  # false alarm 1e-6
    beyond = (np.abs(noise) > 3).sum()
    assert stats.binomtest(int(beyond), n, 2 * stats.norm.sf(3)).pvalue > 1e-6  # false alarm 1e-6
    for lag in (1, n // 2):  # one radius serves entries that lie n / 2 apart
        for pair in (noise[:-lag] * noise[lag:], (noise[:-lag] ** 2 - 1) * (noise[lag:] ** 2 - 1) / 2):
            assert abs(pair.sum() / np.sqrt(len(pair))) < 6  # false alarm about 1e-8, heavier tails allowed for


def test_two_sources_of_a_site_with_everything_equal_differ() -> None:
    draws = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        source = SystemEntropy()
        draws.append((source.poisson_draw(500, 0.5, "draw", 1), source.gaussian(8, 1.0, 1), source.rng(1).random(8)))
    (drawn, noise, other), (drawn_again, noise_again, other_again) = draws
    assert drawn.tolist() != drawn_again.tolist()  # equal by chance: 2**-500
    assert not np.isin(noise, noise_again).any()
    assert not np.isin(other, other_again).any()
    source = SystemEntropy()
    assert not np.isin(source.gaussian(8, 1.0, 1), source.gaussian(8, 1.0, 1)).any()


def test_a_sites_source_takes_no_seed_and_holds_no_state() -> None:
    with pytest.raises(TypeError):
        SystemEntropy(1)  # type: ignore[call-arg]
    assert vars(SystemEntropy()) == {}
    assert b"seed" not in pickle.dumps(SystemEntropy())
    assert SystemEntropy().simulated is False
    assert SeededEntropy(1).simulated is True


def test_a_simulations_draws_repeat_in_any_order() -> None:
    first, second = SeededEntropy(7, "site-2"), SeededEntropy(7, "site-2")
    forward = [first.gaussian(5, 2.0, "noise", r, s).tolist() for r in range(3) for s in range(2)]
    backward = [second.gaussian(5, 2.0, "noise", r, s).tolist() for r in (2, 1, 0) for s in (1, 0)]
    assert forward == backward[::-1]
    assert first.poisson_draw(99, 0.5, 1).tolist() == second.poisson_draw(99, 0.5, 1).tolist()
    assert first.rng("views", 1).random() == second.rng("views", 1).random()


def test_any_other_label_is_another_draw_in_a_simulation() -> None:
    draws = [
        SeededEntropy(seed, *site).gaussian(4, 1.0, *labels)
        for seed, site, labels in [
            (7, ("a",), ("noise", 1, 0)),
            (8, ("a",), ("noise", 1, 0)),
            (7, ("b",), ("noise", 1, 0)),
            (7, (), ("a", "noise", 1, 0)),
            (7, ("a",), ("noise", 2, 0)),
            (7, ("a",), ("noise", 1, 1)),
            (7, ("a",), ("noise", 11, 0)),
            (7, ("a",), ("noise", "1", 0)),
            (7, ("a",), ("other", 1, 0)),
            (7, ("a",), ("noise", 1)),
        ]
    ]
    assert len(np.unique(np.concatenate(draws))) == 4 * len(draws)
    entropy = SeededEntropy(7)
    assert entropy.rng("x").standard_normal() != entropy.gaussian(1, 1.0, "x")[0]
