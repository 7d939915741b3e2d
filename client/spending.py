"""What a ledger says, as figures for people: runs, totals, messages that left, refusals.

Everything is derived from the ledger's entries and the site's own refusals and log, when it is asked for; there is
no second account. Not here: what may be spent (`shared.privacy.budget`), and how figures look (`client.cli`,
`client.receipts`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shared.privacy.accounting import EpsilonReport, Spent, composed_epsilon, renyi_cost
from shared.privacy.budget import Left, Lifetime, as_spent, what_is_left
from shared.privacy.ledger import UNSAMPLED, Ledger, RunAccount

RunState = Literal["active", "complete", "closed"]


@dataclass(frozen=True)
class RunFigures:
    """One reserved run.

    Attributes:
        state: "complete" when all planned steps are charged and only repeated rounds may follow.
        through: another lineage that shares records and on which the run took place; "" for this one.
        epsilon_spent, steps: of what was charged, at `delta`; a charge counts whether or not its message left.
        unsampled: charged releases beside the steps, such as the moments of a warm start.
        releases: messages that left.
    """

    run: str
    federation: str
    state: RunState
    closed: str | None
    through: str
    began: str
    epsilon_reserved: float
    epsilon_spent: float
    delta: float
    steps: int
    steps_reserved: int
    unsampled: int
    releases: int


@dataclass(frozen=True)
class Totals:
    """Of the whole lineage. With sums, runs add up; with a Renyi filter, their divergences of its order do.

    Attributes:
        ceiling: the ledger's or the policy's, the lower one.
        composed: of everything charged, as if all runs had been fixed beforehand: told, and never used to admit.
    """

    ceiling: Lifetime
    reserved: float
    spent: float
    left: Left
    composed: EpsilonReport


@dataclass(frozen=True)
class Receipt:
    """One message that left.

    Attributes:
        time: of its charge; when the work was done depends on the records and is not written down.
        kind: "gradient", "update", "moments" or "query".
        bytes, sha256: of its payload, sealed as it left.
        fields: [name, type, shape] of each part of the payload.
        steps: charged for it; 0 for an unsampled release.
        epsilon_before, epsilon_after: of its run. Equal where the same bytes left again, and between two rows of the
            run's table of prices, which answers for the next row.
    """

    seq: int
    time: str
    federation: str
    run: str
    server_round: int
    kind: str
    bytes: int
    sha256: str
    fields: list[list[Any]]
    steps: int
    epsilon_before: float
    epsilon_after: float
    again: bool

    @property
    def charge(self) -> float:
        return self.epsilon_after - self.epsilon_before if math.isfinite(self.epsilon_before) else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "charge": self.charge}


@dataclass(frozen=True)
class Refusals:
    """Answers that were a code and nothing else; and what the site's own log calls an incident.

    Attributes:
        by_code: of refusals, how many.
        entries: of refusals, in order.
        received: of models that were offered and taken, in order.
    """

    by_code: dict[str, int]
    incidents: int
    entries: list[dict[str, Any]]
    received: list[dict[str, Any]]


def run_figures(ledger: Ledger) -> list[RunFigures]:
    """In the order in which the runs were reserved."""
    return [
        RunFigures(
            account.terms.run, account.terms.federation, _state(account), account.closed,
            str(ledger.entries[account.seq]["through"]), account.time, account.price.epsilon, account.epsilon_spent,
            account.price.delta, account.steps, account.terms.plan.reserved_steps, account.unsampled, account.commits,
        )
        for account in ledger.runs.values()
    ]  # fmt: skip


def totals(ledger: Ledger, ceiling: Lifetime) -> Totals:
    """Seconds where much was charged: the composed figure is computed anew."""
    composed = composed_epsilon(_spent(ledger), delta=ledger.lineage.lifetime.delta)
    reserved, used = reserved_and_spent(ledger, ceiling)
    left = what_is_left(ledger.reserved, ceiling)
    return Totals(ceiling, reserved, used, left, replace(composed, unit=ledger.lineage.unit))


def reserved_and_spent(ledger: Ledger, ceiling: Lifetime) -> tuple[float, float]:
    """(reserved, spent) in epsilon, added up as the ceiling adds up."""
    if ceiling.order is None:
        reserved = math.fsum(price.epsilon for price in ledger.reserved)
        return reserved, math.fsum(account.epsilon_spent for account in ledger.runs.values())
    # As (epsilon, delta): the divergences so far, and once what turns a divergence into it.
    turned = ceiling.max_epsilon - ceiling.renyi_budget
    divergence = math.fsum(price.renyi or 0.0 for price in ledger.reserved)
    spent = math.fsum(renyi_cost(part, order=ceiling.order) for part in _spent(ledger))
    return (divergence + turned if divergence else 0.0), (spent + turned if spent else 0.0)


def _spent(ledger: Ledger) -> list[Spent]:
    return [as_spent(a.terms.plan, a.steps, unsampled=a.unsampled > 0) for a in ledger.runs.values() if a.charges]


def receipts(ledger: Ledger) -> list[Receipt]:
    """Every message that left, in order: of all sites whose records are this lineage."""
    return _follow(ledger)[0]


def charged_and_not_sent(ledger: Ledger) -> list[dict[str, Any]]:
    """Charges of this lineage's own runs whose message never left: a crash, or the one at work right now."""
    return _follow(ledger)[1]


