"""A federation of toy sites as it is deployed: server and sites as processes over TLS on loopback, supervised."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployed_site import CHEAP, OPEN
from flower_processes import eventually
from toy_federation import PROMPTS, make_sites, toy_config, toy_policy

from client.deployment import programs as site_programs
from client.joining import join
from server.deployment import programs as server_programs
from server.federation import FederationFolder
from server.run_queue import OVER, QueuedRun, RunQueue
from server.status import readiness, server_status
from shared.config import RunConfig, Scalar
from shared.flower_runtime import free_port
from shared.protection.kit import read_kit
from shared.supervisor import Program, status, supervise

NAME = "toy"
ROUND_SECONDS = 60.0  # that a round may take here at most
# A node that got nothing asks again after three seconds, of which tests would wait most of their time.
EAGER = """\
import sys
if "client.node" in sys.orig_argv:
    import time, types
    import flwr.supernode.start_client_internal as internal
    internal.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.5))})
"""


class Wire:
    """Stands between the sites and the proxy, passes on what comes, and breaks when it is told to."""

    def __init__(self, to: int) -> None:
        self._to, self.cut_after, self.cuts = to, 0, 0  # bytes of one connection upwards; 0: never
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                threading.Thread(target=self._pass, args=(here,), daemon=True).start()

    def _pass(self, here: socket.socket) -> None:
        with here, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as there:
            down = threading.Thread(target=self._copy, args=(there, here, False), daemon=True)
            down.start()
            self._copy(here, there, True)
            down.join()

    def _copy(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        """Until either end is gone; then so is the other."""
        passed = 0
        with contextlib.suppress(OSError):
            while content := source.recv(1024):
                passed += len(content)
                if up and self.cut_after and passed > self.cut_after:
                    self.cut_after, self.cuts = 0, self.cuts + 1
                    break
                sink.sendall(content)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class DeployedFederation:
    """Use it as a context manager: everything that it started is ended."""

    def __init__(self, folder: Path, *, sizes: Sequence[int] = (40, 40, 40)) -> None:
        self.folder, self._listen = folder / "server", free_port()
        self.wire = Wire(self._listen)
        self.federation = FederationFolder.create(self.folder, name=NAME, address=f"localhost:{self.wire.port}")
        policy = toy_policy(**OPEN, federations=[NAME], max_epsilon=100.0, delta=0.1)  # for many runs
        self.sites = make_sites(folder / "sites", sizes=sizes, seed=None, policy=policy)
        for site in self.sites:
            self.join(site)
        self.queue = RunQueue(self.folder)
        (folder / "eager").mkdir()
        (folder / "eager/sitecustomize.py").write_text(EAGER)
        self._stopped: dict[Path, threading.Event] = {}
        self._threads: dict[Path, threading.Thread] = {}

    def join(self, site: Path) -> None:
        """By a kit, a request and an admission."""
        kit = self.folder.parent / f"{site.name}.zip"
        self.federation.kit(site.name, kit)
        request = join(site, read_kit(kit), site_id=site.name).request
        self.federation.admit(self.federation.read_request(request.read_bytes(), what=str(request)))

    def __enter__(self) -> DeployedFederation:
        self.start_server()
        # A node that finds none gives up after a while and is started again: that would be the longer way.
        eventually(lambda: readiness(self.folder).ready, "a server", 60.0)
        for site in self.sites:
            self.start(site, site_programs(site))
        self.all_online()
        return self

    def __exit__(self, *_: object) -> None:
        for folder in list(self._stopped):
            self.stop(folder, wait=False)
        for thread in self._threads.values():
            thread.join(timeout=90)
        self.wire.close()

    def start_server(self) -> None:
        self.start(self.folder, server_programs(self.folder, listen=f"127.0.0.1:{self._listen}"))

    def start(self, folder: Path, programs: Sequence[Program]) -> None:
        path = os.pathsep.join(filter(None, [str(self.folder.parent / "eager"), os.environ.get("PYTHONPATH")]))
        eager = [replace(one, environment={**one.environment, "PYTHONPATH": path}) for one in programs]
        self._stopped[folder] = threading.Event()
        self._threads[folder] = threading.Thread(
            target=supervise, args=(folder, eager), kwargs={"stopped": self._stopped[folder]}
        )
        self._threads[folder].start()

    def stop(self, folder: Path, *, wait: bool = True) -> None:
        self._stopped[folder].set()
        if wait:
            self._threads[folder].join(timeout=90)

    def all_online(self, seconds: float = 150.0) -> None:
        eventually(lambda: all(self.seen(site.name)["online"] for site in self.sites), "all sites", seconds)

    def seen(self, site: str) -> dict[str, Any]:
        found = [one for one in server_status(self.folder)["sites"] if one["site"] == site]
        return found[0] if found else {"online": False}

    def config(self, changes: Mapping[str, Scalar]) -> RunConfig:
        usual: dict[str, Scalar] = {
            **CHEAP, "federation.name": NAME, "federation.sites": len(self.sites), "privacy.target-epsilon": 1.0,
            "privacy.retry-slack": 6, "federation.published-records": 96, "compute.checkpoint-every": 1,
        }  # fmt: skip
        return toy_config({**usual, **changes})

    def begin(self, name: str, changes: Mapping[str, Scalar] | None = None, sites: Sequence[Path] = ()) -> QueuedRun:
        chosen = [site.name for site in sites or self.sites]
        config = self.config({"federation.sites": len(chosen), **(changes or {})})
        return self.queue.add(name, config=config, prompts=PROMPTS.texts, sites=chosen)

    def finish(self, name: str, *, each: Callable[[], object] = lambda: None, seconds: float = 240.0) -> QueuedRun:
        """The run, once it is over; `each` is called all the time."""
        until = time.monotonic() + seconds
        while (run := self.queue[name]).state not in OVER:
            each()
            assert time.monotonic() < until, self.logs()
            time.sleep(0.05)
        return run

    def reached(self, name: str, server_round: int, seconds: float = 150.0) -> None:
        """Waits until that round is over."""
        events = self.queue[name].path / "events.jsonl"
        eventually(
            lambda: events.exists() and len(events.read_text().splitlines()) >= server_round, f"round {server_round}",
            seconds,
        )  # fmt: skip

    def pid(self, folder: Path, program: str) -> int | None:
        found = (status(folder) or {}).get("programs", {}).get(program, {}).get("pid")
        return int(found) if found else None

    def kill(self, folder: Path, program: str) -> None:
        """-9, as a machine that runs out of memory does; and waits until there is another one."""
        before = self.pid(folder, program)
        assert before is not None
        os.kill(before, signal.SIGKILL)
        eventually(lambda: self.pid(folder, program) not in (None, before), f"another {program}", 60.0)

    def entries(self, site: Path) -> list[dict[str, Any]]:
        """The lines of a site's ledger."""
        (ledger,) = site.rglob("ledger.jsonl")
        return [json.loads(line) for line in ledger.read_text().splitlines()]

    def logs(self) -> str:
        """The last lines of every log, for a failed test."""
        files = [*self.folder.glob("logs/*.log"), *(log for site in self.sites for log in site.glob("logs/*.log"))]
        return "\n".join(f"== {file}\n{chr(10).join(file.read_text().splitlines()[-8:])}" for file in files)
