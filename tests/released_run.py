"""A run directory with a released model, its weights those that a model starts with: for tests of what comes after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from public_pictures import PLAIN

from shared.config import RunConfig, Scalar
from shared.models import build_discriminator, build_generator
from shared.privacy.accounting import EpsilonReport
from shared.privacy.plan import make_plan
from shared.rundir import RunDirectory
from shared.text import build_encoder

PROMPTS = tuple(kind.caption for kind in PLAIN)
CONFIG = RunConfig.from_table(
    {
        "data": {"image-size": 8},
        "privacy": {"delta": 1e-4, "sampling-rate": 0.2},
        "federation": {"published-records": 400, "rounds": 5, "sites": 3},
        "discriminator": {"name": "toy", "width": 8, "hidden": 8},
        "generator": {"width": 8, "latent-dim": 8},
    }
)
SPENT = EpsilonReport(1.5, 1.4, 1.7, 1e-4, 5, unit="example")


def make_released_run(
    path: Path, changes: dict[str, Scalar] | None = None, *, prompts: Sequence[str] = PROMPTS, seed: int = 0
) -> Path:  # fmt: skip
    config = CONFIG.replaced({**(changes or {}), "seed": seed})
    plan, encoder = make_plan(config), build_encoder(config.text)
    with RunDirectory.create(path, config=config, prompts=prompts) as rundir, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for server_round in range(1, 6):
            rundir.charge(server_round, steps=1, reserved_steps=plan.reserved_steps)
            rundir.append_event({"server_round": server_round, "fakes_accuracy": 0.5, "fakes_loss": 0.7})
        rundir.save_model(
            generator=build_generator(config, embedding_dim=encoder.dim).state_dict(),
            discriminator=build_discriminator(config, embedding_dim=encoder.dim).state_dict(),
            card={"encoder_fingerprint": encoder.fingerprint, "plan": plan.to_dict(), "spent": SPENT.to_dict(),
                  "weights_digest": "e" * 64, "entropy": "seeded"},
        )  # fmt: skip
    return path
