"""Programs that must stay up on this machine: started together, started again when they end, stopped together.

    FOLDER/run/lock         held while the supervisor lives; the kernel frees it however that ends
    FOLDER/run/status.json  its process, and for each program process, starts, since when, how it ended last
    FOLDER/logs/NAME.log    what a program says, as text; turned over at 10 MB, five are kept

A program that ends is started again after `restart_seconds`, longer after each quick end (doubling up to
`most_seconds`), for as long as it takes: Flower refuses a node for a minute after it was killed. Programs are ended in
the opposite order of their start, and are killed when they do not end. When the supervisor itself is killed, the kernel
ends its programs.
Linux only. Not here: what is run (`client.deployment`, `server.deployment`), and a machine that starts again (systemd).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from shared.disk import locked, write_whole
from shared.errors import FederationError

RUN, LOGS = "run", "logs"
LOCK, STATUS = "lock", "status.json"
LOG_BYTES, LOG_FILES = 10_000_000, 5
QUICK_SECONDS = 30.0  # a program that ran for less ended quickly
END_SECONDS = 20.0  # before a program is killed
POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded before any fork


@dataclass(frozen=True)
class Program:
    """One process.

    Attributes:
        name: of its log, and in the status.
        environment: beside this process's own.
        restart_seconds: before it is started again, the first time.
        most_seconds: before it is started again, ever.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    restart_seconds: float = 1.0
    most_seconds: float = 60.0


class _Running:
    """A program and its process."""

    def __init__(self, program: Program, logs: Path) -> None:
        self.program, self.starts, self.ended = program, 0, ""
        self.process: subprocess.Popen[bytes] | None = None
        self.since = self.due = 0.0
        self._wait = program.restart_seconds
        self.log = logging.getLogger(f"fedcanvas.{logs}.{program.name}")
        self.log.propagate = False
        self.log.setLevel(logging.INFO)
        self.handler = RotatingFileHandler(
            logs / f"{program.name}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8"
        )
        self.handler.setFormatter(logging.Formatter("%(message)s"))
        self.log.addHandler(self.handler)

    def start(self) -> None:
        self.starts += 1
        self.since = time.monotonic()
        try:
            self.process = subprocess.Popen(
                list(self.program.command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, **self.program.environment}, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        except OSError as error:
            self._note_end(f"cannot be started: {error.strerror or error}")
            return
        assert self.process.stdout is not None
        threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True).start()

    def look(self, now: float) -> bool:
        """Whether anything changed."""
        if self.process is None:
            if now < self.due:
                return False
            self.start()
            return True
        code = self.process.poll()
        if code is None:
            return False
        self._note_end(f"signal {-code}" if code < 0 else f"code {code}")
        return True

    def _note_end(self, how: str) -> None:
        ran = time.monotonic() - self.since
        self.process, self.ended = None, f"{_now()}: {how}, after {ran:.0f} s"
        quick = ran < QUICK_SECONDS
        self._wait = min(2 * self._wait, self.program.most_seconds) if quick else self.program.restart_seconds
        self.due = time.monotonic() + self._wait
        self.log.info("--- %s; it is started again in %.0f s", self.ended, self._wait)

    def stop(self) -> None:
        if self.process is None:
            return
        for ending, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, END_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=seconds)
                break
        self.process = None

    def close(self) -> None:
        self.log.removeHandler(self.handler)
        self.handler.close()

    def _copy(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self.log.info("%s", line.decode("utf-8", "replace").rstrip("\n"))

    def to_dict(self) -> dict[str, Any]:
        return {
            "pid": self.process.pid if self.process else None, "starts": self.starts, "ended": self.ended,
            "seconds": round(time.monotonic() - self.since, 1) if self.process else 0.0,
        }  # fmt: skip


def supervise(folder: Path, programs: Sequence[Program], *, stopped: threading.Event) -> None:
    """Keeps the programs running until `stopped` is set, then ends them.

    Raises:
        FederationError: another supervisor keeps this folder.
    """
    with _held(folder):
        logs = folder / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        running = [_Running(program, logs) for program in programs]
        try:
            for one in running:
                one.start()
            _write_status(folder, running)
            while not stopped.wait(POLL_SECONDS):
                if any([one.look(time.monotonic()) for one in running]):
                    _write_status(folder, running)
        finally:
            for one in reversed(running):
                one.stop()
                one.close()
            (folder / RUN / STATUS).unlink(missing_ok=True)


def status(folder: Path) -> dict[str, Any] | None:
    """What the supervisor of `folder` last wrote; `None` when none lives."""
    if not is_held(folder):
        return None
    try:
        found: dict[str, Any] = json.loads((folder / RUN / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"pid": None, "programs": {}}  # it is just starting, or ending
    return found


def stop(folder: Path, *, seconds: float = 3 * END_SECONDS) -> bool:
    """Ends the supervisor of `folder` and its programs; false when none lived.

    Raises:
        FederationError: it does not end.
    """
    until, told = time.monotonic() + seconds, False
    while is_held(folder):
        pid = (status(folder) or {}).get("pid")
        if pid is not None and not told:
            os.kill(pid, signal.SIGTERM)
            told = True
        if time.monotonic() > until:
            raise FederationError(f"the supervisor of {folder} does not end", hint=f"kill -9 {pid}")
        time.sleep(POLL_SECONDS)
    return told


def is_held(folder: Path) -> bool:
    path = folder / RUN / LOCK
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _held(folder: Path) -> AbstractContextManager[None]:
    (folder / RUN).mkdir(mode=0o700, parents=True, exist_ok=True)
    busy = FederationError(f"{folder} is started already", hint="stop it first, or ask for its status")
    return locked(folder / RUN / LOCK, busy)


def _write_status(folder: Path, running: Sequence[_Running]) -> None:
    about = {"pid": os.getpid(), "time": _now(), "programs": {one.program.name: one.to_dict() for one in running}}
    write_whole(folder / RUN / STATUS, json.dumps(about, indent=2).encode() + b"\n", durable=False)


def _end_with_parent() -> None:
    """In the child, before it runs: the kernel ends it when the thread that started it is gone, however that went."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
