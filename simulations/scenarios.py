"""Named runs: each a function that returns a whole `RunConfig`, with what data it wants and how long it takes.

The settings of `demo`, `fashion-mnist-10` and `mednist-6` were found on the data that they are measured on (synthetic
shapes, public Fashion-MNIST and MedNIST): on private data such a search would itself cost privacy (PRIVACY rule 18).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shared.config import RunConfig
from shared.errors import UsageError
from shared.registry import nearest_name_hint

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DIGITS = tuple(str(digit) for digit in range(10))

MODALITIES = (
    "a breast MRI slice", "a frontal chest X-ray", "an X-ray of a hand", "an axial abdominal CT slice",
    "an axial chest CT slice", "an axial head CT slice",
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """A run that someone can name.

    Attributes:
        data: what `--data` must hold, in words.
        minutes: of training on two cores, about.
        prompts: public prompts that the scenario itself ships; empty when they lie beside the data.
        shapes: how many captioned shapes are made when no `--data` is given; 0 where data must be given.
    """

    name: str
    summary: str
    data: str
    minutes: float
    config: Callable[[], RunConfig]
    prompts: tuple[str, ...] = field(default=())
    shapes: int = 0


def demo() -> RunConfig:
    return RunConfig.from_table(
        {
            "privacy": {"target-epsilon": 8.0, "delta": 1e-5, "sampling-rate": 0.098, "clipping-norm": 12.0},
            "federation": {"sites": 4, "rounds": 470, "published-records": 20_000},
            "discriminator": {"near-prompt-share": 0.25},
            "discriminator-optimizer": {"final-fraction": 0.2},
            "generator": {"width": 24},
            "generator-optimizer": {"final-fraction": 0.2},
            "training": {"fakes": 64, "generator-batch": 96, "lead-rounds": 0, "moment-weight": 30.0},
            "warm-start": {"enabled": True, "steps": 120, "random-features": 2000},
        }
    )


def toy() -> RunConfig:
    return RunConfig.from_table(
        {
            "data": {"image-size": 8},
            "privacy": {"target-epsilon": 8.0, "delta": 1e-4, "sampling-rate": 0.2, "clipping-norm": 1.0},
            "federation": {"sites": 2, "rounds": 10, "published-records": 400},
            "discriminator": {"name": "toy", "width": 8, "hidden": 16},
            "generator": {"width": 8, "latent-dim": 8},
            "training": {"fakes": 32, "generator-batch": 32},
            "evaluation": {"every": 5, "samples": 96},
            "compute": {"checkpoint-every": 5},
        }
    )


def _ten_sites() -> RunConfig:
    return RunConfig.from_table(
        {
            "data": {"image-size": 28, "channels": 1},
            "text": {"dim": 32},
            "privacy": {"target-epsilon": 10.0, "delta": 1e-5, "sampling-rate": 0.1, "clipping-norm": 5.0},
            "federation": {"sites": 10, "rounds": 300, "published-records": 60_000},
            # Garments and digits lie in the middle, so where something lies counts: the head keeps its places.
            "discriminator": {"pooled-side": 0, "loss": "hinge"},
            "discriminator-optimizer": {"learning-rate": 2e-3, "final-fraction": 0.1},
            "generator-optimizer": {"learning-rate": 2e-3, "final-fraction": 0.1},
            # The moments keep pictures varied, so the ladder has nothing to mend.
            "training": {
                "fakes": 512, "generator-steps": 3, "generator-batch": 160, "adaptive": False, "lead-rounds": 0,
                "moment-weight": 100.0,
            },
            "warm-start": {"enabled": True, "steps": 1000, "epsilon-share": 0.5, "random-features": 5000},
        }
    )


def _six_sites() -> RunConfig:
    return RunConfig.from_table(
        {
            "data": {"image-size": 32, "channels": 1},
            "text": {"dim": 32},
            "privacy": {"target-epsilon": 10.0, "delta": 1e-4, "sampling-rate": 0.3, "clipping-norm": 5.0},
            "federation": {"sites": 6, "rounds": 300, "published-records": 6_000},
            "discriminator": {"pooled-side": 2, "loss": "hinge"},
            "discriminator-optimizer": {"learning-rate": 2e-3, "final-fraction": 0.1},
            "generator-optimizer": {"learning-rate": 2e-3, "final-fraction": 0.1},
            "training": {
                "fakes": 256, "generator-steps": 2, "adaptive": False, "lead-rounds": 0, "moment-weight": 30.0,
            },
            # A tenth of the garments' records, so a fifth of their random features.
            "warm-start": {"enabled": True, "steps": 500, "epsilon-share": 0.5, "random-features": 1000},
        }
    )


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "demo", "captioned shapes over four sites, epsilon 8", "none: 20,000 shapes are made", 3.5, demo,
            shapes=20_000,
        ),
        Scenario(
            "toy", "8 px shapes over two sites in seconds, too small to be good", "none: 400 shapes are made", 0.1, toy,
            shapes=400,
        ),
        Scenario(
            "fashion-mnist-10", "ten garments over ten sites, epsilon 10", "Fashion-MNIST as .npz (x_train, y_train,"
            " class_names)", 12.0, _ten_sites, tuple(f"a photo of a {name}" for name in GARMENTS),
        ),
        Scenario(
            "mnist-10", "ten digits over ten sites, epsilon 10", "MNIST as .npz (x_train, y_train, class_names)",
            12.0, _ten_sites, tuple(f"a photo of a {name}" for name in DIGITS),
        ),
        Scenario(
            "mednist-6", "six kinds of medical pictures over six sites, epsilon 10", "MedNIST unzipped: a folder with"
            " captions.csv (file_name, text, label)", 6.0, _six_sites, MODALITIES,
        ),
    )
}  # fmt: skip


def scenario_called(name: str) -> Scenario:
    """The scenario; `UsageError` with the nearest known name when there is none."""
    if name not in SCENARIOS:
        raise UsageError(f"unknown scenario '{name}'", hint=nearest_name_hint(name, sorted(SCENARIOS)))
    return SCENARIOS[name]
