"""Where the Poisson draw and the noise come from: the operating system at a site, a seed in a simulation.

A draw that the server can predict gives no amplification, and noise that it can predict is no noise, so a
deployed site has one source, `SystemEntropy`, which keeps no state: nothing of it can be checkpointed or set.
`SeededEntropy` is for simulations and tests, which say so by `simulated`.
Not covered: timing of the arithmetic; floating point tails, which the public lattice hides (PRIVACY rule 9).
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Protocol

import numpy as np

Label = int | str


class Entropy(Protocol):
    """Labels say what a draw is for (purpose, server round, local step); only a seeded source uses them."""

    @property
    def simulated(self) -> bool: ...

    def poisson_draw(self, count: int, rate: float, *labels: Label) -> np.ndarray:
        """Each of `count` records with probability `rate`: ascending int64 indices, `(drawn,)`, maybe none."""
        ...

    def gaussian(self, size: int, std: float, *labels: Label) -> np.ndarray:
        """`(size,)` float64, independent, mean 0, standard deviation `std`."""
        ...

    def rng(self, *labels: Label) -> np.random.Generator:
        """For what privacy does not rest on: augmentation, which caption, which wrong prompt."""
        ...


class SystemEntropy:
    """Every uniform number behind a draw is fresh from the operating system; labels change nothing."""

    simulated = False

    def poisson_draw(self, count: int, rate: float, *labels: Label) -> np.ndarray:
        assert 0 <= rate <= 1, rate
        uniform = (_system_words(count) >> np.uint64(11)) * 2.0**-53  # in [0, 1), all 53 bits
        return np.flatnonzero(uniform < rate)

    def gaussian(self, size: int, std: float, *labels: Label) -> np.ndarray:
        # Box and Muller 1958. 128 bits for the radius: it ends at 13.3 std, beyond which lies mass 2e-39.
        words = _system_words(3 * ((size + 1) // 2)).reshape(3, -1)
        radius = np.sqrt(-2 * np.log((words[0] + (words[2] + 0.5) * 2.0**-64) * 2.0**-64))
        angle = words[1] * (2 * np.pi * 2.0**-64)
        return std * np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]

    def rng(self, *labels: Label) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=int.from_bytes(os.urandom(16))))


class SeededEntropy:
    """Simulations only: the same seed and labels give the same draw, on every engine and in any order.

    Args:
        seed: of the run.
        site: labels that set this site apart from the others of the simulation.
    """

    simulated = True

    def __init__(self, seed: int, *site: Label) -> None:
        self._labels = (seed, *site)

    def poisson_draw(self, count: int, rate: float, *labels: Label) -> np.ndarray:
        assert 0 <= rate <= 1, rate
        return np.flatnonzero(self.rng("poisson", *labels).random(count) < rate)

    def gaussian(self, size: int, std: float, *labels: Label) -> np.ndarray:
        return std * self.rng("gaussian", *labels).standard_normal(size)

    def rng(self, *labels: Label) -> np.random.Generator:
        # JSON keeps apart what joined text would not: 1 and "1", ("ab",) and ("a", "b").
        text = json.dumps([self._labels, labels])
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])
        return np.random.Generator(np.random.Philox(key=key))


def _system_words(count: int) -> np.ndarray:
    """`(count,)` uint64."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
