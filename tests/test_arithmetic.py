"""What float arithmetic may add to one record's share, against weights made to abuse it (PRIVACY rules 3 and 9).

The bounds that are tested are sharper than eta where the arithmetic is float64: a float32 sum would show.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dpsgd import CLIP, batch, build, loop, record_loss
from torch import Tensor, nn

from shared.config import DiscriminatorConfig, RunConfig
from shared.errors import PrivacyError
from shared.models import DISCRIMINATORS, Discriminator
from shared.models.discriminator import Window
from shared.moments import MomentFeatures, clipped_moment_sum
from shared.privacy.arithmetic import (
    ARITHMETIC_SLACK,
    BLOCK,
    FLOAT32,
    FLOAT64,
    LARGEST_SUM,
    LARGEST_TERMS,
    gamma,
    gram_allowance,
)
from shared.privacy.dpsgd import ClippedSum, _LayerSum, clipped_gradient_sum
from shared.privacy.plan import make_plan

# Rounding of the float64 sums of these small batches; a float32 sum is wrong by 1e-8 to 1e-6.
SHARP = 1e-9


def clipped(discriminator: nn.Module, features: Tensor, conditioning: Tensor, **changes: object) -> ClippedSum:
    keywords = {"clipping_norm": CLIP, **changes}
    return clipped_gradient_sum(discriminator, features, conditioning, record_loss, **keywords)  # type: ignore[arg-type]


class Untouched(Discriminator):
    """2 x 2 windows without padding, so that equal cells give equal windows, and no pooling.

    Made to cancel: all windows of a record are nearly `v`, all their output gradients nearly +-g, in equal shares.
    """

    def __init__(self, *, channels: int = 16, width: int = 64) -> None:
        settings = DiscriminatorConfig(hidden=8, pooled_side=0)
        stack = [Window(2, 2, 0, width)]
        super().__init__(
            feature_side=8, feature_channels=channels, stack=stack, settings=settings, embedding_dim=6
        )
        with torch.no_grad():
            signs = torch.tensor([1.0, -1.0]).repeat(8)  # of the 16 windows
            shared = torch.randn(8, 1, width) * 30
            self.hidden.weight.copy_((shared * signs[None, :, None]).flatten(1))
        self.requires_grad_(False)


def cancelling_batch(count: int, *, wobble: float, seed: int, channels: int = 16) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    same = torch.randn(count, 1, 1, 1, channels, generator=rng) * 30
    features = same * (1 + wobble * torch.randn(count, 1, 8, 8, channels, generator=rng))
    return features, torch.randn(count, 2, 6, generator=rng)


def exact_norms(discriminator: nn.Module, features: Tensor, conditioning: Tensor) -> Tensor:
    """Of the float32 forward pass and output gradients, all else in float64: what is summed, record by record."""
    norms = []
    for row in range(len(features)):
        whole = clipped(discriminator, features[row : row + 1], conditioning[row : row + 1], clipping_norm=1e30)
        norms.append(whole.total.norm())
    return torch.stack(norms)


@pytest.mark.parametrize(
    "wobble", [0.0, 1e-4, 1e-2, *(pytest.param(wobble, marks=pytest.mark.slow) for wobble in (1e-7, 1e-5, 1e-3))]
)
def test_no_record_passes_its_clip_by_cancelling_in_its_norm(wobble: float) -> None:
    """The Gram form of a squared norm has mixed signs: alone it may be far below the true one, even negative."""
    torch.manual_seed(1)
    discriminator = Untouched()
    features, conditioning = cancelling_batch(200, wobble=wobble, seed=3)
    true = exact_norms(discriminator, features, conditioning)
    used = clipped(discriminator, features, conditioning).norms.double()
    assert (used >= true * (1 - 1e-6)).all()  # `norms` is rounded to float32
    for row in range(200):
        # A clip at half the record's true norm: its share must not be a bit longer.
        clip = float(true[row]) / 2
        alone = clipped(discriminator, features[row : row + 1], conditioning[row : row + 1], clipping_norm=clip)
        assert alone.total.norm() <= clip * (1 + SHARP)


@given(
    positions=st.integers(1, 40), width=st.integers(40, 90), height=st.integers(40, 70), wobble=st.floats(-9, 0),
    inputs_scale=st.integers(-26, 12), outputs_scale=st.integers(-26, 12), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_norm_that_clips_is_never_below_the_norm_of_what_is_summed(
    positions: int, width: int, height: int, wobble: float, inputs_scale: int, outputs_scale: int, seed: int
) -> None:
    """Against numpy in float64, with windows that nearly cancel, and from vanishing squares to overflowing ones."""
    rng = np.random.default_rng(seed)
    signs = np.array([1, -1] * 20)[:positions, None]
    inputs = rng.standard_normal((BLOCK, 1, width)) * (1 + 10**wobble * rng.standard_normal((BLOCK, positions, width)))
    outputs = rng.standard_normal((BLOCK, 1, height)) * signs
    outputs = outputs * (1 + 10**wobble * rng.standard_normal((BLOCK, positions, height)))
    a = torch.from_numpy(inputs * 10.0**inputs_scale).float()
    g = torch.from_numpy(outputs * 10.0**outputs_scale).float()
    layer = _LayerSum(nn.Linear(width, height))
    used = layer.squared_norms(a, g)
    wide_a, wide_g = a.double().numpy(), g.double().numpy()
    weight, sizes = np.einsum("nto,ntk->nok", wide_g, wide_a), np.einsum("nto,ntk->nok", abs(wide_g), abs(wide_a))
    if layer.rows is not None:  # of many windows, what is summed is the gradient as float32 made it
        rows = layer.rows.numpy().reshape(weight.shape)
        near = gamma(positions, FLOAT32) * sizes + positions * 2.0**-126
        assert (abs(rows - weight) <= near)[np.isfinite(rows)].all()
        weight, sizes = rows, abs(rows)
    true = (weight**2).sum(axis=(1, 2)) + (wide_g.sum(axis=1) ** 2).sum(axis=1)
    finite = used.isfinite()
    assert finite.all() or max(inputs_scale, outputs_scale) > 0
    assert (used.numpy()[finite] >= true[finite] * (1 - 1e-9)).all()
    # And the sum is that of the records, each by its own factor.
    factors = torch.rand(BLOCK, dtype=torch.float64)
    layer.add_clipped(factors)
    expected, sizes = (np.einsum("n,nok->ok", factors.numpy(), each) for each in (weight, sizes))
    got = layer.sums()[layer.layer.weight].numpy()
    assert (abs(got - expected) <= 2 * gamma(BLOCK * 40 + 2, FLOAT64) * sizes)[np.isfinite(sizes)].all()


def test_no_product_is_longer_than_eta_is_derived_for() -> None:
    layer, terms = _LayerSum(nn.Linear(48, 48)), []
    for _ in range(20):
        layer.squared_norms(torch.ones(BLOCK, 15, 48), torch.ones(BLOCK, 15, 48))
        layer.add_clipped(torch.ones(BLOCK, dtype=torch.float64))
        terms.append(layer.part_terms)
    assert max(terms) <= LARGEST_TERMS < sum(terms)
    assert (layer.sums()[layer.layer.weight] == 20 * BLOCK * 15).all()


@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_the_norm_that_clips_is_hardly_above_the_true_one(name: str) -> None:
    """Of ordinary records: what safety costs in signal. The loop runs plain autograd in float64."""
    discriminator = build(name, width=32, hidden=64)
    features, conditioning = batch(discriminator, 40)
    norms = clipped(discriminator, features, conditioning).norms.double()
    for row in range(40):
        true = loop(discriminator, features[row : row + 1], conditioning[row : row + 1], clip=1e30).norm()
        assert true * (1 - 1e-5) <= norms[row] <= true * (1 + 1e-3)


def hostile(discriminator: Discriminator, *, scale: float, rounded: bool, seed: int) -> None:
    """Weights of a coordinator that may send anything: huge ones, and of few bits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in discriminator.parameters():
        values = torch.randn(parameter.shape, generator=generator) * scale
        parameter.copy_(values.bfloat16().float() if rounded else values)


