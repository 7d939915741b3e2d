"""How a federation's server does: its processes, what is seen of each site, and its runs. Reads files alone.

Not here: who belongs to the federation (`server.federation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from server.federation import FederationFolder
from server.roster import read_seen
from server.run_queue import QueuedRun, RunQueue
from shared.rundir import RunDirectory
from shared.supervisor import status as supervisor_status

FRESH = timedelta(seconds=15)  # the worker writes every second


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes:
        seconds: of a round, the mean of the last ones; 0 before the first.
        bytes_down, bytes_up: of a round, to and from all sites together.
    """

    rounds_done: int
    rounds: int
    seconds: float
    bytes_down: int
    bytes_up: int


def progress(run: QueuedRun) -> RunProgress:
    opened = RunDirectory.open(run.path)
    lines = [line for line in opened.timings() if "bytes_down" in line]
    last = lines[-10:]
    count = max(len(last), 1)
    done = max((int(event["server_round"]) for event in opened.events()), default=0)
    return RunProgress(
        done, opened.config.federation.rounds, sum(float(line["seconds"]) for line in last) / count,
        sum(int(line["bytes_down"]) for line in last) // count, sum(int(line["bytes_up"]) for line in last) // count,
    )  # fmt: skip


def server_status(folder: Path) -> dict[str, Any]:
    """Everything, as `fedcanvas server status --json` prints it."""
    opened = FederationFolder.open(folder)
    known, keys = opened.federation, opened.keys
    supervised, seen = supervisor_status(folder), read_seen(folder)
    fresh = supervised is not None and _is_fresh(seen.get("time", ""))
    sites = []
    for site in opened.roster():
        about = seen.get("sites", {}).get(site.site, {})
        sites.append({
            "site": site.site, "fingerprint": site.fingerprint, "registered": bool(about.get("node")),
            "online": bool(about.get("online")) and fresh, "last_seen": about.get("last_seen", ""),
            "run": about.get("run", ""), "state": about.get("state", ""), "round": about.get("server_round", -1),
            "answered": about.get("answered", -1), "trouble": about.get("trouble", ""),
        })  # fmt: skip
    return {
        "name": known.name, "address": known.address, "fingerprint": known.fingerprint,
        "keys": {"serial": keys.serial, "not_after": keys.not_after.isoformat()},
        "started": supervised is not None, "programs": (supervised or {}).get("programs", {}),
        "ready": fresh and not seen.get("trouble"), "trouble": seen.get("trouble", "") if supervised else "",
        "sites": sites, "runs": [run_status(run) for run in RunQueue(folder).all()], "warnings": opened.warnings(),
    }  # fmt: skip


def run_status(run: QueuedRun) -> dict[str, Any]:
    far = progress(run)
    return {
        "run": run.name, "run_id": RunDirectory.open(run.path).run_id, "folder": str(run.path), "state": run.state,
        "reason": run.reason, "since": run.since, "rounds_done": far.rounds_done, "rounds": far.rounds,
        "seconds_a_round": round(far.seconds, 2), "bytes_down_a_round": far.bytes_down,
        "bytes_up_a_round": far.bytes_up,
    }  # fmt: skip


def _is_fresh(time: str) -> bool:
    try:
        return datetime.now(UTC) - datetime.fromisoformat(time) < FRESH
    except ValueError:
        return False
