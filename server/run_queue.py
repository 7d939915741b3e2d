"""The runs of a federation's server, one after another: what the operator wants of each, and how far it is.

    FOLDER/runs/NAME/              the run directory (`shared.rundir`); the trained model is in its `model/`
    FOLDER/runs/NAME.wanted.json   what the operator wants: "run" or "cancel", and how often it was resumed; written by
                                   the command line alone
    FOLDER/runs/NAME.state.json    how far it is, why it ended, and for which resumption that is; written by the
                                   server's worker alone
    FOLDER/runs/.lock              held for the moment of either writing

Not here: doing them (`server.worker`).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from shared.config import RunConfig
from shared.disk import write_whole
from shared.errors import UsageError
from shared.rundir import RunDirectory

RUNS = "runs"
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")

State = Literal["waiting", "running", "finished", "failed", "cancelled", "unreadable"]
OVER = ("finished", "failed", "cancelled")
COHORT = "cohort.json"  # in the run directory: the sites that may take part
# What the two files say where they are absent.
WANTED: Mapping[str, Any] = {"wanted": "run", "since": "", "asked": "", "resumed": 0}
WRITTEN: Mapping[str, Any] = {"state": "waiting", "reason": "", "since": "", "resumed": 0}


@dataclass(frozen=True)
class QueuedRun:
    """One run of the federation.

    Attributes:
        reason: why it failed or what cannot be read, in words; "" otherwise.
        since: when it came into this state, UTC.
        cancelling: it is running, and will be cancelled as soon as the worker sees that.
    """

    name: str
    path: Path
    state: State
    reason: str
    since: str
    cancelling: bool = False


class RunQueue:
    """The runs in the federation's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / RUNS

    def add(
        self, name: str, *, config: RunConfig, prompts: Sequence[str], sites: Sequence[str],
        documents: Mapping[str, Any] | None = None,
    ) -> QueuedRun:  # fmt: skip
        """A new run, which waits for its turn.

        Args:
            sites: names of those that may take part.
        Raises:
            UsageError: the name cannot be one, or there is such a run.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"'{name}' is no name of a run", hint="1 to 64 letters, digits, dashes and underscores")
        if (self.folder / name).exists():
            raise UsageError(f"there is a run '{name}' already", hint="name another: --name")
        for left in (self._wanted_path(name), self._state_path(name)):
            if left.exists():  # it would be taken for this run's
                raise UsageError(f"{left} is left of an earlier run", hint="remove it, or name another run: --name")
        RunDirectory.create(
            self.folder / name, config=config, prompts=prompts, entropy="system", run_id=secrets.token_hex(8),
            documents={COHORT: {"sites": list(sites)}, **(documents or {})},
        ).close()  # fmt: skip
        with self._one_writes(name):
            self._want(name, "run", resumed=0)
        return self[name]

    def cancel(self, name: str) -> QueuedRun:
        """Ends it; what was spent stays spent. Raises `UsageError` where it is over already."""
        with self._one_writes(name):
            found = self._readable(name)
            if found.state in OVER:
                raise UsageError(f"run '{name}' is {found.state} already")
            self._want(name, "cancel", resumed=self._resumed(name))
        return self[name]

    def resume(self, name: str) -> QueuedRun:
        """From its last checkpoint on; a cancellation that the worker has not seen yet is taken back.

        Raises:
            UsageError: it is not over, or is finished.
        """
        with self._one_writes(name):
            found = self._readable(name)
            if found.state not in ("failed", "cancelled") and not found.cancelling:
                raise UsageError(f"run '{name}' is {found.state}", hint="only a failed or cancelled run is resumed")
            # One more makes the state on disk that of an earlier time; a run that is going on keeps its own.
            self._want(name, "run", resumed=self._resumed(name) + (0 if found.cancelling else 1))
        return self[name]

    def __getitem__(self, name: str) -> QueuedRun:
        """Raises `UsageError` where there is no such run; one that cannot be read is "unreadable"."""
        if not self._is_run(name):
            raise UsageError(f"there is no run '{name}'", hint=f"there are: {', '.join(self._names()) or 'none'}")
        path = self.folder / name
        try:
            wanted, written = _read(self._wanted_path(name), WANTED), _read(self._state_path(name), WRITTEN)
        except UsageError as error:
            return QueuedRun(name, path, "unreadable", f"{error.message}: {error.hint}", "")
        cancelled = wanted["wanted"] == "cancel"
        if written["resumed"] < wanted["resumed"] or written["state"] == "waiting":
            return QueuedRun(name, path, "cancelled" if cancelled else "waiting", "", wanted["since"])
        state = written["state"]
        return QueuedRun(
            name, path, state, written["reason"], written["since"], cancelling=cancelled and state == "running"
        )

    def all(self) -> list[QueuedRun]:
        """In the order in which they were asked for."""
        return [self[name] for name in self._names()]

    def turns(self) -> list[QueuedRun]:
        """Those to be done, in order: one that was begun comes before any other."""
        return sorted(
            (run for run in self.all() if run.state in ("running", "waiting")), key=lambda run: run.state != "running"
        )

    # ---- for the worker

    def finished(self) -> list[QueuedRun]:
        return [run for run in self.all() if run.state == "finished"]

    def next(self) -> QueuedRun | None:
        """The one to be done now."""
        return next(iter(self.turns()), None)

    def is_cancelled(self, name: str) -> bool:
        return bool(self._wanted(name)["wanted"] == "cancel")

    def note(self, name: str, state: State, reason: str = "") -> None:
        """That a cancellation was taken back meanwhile is seen here: the run then stays as it is, and goes on."""
        with self._one_writes(name):
            if state == "cancelled" and not self.is_cancelled(name):
                return
            about = {"state": state, "reason": reason, "since": _now(), "resumed": self._resumed(name)}
            write_whole(self._state_path(name), json.dumps(about).encode() + b"\n")

    # ---- inside

    def _names(self) -> list[str]:
        """Of what stands here as a run; a copy or a run that is just appearing has a name that none can have."""
        found = [path.name for path in self.folder.glob("*") if self._is_run(path.name)]
        return sorted(found, key=lambda name: (self._wanted(name)["asked"], name))

    def _is_run(self, name: str) -> bool:
        return NAME.fullmatch(name) is not None and RunDirectory.exists(self.folder / name)

    def _readable(self, name: str) -> QueuedRun:
        if (found := self[name]).state == "unreadable":
            raise UsageError(f"run '{name}' is unreadable: {found.reason}")
        return found

    def _wanted(self, name: str) -> dict[str, Any]:
        """As if it were absent where it is damaged."""
        try:
            return _read(self._wanted_path(name), WANTED)
        except UsageError:
            return dict(WANTED)

    def _resumed(self, name: str) -> int:
        """How often, by whichever of the two files can be read."""
        resumed = self._wanted(name)["resumed"]
        with suppress(UsageError):
            resumed = max(resumed, _read(self._state_path(name), WRITTEN)["resumed"])
        return int(resumed)

    def _want(self, name: str, wanted: str, *, resumed: int) -> None:
        asked = self._wanted(name)["asked"] or _now(fine=True)
        about = {"wanted": wanted, "since": _now(), "asked": asked, "resumed": resumed}
        write_whole(self._wanted_path(name), json.dumps(about).encode() + b"\n")

    @contextmanager
    def _one_writes(self, name: str) -> Iterator[None]:
        """Waits for the other. Between looking at one file and writing the other nothing changes."""
        self[name]  # there is such a run
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _wanted_path(self, name: str) -> Path:
        return self.folder / f"{name}.wanted.json"

    def _state_path(self, name: str) -> Path:
        return self.folder / f"{name}.state.json"


def _read(path: Path, absent: Mapping[str, Any]) -> dict[str, Any]:
    """Its values, with those of `absent` for what is not there, and of the same types."""
    try:
        found = {**absent, **json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return dict(absent)
    except (OSError, ValueError, TypeError, RecursionError):
        found = {}
    known = found.get("state", "waiting") in get_args(State) and found.get("wanted", "run") in ("run", "cancel")
    if not known or any(type(found.get(name)) is not type(value) for name, value in absent.items()):
        raise UsageError(f"{path} is damaged", hint="remove it; the run itself is whole")
    return found


def _now(*, fine: bool = False) -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds" if fine else "seconds")
