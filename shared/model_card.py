"""What the card of a released model says that follows from settings, prompts and what sites signed.

Whoever makes a card takes it from here, and whoever checks one compares it with the same: none of it is a matter of
belief. The words below are part of format 1 of a released model: others are another format.
Not here: epsilon, which accountants make of the statements (`shared.spend`), and what only the releaser knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.config import RunConfig
from shared.privacy.accounting import ADJACENCY
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.spend import SpendStatement

TRUSTED = {
    "local": "nobody with the records' privacy: each site adds the whole noise itself, before anything leaves it",
    "distributed": "the other sites, to add their shares of the noise: each site adds a part of it",
}
SAMPLING = "each step takes every record with the same probability, independently (Poisson), drawn at the site"
SIMULATED = (
    "A simulation: draws and noise came from the seed in its settings, which are published with it. The figures show"
    " what a real run would promise; this model protects nobody's records."
)


def public_terms(
    config: RunConfig, prompts: PromptPool, statements: Mapping[str, SpendStatement]
) -> dict[str, Any]:  # fmt: skip
    """Of the whole run."""
    return {
        "federation": config.federation.name,
        "simulated": all(statement.simulated for statement in statements.values()),
        "public": {
            "prompts": len(prompts),
            "prompts_digest": prompts.digest,
            "text_encoder": config.text.encoder,
            "text_encoder_path": config.text.path,
            "discriminator": config.discriminator.name,
        },
        "code": {"sites": sorted({statement.code_digest for statement in statements.values()})},
        "example": prompts.texts[0],
        "picture": {"size": config.data.image_size, "channels": config.data.channels},
    }


def privacy_terms(config: RunConfig, plan: PrivacyPlan) -> dict[str, Any]:
    """Of what a site's plan promises; a site of the run has this plan."""
    return {
        "private": plan.private, "delta": plan.delta, "unit": plan.unit, "adjacency": ADJACENCY,
        "accountants": ["PRV", "PLD"] if plan.private else [], "sampling": SAMPLING,
        "sampling_rate": plan.sampling_rate, "noise": config.privacy.noise, "noise_multiplier": plan.noise_multiplier,
        "warm_start_noise_multiplier": plan.warm_start_noise_multiplier, "clipping_norm": plan.clipping_norm,
        "trusted": TRUSTED.get(config.privacy.noise, config.privacy.noise), "rounds": config.federation.rounds,
        "local_steps": config.federation.local_steps,
    }  # fmt: skip


def site_terms(statement: SpendStatement) -> dict[str, Any]:
    return {
        "steps": statement.steps, "unsampled_releases": statement.unsampled, "head": statement.head,
        "closed": statement.closed, "code_digest": statement.code_digest, "simulated": statement.simulated,
    }  # fmt: skip


def settings_terms(config: RunConfig) -> dict[str, Any]:
    """Of `config.json`, for readers that know no settings of ours."""
    return {
        "model_type": "fedcanvas", "architectures": ["FedCanvasGenerator"], "library_name": "fedcanvas",
        "image_size": config.data.image_size, "channels": config.data.channels,
        "latent_dim": config.generator.latent_dim,
    }  # fmt: skip
