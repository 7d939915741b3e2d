"""What a run is: typed, frozen, bounded settings, and their three forms (TOML, Flower's flat table, JSON).

Names are written with dashes (`federation.local-steps`) everywhere a person types them; underscores are
accepted too. Everything here is public: it travels to every site and stands in every report.
Not here: what only a site decides (its ceiling, its data, its keys), and sigma, which no field lets a
person type: it is derived in `shared.privacy.plan`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import ConfigError

Scalar = str | int | float | bool


def _dashed(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        strict=True,  # "5" and true are no integers: a setting of the wrong type is a mistake to be told
        extra="forbid",
        alias_generator=_dashed,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


SectionKind = TypeVar("SectionKind", bound=Section)


class DataConfig(Section):
    """The fixed public preprocessing, equal at all sites, and augmentation as views inside the one clip."""

    image_size: Literal[8, 28, 32, 64] = Field(32, description="Side of the square images, in pixels.")
    channels: Literal[1, 3] = Field(3, description="1 = grey, 3 = colour.")
    max_caption_characters: int = Field(512, ge=1, le=8192, description="Longer captions are cut here.")
    views: int = Field(1, ge=1, le=16, description="Augmented views of a record, averaged in its one loss.")
    crop: float = Field(0.0, ge=0, le=0.5, description="Largest fraction of the side that a random crop removes.")
    flip: bool = Field(False, description="Mirror left and right at random; off, since captions may say 'left'.")
    rotation: float = Field(0.0, ge=0, le=180, description="Largest random rotation, in degrees.")
    brightness: float = Field(0.0, ge=0, le=1, description="Largest random change of brightness.")
    contrast: float = Field(0.0, ge=0, le=1, description="Largest random change of contrast.")
    saturation: float = Field(0.0, ge=0, le=1, description="Largest random change of saturation.")

    @property
    def augmented(self) -> bool:
        return bool(
            self.crop or self.flip or self.rotation or self.brightness or self.contrast or self.saturation
        )

    @model_validator(mode="after")
    def _views_need_augmentation(self) -> DataConfig:
        if self.views > 1 and not self.augmented:
            raise ValueError("views > 1 without any augmentation are equal views: set data.crop or another")
        return self


class TextConfig(Section):
    encoder: str = Field("hashing", description="An entry of ENCODERS: hashing, transformers.")
    path: str | None = Field(None, description="For encoder 'transformers': model id or local folder.")
    dim: int = Field(64, ge=8, le=1024, description="Size E of the text embedding (hashing encoder).")
    max_tokens: int = Field(64, ge=1, le=512, description="Longer texts are cut here (transformers encoder).")


class PrivacyConfig(Section):
    name: Literal["dp-sgd", "none"] = Field("dp-sgd", description="'none' is no privacy: epsilon = inf everywhere.")
    target_epsilon: float = Field(8.0, gt=0, le=1000, description="Budget of the whole run, per site.")
    delta: float = Field(gt=0, lt=1, description="Public constant, below 1 / number of units at a site.")
    sampling_rate: float = Field(gt=0, le=1, description="Poisson sampling rate q of a step, public.")
    clipping_norm: float = Field(12.0, gt=0, le=1e6, description="L2 bound C of one unit's gradient.")
    noise: Literal["local", "distributed"] = Field("local", description="Who adds it: each site all, or shares of it.")
    kernel: Literal["fused", "opacus"] = Field("fused", description="What computes the clipped sum; both agree.")
    retry_slack: int = Field(5, ge=0, le=10_000, description="Rounds reserved for retries beside federation.rounds.")
    unit: Literal["example", "subject"] = Field(
        "example", description="The privacy unit: an image with all its captions, or a subject_id with all its images."
    )
    images_per_subject: int = Field(
        4, ge=1, le=64, description="Unit 'subject': how many images of one a step looks at, averaged in its one loss."
    )

    @property
    def units(self) -> str:
        """What is drawn and counted, in the words of messages and reports."""
        return "subjects" if self.unit == "subject" else "records"

    @model_validator(mode="after")
    def _images_per_subject_need_subjects(self) -> PrivacyConfig:
        default = type(self).model_fields["images_per_subject"].default
        if self.unit == "example" and self.images_per_subject != default:
            raise ValueError("images-per-subject bounds nothing with unit 'example': set privacy.unit = 'subject'")
        return self


class FederationConfig(Section):
    name: str = Field(
        "simulation", pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$",
        description="Name of the federation, as sites see it in their policies and receipts.",
    )  # fmt: skip
    sites: int = Field(4, ge=1, le=10_000, description="Number of sites.")
    rounds: int = Field(300, ge=1, le=1_000_000, description="Federated rounds.")
    local_steps: int = Field(1, ge=1, le=1000, description="DP-SGD steps at a site a round; every one is charged.")
    fewest_sites: int = Field(
        0, ge=0, le=10_000, description="A round needs so many answers and goes on without the others; 0 = all sites."
    )
    cohort: Literal["all", "first"] = Field(
        "all", description="A round waits for every site that is there, or ends with the fewest-sites that are first."
    )
    deadline_seconds: float = Field(
        3600.0, gt=0, le=604_800, description="Seconds that a round waits for a silent site."
    )
    published_records: int = Field(
        ge=1, le=10**12, description="Units (examples or subjects) of all sites, a rounded figure."
    )


class DiscriminatorConfig(Section):
    name: str = Field("front", description="An entry of DISCRIMINATORS: front, conv, toy.")
    width: int = Field(96, ge=4, le=512, description="Channels of the deepest convolution.")
    pooled_side: int = Field(2, ge=0, le=64, description="Cells a side that the last map is averaged to; 0 = as it is.")
    hidden: int = Field(128, ge=8, le=2048, description="Units before the projection on the text.")
    loss: str = Field("non-saturating", description="An entry of LOSSES: non-saturating, hinge.")
    wrong_prompt_weight: float = Field(0.5, ge=0, le=10, description="Weight of (same image, wrong prompt) at a site.")
    near_prompt_share: float = Field(
        0.0, ge=0, le=1, description="Part of the wrong prompts that is drawn among those nearest to the caption."
    )
    near_prompts: int = Field(10, ge=1, le=1000, description="How many public prompts count as nearest.")


class GeneratorConfig(Section):
    name: str = Field("film", description="An entry of GENERATORS.")
    width: int = Field(32, ge=4, le=512, description="Channels of the last block.")
    latent_dim: int = Field(32, ge=1, le=1024, description="Size of the latents z.")
    attention: bool = Field(False, description="Self-attention at 16 x 16 (14 x 14, 8 x 8 for small images).")


class OptimizerConfig(Section):
    name: str = Field("adam", description="An entry of OPTIMIZERS: adam, adamw, rmsprop.")
    learning_rate: float = Field(4e-3, gt=0, le=1, description="After the warm-up, before the fall.")
    beta1: float = Field(0.5, ge=0, lt=1, description="Momentum of the gradient (rmsprop: momentum).")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the squared gradient.")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Part of each weight removed a step, times the rate.")
    warmup_rounds: int = Field(10, ge=0, le=100_000, description="Rounds (steps, in the warm start) of linear rise.")
    final_fraction: float = Field(1.0, gt=0, le=1, description="The rate falls linearly to this part at the end.")


class TrainingConfig(Section):
    """What the server does between releases: public prompts and released weights only, no privacy cost."""

    fakes: int = Field(128, ge=1, le=65_536, description="Fakes of one discriminator step.")
    generator_batch: int = Field(128, ge=2, le=65_536, description="Fakes of one generator step.")
    generator_steps: int = Field(1, ge=1, le=64, description="Generator steps a round to start with.")
    max_generator_steps: int = Field(4, ge=1, le=64, description="Top rung when the discriminator wins.")
    adaptive: bool = Field(True, description="Move on the ladder of D and G steps by the accuracy on fresh fakes.")
    low_accuracy: float = Field(0.6, ge=0, le=1, description="Below: one rung towards more discriminator steps.")
    high_accuracy: float = Field(0.98, ge=0, le=1, description="Above: one rung towards more generator steps.")
    grace: int = Field(10, ge=0, description="Generator steps before the ladder moves again.")
    lead_rounds: int = Field(10, ge=0, description="First rounds without generator steps: the discriminator leads.")
    mode_seeking_weight: float = Field(0.0, ge=0, le=100, description="Weight of the mode-seeking term.")
    mode_seeking_cap: float = Field(0.25, gt=0, le=10, description="Ratio beyond which it asks for no more variety.")
    moment_weight: float = Field(
        0.0, ge=0, le=1e6, description="Weight of the warm start's moments in every generator step; 0 = the start only."
    )
    ema_decay: float = Field(0.998, ge=0, lt=1, description="Largest decay of the generator's moving average.")


class WarmStartConfig(Section):
    """One DP release of caption-conditioned moments before the first round; both models learn from it."""

    enabled: bool = Field(False, description="Pre-train at the server from one moment release of each site.")
    epsilon_share: float = Field(0.15, gt=0, lt=1, description="Part of target-epsilon that the release may spend.")
    random_features: int = Field(
        0, ge=0, le=16_384, description="Random Fourier features in the moments, beside means: what tells variety."
    )
    steps: int = Field(100, ge=1, le=100_000, description="Generator steps on the released moments.")
    discriminator_steps: int = Field(60, ge=0, le=100_000, description="Discriminator steps on them, after those.")


class EvaluationConfig(Section):
    every: int = Field(50, ge=1, description="Rounds between samples, and between figures during training.")
    round_samples: int = Field(384, ge=0, le=100_000, description="Pictures of those figures; 0 = none are measured.")
    samples: int = Field(1920, ge=1, le=1_000_000, description="Pictures of the final attribute accuracy.")


class ComputeConfig(Section):
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where tensors live.")
    site_threads: int = Field(1, ge=1, le=256, description="Threads of one site; part of the result's digest.")
    server_threads: int = Field(2, ge=1, le=256, description="Threads of the server; part of the result's digest.")
    parallel_sites: int = Field(2, ge=1, le=256, description="Sites that work at the same time in the local engine.")
    checkpoint_every: int = Field(25, ge=1, description="Rounds between checkpoints on disk.")


class RunConfig(Section):
    """A whole run. Build it with `from_table`, `from_toml` or `from_flat`, which raise `ConfigError`."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything but a deployed site's draw and noise.")
    data: DataConfig = Field(default_factory=DataConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    privacy: PrivacyConfig
    federation: FederationConfig
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)
    discriminator_optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    generator_optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    warm_start: WarmStartConfig = Field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)

    @model_validator(mode="after")
    def _combinations(self) -> RunConfig:
        if self.privacy.noise == "distributed":
            raise ValueError(
                "privacy.noise = 'distributed' needs secure aggregation, which this release does not have:"
                " use 'local'"
            )
        if self.federation.fewest_sites > self.federation.sites:
            raise ValueError("federation.fewest-sites is more than federation.sites")
        if self.expected_batch_size < 1:
            raise ValueError(
                "privacy.sampling-rate * federation.published-records is below one record a step"
            )
        if self.training.moment_weight and not self.warm_start.enabled:
            raise ValueError(
                "training.moment-weight follows the warm start's moments, and warm-start.enabled is false: set"
                " training.moment-weight = 0 too"
            )
        return self

    @property
    def expected_batch_size(self) -> float:
        """Units that one step draws over all sites, in expectation: the public divisor, never a count."""
        return self.privacy.sampling_rate * self.federation.published_records

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, 64 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical: dashed keys, sorted, no blanks. Equal configs have equal text."""
        table = self.model_dump(mode="json", by_alias=True)
        return json.dumps(table, sort_keys=True, separators=(",", ":"))

    def to_flat(self) -> dict[str, Scalar]:
        """Flower's run config: `{"privacy.delta": 1e-05, ...}`; unset values are left out."""
        return _flatten(self.model_dump(mode="json", by_alias=True))

    def to_toml(self) -> str:
        lines = [f"seed = {self.seed}"]
        for section, values in self.model_dump(mode="json", by_alias=True).items():
            if isinstance(values, dict):
                lines += ["", f"[{section}]"]
                lines += [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items() if v is not None]
        return "\n".join(lines) + "\n"

    def replaced(self, changes: Mapping[str, Scalar]) -> RunConfig:
        """A copy with flat keys changed: `config.replaced({"privacy.clipping-norm": 5.0})`."""
        return RunConfig.from_flat({**self.to_flat(), **{_dashed(k): v for k, v in changes.items()}})

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, origin: str = "config") -> RunConfig:
        try:
            return cls.model_validate(dict(table))
        except ValidationError as error:
            raise _config_error(error, origin) from None

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        try:
            table = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the run config is not JSON: {error}") from None
        if not isinstance(table, dict):
            raise ConfigError("the run config is not a JSON object")
        return cls.from_table(table)

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar], *, origin: str = "config") -> RunConfig:
        return cls.from_table(unflatten(flat), origin=origin)

    @classmethod
    def from_toml(cls, path: Path) -> RunConfig:
        return cls.from_table(read_toml(path), origin=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; `ConfigError` with file and line when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}", hint="check the path given to --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def read_section(kind: type[SectionKind], path: Path) -> SectionKind:
    """The one section that a TOML file holds; `ConfigError` with file and key where something else stands there."""
    try:
        return kind.model_validate(read_toml(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(_dashed(str(part)) for part in first["loc"])
        known = ", ".join(map(_dashed, kind.model_fields))
        hint = f"known: {known}" if first["type"] == "extra_forbidden" else None
        raise ConfigError(f"{path}: '{place}': {first['msg'].lower()}", hint=hint) from None


def toml_value(value: object) -> str:
    """A text, number, truth value or list of them, as TOML writes it."""
    if isinstance(value, float):
        return repr(value)  # inf and exponents are written alike in Python and TOML
    return json.dumps(value, ensure_ascii=False)


def flatten_table(table: Mapping[str, Any]) -> dict[str, Scalar]:
    """Nested table to dashed flat keys; `None` is left out."""
    return _flatten(table)


def unflatten(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """`{"a.b": 1}` to `{"a": {"b": 1}}`; a key that is both a value and a section is an error."""
    table: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = [_dashed(part) for part in key.split(".")]
        place = table
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise ConfigError(f"setting '{key}': '{section}' is a value, not a section")
        place[name] = value
    return table


def setting_names() -> dict[str, str]:
    """Every flat key with its description, in the order of declaration."""
    names: dict[str, str] = {}
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for inner, detail in kind.model_fields.items():
                names[f"{_dashed(name)}.{_dashed(inner)}"] = detail.description or ""
        else:
            names[_dashed(name)] = field.description or ""
    return names


def parse_setting(text: str) -> tuple[str, Scalar]:
    """One `--set section.key=value`: the value is read as TOML, and as a string when it is none."""
    key, equals, raw = text.partition("=")
    key = _dashed(key.strip())
    if not equals or not key:
        raise ConfigError(f"'{text}' is not section.key=value", hint="for example --set privacy.clipping-norm=5")
    if key not in setting_names():
        raise ConfigError(f"unknown setting '{key}'", hint=_setting_hint(key))
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"setting '{key}' takes one value, not {raw.strip()}")
    return key, value


def _setting_hint(key: str) -> str:
    """The setting that was probably meant; for a key that asks for sigma, what it is derived from."""
    known = list(setting_names())
    name = key.rpartition(".")[2]
    if name in ("sigma", "noise-multiplier", "sensitivity", "noise-std"):
        return "no setting holds it: it is derived from privacy.target-epsilon, delta, sampling-rate and the rounds"
    same_name = [setting for setting in known if setting.rpartition(".")[2] == name]
    near = same_name if len(same_name) == 1 else difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"did you mean '{near[0]}'?" if near else "`fedcanvas simulate --settings` lists them"


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        key = f"{prefix}{_dashed(name)}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{key}."))
        elif value is not None:
            flat[key] = value
    return flat


def _config_error(error: ValidationError, origin: str) -> ConfigError:
    first = error.errors()[0]
    place = ".".join(_dashed(str(part)) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{origin}: unknown setting '{place}'", hint=_setting_hint(place))
    if first["type"] == "missing":
        return ConfigError(f"{origin}: setting '{place}' is missing", hint="it has no default; write it down")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    where = f"setting '{place}': " if place else ""
    shown = first.get("input")
    given = f", got {shown!r}" if place and isinstance(shown, str | int | float | bool) else ""
    return ConfigError(f"{origin}: {where}{message}{given}")
