"""Optimizers by name, their schedule over rounds, and their state as plain tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn, optim

from shared.config import OptimizerConfig
from shared.registry import Registry

OPTIMIZERS: Registry[Callable[..., optim.Optimizer]] = Registry(
    "optimizer",
    {"adam": "shared.optimizers:adam", "adamw": "shared.optimizers:adamw", "rmsprop": "shared.optimizers:rmsprop"},
)


def adam(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> optim.Optimizer:
    betas = (settings.beta1, settings.beta2)
    return optim.Adam(parameters, settings.learning_rate, betas, weight_decay=settings.weight_decay)


def adamw(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> optim.Optimizer:
    betas = (settings.beta1, settings.beta2)
    return optim.AdamW(parameters, settings.learning_rate, betas, weight_decay=settings.weight_decay)


def rmsprop(parameters: Iterable[nn.Parameter], settings: OptimizerConfig) -> optim.Optimizer:
    return optim.RMSprop(
        parameters, settings.learning_rate, alpha=settings.beta2, momentum=settings.beta1,
        weight_decay=settings.weight_decay,
    )  # fmt: skip


def build_optimizer(module: nn.Module, settings: OptimizerConfig) -> optim.Optimizer:
    """An optimizer over the parameters of `module` in the order of their names."""
    return OPTIMIZERS.get(settings.name)([p for _, p in sorted(module.named_parameters())], settings)


def set_learning_rate(optimizer: optim.Optimizer, settings: OptimizerConfig, server_round: int, rounds: int) -> None:
    """Linear rise over `warmup_rounds`, linear fall to `final_fraction` at the last round (rounds from 1)."""
    rise = min(1.0, server_round / settings.warmup_rounds) if settings.warmup_rounds else 1.0
    fall = 1 - (1 - settings.final_fraction) * (server_round - 1) / max(1, rounds - 1)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * rise * fall


def optimizer_state(optimizer: optim.Optimizer) -> dict[str, Any]:
    """The moments and counts, keyed by the parameter's place; string keys, tensors and numbers only."""
    return {str(place): dict(values) for place, values in optimizer.state_dict()["state"].items()}


def load_optimizer_state(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {int(place): values for place, values in state.items()}
    optimizer.load_state_dict(whole)