HOSTILE = [(scale, rounded) for scale in (1.0, 1e-12, 1e6, 1e12, 1e18) for rounded in (False, True)]
ALWAYS = [(1e18, True)]  # the others are slow together; (1.0, False) is test_dpsgd.py's as well


@pytest.mark.parametrize(
    ("scale", "rounded"), [pytest.param(*case, marks=[] if case in ALWAYS else pytest.mark.slow) for case in HOSTILE]
)
@pytest.mark.parametrize("name", [*DISCRIMINATORS.names(), "cancelling"])
def test_200_neighbours_move_the_sum_by_at_most_the_clip_under_hostile_weights(
    name: str, scale: float, rounded: bool
) -> None:
    """One record added at any place; every seed has its own weights, order and number of records."""
    torch.manual_seed(0)
    discriminator = Untouched() if name == "cancelling" else build(name)
    count = moving = 0
    for seed in range(20):
        if name == "cancelling":
            discriminator.convolutions[0].weight.copy_(torch.randn(64, 64) * min(scale, 1e6))
            features, conditioning = cancelling_batch(70, wobble=10.0 ** -(seed % 6), seed=seed)
        else:
            hostile(discriminator, scale=scale, rounded=rounded, seed=seed)
            features, conditioning = batch(discriminator, 70, seed=seed)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(seed))
        whole = clipped(discriminator, features[order], conditioning[order]).total
        assert whole.isfinite().all()
        for gone in range(seed % 7, 70, 7):
            kept = order[order != gone]
            moved = (whole - clipped(discriminator, features[kept], conditioning[kept]).total).norm()
            assert moved <= CLIP * (1 + SHARP)
            count, moving = count + 1, moving + int(moved > CLIP * 0.99)
    assert count == 200
    if name == "cancelling" or (scale == 1.0 and not rounded):
        assert moving > 20  # the bound is met by records that are clipped, not by empty shares


