"""RunConfig: what is refused and with which words, and that its three forms carry the same settings."""

from __future__ import annotations

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shared.config
from shared.config import PrivacyConfig, RunConfig, Section, parse_setting, read_toml, setting_names, unflatten
from shared.errors import ConfigError

REQUIRED: dict[str, Any] = {
    "privacy": {"delta": 1e-5, "sampling-rate": 0.1},
    "federation": {"published-records": 20_000},
}


def table(**sections: dict[str, Any]) -> dict[str, Any]:
    """The required settings with sections merged over them."""
    return {name: REQUIRED.get(name, {}) | sections.get(name, {}) for name in REQUIRED.keys() | sections.keys()}


def refused(*, seed: object = 0, **sections: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_table(table(**sections) | {"seed": seed})
    return caught.value


def test_only_three_settings_have_no_default() -> None:
    # Nothing required has a default that switches it off; everything else works as it is.
    required = [
        f"{section}.{name}"
        for section, kind in RunConfig.model_fields.items()
        if isinstance(kind.annotation, type) and issubclass(kind.annotation, Section)
        for name, field in kind.annotation.model_fields.items()
        if field.is_required()
    ]
    assert required == ["privacy.delta", "privacy.sampling_rate", "federation.published_records"]
    RunConfig.from_table(table())


@pytest.mark.parametrize("missing", ["privacy.delta", "privacy.sampling-rate", "federation.published-records"])
def test_a_missing_setting_is_named(missing: str) -> None:
    section, name = missing.split(".")
    given_table = table()
    del given_table[section][name]
    with pytest.raises(ConfigError, match=f"^config: setting '{missing}' is missing$"):
        RunConfig.from_table(given_table)


# rule 10: privacy is a budget; a noise multiplier, a sensitivity or a zero cannot be typed.
def test_no_setting_holds_a_noise_multiplier_or_a_sensitivity() -> None:
    assert set(PrivacyConfig.model_fields) == {
        "name", "target_epsilon", "delta", "sampling_rate", "clipping_norm", "noise", "kernel", "retry_slack", "unit",
        "images_per_subject",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["noise-multiplier", "sigma", "sensitivity"])
def test_asking_for_sigma_is_answered_with_what_it_is_derived_from(name: str) -> None:
    error = refused(privacy={name: 0.0})
    assert error.message == f"config: unknown setting 'privacy.{name}'"
    assert error.hint is not None
    assert "derived from privacy.target-epsilon" in error.hint


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("privacy", "target-epsilon", 0.0),
        ("privacy", "target-epsilon", -1.0),
        ("privacy", "target-epsilon", float("inf")),
        ("privacy", "target-epsilon", float("nan")),
        ("privacy", "delta", 0.0),
        ("privacy", "delta", 1.0),
        ("privacy", "sampling-rate", 0.0),
        ("privacy", "sampling-rate", 1.01),
        ("privacy", "clipping-norm", 0.0),
        ("privacy", "name", "dp"),
        ("privacy", "unit", "person"),
        ("privacy", "images-per-subject", 0),
        ("privacy", "images-per-subject", 65),
        ("federation", "sites", 0),
        ("federation", "rounds", 0),
        ("federation", "local-steps", 0),
        ("federation", "published-records", 0),
        ("data", "image-size", 33),
        ("data", "channels", 4),
        ("compute", "device", "gpu"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_setting(section: str, name: str, value: object) -> None:
    error = refused(**{section: {name: value}})
    assert f"setting '{section}.{name}'" in error.message
    assert repr(value) in error.message


@pytest.mark.parametrize("value", ["4", True, 4.0, None, [4]])
def test_a_number_of_another_type_is_refused(value: object) -> None:
    # `--set federation.sites=true` would otherwise quietly mean one site.
    assert "setting 'federation.sites'" in refused(federation={"sites": value}).message


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0"])
def test_a_seed_outside_its_range_is_refused(seed: object) -> None:
    assert "setting 'seed'" in refused(seed=seed).message


def test_images_per_subject_belong_to_the_unit_subject() -> None:
    error = refused(privacy={"images-per-subject": 8})
    assert "images-per-subject bounds nothing with unit 'example'" in error.message
    config = RunConfig.from_table(table(privacy={"unit": "subject", "images-per-subject": 8}))
    assert (config.privacy.unit, config.privacy.images_per_subject) == ("subject", 8)
    assert RunConfig.from_table(table()).privacy.unit == "example"


def test_distributed_noise_is_refused_until_masking_exists() -> None:
    assert "secure aggregation" in refused(privacy={"noise": "distributed"}).message


def test_less_than_one_expected_record_a_step_is_refused() -> None:
    RunConfig.from_table(table(privacy={"sampling-rate": 1 / 20_000}))
    assert "below one record a step" in refused(privacy={"sampling-rate": 0.9 / 20_000}).message


def test_following_moments_that_no_warm_start_releases_is_refused() -> None:
    settings = {"training": {"moment-weight": 1.0}}
    assert "warm-start.enabled is false" in refused(**settings).message
    RunConfig.from_table(table(**settings, **{"warm-start": {"enabled": True}}))


def test_views_without_augmentation_are_refused() -> None:
    assert "data.crop" in refused(data={"views": 2}).message
    RunConfig.from_table(table(data={"views": 2, "crop": 0.1}))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("privacy.clip-norm", "did you mean 'privacy.clipping-norm'?"),
        ("privacy.clippingnorm", "did you mean 'privacy.clipping-norm'?"),
        ("rounds", "did you mean 'federation.rounds'?"),
        ("training.rounds", "did you mean 'federation.rounds'?"),
        ("privacy.zzz", "`fedcanvas simulate --settings` lists them"),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown setting '{key}'$") as caught:
        parse_setting(f"{key}=5")
    assert caught.value.hint == hint


def test_an_unknown_key_in_a_table_is_refused_with_its_place() -> None:
    assert refused(privacy={"clip-norm": 5.0}).message == "config: unknown setting 'privacy.clip-norm'"


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("privacy.clipping-norm=5", ("privacy.clipping-norm", 5)),
        ("privacy.clipping_norm = 5.5", ("privacy.clipping-norm", 5.5)),
        ("data.flip=true", ("data.flip", True)),
        ("text.encoder=transformers", ("text.encoder", "transformers")),
        ("text.path=/models/a=b", ("text.path", "/models/a=b")),
        ('text.path="5"', ("text.path", "5")),
        ("seed=7", ("seed", 7)),
    ],
)
def test_a_typed_setting_is_read_as_toml_and_else_as_text(text: str, setting: tuple[str, object]) -> None:
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["privacy.delta", "=5", "", "privacy.delta=[1]", "privacy.delta={a=1}"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_setting(text)


def test_a_key_that_is_a_value_and_a_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        unflatten({"seed": 1, "seed.a": 2})


def test_dashes_and_underscores_name_the_same_setting() -> None:
    underscored = {"privacy": {"delta": 1e-5, "sampling_rate": 0.1}, "federation": {"published_records": 20_000}}
    assert RunConfig.from_table(underscored) == RunConfig.from_table(REQUIRED)


def test_settings_are_frozen() -> None:
    config = RunConfig.from_table(table())
    with pytest.raises(ValueError, match="frozen"):
        config.privacy.delta = 0.5  # type: ignore[misc]


SOME_SETTINGS = {
    "seed": st.integers(0, 2**63 - 1),
    "privacy.delta": st.floats(1e-12, 0.5),
    "privacy.target-epsilon": st.floats(1e-3, 1000),
    "privacy.sampling-rate": st.floats(1e-3, 1),
    "federation.rounds": st.integers(1, 10**6),
    "data.flip": st.booleans(),
    "text.path": st.text(st.characters(codec="utf-8", exclude_characters="\x7f")),
}


@given(st.fixed_dictionaries({}, optional=SOME_SETTINGS))
def test_every_form_carries_the_same_settings(changes: dict[str, Any]) -> None:
    # The oracles are the standard library's readers of TOML and JSON.
    config = RunConfig.from_table(table()).replaced(changes)
    assert {name: value for name, value in config.to_flat().items() if name in changes} == changes
    assert RunConfig.from_table(tomllib.loads(config.to_toml())) == config
    assert RunConfig.from_table(json.loads(config.to_json())) == config
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.from_flat(config.to_flat()) == config


def test_equal_settings_have_one_digest_and_others_another() -> None:
    config = RunConfig.from_table(table())
    assert config.digest == RunConfig.from_table(table(privacy={"target-epsilon": 8})).digest  # 8 and 8.0
    assert config.digest != config.replaced({"seed": 1}).digest
    assert len(config.digest) == 64


def test_the_flat_table_holds_what_flower_takes() -> None:
    assert all(type(value) in (str, int, float, bool) for value in RunConfig.from_table(table()).to_flat().values())


def test_every_setting_has_a_name_with_dashes_and_a_description() -> None:
    names = setting_names()
    assert {"seed", "federation.local-steps", "privacy.target-epsilon"} <= names.keys()
    assert not [name for name, description in names.items() if "_" in name or not description]
    assert names.keys() >= RunConfig.from_table(table()).to_flat().keys()


def test_every_setting_is_read_by_the_code() -> None:
    # A setting that nothing reads is a promise that nothing keeps.
    root = Path(shared.config.__file__).parents[1]
    files = [path for folder in ("shared", "client", "server", "simulations") for path in (root / folder).rglob("*.py")]
    read = {
        node.attr
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    names = {name.rpartition(".")[2].replace("-", "_") for name in setting_names()}
    assert names - read == set()


def test_the_expected_batch_size_comes_from_public_figures() -> None:
    config = RunConfig.from_table(table())
    assert config.expected_batch_size == pytest.approx(0.1 * 20_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"seed = ", "is not TOML"), (b"seed = '\xff'", "cannot be read"), (b"[a]\n[a]\n", "is not TOML")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(path)
    assert str(path) in caught.value.message


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no config file {tmp_path}/run.toml"):
        RunConfig.from_toml(tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        RunConfig.from_toml(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "[" * 100_000, '{"privacy": 5}', '{"seed": NaN}'])
def test_a_config_from_another_machine_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        RunConfig.from_json(text)
