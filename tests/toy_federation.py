"""A federation small enough for tests: the production functions on 8 px images at two sites of different size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from client.enrolment import create_site
from client.policy import SitePolicy
from client.settings import SiteConfig
from shared.config import RunConfig, Scalar
from shared.privacy.budget import Lifetime
from shared.privacy.ledger import Lineage
from shared.prompts import PromptPool
from shared.rundir import RunDirectory

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
PROMPTS = PromptPool(tuple(f"a photo of a {name}" for name in COLOURS))


def toy_config(changes: Mapping[str, Scalar] | None = None) -> RunConfig:
    return RunConfig.from_flat(
        {
            "seed": 7,
            "data.image-size": 8,
            "text.dim": 8,
            "privacy.delta": 1e-3,
            "privacy.sampling-rate": 0.25,
            "privacy.clipping-norm": 4.0,
            "federation.sites": 2,
            "federation.rounds": 4,
            "federation.published-records": 64,
            "discriminator.name": "toy",
            "discriminator.width": 8,
            "discriminator.hidden": 8,
            "generator.width": 4,
            "generator.latent-dim": 4,
            "training.fakes": 8,
            "training.generator-batch": 8,
            "training.mode-seeking-weight": 1.0,
            "evaluation.every": 2,
            "compute.checkpoint-every": 2,
            "compute.server-threads": 1,
            **(changes or {}),
        }
    )


def toy_policy(**changes: Any) -> SitePolicy:
    """Of a deployed toy site: everything that the toy run needs, and nothing without privacy."""
    values = {
        "max_epsilon": 8.0, "delta": 1e-3, "min_noise_multiplier": 0.0, "min_expected_batch": 0.0, "models": ["toy"],
        "federations": ["simulation"], "approve_each_run": False,
    }  # fmt: skip
    return SitePolicy(**{**values, **changes})


def make_site(
    folder: Path, *, seed: int | None = 7, policy: SitePolicy | None = None, lifetime: Lifetime | None = None,
    **settings: Any,
) -> Path:  # fmt: skip
    """An empty site; simulated ones are open for everything, deployed ones (`seed=None`) are held to a policy."""
    simulated = seed is not None
    if policy is None:
        policy = toy_policy()
        if simulated:
            policy = SitePolicy.for_simulation(max_epsilon=math.inf, delta=0.5, unit="example")
    lifetime = lifetime or Lifetime(policy.max_epsilon, policy.delta)
    settings.setdefault("slot_seconds", 0.0)  # no test waits for a slot that it is not about
    config = SiteConfig(
        site_id=folder.name, data="data.npz", simulated_seed=seed, lineage=f"of-{folder.name}",
        published_records=settings.pop("published_records", None if simulated else 40), **settings,
    )  # fmt: skip
    create_site(folder, config, policy, Lineage(config.lineage, policy.unit, lifetime, simulated=simulated))
    return folder


def make_sites(
    folder: Path, *, sizes: Sequence[int] = (40, 24), seed: int | None = 7, **settings: Any
) -> list[Path]:  # fmt: skip
    """One folder a site, each with its own data; `seed=None` makes deployed ones."""
    folders = []
    for place, size in enumerate(sizes):
        site, rng = folder / f"site-{place}", np.random.default_rng(place)
        labels = rng.integers(len(COLOURS), size=size)
        colours = np.array(list(COLOURS.values()))[labels]
        images = np.clip(colours[:, None, None] + rng.integers(-20, 20, size=(size, 8, 8, 3)), 0, 255)
        make_site(site, seed=seed, **settings)
        np.savez(
            site / "data.npz", x_train=images.astype(np.uint8), y_train=labels.astype(np.uint8),
            class_names=np.array(list(COLOURS)),
        )  # fmt: skip
        folders.append(site)
    return folders


def make_run(path: Path, config: RunConfig) -> RunDirectory:
    return RunDirectory.create(path, config=config, prompts=PROMPTS.texts)
