"""Discriminators and generators by name, and what every one of them must keep.

Letters of shapes: B records or pictures · V views of a record · P prompts of a record (matched, wrong) ·
C, H, W image channels, height, width · c, h, w feature channels, height, width · E text embedding ·
K conditioning · Z latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import RunConfig
from shared.models.discriminator import Discriminator, check_examples_independent
from shared.models.generator import Generator
from shared.registry import Registry

DISCRIMINATORS: Registry[Callable[..., Discriminator]] = Registry(
    "discriminator",
    {
        "front": "shared.models.front_discriminator:FrontDiscriminator",
        "conv": "shared.models.conv_discriminator:ConvDiscriminator",
        "toy": "shared.models.toy_discriminator:ToyDiscriminator",
    },
)
GENERATORS: Registry[Callable[..., Generator]] = Registry(
    "generator", {"film": "shared.models.film_generator:FilmGenerator"}
)

__all__ = [
    "DISCRIMINATORS",
    "GENERATORS",
    "Discriminator",
    "Generator",
    "build_discriminator",
    "build_generator",
    "check_examples_independent",
    "draw_latents",
    "flat_parameters",
    "load_flat_parameters",
    "parameter_count",
    "weights_digest",
]


def build_discriminator(config: RunConfig, *, embedding_dim: int) -> Discriminator:
    """The discriminator that `config` names, initialised from `config.seed`, without gradients.

    Every site and the server build it from the same public config; weights then come with each instruction.
    """
    kind = DISCRIMINATORS.get(config.discriminator.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config.seed, "discriminator"))
        discriminator = kind(
            data=config.data, settings=config.discriminator, embedding_dim=embedding_dim
        )
    discriminator.requires_grad_(False)
    check_examples_independent(discriminator)
    return discriminator.to(config.compute.device)


def build_generator(config: RunConfig, *, embedding_dim: int) -> Generator:
    """The generator that `config` names, initialised from `config.seed`."""
    kind = GENERATORS.get(config.generator.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(config.seed, "generator"))
        generator = kind(data=config.data, settings=config.generator, embedding_dim=embedding_dim)
    return generator.to(config.compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def draw_latents(seed: int, indices: Sequence[int], latent_dim: int) -> Tensor:
    """Standard normal latents, one row an index, so that a picture does not depend on its batch.

    Args:
        seed: from 0 to 2**63 - 1.
        indices: of the pictures, from 0.
    Returns:
        `(len(indices), latent_dim)` float32, from numpy's Philox keyed by (seed, index).
    """
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64))).standard_normal(latent_dim)
        for index in indices
    ]
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(indices), latent_dim))


def flat_parameters(module: nn.Module) -> np.ndarray:
    """All parameters in the order of their names, `(parameter_count,)` float32, row-major."""
    parts = [p.detach().reshape(-1).cpu() for _, p in sorted(module.named_parameters())]
    return torch.cat(parts).to(torch.float32).numpy().copy()


def load_flat_parameters(module: nn.Module, vector: np.ndarray) -> None:
    """Inverse of `flat_parameters`, in place."""
    values = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32))
    assert values.shape == (parameter_count(module),), "the caller checked the length against the public plan"
    offset = 0
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            part = values[offset : offset + parameter.numel()]
            parameter.copy_(part.view(parameter.shape))
            offset += parameter.numel()


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def weights_digest(*modules: nn.Module) -> str:
    """SHA-256 over the names, shapes and float32 bytes of all parameters, 64 hex digits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, parameter in sorted(module.named_parameters()):
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _seed(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{purpose}".encode()).digest()[:8], "little") >> 1
