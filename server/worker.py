"""The server's process that does the federation's runs, one after another: `python -m server.worker FOLDER`.

It holds the aggregator's keys, so it is the only one that can open what sites send; the SuperLink relays what it cannot
read. A run is a folder on disk (`server.run_queue`), and a Flower run is only the way to the sites for as long as this
process lives: when it, or the SuperLink, was killed, the run goes on from its last checkpoint under a new Flower run.
Between runs the models of finished ones are brought to their sites (`server.delivery`).

Runs nothing of a bundle: the ServerApp is the installed `server.app`.
Not here: asking the SuperLink (`server.superlink`), and keeping this process up (`shared.supervisor`).
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from flwr.supercore.run import RunNotRunningException

from server.app import serve
from server.cohort import Cohort, RunStopped
from server.delivery import Delivery
from server.federation import FederationFolder
from server.result import finish
from server.roster import LiveRoster, RunRoster
from server.run_queue import COHORT, QueuedRun, RunQueue
from server.superlink import UNREACHABLE, EngineLost, SuperLink
from shared.errors import FedCanvasError, RunDirectoryError
from shared.flower_runtime import Runtime
from shared.rundir import RunDirectory

IDLE_SECONDS = 0.5
ENGINE_SECONDS = 5.0  # before a run goes on after the SuperLink was lost
MOST_ENGINE_FAILURES = 20  # in a row, without a round between them


class _Log:
    """An observer that writes lines to the log."""

    def __init__(self, name: str) -> None:
        self.name, self.rounds, self._since = name, 0, time.monotonic()

    def on_warm_start(self, step: int, steps: int) -> None:
        pass

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.on_message(f"round {server_round} of {self.rounds} in {now - self._since:.1f} s")
        self._since = now

    def on_sample(self, server_round: int, path: Path) -> None:
        pass

    def on_message(self, text: str) -> None:
        print(f"{self.name}: {text}", flush=True)


def work(folder: Path, *, ending: threading.Event) -> None:
    """Until `ending` is set; a run that is not over then goes on when this is called again."""
    federation, runtime, queue = FederationFolder.open(folder), Runtime.read(folder), RunQueue(folder)
    with LiveRoster(federation, runtime) as live, SuperLink(runtime) as superlink:
        say = partial(print, flush=True)
        delivery, failures = Delivery(queue, live, channel=federation.channel, grid=superlink.run, say=say), 0
        while not ending.is_set():
            try:
                if not live.trouble and delivery.deliver(stopped=ending.is_set):
                    continue
            except (Exception, RunNotRunningException):  # it is offered again, later; the queue goes on
                traceback.print_exc()
                ending.wait(ENGINE_SECONDS)
            if live.trouble or (queued := queue.next()) is None:
                ending.wait(IDLE_SECONDS)
                continue
            log, asked = _Log(queued.name), _asked(queued)
            try:
                _do(queued, log, federation=federation, live=live, superlink=superlink, queue=queue, ending=ending)
                failures = 0
            except (*UNREACHABLE, EngineLost, RunNotRunningException, RunDirectoryError) as error:
                # The SuperLink was killed or ended our Flower run, or a worker that was killed still holds the folder.
                failures = 0 if _asked(queued) > asked else failures + 1
                log.on_message(f"{type(error).__name__}: {error}; it is tried again in {ENGINE_SECONDS:.0f} s")
                if failures > MOST_ENGINE_FAILURES:
                    queue.note(queued.name, "failed", f"{type(error).__name__}: {error}")
                    failures = 0
                ending.wait(ENGINE_SECONDS)
            except Exception as error:  # a bug: again it would be the same
                traceback.print_exc()
                queue.note(queued.name, "failed", f"{type(error).__name__}, see logs/worker.log")


def _asked(queued: QueuedRun) -> int:
    """How many questions the run has asked: whether it gets on."""
    try:
        return len(RunDirectory.open(queued.path).charges())
    except FedCanvasError:
        return 0


def _do(
    queued: QueuedRun, log: _Log, *, federation: FederationFolder, live: LiveRoster, superlink: SuperLink,
    queue: RunQueue, ending: threading.Event,
) -> None:  # fmt: skip
    """One run, to its end, its failure, or until somebody stops it."""
    name = queued.name
    # Not a failure of the run where it cannot be opened: a worker that was killed a moment ago may still hold it.
    with RunDirectory.resume(queued.path) as rundir:
        try:
            log.rounds = rundir.config.federation.rounds
            if not rundir.finished:
                queue.note(name, "running")
                with superlink.run() as grid:
                    cohort = Cohort(
                        grid, rundir.config.federation, log,
                        roster=RunRoster(live, rundir.read_json(COHORT)["sites"]), channel=federation.channel(),
                        begun=bool(rundir.heads()),
                        stopped=lambda: ending.is_set() or queue.is_cancelled(name), tell=partial(live.tell, run=name),
                    )  # fmt: skip
                    serve(cohort, rundir, log)
                finish(rundir)
            queue.note(name, "finished")
            log.on_message(f"finished: {queued.path / 'model'}")
        except RunStopped:
            if queue.is_cancelled(name):
                queue.note(name, "cancelled")
                log.on_message("cancelled")
        except FedCanvasError as error:
            queue.note(name, "failed", f"{error.message} ({error.hint})" if error.hint else error.message)
            log.on_message(f"failed: {error.message}")


def main() -> None:
    """Until SIGTERM. Flower sends its own process SIGINT where the SuperLink takes a token back: also an end, from
    which the supervisor brings it back."""
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    work(Path(sys.argv[1]), ending=ending)


if __name__ == "__main__":
    main()