def _follow(ledger: Ledger) -> tuple[list[Receipt], list[dict[str, Any]]]:
    found: list[Receipt] = []
    known: dict[tuple[str, str], Receipt] = {}  # by run and SHA-256
    waiting: dict[int, dict[str, Any]] = {}  # charges by number
    steps: Counter[str] = Counter()
    around: dict[int, tuple[float, float]] = {}  # epsilon of its run before and after a charge
    for entry in ledger.entries:
        run, kind = entry.get("run", ""), entry["kind"]
        if kind == "charge":
            if not ledger.entries[ledger.runs[run].seq]["through"]:
                waiting[entry["seq"]] = entry
            price, first_of_run = ledger.runs[run].price, run not in steps
            spent = 0.0 if first_of_run else price.epsilon_after(steps[run])
            steps[run] += entry["steps"]
            around[entry["seq"]] = spent, price.epsilon_after(steps[run])
            continue
        if kind not in ("commit", "resent"):
            continue
        account, first = ledger.runs[run], known.get((run, entry["sha256"]))
        if first is not None and kind == "resent":
            spent = account.price.epsilon_after(steps[run])
            found.append(
                replace(first, seq=entry["seq"], time=entry["time"], steps=0, epsilon_before=spent,
                        epsilon_after=spent, again=True)
            )  # fmt: skip
            continue
        # Sent again without a commit: the reply was kept, and a crash came before the line about it.
        charge = waiting.pop(entry["of"], None) if kind == "commit" else _last_of(waiting, run, entry["server_round"])
        now = account.price.epsilon_after(steps[run])
        epsilon_before, epsilon_after = around[charge["seq"]] if charge else (now, now)
        receipt = Receipt(
            entry["seq"], charge["time"] if charge else entry["time"], account.terms.federation, run,
            entry["server_round"], charge["release"] if charge else "unknown", entry["bytes"], entry["sha256"],
            entry.get("fields", []), charge["steps"] if charge else 0,
            float(entry.get("epsilon_before", epsilon_before)), float(entry.get("epsilon_after", epsilon_after)),
            again=False,
        )  # fmt: skip
        known[run, receipt.sha256] = receipt
        found.append(receipt)
    return found, list(waiting.values())


def _last_of(waiting: dict[int, dict[str, Any]], run: str, server_round: int) -> dict[str, Any] | None:
    for seq in sorted(waiting, reverse=True):
        if (waiting[seq]["run"], waiting[seq]["server_round"]) == (run, server_round):
            return waiting.pop(seq)
    return None


def spent_over_time(ledger: Ledger) -> list[tuple[str, float, float]]:
    """(time, spent, reserved) of all runs together, after each entry that changes one; added up as in `totals`."""
    order, points = ledger.lineage.lifetime.order, [(str(ledger.entries[0]["time"]), 0.0, 0.0)]
    turned = 0.0 if order is None else ledger.lineage.lifetime.max_epsilon - ledger.lineage.lifetime.renyi_budget
    steps: Counter[str] = Counter()
    unsampled: set[str] = set()
    of_run: dict[str, float] = {}
    spent = reserved = 0.0
    for entry in ledger.entries:
        if entry["kind"] not in ("run", "charge"):
            continue
        run = entry["run"]
        account = ledger.runs[run]
        if entry["kind"] == "run":
            reserved += account.price.epsilon if order is None else account.price.renyi or 0.0
        else:
            steps[run] += entry["steps"]
            if entry["release"] in UNSAMPLED:
                unsampled.add(run)
            if order is None:
                now = account.price.epsilon_after(steps[run])
            else:
                now = renyi_cost(as_spent(account.terms.plan, steps[run], unsampled=run in unsampled), order=order)
            spent += now - of_run.get(run, 0.0)
            of_run[run] = now
        points.append((str(entry["time"]), spent + turned * (spent > 0), reserved + turned * (reserved > 0)))
    return points


def refusals(folder: Path) -> Refusals:
    """From the site's own `refusals.jsonl` and `site.log`; a line that cannot be read is counted as "unreadable"."""
    from client.settings import CODES, LOG
    from shared.records import Confirmation

    entries: list[dict[str, Any]] = []
    received: list[dict[str, Any]] = []
    unreadable = 0
    for line in _lines(folder / CODES):
        try:
            entry = {name: json.loads(line)[name] for name in ("time", "code", "run", "server_round")}
            (received if entry["code"] == Confirmation.RECEIVED else entries).append(entry)
        except (ValueError, KeyError, TypeError):
            unreadable += 1
    by_code = dict(Counter(str(entry["code"]) for entry in entries))
    if unreadable:
        by_code["unreadable"] = unreadable
    incidents = sum(" incident: " in line for line in _lines(folder / LOG))
    return Refusals(by_code, incidents, entries, received)


def best_guess(epsilon: float, delta: float) -> float:
    """How often at most a guess is right whether one unit was in the data, when it was even odds before.

    Source: (epsilon, delta) as hypothesis testing, Kairouz et al. 2015, https://arxiv.org/abs/1311.0776.
    """
    return min(1.0, (1 / (1 + math.exp(-epsilon))) + delta / (1 + math.exp(min(epsilon, 700.0))))


def percent(share: float) -> str:
    """Of `best_guess`, in words: rounded up, and never to 100 %, which would be certainty."""
    percent = math.ceil(share * 10_000 - 1e-9) / 100
    return f"{percent:g} %" if percent < 100 else "more than 99.99 %"


def _state(account: RunAccount) -> RunState:
    if account.closed is not None:
        return "closed"
    plan = account.terms.plan
    # A run without steps is one question: it is complete when that was charged.
    done = account.steps >= plan.steps if plan.steps else account.unsampled > 0
    return "complete" if done else "active"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
