"""The site's policy: closed until a person opens it, strict in what it reads, and in words what it enforces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_federation import toy_config

from client.policy import FILE, SitePolicy
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.privacy.plan import PrivacyPlan, make_plan

CLOSED = {"max_epsilon": 8.0, "delta": 1e-5}
FRONT = {
    "privacy.delta": 1e-6, "privacy.sampling-rate": 0.1, "federation.published-records": 20_000,
    "federation.rounds": 200, "privacy.target-epsilon": 4.0,
}  # fmt: skip


def proposed(**changes: Any) -> tuple[RunConfig, PrivacyPlan]:
    config = RunConfig.from_flat({**FRONT, **{name.replace("__", "."): value for name, value in changes.items()}})
    return config, make_plan(config)


def violations(policy: SitePolicy, **changes: Any) -> list[str]:
    return list(policy.violations(*proposed(**changes)))


def test_what_nobody_opened_is_closed() -> None:
    """PRIVACY rule 24: the defaults that a site's safety rests on."""
    policy = SitePolicy(**CLOSED)
    assert policy.approve_each_run
    assert not policy.allow_no_privacy
    assert policy.max_query_epsilon == 0
    assert (policy.models, policy.kernels, policy.text_encoders, policy.noise) == (
        ["front"], ["fused"], ["hashing"], ["local"],
    )  # fmt: skip
    assert policy.min_noise_multiplier >= 0.5
    assert policy.max_sampling_rate <= 0.25
    assert policy.min_expected_batch >= 1
    assert (policy.max_rounds, policy.max_local_steps, policy.max_parameters) == (2000, 32, 2_000_000)
    for required in CLOSED:
        with pytest.raises(ValueError, match="required"):
            SitePolicy(**{name: value for name, value in CLOSED.items() if name != required})


def test_an_ordinary_run_is_within_the_defaults() -> None:
    assert violations(SitePolicy(**CLOSED)) == []


@pytest.mark.parametrize(
    ("policy", "changes", "word"),
    [
        ({}, {"privacy__name": "none"}, "no privacy"),
        ({"min_noise_multiplier": 50.0}, {}, "noise multiplier"),
        ({"min_expected_batch": 600.0}, {}, "fewer than 600"),
        ({}, {"federation__sites": 2000, "privacy__delta": 1e-6}, "fewer than 16"),
        ({}, {"privacy__sampling-rate": 0.5}, "sampling rate"),
        ({"max_rounds": 199}, {}, "200 rounds"),
        ({}, {"federation__local-steps": 33}, "33 local steps"),
        ({}, {"privacy__unit": "subject"}, "unit is the subject"),
        ({"noise": []}, {}, "allowed is none"),
        ({}, {"discriminator__name": "conv"}, "discriminator is 'conv'"),
        ({}, {"privacy__kernel": "opacus"}, "kernel is 'opacus'"),
        ({}, {"text__encoder": "transformers", "text__path": "/etc"}, "'transformers:/etc'"),
        ({"federations": ["retina"]}, {"federation__name": "cornea"}, "federation is 'cornea'"),
        ({"approve_each_run": False}, {}, "no federation is named"),
        ({"aggregator_keys": ["k3xa 7mqe"]}, {}, "not signed, allowed is 'k3xa 7mqe'"),
    ],
)
def test_each_limit_refuses_what_passes_it_and_says_by_what(
    policy: dict[str, Any], changes: dict[str, Any], word: str
) -> None:
    (only,) = violations(SitePolicy(**{**CLOSED, **policy}), **changes)
    assert word in only


def test_a_policy_is_read_as_it_was_written(tmp_path: Path) -> None:
    policy = SitePolicy(**CLOSED, max_run_epsilon=2.5, federations=["retina-2026"], code=["ab" * 32])
    (tmp_path / FILE).write_text(policy.to_toml())
    assert SitePolicy.read(tmp_path) == policy
    simulated = SitePolicy.for_simulation(max_epsilon=float("inf"), delta=0.5, unit="subject")
    (tmp_path / FILE).write_text(simulated.to_toml())
    assert SitePolicy.read(tmp_path) == simulated
    config = toy_config({"privacy.name": "none", "privacy.unit": "subject"})
    assert list(simulated.violations(config, make_plan(config))) == []


@pytest.mark.parametrize(
    "text",
    [
        "", "delta = 1e-5", "max-epsilon = 8.0", 'max-epsilon = "8"\ndelta = 1e-5', "max-epsilon = 8.0\ndelta = 2.0",
        "max-epsilon = nan\ndelta = 1e-5", "max-epsilon = 8.0\ndelta = 1e-5\nsigma = 0.1",
        "max-epsilon = 8.0\ndelta = 1e-5\napprove-each-run = 1", "max-epsilon = 8.0\ndelta = 1e-5\nmodels = 'front'",
        "no toml",
    ],
)  # fmt: skip
def test_a_policy_that_says_something_else_is_refused_with_its_place(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        SitePolicy.read(tmp_path)


def test_a_site_without_a_policy_allows_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without one nothing is allowed"):
        SitePolicy.read(tmp_path)


def test_the_words_hold_every_figure_of_the_policy() -> None:
    policy = SitePolicy(
        max_epsilon=7.25, delta=3e-6, max_run_epsilon=1.125, min_noise_multiplier=0.625, min_expected_batch=37,
        max_sampling_rate=0.1875, max_rounds=123, max_local_steps=17, max_parameters=345_678, unit="subject",
        federations=["retina"], code=["ab" * 32], aggregator_keys=["k3xa 7mqe", "2zpd w4hu"],
    )  # fmt: skip
    words = "\n".join(policy.in_words())
    for figure in ("7.25", "3e-06", "1.125", "0.625", "37", "0.1875", "123", "17", "345,678", "subject", "Retina"):
        assert figure in words
    assert "approves each run" in words
    assert "abababababab" in words
    assert "signed with the aggregator's keys 'k3xa 7mqe' or '2zpd w4hu'" in words
