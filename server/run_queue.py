"""The runs of a federation's server, one after another: what the operator wants of each, and how far it is.

    FOLDER/runs/NAME/              the run directory (`shared.rundir`); the trained model is in its `model/`
    FOLDER/runs/NAME.wanted.json   what the operator wants: "run" or "cancel"; written by the command line alone
    FOLDER/runs/NAME.state.json    how far it is, and why it ended; written by the server's worker alone

Not here: doing them (`server.worker`).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from shared.config import RunConfig
from shared.disk import write_whole
from shared.errors import UsageError
from shared.rundir import RunDirectory

RUNS = "runs"
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")

State = Literal["waiting", "running", "finished", "failed", "cancelled"]
OVER = ("finished", "failed", "cancelled")
COHORT = "cohort.json"  # in the run directory: the sites that may take part


@dataclass(frozen=True)
class QueuedRun:
    """One run of the federation.

    Attributes:
        reason: why it failed, in words; "" otherwise.
        since: when it came into this state, UTC.
    """

    name: str
    path: Path
    state: State
    reason: str
    since: str


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
        RunDirectory.create(
            self.folder / name, config=config, prompts=prompts, entropy="system", run_id=secrets.token_hex(8),
            documents={COHORT: {"sites": list(sites)}, **(documents or {})},
        ).close()  # fmt: skip
        self._want(name, "run")
        return self[name]

    def cancel(self, name: str) -> QueuedRun:
        """Ends it; what was spent stays spent. Raises `UsageError` where it is over already."""
        found = self[name]
        if found.state in OVER:
            raise UsageError(f"run '{name}' is {found.state} already")
        self._want(name, "cancel")
        return found

    def resume(self, name: str) -> QueuedRun:
        """From its last checkpoint on. Raises `UsageError` where it is not over, or is finished."""
        found = self[name]
        if found.state not in ("failed", "cancelled"):
            raise UsageError(f"run '{name}' is {found.state}", hint="only a failed or cancelled run is resumed")
        self._want(name, "run")
        self._state_path(name).unlink(missing_ok=True)
        return self[name]

    def __getitem__(self, name: str) -> QueuedRun:
        path = self.folder / name
        if not NAME.fullmatch(name) or not RunDirectory.exists(path):
            known = ", ".join(run.name for run in self.all()) or "none"
            raise UsageError(f"there is no run '{name}'", hint=f"there are: {known}")
        written = _read(self._state_path(name))
        state, since = written.get("state", "waiting"), written.get("since", "")
        wanted = _read(self._wanted_path(name))
        if self._cancelled(name) and state == "waiting":
            state = "cancelled"  # before its turn
        return QueuedRun(name, path, state, written.get("reason", ""), since or wanted.get("since", ""))

    def all(self) -> list[QueuedRun]:
        """In the order in which they were asked for."""
        names = [path.name for path in self.folder.glob("*") if RunDirectory.exists(path)]
        return [self[name] for name in sorted(names, key=lambda name: (self._first_asked(name), name))]

    # ---- for the worker

    def next(self) -> QueuedRun | None:
        """The one to be done now: one that was begun before any other."""
        ready = [run for run in self.all() if run.state in ("running", "waiting")]
        return min(ready, key=lambda run: run.state != "running", default=None)

    def is_cancelled(self, name: str) -> bool:
        return self._cancelled(name)

    def note(self, name: str, state: State, reason: str = "") -> None:
        about = {"state": state, "reason": reason, "since": _now()}
        write_whole(self._state_path(name), json.dumps(about).encode() + b"\n")

    # ---- inside

    def _cancelled(self, name: str) -> bool:
        return _read(self._wanted_path(name)).get("wanted") == "cancel"

    def _first_asked(self, name: str) -> str:
        return str(_read(self._wanted_path(name)).get("asked", ""))

    def _want(self, name: str, wanted: str) -> None:
        about = {"wanted": wanted, "since": _now(), "asked": self._first_asked(name) or _now(fine=True)}
        write_whole(self._wanted_path(name), json.dumps(about).encode() + b"\n")

    def _wanted_path(self, name: str) -> Path:
        return self.folder / f"{name}.wanted.json"

    def _state_path(self, name: str) -> Path:
        return self.folder / f"{name}.state.json"


def _read(path: Path) -> dict[str, Any]:
    """`{}` where there is none yet."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{path} is damaged", hint="remove it; the run itself is whole") from None


def _now(*, fine: bool = False) -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds" if fine else "seconds")
