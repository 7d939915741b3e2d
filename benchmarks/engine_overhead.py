"""Seconds a round: a federation in the in-process engine over a bare loop of the same arithmetic, pair by pair.

    python benchmarks/engine_overhead.py [--records 4000] [--rounds 20] [--pairs 3]

Baseline: the same sites' gradients in the same number of threads and the same server step, called directly:
no Flower, no messages, no ledgers, no run directory. Both end in the same weights, which is checked.
"""

# ruff: noqa: B023 -- what a loop defines is called before the loop goes on
from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from client.enrolment import create_site
from client.policy import SitePolicy
from client.settings import SiteConfig
from client.training import prepare_records, site_gradient
from server.training import ServerTraining
from shared.config import RunConfig
from shared.data import open_dataset
from shared.models import build_discriminator, flat_parameters, load_flat_parameters
from shared.observer import SilentObserver
from shared.privacy.budget import Lifetime
from shared.privacy.ledger import Lineage
from shared.privacy.plan import make_plan
from shared.prompts import PromptPool
from shared.rundir import RunDirectory
from shared.text import build_encoder
from simulations.engines import run_local
from simulations.partition import partition_indices
from simulations.scenarios import demo
from simulations.shapes import make_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_shapes(root / "shapes", count=options.records)
        config = demo().replaced(
            {"federation.rounds": options.rounds, "federation.published-records": options.records,
             "privacy.sampling-rate": min(1.0, 2048 / options.records), "warm-start.enabled": False,
             "training.moment-weight": 0.0, "compute.checkpoint-every": options.rounds,
             "evaluation.every": options.rounds}
        )  # fmt: skip
        prompts = PromptPool.from_file(root / "shapes" / "prompts.txt")
        sites = _make_sites(root, config)
        print(f"{options.records} records, {config.federation.sites} sites, {options.rounds} rounds a run")
        ratios = []
        for pair in range(options.pairs):
            bare, expected = _bare(config, prompts, sites)
            federated, digest = _federated(config, prompts, sites, root / f"run-{pair}")
            assert digest == expected, "the two did different arithmetic"
            ratios.append(federated / bare)
            print(f"pair {pair + 1}: federated {federated:.3f} s a round, bare {bare:.3f} s, ratio {ratios[-1]:.3f}")
        print(f"ratio: min {min(ratios):.3f} median {statistics.median(ratios):.3f} max {max(ratios):.3f}")


def _make_sites(root: Path, config: RunConfig) -> list[Path]:
    dataset = open_dataset(root / "shapes", config=config.data)
    parts = partition_indices(dataset, sites=config.federation.sites, scheme="iid", seed=config.seed)
    folders = []
    for place, indices in enumerate(parts):
        folder = root / "sites" / f"site-{place:02d}"
        site = SiteConfig(
            site_id=f"site-{place:02d}", data=str(root / "shapes"), cache_dir=str(root / "cache"),
            indices="indices.npy", simulated_seed=config.seed, lineage=f"site-{place:02d}",
        )  # fmt: skip
        policy = SitePolicy.for_simulation(max_epsilon=math.inf, delta=0.5, unit="example")
        create_site(folder, site, policy, Lineage(site.lineage, "example", Lifetime(math.inf, 0.5), simulated=True))
        np.save(folder / "indices.npy", indices)
        folders.append(folder)
    return folders


def _federated(config: RunConfig, prompts: PromptPool, sites: list[Path], out: Path) -> tuple[float, str]:
    # A name of its own: to the sites' ledgers each pair is another run.
    with RunDirectory.create(out, config=config, prompts=prompts.texts, entropy="seeded", run_id=out.name) as rundir:
        outcome = run_local(config, site_dirs=sites, rundir=rundir, prompts=prompts, observer=SilentObserver())
        seconds = [line["seconds"] for line in rundir.timings()]
    return statistics.mean(seconds[1:]), outcome.digest  # the first round opens the data


def _bare(config: RunConfig, prompts: PromptPool, sites: list[Path]) -> tuple[float, str]:
    from client.site import open_site

    plan, encoder = make_plan(config), build_encoder(config.text)
    server = ServerTraining(config, plan, prompts, encoder)
    embeddings = encoder.encode(prompts.texts)
    workers = []
    for folder in sites:
        settings = SiteConfig.read(folder)
        dataset = open_dataset(Path(settings.data), config=config.data, cache_dir=Path(settings.cache_dir))
        discriminator = build_discriminator(config, embedding_dim=encoder.dim)
        indices = np.load(folder / "indices.npy")
        records = prepare_records(dataset, indices, config=config, encoder=encoder, discriminator=discriminator)
        workers.append((discriminator, records, open_site(folder, simulated=True).entropy))

    def at_site(place: int, weights: np.ndarray, server_round: int) -> np.ndarray:
        torch.set_num_threads(config.compute.site_threads)
        discriminator, records, entropy = workers[place]
        load_flat_parameters(discriminator, weights)
        return site_gradient(
            discriminator, records, config=config, plan=plan, prompts=prompts, prompt_embeddings=embeddings,
            entropy=entropy, server_round=server_round,
        )  # fmt: skip

    seconds = []
    with ThreadPoolExecutor(config.compute.parallel_sites) as pool:
        for server_round in range(1, config.federation.rounds + 1):
            start = time.perf_counter()
            weights = flat_parameters(server.discriminator)
            replies = list(pool.map(lambda place: at_site(place, weights, server_round), range(len(workers))))
            torch.set_num_threads(config.compute.server_threads)
            server.step(np.sum(replies, axis=0), len(replies), server_round)
            seconds.append(time.perf_counter() - start)
    return statistics.mean(seconds[1:]), server.digest


if __name__ == "__main__":
    main()