def test_weights_near_the_largest_number_add_nothing_and_raise_nothing() -> None:
    for name in DISCRIMINATORS.names():
        discriminator = build(name)
        for scale in (1e38, math.inf, math.nan):
            hostile(discriminator, scale=scale, rounded=False, seed=0)
            features, conditioning = batch(discriminator, 5)
            result = clipped(discriminator, features, conditioning, padded_to=70)
            assert not result.total.any()
            assert not result.norms.isfinite().any()


def test_a_record_that_is_not_finite_is_emptied_without_touching_the_callers_rows() -> None:
    discriminator = build("front")
    features, conditioning = batch(discriminator, BLOCK)
    features[3], conditioning[5] = math.inf, math.nan
    before = features.clone(), conditioning.clone()
    kept = [row for row in range(BLOCK) if row not in (3, 5)]
    total = clipped(discriminator, features, conditioning).total
    assert torch.equal(features, before[0])
    assert torch.equal(conditioning.nan_to_num(7), before[1].nan_to_num(7))
    clean = clipped(discriminator, features[kept], conditioning[kept]).total
    assert torch.allclose(total, clean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 8), (96, 128)])
@pytest.mark.parametrize("name", DISCRIMINATORS.names())
def test_a_records_logits_and_norm_have_the_same_bits_whatever_else_is_in_the_batch(
    name: str, size: tuple[int, int]
) -> None:
    width, hidden = size
    discriminator = build(name, width=width, hidden=hidden)
    features, conditioning = batch(discriminator, BLOCK + 37, views=2)
    whole = clipped(discriminator, features, conditioning)
    rng = torch.Generator().manual_seed(5)

    def agree(rows: Tensor, changed: ClippedSum, places: Tensor) -> None:
        assert torch.equal(changed.norms[places], whole.norms[rows])
        assert torch.equal(changed.logits[places], whole.logits[rows])

    order = torch.randperm(len(features), generator=rng)
    agree(order, clipped(discriminator, features[order], conditioning[order]), torch.arange(len(order)))
    for removed in (1, 5, BLOCK, BLOCK + 36):
        kept = order[removed:].sort().values
        agree(kept, clipped(discriminator, features[kept], conditioning[kept]), torch.arange(len(kept)))
    for poison in (0.0, 1e4, 1e30, math.inf, math.nan):
        other, texts = features.clone(), conditioning.clone()
        replaced, stays = order[:80], order[80:]
        other[replaced] = poison * torch.randn(other[replaced].shape, generator=rng)
        texts[replaced] = torch.randn(texts[replaced].shape, generator=rng)
        agree(stays, clipped(discriminator, other, texts), stays)


