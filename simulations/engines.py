"""The same two apps over two engines: in this process, or Flower's simulation on Ray.

`LocalGrid` carries every message as the wire does: taken apart into Flower's hashed objects, put together
again on the other side. Both engines give the same bits: sums are integers, draws are keyed by site and
round, and both sides set their number of torch threads themselves.
Private names of Flower are used here and nowhere else. Not here: a deployment.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import make_app as make_client_app
from server.app import make_app as make_server_app
from server.app import serve
from server.cohort import Cohort
from server.rounds import Outcome
from shared import errors
from shared.config import RunConfig
from shared.errors import FedCanvasError, FederationError
from shared.observer import Observer
from shared.prompts import PromptPool
from shared.rundir import RunDirectory

RELEASE = Path(__file__).resolve().parents[1]
SERVER_NODE = 1  # Flower's own number of the SuperLink
FIRST_SITE_NODE = 1001
PULL_SECONDS = 0.5  # `pull_messages` waits this long for the next reply
STOP_SECONDS = 10.0
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run_local(
    config: RunConfig, *, site_dirs: Sequence[Path], rundir: RunDirectory, prompts: PromptPool, observer: Observer
) -> Outcome:  # fmt: skip
    """The run in this process: no server, no network, nothing left behind.

    Raises:
        FedCanvasError: as `server.rounds.run_rounds` does. After a KeyboardInterrupt the run can be resumed.
    """
    assert (config.digest, prompts.texts) == (rundir.config.digest, rundir.prompts)
    app = make_client_app(site_dirs)
    with LocalGrid(app, sites=len(site_dirs), parallel_sites=config.compute.parallel_sites) as grid:
        return serve(Cohort(grid, config.federation, observer), rundir, observer)


def run_ray(
    config: RunConfig, *, site_dirs: Sequence[Path], rundir: RunDirectory, prompts: PromptPool, observer: Observer
) -> Outcome:  # fmt: skip
    """The same run in Flower's simulation engine, in a process of its own; about ten seconds to start.

    Ray imports the client app from the folder where its process starts, so it starts in this release's, with
    a temporary Flower home. The process holds the run directory's lock while it works, and ends with ours.

    Raises:
        FedCanvasError: as the process reports it; `FederationError` when it ends without a report.
    """
    assert (config.digest, prompts.texts) == (rundir.config.digest, rundir.prompts)
    job = {
        "run": str(rundir.path.resolve()),
        "sites": [str(path.resolve()) for path in site_dirs],
        "parallel-sites": config.compute.parallel_sites,
        "gpu": config.compute.device == "cuda",
    }
    # Unix sockets have short names only: not below a long TMPDIR.
    with rundir.lent(), tempfile.TemporaryDirectory(prefix=f"fedcanvas-{os.getpid()}-", dir="/tmp") as home:
        log = Path(home) / "engine.log"
        reading, writing = os.pipe()
        with open(reading, encoding="utf-8") as reports, log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "simulations.engines", str(writing), home],
                cwd=RELEASE, env={**os.environ, **QUIET, "FLWR_HOME": home}, stdin=subprocess.PIPE, stdout=output,
                stderr=output, pass_fds=[writing], start_new_session=True,
            )  # fmt: skip
            os.close(writing)
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(job).encode() + b"\n")
                process.stdin.flush()  # and stays open: its end tells the process that we are gone
                outcome = _forward(reports, observer)
                process.wait()
            finally:
                _stop(process)
        if outcome is None:
            *_, last = ["", *log.read_text(errors="replace").split("\n")[-20:]]
            raise FederationError(
                f"Flower's simulation engine ended with exit status {process.returncode} and no report",
                hint=f"its last words: {last}" if last else "try --engine local",
            )
        return outcome


class LocalGrid(Grid):
    """Flower's Grid in one process: a pool of threads runs the ClientApp, one message a site at a time.

    Use it as a context manager: leaving it waits for the sites that are at work and drops what they would
    have answered.
    """

    def __init__(self, app: ClientApp, *, sites: int, parallel_sites: int) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            FIRST_SITE_NODE + i: Context(
                run_id=self._run.run_id,
                node_id=FIRST_SITE_NODE + i,
                node_config={"partition-id": i, "num-partitions": sites},
                state=RecordDict(),
                run_config={},
            )
            for i in range(sites)
        }
        self._pool = ThreadPoolExecutor(min(parallel_sites, sites), thread_name_prefix="site")
        self._replies: dict[str, Future[tuple[str, dict[str, bytes]]]] = {}

    def __enter__(self) -> LocalGrid:
        # `Message` asks for these when it is made outside a Flower process.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, self._run.run_id, SERVER_NODE
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._replies.clear()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name, objects = take_apart(message)
            message.metadata.__dict__["_message_id"] = name
            self._replies[name] = self._pool.submit(self._at_site, name, objects)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that are there; waits a moment for the first."""
        asked = {name: self._replies[name] for name in message_ids if name in self._replies}
        wait(asked.values(), timeout=PULL_SECONDS, return_when=FIRST_COMPLETED)
        ready = [name for name, future in asked.items() if future.done()]
        return [put_together(*self._replies.pop(name).result()) for name in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError("the round loop streams: push_messages, then pull_messages")

    def _at_site(self, name: str, objects: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
        """What a node does: put together, answer, take apart. A failing app is an error reply, as in Flower."""
        message = put_together(name, objects)
        try:
            reply = self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            reply = Message(Error(code=2, reason=type(error).__name__), reply_to=message)
        return take_apart(reply)


def take_apart(message: Message) -> tuple[str, dict[str, bytes]]:
    """Flower's wire form: the message's name and its objects by the SHA-256 of their bytes."""
    with no_object_id_recompute():  # or every parent hashes its children again
        objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        return message.object_id, objects


def put_together(name: str, objects: dict[str, bytes]) -> Message:
    """Inverse of `take_apart`."""
    message = inflate_object_from_contents(name, objects)
    assert isinstance(message, Message)
    message.metadata.__dict__["_message_id"] = name
    return message


def _forward(reports: Iterable[str], observer: Observer) -> Outcome | None:
    """Hands every line to the observer; the outcome when one comes, `None` when the process ends without."""
    for line in reports:
        name, *values = json.loads(line)
        if name == "error":
            kind, message, hint = values
            raise getattr(errors, kind)(message, hint=hint)
        if name == "outcome":
            return Outcome(**values[0])
        if name == "on_sample":
            values[1] = Path(values[1])
        getattr(observer, name)(*values)
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and what it started. The run directory is complete at every moment."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_SECONDS)
    if process.stdin is not None:
        process.stdin.close()


class _Reports:
    """An observer that writes JSON lines to the process that started this one."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe = pipe

    def send(self, name: str, *values: Any) -> None:
        self._pipe.write(json.dumps([name, *values]) + "\n")
        self._pipe.flush()

    def on_warm_start(self, step: int, steps: int) -> None:
        self.send("on_warm_start", step, steps)

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        self.send("on_round", server_round, dict(figures))

    def on_sample(self, server_round: int, path: Path) -> None:
        self.send("on_sample", server_round, str(path))

    def on_message(self, text: str) -> None:
        self.send("on_message", text)

    def done(self, outcome: Outcome) -> None:
        self.send("outcome", asdict(outcome))


def _serve_in_ray(reports: _Reports, home: str) -> None:
    """The process that `run_ray` starts: one job from stdin, reports to the pipe."""
    from flwr.simulation import run_simulation

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with RunDirectory.resume(Path(job["run"])) as rundir:
        run_simulation(
            server_app=make_server_app(rundir, reports, reports.done),
            client_app=make_client_app([Path(path) for path in job["sites"]]),
            num_supernodes=len(job["sites"]),
            backend_config={
                # As many workers as sites may work at the same time, each with one of Ray's counted CPUs.
                "init_args": {
                    "num_cpus": job["parallel-sites"], "include_dashboard": False, "log_to_driver": False,
                    "logging_level": logging.ERROR, "_temp_dir": home,
                },
                "client_resources": {
                    "num_cpus": 1, "num_gpus": 1 / job["parallel-sites"] if job["gpu"] else 0.0,
                },
            },
        )  # fmt: skip


def _end_with_parent() -> None:
    """Blocks until stdin ends, which it does when the starting process is gone, however it went."""
    sys.stdin.read()
    os.killpg(os.getpgid(0), signal.SIGTERM)


def _main() -> None:
    with open(int(sys.argv[1]), "w", encoding="utf-8") as pipe:
        reports = _Reports(pipe)
        try:
            _serve_in_ray(reports, sys.argv[2])
        except FedCanvasError as error:
            reports.send("error", type(error).__name__, error.message, error.hint)


if __name__ == "__main__":
    _main()
