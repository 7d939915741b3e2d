"""A site's account: the ledgers of its lineage, the runs that people decided on, and the last reply of each run.

    STORE/<lineage>/ledger.jsonl   what was spent; outlives this site's folder, and all sites with its records share it
    SITE/anchor.json               the last entry that this site has seen; anchor-<lineage>.json of shared records
    SITE/runs/<run>.json           a proposed run, and what a person decided
    SITE/replies/<run>.reply       the last reply of a run: the same instruction gets the same bytes, uncharged
                                   (a simulated site keeps it in memory: its seeded noise repeats it anyway)

Another lineage that shares records is declared in both ledgers; a run is then reserved and charged in each of them.
Not here: the format of a ledger (`shared.privacy.ledger`), and what a run needs to be admitted (`client.site`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from shared.errors import LedgerError, UsageError
from shared.privacy.budget import Lifetime, Price
from shared.privacy.ledger import LOCK_SECONDS, Charge, Ledger, RunAccount, RunTerms, make_folder, write_note

ANCHOR, RUNS, REPLIES = "anchor.json", "runs", "replies"

Decision = Literal["pending", "approved", "denied"]


@dataclass(frozen=True)
class ProposedRun:
    """A run that asked to be admitted, as `runs/<run>.json` keeps it.

    Attributes:
        config_digest, prompts_digest: what was decided on; another one under the same name is another run.
        summary: in words, for the person who decides.
    """

    run: str
    federation: str
    config_digest: str
    prompts_digest: str
    decision: Decision
    summary: list[str]
    asked: str


class Asked(Protocol):
    """What is charged and answered once: a federation's instruction, or a question of a person at the site."""

    @property
    def run_id(self) -> str: ...

    @property
    def server_round(self) -> int: ...

    @property
    def attempt(self) -> int: ...

    @property
    def digest(self) -> str: ...


@dataclass(frozen=True)
class KeptReply:
    """An answer that left, or was about to.

    Attributes:
        leaves: what leaves the site: an envelope (`shared.records.pack_envelope`), or between institutions its sealed
            form, which nobody here can open and which would be another one if it were sealed again.
        head: of the run, as the envelope holds it; whether its charge is in a ledger is asked by it.
        serial: of the aggregator's keys that it is sealed to; `None` of an envelope.
    """

    leaves: bytes
    head: str
    serial: int | None = None