@pytest.mark.parametrize("count", [0, 1, BLOCK, BLOCK + 1, 130])
def test_padding_changes_no_bit_and_makes_the_work_independent_of_the_number_of_records(count: int) -> None:
    discriminator = build("front")
    features, conditioning = batch(discriminator, count)
    passes: list[int] = []
    handle = discriminator.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    padded = clipped(discriminator, features, conditioning, padded_to=130)
    handle.remove()
    assert passes == [BLOCK] * math.ceil(130 / BLOCK)
    plain = clipped(discriminator, features, conditioning)
    assert torch.equal(padded.total, plain.total)
    assert torch.equal(padded.norms, plain.norms)
    assert torch.equal(padded.logits, plain.logits)
    assert (len(padded.norms), len(padded.logits)) == (count, count)


def test_more_records_than_are_padded_for_are_a_bug_of_the_caller() -> None:
    discriminator = build("front")
    with pytest.raises(AssertionError):
        clipped(discriminator, *batch(discriminator, 3), padded_to=2)


def test_products_in_less_than_float32_are_a_bug_of_the_caller() -> None:
    discriminator = build("front")
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(AssertionError):
            clipped(discriminator, *batch(discriminator, 3))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_gamma_bounds_the_worst_order_of_a_float32_sum() -> None:
    """1 followed by halves of its last bit, which round away one by one: the textbook's worst case, exactly."""
    for terms in (10, 1000, 4096):
        values = np.full(terms, 2.0**-24, dtype=np.float32)
        values[0] = 1
        rounded = np.float32(0)
        for value in values:
            rounded = np.float32(rounded + value)
        exact = sum(Fraction(float(value)) for value in values)
        error = abs(Fraction(float(rounded)) - exact) / exact
        assert 0.9 * (terms - 1) * FLOAT32 < error <= gamma(terms, FLOAT32)


def test_eta_is_small_and_made_of_what_the_docs_say() -> None:
    assert 2**-12 < ARITHMETIC_SLACK < 2**-11
    # A layer of the demo's size: the squared norm grows by this for each unit of (sum of lengths)^2.
    assert 2**-16 < gram_allowance(736, 96) < 2**-13
    assert gram_allowance(736, 96) > 832 * FLOAT32 + 2**-17


@pytest.mark.parametrize("sites", [1, 8])
def test_a_step_larger_than_eta_covers_is_refused(sites: int) -> None:
    flat = {"privacy.name": "none", "privacy.delta": 1e-9, "privacy.sampling-rate": 1.0, "federation.sites": sites}
    allowed = LARGEST_SUM // 2 * sites
    make_plan(RunConfig.from_flat({**flat, "federation.published-records": allowed}))
    with pytest.raises(PrivacyError, match="would draw") as error:
        make_plan(RunConfig.from_flat({**flat, "federation.published-records": allowed + sites}))
    assert "sampling-rate" in str(error.value.hint)


@pytest.mark.parametrize("random", [0, 200])
def test_one_record_among_thousands_moves_the_moments_by_at_most_one(random: int) -> None:
    """All alike, so that the sum is long and a float32 sum would be wrong by more than the bound."""
    rng = torch.Generator().manual_seed(0)
    features = 30 + torch.randn(2500, 4, 4, 5, generator=rng)
    captions = torch.nn.functional.normalize(torch.ones(2500, 6) + 0.01 * torch.randn(2500, 6, generator=rng), dim=1)
    of = MomentFeatures((4, 4, 5), random=random)
    whole = clipped_moment_sum(features, captions, of)
    for gone in (0, 999, 1000, 1700, 2499):
        kept = [row for row in range(2500) if row != gone]
        moved = (whole - clipped_moment_sum(features[kept], captions[kept], of)).norm()
        assert 0.99 < moved <= 1 + SHARP
