"""Flower's ServerApp: opens the run directory, builds what trains, hands over to the round loop.

`make_app` serves a run directory that the caller made; the module's own `app` is for `flwr run`, which names
it, the sites and the prompts in the run config. Sees released sums and public prompts only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.cohort import Cohort
from server.evaluation import write_samples
from server.quality import QualityProbe, as_event
from server.rounds import Outcome, run_rounds
from server.training import ServerTraining
from shared.config import RunConfig, Scalar
from shared.data import open_dataset, unseen_split
from shared.data.source import Split
from shared.errors import ConfigError, DataError
from shared.observer import Observer, SilentObserver
from shared.privacy.plan import make_plan
from shared.private_data import refuse_private
from shared.prompts import PromptPool
from shared.rundir import RunDirectory, reference_cache
from shared.text import build_encoder
from shared.tree import check_same_tree

HOME = check_same_tree(__file__)

REFERENCE = "reference.json"  # in the run directory: a `ReferencePlace`

# Keys of `[tool.flwr.app.config]` beside the settings of `RunConfig`: where things are on this machine.
PLACES = {
    "simulation.run-dir": "the run directory: made, or resumed where it exists",
    "simulation.sites": "the folder that holds one folder a site",
    "simulation.prompts": "the file of public prompts",
    "simulation.reference": "a public reference set, for figures during training",
}
OPTIONAL = ("simulation.reference",)


@dataclass(frozen=True)
class ReferencePlace:
    """Where the public reference set lies on the server, and where what is learned from it is kept."""

    path: str
    split: Split
    cache_dir: str


def reference_document(reference: Path, run: Path) -> dict[str, Any]:
    """`REFERENCE` of a new run in `run`; `DataError` where there is nothing."""
    if not reference.exists():
        raise DataError(f"there is no reference set at {reference}", hint="check the path")
    place = ReferencePlace(str(reference.resolve()), unseen_split(reference), str(reference_cache(run)))
    return asdict(place)


def serve(cohort: Cohort, rundir: RunDirectory, observer: Observer) -> Outcome:
    """Every round that `rundir` does not hold yet, then the released model beside them."""
    config, prompts = rundir.config, PromptPool(rundir.prompts)
    plan, encoder = make_plan(config), build_encoder(config.text)
    training = ServerTraining(config, plan, prompts, encoder)

    probe = _probe(rundir, observer)

    def evaluate(server_round: int) -> None:
        observer.on_sample(server_round, write_samples(training, rundir, server_round))
        if probe is not None:
            started, count = time.monotonic(), config.evaluation.round_samples
            found = probe.measure(
                lambda texts, seed, indices: training.samples(texts, seed=seed, indices=indices), prompts.texts, count
            )
            rundir.append_event({"server_round": server_round, "quality": as_event(found, count)})
            rundir.append_timing(server_round, time.monotonic() - started, of="quality")

    outcome = run_rounds(
        cohort, config=config, plan=plan, training=training, rundir=rundir, prompts=prompts, observer=observer,
        evaluate=evaluate,
    )  # fmt: skip
    # A deployed site may have been asked twice without the server's knowing: its ledger stops it at what it reserved.
    steps = plan.reserved_steps if rundir.entropy == "system" else outcome.steps_charged
    card = {
        "encoder_fingerprint": encoder.fingerprint,
        "weights_digest": outcome.digest,
        "entropy": rundir.entropy,
        "plan": plan.to_dict(),
        "spent": plan.spent(steps, warm_start=config.warm_start.enabled).to_dict(),
    }
    rundir.save_model(
        generator=training.ema_generator.state_dict(), discriminator=training.discriminator.state_dict(), card=card
    )
    return outcome


def _probe(rundir: RunDirectory, observer: Observer) -> QualityProbe | None:
    """What measures during training; `None` where no public reference set was named or no pictures are wanted.

    Raises:
        DataError: the reference set is a site's.
    """
    if rundir.config.evaluation.round_samples == 0 or not (rundir.path / REFERENCE).is_file():
        return None
    place = ReferencePlace(**rundir.read_json(REFERENCE))
    refuse_private(Path(place.path))
    try:
        dataset = open_dataset(
            Path(place.path), config=rundir.config.data, cache_dir=Path(place.cache_dir), split=place.split
        )
        return QualityProbe(dataset, cache_dir=Path(place.cache_dir), progress=observer.on_message)
    except DataError as error:
        observer.on_message(f"no figures during training: {error.message}")
        return None


def make_app(rundir: RunDirectory, observer: Observer, done: Callable[[Outcome], None]) -> ServerApp:
    """An app that serves `rundir` and hands the outcome to `done`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        done(serve(Cohort(grid, rundir.config.federation, observer), rundir, observer))

    return app


def open_run(run_config: Mapping[str, Scalar]) -> RunDirectory:
    """The run that Flower's flat run config asks for; `ConfigError` where a place or a setting is wrong."""
    settings = {key: value for key, value in run_config.items() if key not in PLACES and value != ""}
    config = RunConfig.from_flat(settings, origin="run config")
    places = {key: str(run_config.get(key) or "") for key in PLACES}
    for key, meaning in PLACES.items():
        if not places[key] and key not in OPTIONAL:
            raise ConfigError(f"run config: '{key}' is missing", hint=f"name {meaning} with --run-config")
    path = Path(places["simulation.run-dir"])
    prompts = PromptPool.from_file(Path(places["simulation.prompts"]))
    if RunDirectory.exists(path):
        return RunDirectory.resume(path, config=config, prompts=prompts.texts)
    documents = {}
    if reference := places["simulation.reference"]:
        documents[REFERENCE] = reference_document(Path(reference), path)
    return RunDirectory.create(path, config=config, prompts=prompts.texts, entropy="seeded", documents=documents)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    with open_run(context.run_config) as rundir:
        observer = SilentObserver()
        serve(Cohort(grid, rundir.config.federation, observer), rundir, observer)
