"""What a site's worker is doing right now, for the person at the site: SITE/run/worker.json.

The worker writes it, whole each time and without waiting for the disk; a full one changes no answer. It names a message
as Flower does, since nothing of the message's content is believed before its signature was checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from shared.disk import write_whole
from shared.errors import RunDirectoryError

FILE = "run/worker.json"
MOST_CHARACTERS = 64  # of a group's name: the server chose it


@dataclass(frozen=True)
class Activity:
    """
    Attributes:
        pid: of the worker that wrote it.
        since: ISO 8601, UTC.
        message: of which Flower run and group it answers a message; "" while it is idle.
    """

    pid: int
    since: str
    message: str

    @classmethod
    def read(cls, folder: Path) -> Activity | None:
        try:
            found = cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found


def note_activity(folder: Path, *, flower_run: int | None = None, group: str = "") -> None:
    """What this process begins to do now; without a run, to wait."""
    message = "" if flower_run is None else f"Flower's run {flower_run}, group {group[:MOST_CHARACTERS]}"
    activity = Activity(os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"), message)
    with contextlib.suppress(RunDirectoryError):
        write_whole(folder / FILE, json.dumps(asdict(activity)).encode() + b"\n", durable=False)
