"""What there is to say about a deployed site right now, from its own files: processes, connection, work, budget.

Whether the node has a connection is read from Flower's own words in its log: Flower itself tells no more, and nothing
here connects to anything. What cannot be known from here, such as whether the operator has admitted the site, is said
to be unknown. Not here: what is wrong and why (`client.doctor`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from client.account import SiteAccount
from client.activity import Activity
from client.membership import read_federation
from client.policy import SitePolicy
from client.settings import LOG, SiteConfig
from client.spending import charged_and_not_sent, receipts, refusals, reserved_and_spent
from shared.errors import FedCanvasError, LedgerError
from shared.privacy.budget import what_is_left
from shared.supervisor import NOTE, STARTED, LogLine, log_lines, status

RACE_SECONDS = 0.2
SHOWN = 3  # of what was answered and refused last

State = Literal["connected", "trying", "refused", "failed", "unknown"]

# What Flower 1.41 writes; `tests/test_client_deployment.py` compares it with what a SuperNode really says.
_CONNECTED = re.compile(r"INFO :\s+(SuperNode ID: \d+|Connection successful after .*)")
_TRYING = re.compile(r"WARNING :\s+Connection attempt failed, retrying in .*")
_GAVE_UP = "Failed to initialize the connection to the SuperLink."
_NOT_ACTIVATED = "[code: 2004]"
_WORDS: dict[State, str] = {
    "connected": "the server has activated the node",
    "trying": "no answer from the server; the node keeps trying",
    "refused": "the server did not activate the node (2004): it is not admitted (yet), was revoked, or still counts as"
    " online, as for a minute after it was killed",
    "unknown": "the node has not said yet",
}


@dataclass(frozen=True)
class Connection:
    """Of the node to the federation's server, as its log tells.

    Attributes:
        since: ISO 8601, UTC; "" where there is nothing to tell.
    """

    state: State
    since: str
    words: str


def read_connection(lines: Sequence[LogLine]) -> Connection:
    """What the last of a node's lines that tell anything of it tell."""
    found = _connection("unknown", "")
    for place, line in enumerate(lines):
        ended = line.text.startswith(NOTE) and found.state in ("connected", "trying")  # a refusal stays the newest word
        if ended or line.text == STARTED:
            found = _connection("unknown", line.time)
            continue
        state: State | None = None
        words = None
        if _CONNECTED.fullmatch(line.text):
            state = "connected"
        elif _TRYING.fullmatch(line.text):
            state = "trying"
        elif line.text == _GAVE_UP:
            words = lines[place + 1].text if place + 1 < len(lines) else ""
            state = "refused" if words.startswith(_NOT_ACTIVATED) else "failed"
        if state is not None and state != found.state:
            found = _connection(state, line.time, words)
    return found


def _connection(state: State, since: str, words: str | None = None) -> Connection:
    return Connection(state, since, _WORDS.get(state) or f"the node gave up: {words}")


def open_account(site_dir: Path) -> tuple[SiteConfig, SiteAccount]:
    """The site's settings and its account, the ledger checked.

    A site at work writes its ledger first and the anchor next; who reads in between sees an anchor that does not fit,
    so it is looked at twice.
    """
    config = SiteConfig.read(site_dir)
    try:
        account = SiteAccount(site_dir, store=site_dir / config.store, lineage=config.lineage)
    except LedgerError:
        time.sleep(RACE_SECONDS)
        account = SiteAccount(site_dir, store=site_dir / config.store, lineage=config.lineage)
    return config, account


def site_status(site_dir: Path) -> dict[str, Any]:
    """Everything, by name; what cannot be read of the ledger or policy is told instead of it."""
    config, federation, running = SiteConfig.read(site_dir), read_federation(site_dir), status(site_dir)
    about: dict[str, Any] = {
        "site": str(site_dir), "site_id": config.site_id, "federation": federation.name if federation else None,
        "address": federation.address if federation else None, "started": running is not None,
        "supervisor": {"pid": running["pid"], "since": running.get("since", "")} if running else None,
        "programs": running["programs"] if running else {}, "connection": None, "worker": None, "charged": None,
        "answered": [], "waiting": [], "epsilon": None, "account_error": None,
    }  # fmt: skip
    activity = Activity.read(site_dir)
    if running is not None:
        about["connection"] = asdict(read_connection(log_lines(site_dir, "node")))
        if activity is not None and activity.pid == about["programs"].get("worker", {}).get("pid"):
            about["worker"] = {"since": activity.since, "answers": activity.message}
    refused = refusals(site_dir)
    about["refused"] = {"by_code": refused.by_code, "last": refused.entries[-SHOWN:]}
    about["incidents"] = {"count": refused.incidents, "last": _last_incident(site_dir)}
    try:
        about.update(_of_account(site_dir))
    except FedCanvasError as error:
        about["account_error"] = error.message
    if about["charged"] is not None and not (about["worker"] or {}).get("answers"):
        about["charged"] = None  # of a crash: nothing is being done about it
    return about


def _of_account(site_dir: Path) -> dict[str, Any]:
    _, account = open_account(site_dir)
    ledger, policy = account.ledger, SitePolicy.read(site_dir)
    ceiling = policy.ceiling(ledger.lineage.lifetime)
    reserved, spent = reserved_and_spent(ledger, ceiling)
    left, open_charges = what_is_left(ledger.reserved, ceiling), charged_and_not_sent(ledger)
    return {
        "charged": {name: open_charges[-1][name] for name in ("run", "server_round")} if open_charges else None,
        "answered": [
            {"run": receipt.run, "server_round": receipt.server_round, "charged": receipt.time, "again": receipt.again}
            for receipt in receipts(ledger) if receipt.kind != "query"
        ][-SHOWN:],
        "waiting": [proposed.run for proposed in account.all_proposed() if proposed.decision == "pending"],
        "epsilon": {
            "lineage": account.lineage, "spent": spent, "reserved": reserved, "left": left.epsilon,
            "ceiling": ceiling.max_epsilon, "delta": ceiling.delta,
        },
    }  # fmt: skip


def _last_incident(site_dir: Path) -> str:
    try:
        lines = (site_dir / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if " incident: " in line), "")
