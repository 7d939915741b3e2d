"""How long a run will take: a round is tried out on noise pictures, in this process, before anything begins.

It runs the functions of the real round, at the real sizes and numbers of threads, on throw-away public input.
Not covered: what the engine adds (messages, Ray's start), other work on the machine, generator steps that the
ladder adds or leaves out on the way, and the final evaluation.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from client.training import PrivateRecords, prepare_records, site_gradient, site_moments, site_update
from server.training import ServerTraining
from shared.config import RunConfig
from shared.data import SUBJECT_ID, ImageCaptionDataset
from shared.models import parameter_count
from shared.privacy.entropy import SeededEntropy
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.text import build_encoder

MOST_RECORDS = 4096  # that are made up for one site
TRIES = 2


@dataclass(frozen=True)
class Estimate:
    """Seconds, of a round and of the preparation before the first."""

    round_seconds: float
    preparation_seconds: float

    def of(self, rounds: int) -> float:
        return self.preparation_seconds + rounds * self.round_seconds


def estimate_run(config: RunConfig, plan: PrivacyPlan, prompts: PromptPool) -> Estimate:
    """Tries a round twice, after one that warms up; some seconds."""
    threads = torch.get_num_threads()
    try:
        return _estimate(config, plan, prompts)
    finally:
        torch.set_num_threads(threads)


def _estimate(config: RunConfig, plan: PrivacyPlan, prompts: PromptPool) -> Estimate:
    federation, compute = config.federation, config.compute
    encoder = build_encoder(config.text)
    training = ServerTraining(config, plan, prompts, encoder)
    drawn = min(MOST_RECORDS, math.ceil(plan.expected_batch_size / federation.sites))
    began = time.monotonic()
    records = _made_up_records(drawn, training, prompts)
    prepared = time.monotonic() - began
    every_record = replace(plan, sampling_rate=1.0)  # of as many records as a real draw has on average
    together = min(compute.parallel_sites, federation.sites)
    fakes = training.fake_bank(1) if federation.local_steps > 1 else None
    copies = [copy.deepcopy(training.discriminator) for _ in range(together)]  # each site has its own

    def site(place: int) -> np.ndarray:
        torch.set_num_threads(compute.site_threads)
        shared = {
            "config": config, "plan": every_record, "prompts": prompts, "entropy": SeededEntropy(0, f"try-{place}"),
            "prompt_embeddings": training.prompt_embeddings, "server_round": 1,
        }  # fmt: skip
        if fakes is not None:
            return site_update(copies[place], records, fakes, **shared)  # type: ignore[arg-type]
        return site_gradient(copies[place], records, **shared)  # type: ignore[arg-type]

    def server() -> None:
        # As in the last round: the first ones may take no generator steps.
        nothing = np.zeros(parameter_count(training.discriminator), np.int64)
        training.step(nothing, federation.sites, federation.rounds)

    with ThreadPoolExecutor(together) as pool:
        sites = _best_of(lambda: list(pool.map(site, range(together)))) * math.ceil(federation.sites / together)
    torch.set_num_threads(compute.server_threads)
    at_server = _best_of(server)
    per_site = federation.published_records / federation.sites
    warm_start = 0.0
    if config.warm_start.enabled:
        torch.set_num_threads(compute.site_threads)
        began = time.monotonic()
        moments = site_moments(
            records, config=config, plan=plan, discriminator=copies[0], entropy=SeededEntropy(0, "try")
        )
        prepared += time.monotonic() - began
        torch.set_num_threads(compute.server_threads)
        # A step of the discriminator's is shorter; there are few.
        steps = config.warm_start.steps + config.warm_start.discriminator_steps
        warm_start = steps * _warm_step(training, moments)
    preparation = prepared / drawn * per_site * math.ceil(federation.sites / together)
    return Estimate(sites + at_server, preparation + warm_start)


def _warm_step(training: ServerTraining, moments: np.ndarray) -> float:
    """Seconds of one generator step on the moments of one site."""
    seconds = []
    for steps in (1, 1 + TRIES):
        config = training.config.replaced({"warm-start.steps": steps, "warm-start.discriminator-steps": 0})
        fresh = ServerTraining(config, training.plan, training.prompts, training.encoder)
        began = time.monotonic()
        fresh.warm_start(moments, 1)
        seconds.append(time.monotonic() - began)
    return max(0.0, seconds[1] - seconds[0]) / TRIES


def _made_up_records(count: int, training: ServerTraining, prompts: PromptPool) -> PrivateRecords:
    data = training.config.data
    shape = (count, data.image_size, data.image_size, data.channels)
    dataset = ImageCaptionDataset(
        images=np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8),
        captions=[(prompts.texts[place % len(prompts)],) for place in range(count)],
        # Subjects of one image: a step looks at as many images of each, whatever they have.
        attributes={SUBJECT_ID: [f"{place}" for place in range(count)]},
    )
    return prepare_records(
        dataset, np.arange(count), config=training.config, encoder=training.encoder,
        discriminator=training.discriminator,
    )  # fmt: skip


def _best_of(work: Callable[[], object]) -> float:
    """Seconds of the quickest of some tries, after one that does not count."""
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.monotonic()
        work()
        seconds.append(time.monotonic() - began)
    return min(seconds)
