"""Epsilon of Gaussian mechanisms from the textbook formula: an oracle that shares nothing with the accountants."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import norm


def epsilon_of_gaussians(sigma: float, count: int, delta: float) -> float:
    """Of `count` Gaussian mechanisms of noise multiplier `sigma`. Source: Balle & Wang 2018, Theorem 8."""
    mu = math.sqrt(count) / sigma

    def excess(epsilon: float) -> float:
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(norm.cdf(a) - math.exp(epsilon) * norm.cdf(b)) - delta

    return float(brentq(excess, 1e-9, 100.0))
