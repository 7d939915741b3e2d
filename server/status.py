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
from shared.errors import FedCanvasError
from shared.records import Confirmation
from shared.rundir import RunDirectory
from shared.supervisor import status as supervisor_status
from shared.tree import code_digest

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
    supervised, seen, ready = supervisor_status(folder), read_seen(folder), readiness(folder)
    sites = []
    for site in opened.roster():
        about = seen.get("sites", {}).get(site.site, {})
        sites.append({
            "site": site.site, "fingerprint": site.fingerprint, "registered": bool(about.get("node")),
            "online": bool(about.get("online")) and ready.fresh, "last_seen": about.get("last_seen", ""),
            "run": about.get("run", ""), "state": about.get("state", ""), "round": about.get("server_round", -1),
            "answered": about.get("answered", -1), "trouble": about.get("trouble", ""),
        })  # fmt: skip
    return {
        "name": known.name, "address": known.address, "fingerprint": known.fingerprint,
        "keys": {"serial": keys.serial, "not_after": keys.not_after.isoformat()},
        "started": supervised is not None, "programs": (supervised or {}).get("programs", {}),
        "ready": ready.ready, "trouble": ready.trouble, "release": release(),
        "sites": sites, "runs": runs_status(RunQueue(folder)), "warnings": opened.warnings(),
    }  # fmt: skip


@dataclass(frozen=True)
class Readiness:
    """Whether the worker looks after the sites.

    Attributes:
        fresh: what it wrote about them is of now.
        trouble: what keeps it from doing so, in words; "" where nothing does, or where it has not said a word.
    """

    fresh: bool
    trouble: str

    @property
    def ready(self) -> bool:
        return self.fresh and not self.trouble


def readiness(folder: Path) -> Readiness:
    supervised, seen = supervisor_status(folder), read_seen(folder)
    since = (supervised or {}).get("since", "")
    try:
        told, began = datetime.fromisoformat(seen.get("time", "")), datetime.fromisoformat(since)
        # What a worker of an earlier start left says nothing. Both are whole seconds: the same one may be either's.
        if told <= began:
            return Readiness(False, "")
        return Readiness(datetime.now(UTC) - told < FRESH, str(seen.get("trouble", "")))
    except (ValueError, TypeError):  # nobody has written one of them yet
        return Readiness(False, "")


def release() -> str:
    """The digest by which a site's policy may allow this release."""
    return code_digest(Path(__file__).resolve().parents[1])


def runs_status(queue: RunQueue) -> list[dict[str, Any]]:
    """All of them, in the order in which they were asked for."""
    return [run_status(run, queue) for run in queue.all()]


def run_status(run: QueuedRun, queue: RunQueue) -> dict[str, Any]:
    """One of the runs; what is damaged is a state of its own, and no other run's trouble.

    Of a finished run also which sites have its model, and what the others said to it, if they said anything.
    """
    state, reason, run_id, far = run.state, run.reason, "", RunProgress(0, 0, 0.0, 0, 0)
    said, took_part = dict[str, str](), set[str]()
    try:
        opened, far = RunDirectory.open(run.path), progress(run)
        run_id, took_part = opened.run_id, set(opened.heads())
        said = {site: answer["code"] for site, answer in opened.deliveries().items()}
    except FedCanvasError as error:
        state, reason = "unreadable", error.message
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # JSON, and not what is written there
        state, reason = "unreadable", f"the folder {run.path} is damaged: {type(error).__name__}: {error}"
    turns = [due.name for due in queue.turns()] if state == "waiting" else []
    place = turns.index(run.name) if run.name in turns else 0
    delivered = [site for site, code in sorted(said.items()) if code == Confirmation.RECEIVED]
    waiting = took_part - set(delivered) if state == "finished" else set()
    return {
        "run": run.name, "run_id": run_id, "folder": str(run.path), "state": state, "reason": reason,
        "since": run.since, "cancelling": run.cancelling, "behind": turns[place - 1] if place else "",
        "rounds_done": far.rounds_done, "rounds": far.rounds, "seconds_a_round": round(far.seconds, 2),
        "bytes_down_a_round": far.bytes_down, "bytes_up_a_round": far.bytes_up, "delivered": delivered,
        "undelivered": {site: said.get(site, "") for site in sorted(waiting)},
    }  # fmt: skip
