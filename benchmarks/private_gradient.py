"""Seconds of one private gradient, as a ratio to a plain gradient of the same batch, pair by pair.

    python benchmarks/private_gradient.py [--records 512] [--pairs 7] [--threads 1]

Baseline: one forward and backward pass of the mean loss over the same rows in the same blocks, no clipping.
"""

# ruff: noqa: B023 -- what a loop defines is called before the loop goes on
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from shared.adversarial import build_loss, real_record_loss
from shared.models import DISCRIMINATORS, build_discriminator, parameter_count
from shared.privacy.dpsgd import BLOCK, clipped_gradient_sum
from simulations.scenarios import demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--records", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.records} records, blocks of {BLOCK}, {options.threads} threads, {options.pairs} pairs")
    for name in ("front", "conv"):
        assert name in DISCRIMINATORS
        config = demo().replaced({"discriminator.name": name, "discriminator.width": 16 if name == "conv" else 32})
        discriminator = build_discriminator(config, embedding_dim=64)
        features = torch.randn(options.records, 1, *discriminator.feature_shape)
        conditioning = torch.nn.functional.normalize(torch.randn(options.records, 2, 64), dim=2)
        loss = real_record_loss(build_loss(config.discriminator), wrong_prompt_weight=0.5)

        def plain() -> None:
            discriminator.requires_grad_(True)
            for start in range(0, options.records, BLOCK):
                rows = slice(start, start + BLOCK)
                loss(discriminator(features[rows], conditioning[rows])).mean().backward()
            discriminator.requires_grad_(False)

        print(f"{name}: {parameter_count(discriminator):,} parameters")
        for kernel in ("fused", "opacus"):
            ratios, seconds = [], []
            for pair in range(options.pairs + 1):
                base = _seconds(plain)
                private = _seconds(
                    lambda: clipped_gradient_sum(
                        discriminator, features, conditioning, loss, clipping_norm=12.0, kernel=kernel
                    )
                )
                if pair:  # the first is the warm-up
                    ratios.append(private / base)
                    seconds.append(private)
            print(
                f"  {kernel:7} {statistics.median(seconds):.3f} s, ratio to plain:"
                f" min {min(ratios):.2f} median {statistics.median(ratios):.2f} max {max(ratios):.2f}"
            )


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
