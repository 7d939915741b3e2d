"""The work of a step does not tell how many records were drawn, and what that costs is in delta (PRIVACY rule 15)."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_site import CHEAP, OPEN, ask, instruction
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from toy_federation import make_sites, toy_config, toy_policy

import client.training
from client.settings import OVERFLOW_SHARE
from client.site import Site, padded_rows
from shared.models import Discriminator
from shared.privacy.accounting import renyi_budget
from shared.privacy.budget import Lifetime, Price, fits, price_run
from shared.privacy.entropy import SeededEntropy
from shared.privacy.plan import PrivacyPlan


def plan_of(*, q: float, steps: int, sigma: float = 1.0) -> PrivacyPlan:
    return PrivacyPlan(
        private=True, noise_multiplier=sigma, sampling_rate=q, clipping_norm=1.0, expected_batch_size=100.0,
        steps=steps, reserved_steps=steps, delta=1e-6, warm_start_noise_multiplier=None, unit="example", sites=2,
    )  # fmt: skip


def chance_of_more(than: int, *, units: int, q: Fraction) -> Fraction:
    """Exactly, from the binomial coefficients."""
    return sum(
        (math.comb(units, k) * q**k * (1 - q) ** (units - k) for k in range(than + 1, units + 1)), start=Fraction()
    )


@pytest.mark.parametrize(
    ("units", "q", "steps", "epsilon", "delta"),
    [(400, Fraction(1, 10), 500, 8.0, 1e-6), (300, Fraction(1, 4), 3, 0.5, 1e-5), (60, Fraction(1, 2), 40, 3.0, 1e-9)],
)
def test_a_draw_beyond_the_padded_size_is_paid_for_by_a_thousandth_of_delta(
    units: int, q: Fraction, steps: int, epsilon: float, delta: float
) -> None:
    plan, price = plan_of(q=float(q), steps=steps), Price(epsilon, delta, None, (), 1e-3 * delta, epsilon)
    rows = padded_rows(plan, price, units)
    # Each step's cut changes what leaves with that chance; at most (1 + e^epsilon) of it goes into delta.
    paid = [
        float(chance_of_more(n, units=units, q=q)) * steps * (1 + math.exp(epsilon)) for n in (rows, max(rows - 2, 0))
    ]
    assert paid[0] <= 1e-3 * delta
    assert rows == units or paid[1] > 1e-3 * delta  # and no larger than that needs
    assert rows > units * q


def test_without_sampling_all_published_units_are_worked_for() -> None:
    assert padded_rows(plan_of(q=1.0, steps=10), Price(1.0, 1e-6, None, (), 1e-9, 1.0), 300) == 300


def test_the_price_of_a_padded_run_is_taken_at_the_delta_that_is_left() -> None:
    plan, lifetime = plan_of(q=0.1, steps=50, sigma=2.0), Lifetime(4.0, 1e-6)
    price = price_run(plan, lifetime, overflow_share=0.2)  # much, so that it shows
    pld = PLDAccountant()
    pld.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 50)
    expected = pld.get_epsilon(0.8 * price.delta)
    assert expected - 2e-3 <= price.epsilon <= expected + 0.02
    assert price.epsilon > pld.get_epsilon(price.delta) + 0.02


def test_a_renyi_lifetime_pays_for_all_cut_draws_of_all_its_runs_together() -> None:
    lifetime = Lifetime(8.0, 1e-6, "renyi", 5.0)
    plan = plan_of(q=0.02, steps=20, sigma=4.0)
    price, runs = price_run(plan, lifetime, overflow_share=OVERFLOW_SHARE), 0
    while fits(price, [price] * runs, lifetime) and runs < 3000:
        runs += 250
    rows = padded_rows(plan, price, 400)
    # One conversion at the end: cuts of all runs count against the lifetime's epsilon.
    paid = float(chance_of_more(rows, units=400, q=Fraction(1, 50))) * 20 * (1 + math.exp(8.0)) * runs
    assert runs >= 500
    assert paid <= 1.3e-3 * 1e-6  # a thousandth of delta; the count of runs is in steps of 250
    # And the divergences are converted at what is left of delta.
    order = 5.0
    bound = renyi_budget(8.0, 1e-6 * (1 - 1e-3), order=order)
    assert lifetime.renyi_budget == pytest.approx(bound, rel=1e-12)


def rows_seen(site: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[int, ...]]:
    """Shapes that pass the discriminator while one answer of a deployed site is made."""
    shapes: list[tuple[int, ...]] = []
    real = Discriminator.forward

    def noting(self: Discriminator, features: Any, conditioning: Any) -> Any:
        shapes.append(tuple(features.shape))
        return real(self, features, conditioning)

    monkeypatch.setattr(Discriminator, "forward", noting)
    assert ask(site, toy_config(CHEAP), **changes) is None
    monkeypatch.setattr(Discriminator, "forward", real)
    return shapes


def test_sites_of_different_size_do_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = toy_policy(**OPEN)
    large, small = make_sites(tmp_path, sizes=(200, 3), seed=None, policy=policy, published_records=200)
    first, second = (rows_seen(site, monkeypatch) for site in (large, small))
    assert first == second
    assert len(first) >= 200 / 64  # in blocks of 64


def test_every_step_of_a_deployed_site_is_padded_to_what_was_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = make_sites(tmp_path, sizes=(40,), seed=None)
    config, padded = toy_config(), []
    real = client.training.clipped_gradient_sum

    def noting(*args: Any, padded_to: int | None = None, **settings: Any) -> Any:
        padded.append(padded_to)
        return real(*args, padded_to=padded_to, **settings)

    monkeypatch.setattr(client.training, "clipped_gradient_sum", noting)
    site = Site(folder, simulated=False)
    for server_round in (1, 2):
        site.answer(instruction(config, server_round=server_round))
    run = site.account.ledger.runs["run"]
    assert padded == [run.terms.rows_cap] * 2
    assert run.terms.rows_cap == padded_rows(run.terms.plan, run.price, 40)


def test_a_larger_draw_is_cut_and_no_record_is_preferred(tmp_path: Path) -> None:
    class Everything(SeededEntropy):
        def poisson_draw(self, count: int, rate: float, *labels: int | str) -> np.ndarray:
            return np.arange(count)

    (folder,) = make_sites(tmp_path, sizes=(40,))
    config, counts = toy_config({"privacy.name": "none"}), np.zeros(40)
    site = Site(folder, simulated=True)
    public = site._open_public(instruction(config), config, _plan_of(config))
    records = site._open_records(public)
    for seed in range(400):
        chosen: list[int] = []
        batch = client.training.draw_batch(
            public.discriminator, _numbered(records), config=config, plan=public.plan, prompts=public.prompts,
            prompt_embeddings=public.prompt_embeddings, entropy=Everything(seed), labels=(1, 0), most=10,
        )  # fmt: skip
        chosen = batch.features.flatten(1)[:, 0].int().tolist()
        assert len(set(chosen)) == 10
        counts[chosen] += 1
    # Each record is kept in 400 draws with chance 1/4: chi-square of 40 cells, false alarm below 1e-6.
    expected = 100 * (1 - 10 / 40)
    assert ((counts - 100) ** 2).sum() / expected * (39 / 40) < 100


def _plan_of(config: Any) -> PrivacyPlan:
    from shared.privacy.plan import make_plan

    return make_plan(config)


def _numbered(records: client.training.PrivateRecords) -> client.training.PrivateRecords:
    """The same records with their own number in place of their features."""
    import dataclasses

    import torch

    assert records.features is not None
    numbers = torch.arange(len(records), dtype=torch.float16).view(-1, 1, 1, 1).expand(records.features.shape)
    return dataclasses.replace(records, features=numbers.clone())


def test_the_share_is_the_one_that_the_pages_say() -> None:
    assert OVERFLOW_SHARE == 1e-3
