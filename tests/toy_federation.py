"""A federation small enough for tests: the production functions on 8 px images at two sites of different size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from client.site import SiteConfig
from shared.config import RunConfig, Scalar
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


def make_sites(folder: Path, *, sizes: Sequence[int] = (40, 24), seed: int | None = 7) -> list[Path]:
    """One folder a site, each with its own data; `seed=None` makes deployed ones."""
    folders = []
    for place, size in enumerate(sizes):
        site, rng = folder / f"site-{place}", np.random.default_rng(place)
        labels = rng.integers(len(COLOURS), size=size)
        colours = np.array(list(COLOURS.values()))[labels]
        images = np.clip(colours[:, None, None] + rng.integers(-20, 20, size=(size, 8, 8, 3)), 0, 255)
        SiteConfig(site_id=site.name, data="data.npz", simulated_seed=seed).write(site)
        np.savez(
            site / "data.npz", x_train=images.astype(np.uint8), y_train=labels.astype(np.uint8),
            class_names=np.array(list(COLOURS)),
        )  # fmt: skip
        folders.append(site)
    return folders


def make_run(path: Path, config: RunConfig) -> RunDirectory:
    return RunDirectory.create(path, config=config, prompts=PROMPTS.texts)