class SiteAccount:
    """Opened once a process; everything that spends happens inside `with account.locked():`."""

    def __init__(self, folder: Path, *, store: Path, lineage: str) -> None:
        self.folder, self.store, self.lineage = folder, store, lineage
        self.ledger = Ledger(store / lineage, anchor=folder / ANCHOR)
        self._others: dict[str, Ledger] = {}
        self._in_memory: dict[str, tuple[str, KeptReply]] = {}  # of a simulated site: run to instruction and reply

    @property
    def durable(self) -> bool:
        return not self.ledger.lineage.simulated

    @property
    def ledgers(self) -> list[Ledger]:
        """Of all lineages that share records, this one first."""
        for name in self.ledger.overlaps:
            if name not in self._others:
                anchor = self.folder / f"anchor-{name}.json"
                known = anchor.exists()
                self._others[name] = Ledger(self.store / name, anchor=anchor if known else None)
                if not known:  # noted at first use
                    self._others[name].renew_anchor(anchor)
        return [self.ledger, *(self._others[name] for name in self.ledger.overlaps)]

    @contextmanager
    def locked(self, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """For one message. Ledgers are locked in the order of their names, so that two sites cannot wait in a ring."""
        self.ledger.refresh()
        with contextlib.ExitStack() as stack:
            for ledger in sorted(self.ledgers, key=lambda ledger: ledger.lineage.name):
                stack.enter_context(ledger.locked(wait_seconds=wait_seconds))
            yield

    def check_fits(self, terms: RunTerms, prices: Sequence[Price], lifetimes: Sequence[Lifetime]) -> None:
        """`BudgetExhausted` where the run passes the lifetime of any ledger that has not reserved it yet."""
        for ledger, price, lifetime in zip(self.ledgers, prices, lifetimes, strict=True):
            if terms.run not in ledger.runs:
                ledger.check_fits(terms, price, lifetime=lifetime)

    def reserve(self, terms: RunTerms, prices: Sequence[Price], lifetimes: Sequence[Lifetime]) -> RunAccount:
        """In every ledger of these records, or in none when it does not fit into one.

        Args:
            prices, lifetimes: of each of `ledgers`.
        """
        self.check_fits(terms, prices, lifetimes)
        # A crash may have left the run reserved in some ledgers of shared records; this one comes last.
        for ledger, price, lifetime in reversed(list(zip(self.ledgers, prices, lifetimes, strict=True))):
            if terms.run not in ledger.runs:
                through = "" if ledger is self.ledger else self.lineage
                ledger.reserve(terms, price, lifetime=lifetime, through=through)
        return self.ledger.runs[terms.run]

    def charge(
        self, terms: RunTerms, instruction: Asked, *, release: str, steps: int, nonce: bytes, again: bool
    ) -> Charge:  # fmt: skip
        """In every ledger of these records; this lineage's charge is returned."""
        charges = [
            ledger.charge(
                terms.run, server_round=instruction.server_round, attempt=instruction.attempt, release=release,
                steps=steps, instruction_digest=instruction.digest, nonce=nonce, again=again,
            )
            for ledger in reversed(self.ledgers)
        ]  # fmt: skip
        return charges[-1]

    def close(self, run: str, reason: str) -> bool:
        """Ends a run that has begun, in every ledger that it is charged to; False where there was nothing to end."""
        ended = False
        for ledger in self.ledgers:
            begun = ledger.runs.get(run)
            if begun is not None and begun.closed is None:
                ledger.close(run, reason)
                ended = True
        return ended

    # ---- decisions

    def proposed(self, run: str) -> ProposedRun | None:
        try:
            proposed = ProposedRun(**json.loads((self.folder / RUNS / f"{run}.json").read_text(encoding="utf-8")))
            return proposed if proposed.run == run else None  # a disk may not tell A from a
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise LedgerError(
                f"{self.folder / RUNS / f'{run}.json'} is damaged",
                hint="remove it: the run is then asked for, and decided on, again",
            ) from None

    def all_proposed(self) -> list[ProposedRun]:
        found = [self.proposed(path.stem) for path in sorted((self.folder / RUNS).glob("*.json"))]
        return sorted((run for run in found if run is not None), key=lambda run: run.asked)

    @property
    def pending(self) -> int:
        return sum(proposed.decision == "pending" for proposed in self.all_proposed())

    def write_proposed(self, proposed: ProposedRun) -> None:
        make_folder(self.folder / RUNS, durable=self.durable)
        path = self.folder / RUNS / f"{proposed.run}.json"
        write_note(path, json.dumps(asdict(proposed), indent=2, ensure_ascii=False) + "\n", durable=self.durable)

    def decide(self, run: str, decision: Decision) -> ProposedRun:
        """What a person decided; a run that has begun is ended by `deny`, and nothing of it comes back."""
        proposed = self.proposed(run)
        if proposed is None:
            known = ", ".join(p.run for p in self.all_proposed()) or "none"
            raise UsageError(f"no run '{run}' was proposed here", hint=f"proposed were: {known}")
        decided = ProposedRun(**{**asdict(proposed), "decision": decision})
        self.write_proposed(decided)
        return decided

    # ---- the last reply

    def stored_reply(self, instruction: Asked) -> KeptReply | None:
        """What already answered this very instruction, or `None`."""
        if not self.durable:
            known = self._in_memory.get(instruction.run_id)
            return known[1] if known is not None and known[0] == instruction.digest else None
        found = read_reply(self.folder / REPLIES / f"{instruction.run_id}.reply")
        return found[1] if found is not None and found[0] == instruction.digest else None

    def store_reply(self, instruction: Asked, kept: KeptReply) -> None:
        if not self.durable:
            self._in_memory[instruction.run_id] = (instruction.digest, kept)
            return
        make_folder(self.folder / REPLIES, durable=True)
        path = self.folder / REPLIES / f"{instruction.run_id}.reply"
        about = {
            "instruction": instruction.digest, "bytes": len(kept.leaves), "head": kept.head, "serial": kept.serial,
        }  # fmt: skip
        write_note(path, json.dumps(about).encode() + b"\n" + kept.leaves, durable=True)


def read_reply(path: Path) -> tuple[str, KeptReply] | None:
    """(digest of the instruction that it answers, the reply); `None` where there is none, or a damaged one."""
    try:
        header, _, content = path.read_bytes().partition(b"\n")
        about: dict[str, Any] = json.loads(header)
        digest, size, kept = about["instruction"], about["bytes"], KeptReply(content, about["head"], about["serial"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (digest, kept) if size == len(content) else None


def default_store() -> Path:
    """Where this machine keeps its lineages: one place, whatever folders sites have."""
    state = os.environ.get("FEDCANVAS_STATE")
    if state:
        return Path(state)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fedcanvas" / "lineages"
