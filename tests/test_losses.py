"""Adversarial losses against the formulas of their sources, example by example."""

from __future__ import annotations

import math

import pytest
import torch

from shared.adversarial import build_loss, real_record_loss, to_bytes, to_unit_range
from shared.config import DiscriminatorConfig
from shared.errors import ConfigError
from shared.losses import LOSSES

LOGITS = [-3.0, -0.5, 0.0, 0.5, 2.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("logit", LOGITS)
def test_non_saturating_is_the_logistic_loss(logit: float) -> None:
    loss, x = LOSSES.get("non-saturating")(), torch.tensor([logit])
    assert loss.real(x).item() == pytest.approx(-math.log(sigmoid(logit)), abs=1e-5)
    assert loss.fake(x).item() == pytest.approx(-math.log(1 - sigmoid(logit)), abs=1e-5)
    assert loss.generator(x).item() == pytest.approx(-math.log(sigmoid(logit)), abs=1e-5)


@pytest.mark.parametrize("logit", LOGITS)
def test_hinge_is_zero_beyond_the_margin(logit: float) -> None:
    loss, x = LOSSES.get("hinge")(), torch.tensor([logit])
    assert loss.real(x).item() == max(0.0, 1 - logit)
    assert loss.fake(x).item() == max(0.0, 1 + logit)
    assert loss.generator(x).item() == -logit


@pytest.mark.parametrize("name", LOSSES.names())
def test_a_loss_is_never_reduced(name: str) -> None:
    loss = LOSSES.get(name)()
    for term in (loss.real, loss.fake, loss.generator):
        assert term(torch.zeros(3, 2)).shape == (3, 2)


def test_an_unknown_loss_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        build_loss(DiscriminatorConfig(loss="hing"))
    assert "did you mean 'hinge'" in (caught.value.hint or "")


def test_a_records_loss_is_the_mean_over_its_views_of_both_pairs() -> None:
    logits = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]])  # (1, 2 views, matched and wrong)
    expected = sum(
        math.log1p(math.exp(-matched)) + 0.25 * math.log1p(math.exp(wrong)) for matched, wrong in logits[0].tolist()
    )
    loss = real_record_loss(build_loss(DiscriminatorConfig()), wrong_prompt_weight=0.25)
    assert loss(logits).item() == pytest.approx(expected / 2, rel=1e-6)


def test_bytes_survive_the_way_through_the_unit_range() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).numpy()
    unit = to_unit_range(images)
    assert unit.min() == -1
    assert unit.max() == 1
    assert (to_bytes(unit) == images).all()
