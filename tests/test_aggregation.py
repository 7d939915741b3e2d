"""How large a value of an honest gradient is: noised sums pass, rubbish of the right length does not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from server.aggregation import DRAW_TAIL, NOISE_TAIL, RoundSum, largest_value
from shared.config import RunConfig, Scalar
from shared.errors import ProtocolError
from shared.privacy.dpsgd import noised_sum
from shared.privacy.entropy import SystemEntropy
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.records import LATTICE_LIMIT, MAX_PARAMETERS, SiteReply, pack_envelope

HEAD = "0" * 64
RUN: dict[str, Scalar] = {
    "privacy.delta": 1e-5, "privacy.sampling-rate": 0.05, "privacy.target-epsilon": 4.0, "federation.rounds": 100,
    "federation.sites": 4, "federation.published-records": 20_000,
}  # fmt: skip


def config(**changes: Scalar) -> RunConfig:
    return RunConfig.from_flat({**RUN, **{name.replace("__", "."): value for name, value in changes.items()}})


@pytest.fixture(scope="module")
def plan() -> PrivacyPlan:
    return make_plan(config())


def bound(plan: PrivacyPlan, length: int) -> float:
    most = largest_value(config(), plan, "train", length=length)
    assert most is not None
    return most


def reply(values: np.ndarray, site: str = "a") -> SiteReply:
    return SiteReply("run", 3, site, pack_envelope(values, HEAD))


def summed(most: float | None, length: int) -> RoundSum:
    return RoundSum(run_id="run", server_round=3, length=length, most=most)


@pytest.mark.parametrize("clipping_norm", [0.37, 1.0, 3.0])
def test_a_million_entries_of_the_largest_honest_sum_pass(plan: PrivacyPlan, clipping_norm: float) -> None:
    length, plan = 10**6, dataclasses.replace(plan, clipping_norm=clipping_norm)
    # All records at one site, all drawn that are expected, and all pull at every entry: more than any gradient.
    total = torch.full((length,), plan.expected_batch_size * clipping_norm, dtype=torch.float64)
    total[::2] *= -1
    units = noised_sum(total, plan=plan, entropy=SystemEntropy(), labels=("noise",))
    into = summed(bound(plan, length), length)
    into.add(reply(units))
    assert into.replies == 1
    assert np.array_equal(into.total, units)


@pytest.mark.parametrize("expected", [1, 16, 1000, 50_000])
def test_an_honest_payload_is_refused_less_often_than_once_in_1e20(expected: int, plan: PrivacyPlan) -> None:
    # The oracles: exact tails by scipy, of the draw at rates from rare to usual, and of the noise in every entry.
    length, noiseless = 1, dataclasses.replace(plan, noise_multiplier=0.0, expected_batch_size=float(expected))
    draws = math.floor((bound(noiseless, length) - 1) * plan.lattice / plan.sensitivity(length))
    for rate in (0.001, 0.05, 0.25, 1.0):
        if (units := round(expected / rate)) >= 1:
            assert binom.sf(draws, units, rate) < 1e-20
    assert 2 * norm.sf(NOISE_TAIL) * MAX_PARAMETERS < 1e-20
    assert math.exp(-DRAW_TAIL) < 1e-20
    # And it is no more than a few times what is usual.
    assert draws < expected + 20 * math.sqrt(expected) + 50


@pytest.mark.parametrize("sign", [1, -1])
def test_rubbish_of_the_right_length_is_refused_by_its_site_s_name(sign: int, plan: PrivacyPlan) -> None:
    most = bound(plan, 1000)
    assert most < LATTICE_LIMIT / 1000
    rng, into = np.random.default_rng(0), summed(most, 1000)
    into.add(reply(np.zeros(1000, np.int64)))
    one = np.zeros(1000, np.int64)
    one[7] = sign * (math.floor(most) + 1)
    for values in (one, rng.integers(-LATTICE_LIMIT, LATTICE_LIMIT, 1000)):
        with pytest.raises(ProtocolError, match=r"site st-anna sends a value of .* in round 3"):
            into.add(reply(values, "st-anna"))
        assert (into.replies, np.abs(into.total).max()) == (1, 0)
    one[7] = sign * math.floor(most)
    into.add(reply(one, "st-anna"))
    summed(None, 1000).add(reply(rng.integers(-LATTICE_LIMIT, LATTICE_LIMIT, 1000)))  # without a bound, as before


def test_nothing_is_claimed_of_moments_and_of_updates(plan: PrivacyPlan) -> None:
    assert largest_value(config(), plan, "moments", length=10) is None
    assert largest_value(config(federation__local_steps=2), plan, "train", length=10) is None


def test_without_noise_the_draw_alone_is_the_bound(plan: PrivacyPlan) -> None:
    silent = dataclasses.replace(plan, private=False, noise_multiplier=0.0)
    assert silent.expected_batch_size / silent.lattice < bound(silent, 10) < bound(plan, 10)
