"""A deployed toy site and what a federation may ask of it: for tests of ledgers and receipts with a real history."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from toy_federation import PROMPTS, toy_config

from client.site import Site, SiteRefusal
from shared.config import RunConfig
from shared.models import build_discriminator, flat_parameters
from shared.records import RefusalCode, RoundInstruction

CHEAP = {"privacy.target-epsilon": 2.0, "privacy.sampling-rate": 1.0}  # without sampling, priced in a moment
OPEN = {"max_sampling_rate": 1.0}  # and the policy that it needs


CONFIG = toy_config({**CHEAP, "privacy.retry-slack": 3})  # 4 rounds, so 7 reserved steps


def instruction(config: RunConfig, **changes: Any) -> RoundInstruction:
    usual = RoundInstruction(
        run_id="run", kind="train", server_round=1, attempt=1, config_json=config.to_json(),
        config_digest=config.digest, prompts=PROMPTS.texts,
        weights=flat_parameters(build_discriminator(config, embedding_dim=config.text.dim)),
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def round_of(server_round: int = 1, **changes: Any) -> RoundInstruction:
    return instruction(CONFIG, server_round=server_round, **changes)


def ask(site: Path, config: RunConfig, **changes: Any) -> RefusalCode | None:
    """A round at a deployed site, opened anew as after a restart; the refusal's code, or `None` for a reply."""
    try:
        Site(site, simulated=False).answer(instruction(config, **changes))
    except SiteRefusal as refusal:
        return refusal.code
    return None
