"""What a ledger costs: one charged and committed release, durable and simulated, and reading 10,000 of them back.

    python benchmarks/ledger.py [--charges 10000] [--durable 200] [--folder DIR]

Baseline of the ratio: one answer of a demo site (5,000 records, q 0.098), computed in the same run. `--folder`
names the disk that is measured; the default is the folder for temporary files, which may be in memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from client.training import PrivateRecords, site_gradient
from shared.models import build_discriminator
from shared.privacy.budget import Lifetime, Price
from shared.privacy.entropy import SeededEntropy
from shared.privacy.ledger import Ledger, Lineage, RunTerms, write_note
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.prompts import PromptPool
from shared.text import build_encoder
from simulations.scenarios import demo

RECORDS = 5000
ANSWERS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--charges", type=int, default=10_000)
    parser.add_argument("--durable", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    config = demo()
    plan = make_plan(config)
    answer = _answer_seconds(plan)
    print(f"one answer of a demo site: {answer * 1e3:.1f} ms")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        envelope = bytes(8 * 128_353 + 32)
        for kind, count in (("simulated", options.charges), ("durable", options.durable)):
            seconds = _spend(Path(folder) / kind, plan, count, simulated=kind == "simulated", envelope=envelope)
            print(f"{kind}: {seconds * 1e3:.3f} ms a release, {seconds / answer:.4f} of an answer")
        began = time.perf_counter()
        ledger = Ledger(Path(folder) / "simulated")
        read = time.perf_counter() - began
        entries, spent = len(ledger.entries), ledger.runs["run"].epsilon_spent
        print(f"{entries} entries read, checked and accounted in {read:.3f} s (epsilon {spent:g})")


def _answer_seconds(plan: PrivacyPlan) -> float:
    """Median of some answers on noise pictures, one thread, without any ledger."""
    torch.set_num_threads(1)
    config, rng = demo(), np.random.default_rng(0)
    encoder = build_encoder(config.text)
    discriminator = build_discriminator(config, embedding_dim=encoder.dim)
    prompts = PromptPool(tuple(f"a picture of {number}" for number in range(96)))
    embeddings = encoder.encode(prompts.texts)
    features = torch.from_numpy(rng.random((RECORDS, *discriminator.feature_shape), dtype=np.float32)).half()
    rows = tuple((int(row),) for row in rng.integers(96, size=RECORDS))
    records = PrivateRecords(np.zeros((RECORDS, 1)), features, embeddings, prompts.texts, rows)
    seconds = []
    for server_round in range(ANSWERS):
        began = time.perf_counter()
        site_gradient(
            discriminator, records, config=config, plan=plan, prompts=prompts, prompt_embeddings=embeddings,
            entropy=SeededEntropy(0), server_round=server_round,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _spend(folder: Path, plan: PrivacyPlan, count: int, *, simulated: bool, envelope: bytes) -> float:
    """Seconds of one charge, kept reply and commit."""
    lifetime = Lifetime(math.inf if simulated else 1000.0, 0.5)
    lineage = Lineage("records", "example", lifetime, simulated=simulated)
    ledger = Ledger.create(folder, lineage, anchor=folder / "anchor")
    long = replace(plan, steps=count, reserved_steps=count)
    with ledger.locked():
        ledger.reserve(RunTerms("run", "federation", "0" * 64, "0" * 64, "0" * 64, long), Price(8.0, 1e-5, None))
    began = time.perf_counter()
    for server_round in range(count):
        with ledger.locked():
            charge = ledger.charge(
                "run", server_round=server_round, attempt=1, release="gradient", steps=1, instruction_digest="0" * 64,
                nonce=bytes(16),
            )  # fmt: skip
            if not simulated:  # those keep it in memory
                write_note(folder / "reply", envelope, durable=True)
            ledger.commit(charge, size=len(envelope), sha256="0" * 64, fields=[["payload", "int64", [128_353]]])
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
