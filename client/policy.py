"""What a federation may do at this site: `policy.toml`, typed, strict, and closed until a person opens it.

The server proposes a run; the site computes its own plan of it and holds that plan against this policy. Everything
here is compared with public quantities alone, so a refusal tells nothing of the records.
Not here: what has been spent (`shared.privacy.ledger`); of the ceilings there and here the lower one counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from shared.config import RunConfig, Section, read_section, toml_value
from shared.errors import ConfigError
from shared.privacy.budget import Lifetime
from shared.privacy.plan import PrivacyPlan

FILE = "policy.toml"
Unit = Literal["example", "subject"]


class SitePolicy(Section):
    """The limits of every run at this site; a key that is left out has the default."""

    model_config = ConfigDict(strict=True, allow_inf_nan=True)  # inf: a simulated site of a run without privacy

    max_epsilon: float = Field(gt=0, description="Lifetime epsilon of the lineage; the ledger's own may be lower.")
    delta: float = Field(gt=0, lt=1, description="Lifetime delta of the lineage.")
    max_run_epsilon: float | None = Field(None, gt=0, description="Largest epsilon of one run; unset: what is left.")
    max_query_epsilon: float = Field(
        0.0, ge=0, description="Largest epsilon of one question that a person here asks about the records; 0: none."
    )
    min_noise_multiplier: float = Field(0.5, ge=0, description="Smallest noise multiplier of a step.")
    min_expected_batch: float = Field(16.0, ge=0, description="Fewest units that one site's step draws, expected.")
    max_sampling_rate: float = Field(0.25, gt=0, le=1, description="Largest sampling rate of a step.")
    max_rounds: int = Field(2000, ge=1, description="Most rounds of a run.")
    max_local_steps: int = Field(32, ge=1, description="Most steps of a round.")
    max_parameters: int = Field(2_000_000, ge=1, description="Largest discriminator, in parameters.")
    unit: Unit = Field("example", description="The privacy unit; the lineage's own.")
    noise: list[Literal["local", "distributed"]] = Field(["local"], description="Who may add the noise.")
    allow_no_privacy: Literal[False, True] = Field(False, description="Simulations only: runs without privacy.")
    models: list[str] = Field(["front"], description="Discriminators that may be trained.")
    kernels: list[str] = Field(["fused"], description="What may compute the private gradient.")
    text_encoders: list[str] = Field(["hashing"], description="Encoders: 'hashing', or 'transformers:PATH'.")
    federations: list[str] = Field([], description="Names of federations; empty: any, if each run is approved.")
    aggregator_keys: list[str] = Field(
        [], description="Fingerprints of an aggregator's keys; empty: any that the federation vouches for."
    )
    code: list[str] = Field([], description="Digests of this site's code that may run; empty: what is installed.")
    bundles: list[str] = Field(
        [], description="SHA-256 of further Flower bundles that messages may come with; none is ever unpacked."
    )
    approve_each_run: bool = Field(True, description="A person here approves every run before it begins.")
    accept_models: bool = Field(
        True, description="The trained model of a run that this site took part in is kept in models/ when it comes."
    )

    @classmethod
    def for_simulation(cls, *, max_epsilon: float, delta: float, unit: Unit) -> SitePolicy:
        """Everything but the ceiling is open: a simulated site measures what a run would cost."""
        return cls(
            max_epsilon=max_epsilon, delta=delta, max_query_epsilon=math.inf, min_noise_multiplier=0.0,
            min_expected_batch=0.0, max_sampling_rate=1.0, max_rounds=1_000_000, max_local_steps=1000,
            max_parameters=2**26, unit=unit, allow_no_privacy=True, models=["*"], kernels=["*"], text_encoders=["*"],
            approve_each_run=False,
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> SitePolicy:
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no {FILE}, and without one nothing is allowed", hint="`fedcanvas client init` writes it"
            )
        return read_section(cls, path)

    def to_toml(self) -> str:
        lines = ["# What a federation may do at this site. `fedcanvas client policy` reads it to you in words.", ""]
        values = self.model_dump(by_alias=True)
        for name, field in type(self).model_fields.items():
            key = name.replace("_", "-")
            lines.append(f"# {field.description}")
            value = values[key]
            lines += [f"# {key} =" if value is None else f"{key} = {toml_value(value)}", ""]
        return "\n".join(lines)

    def violations(
        self, config: RunConfig, plan: PrivacyPlan | None, *, units: int | None = None, signed_with: str | None = None
    ) -> Iterator[str]:  # fmt: skip
        """In words, everything by which a run passes the limits; nothing here looks at a record.

        Args:
            plan: `None` before there is one: only the noise multiplier is not looked at.
            units: that the site itself publishes; what a federation says of all sites together may be anything.
            signed_with: fingerprint of the aggregator's keys; `None` where nobody signed the instruction.
        """
        federation, private = config.federation, config.privacy.name != "none"
        if not private and not self.allow_no_privacy:
            yield "it has no privacy (privacy.name = none)"
        if plan is not None and private and plan.noise_multiplier < self.min_noise_multiplier:
            yield f"its noise multiplier {plan.noise_multiplier:g} is below {self.min_noise_multiplier:g}"
        at_site = config.expected_batch_size / federation.sites
        if units is not None:
            at_site = min(at_site, config.privacy.sampling_rate * units)
        if at_site < self.min_expected_batch:
            yield f"it expects {at_site:.3g} units a step at a site, fewer than {self.min_expected_batch:g}"
        if config.privacy.sampling_rate > self.max_sampling_rate:
            yield f"its sampling rate {config.privacy.sampling_rate:g} is above {self.max_sampling_rate:g}"
        if federation.rounds > self.max_rounds:
            yield f"its {federation.rounds} rounds are more than {self.max_rounds}"
        if federation.local_steps > self.max_local_steps:
            yield f"its {federation.local_steps} local steps are more than {self.max_local_steps}"
        if config.privacy.unit != self.unit:
            yield f"its privacy unit is the {config.privacy.unit}, here it is the {self.unit}"
        if config.privacy.noise not in self.noise:
            yield f"its noise is '{config.privacy.noise}', allowed is {', '.join(self.noise) or 'none'}"
        text = config.text
        encoder = text.encoder if text.path is None else f"{text.encoder}:{text.path}"
        for what, value, allowed in (
            ("discriminator", config.discriminator.name, self.models),
            ("kernel", config.privacy.kernel, self.kernels),
            ("text encoder", encoder, self.text_encoders),
        ):
            if value not in allowed and "*" not in allowed:
                yield f"its {what} is '{value}', allowed is {', '.join(allowed) or 'none'}"
        if self.federations and federation.name not in self.federations:
            yield f"its federation is '{federation.name}', allowed is {', '.join(self.federations)}"
        if not self.federations and not self.approve_each_run and not self.allow_no_privacy:
            yield "no federation is named in the policy, and runs are not approved one by one"
        if self.aggregator_keys and signed_with not in self.aggregator_keys:
            signed = "not signed" if signed_with is None else f"signed with the keys '{signed_with}'"
            yield f"it is {signed}, allowed is {', '.join(map(repr, self.aggregator_keys))}"

    def ceiling(self, lifetime: Lifetime) -> Lifetime:
        """Of the ledger's lifetime and this policy's the lower one, which counts."""
        return replace(
            lifetime, max_epsilon=min(lifetime.max_epsilon, self.max_epsilon), delta=min(lifetime.delta, self.delta)
        )  # fmt: skip

    def in_words(self) -> list[str]:
        """What may happen here and what never, one sentence a line."""
        per_run = f"{self.max_run_epsilon:g}" if self.max_run_epsilon is not None else "all that is left"
        federations = ", ".join(self.federations) if self.federations else "any federation"
        approval = (
            "a person here approves each run before it begins" if self.approve_each_run
            else "runs within these limits begin by themselves"
        )  # fmt: skip
        lines = [
            f"All runs together may cost each {self.unit} at most epsilon {self.max_epsilon:g} at delta"
            f" {self.delta:.0e}, for the lifetime of the lineage; what the ledger reserved is never given back.",
            f"One run may cost {per_run}. {approval[:1].upper()}{approval[1:]}.",
            f"{federations[:1].upper()}{federations[1:]} may propose runs with: at most {self.max_rounds} rounds of"
            f" {self.max_local_steps} steps, a sampling rate of at most {self.max_sampling_rate:g}, at least"
            f" {self.min_expected_batch:g} {self.unit}s expected a step, a noise multiplier of at least"
            f" {self.min_noise_multiplier:g}, noise added {' or '.join(self.noise) or 'nowhere'}ly.",
            f"Models: {', '.join(self.models)}, up to {self.max_parameters:,} parameters; kernels:"
            f" {', '.join(self.kernels)}; text encoders: {', '.join(self.text_encoders)}.",
        ]
        if self.max_query_epsilon:
            lines.append(
                "A person here may ask how well a classifier of generated pictures does on the records; one noised"
                f" answer may cost epsilon {self.max_query_epsilon:g}, out of the same lifetime. No federation can ask."
            )
        else:
            lines.append("Nobody may ask questions about the records, not even noised ones (`max-query-epsilon`).")
        lines.append(
            "The trained model of a run that this site took part in is kept in models/ when the federation sends it; it"
            " is weights and text, and nothing of it is run." if self.accept_models
            else "Trained models that the federation sends are refused (`accept-models`)."
        )  # fmt: skip
        if self.code:
            lines.append(f"Code: only releases with digest {', '.join(code[:12] for code in self.code)}.")
        if self.aggregator_keys:
            named = " or ".join(f"'{keys}'" for keys in self.aggregator_keys)
            lines.append(
                f"Instructions must be signed with the aggregator's keys {named}; after a rotation none is answered"
                " until the new ones stand here too."
            )
        if self.allow_no_privacy:
            lines.append("Runs WITHOUT privacy are allowed: this is a simulated site.")
        lines += [
            "Never, whatever this file says: raw images, captions, features, counts, losses, gradient norms or times"
            " leave; a noise multiplier or a sensitivity is taken from a message; a draw or noise that a message can"
            " predict; a release that is not charged in the ledger first.",
        ]
        return lines
