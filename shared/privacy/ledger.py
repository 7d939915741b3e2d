"""A lineage's account on disk: what may be spent on one named set of records in its lifetime, and what was.

    ledger.jsonl   one entry a line, appended and never changed; docs/ledger.md is its written format
    lock           held by the process that writes; the kernel frees it when that process ends, however it ends

An entry is on disk before what it allows begins: a run is reserved whole before its first release, a release is
charged before training and committed before its reply leaves. So a crash counts as spent, never the other way.
Entries are chained by SHA-256, and an anchor (the last entry's number and hash) is kept in the site's folder, apart
from the ledger: an edited line, a ledger cut short or an older copy put in its place does not fit and is refused.

What cannot be noticed here: ledger and anchor put back together to an older state, a machine that was cloned, a disk
that loses what it confirmed, and the same records under a second name on another machine. A server that remembers
the head of a run and shows it back notices the first two while that run lasts (`client.site`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared import disk
from shared.disk import fsync_folder
from shared.errors import BudgetExhausted, LedgerError
from shared.plain import plain
from shared.privacy.accounting import ADJACENCY
from shared.privacy.budget import (
    Left,
    Lifetime,
    Price,
    fits,
    steps_that_fit,
    what_is_left,
)
from shared.privacy.plan import PrivacyPlan

FORMAT = 1
FILE, LOCK = "ledger.jsonl", "lock"
BEFORE_THE_FIRST = "0" * 64
HEAD = b'{"hash":"'  # every line begins so; 64 hex digits and `",` follow
BODY = len(HEAD) + 64 + 2  # where what is hashed begins
LOCK_SECONDS = 30.0

MECHANISMS = {True: "poisson-subsampled gaussian", False: "none"}
# What may be charged: a step's gradient sum or the update of several, the warm start's moments, a noised answer.
UNSAMPLED = ("moments", "query")


@dataclass(frozen=True)
class Lineage:
    """A named set of records and one privacy unit; it outlives folders and federations.

    Attributes:
        simulated: no fsync, and a ceiling may be infinite; never true of private records.
    """

    name: str
    unit: str
    lifetime: Lifetime
    simulated: bool = False


@dataclass(frozen=True)
class RunTerms:
    """All that identifies a run and bounds what it may release; frozen when it is reserved.

    Attributes:
        rows_cap: rows that the work of a step is padded to; `None` where it is not.
    """

    run: str
    federation: str
    config_digest: str
    prompts_digest: str
    code_digest: str
    plan: PrivacyPlan
    rows_cap: int | None = None


@dataclass
class RunAccount:
    """One run as the ledger holds it.

    Attributes:
        furthest: the last round that was charged, and its highest attempt.
    """

    terms: RunTerms
    price: Price
    seq: int
    time: str
    steps: int = 0
    unsampled: int = 0
    charges: int = 0
    commits: int = 0
    furthest: tuple[int, int] = (0, 0)
    head: str = BEFORE_THE_FIRST
    heads: set[str] = field(default_factory=set)
    closed: str | None = None

    @property
    def epsilon_spent(self) -> float:
        """Of what was charged so far, at the price's delta."""
        if self.charges == 0:
            return 0.0
        return self.price.epsilon_after(self.steps)


@dataclass(frozen=True)
class Charge:
    """A release that was charged and is about to be made.

    Attributes:
        head: of the run, after this charge: names it and all charges of the run before it.
    """

    seq: int
    run: str
    server_round: int
    release: str
    steps: int
    head: str
    epsilon_before: float
    epsilon_after: float


class Ledger:
    """The account in `folder`. Reading needs nothing; what writes does it inside `with ledger.locked():`."""

    def __init__(self, folder: Path, *, anchor: Path | None = None) -> None:
        """
        Args:
            anchor: the site's own note of the last entry; checked on every reading, renewed on every entry.
        Raises:
            LedgerError: there is none, it is damaged, or it is behind its anchor.
        """
        self.folder, self.path, self.anchor = folder, folder / FILE, anchor
        self._locked = self._anchor_is_due = False
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._state: tuple[int, int, int] | None = None
        self._torn = b""
        self.hashes: list[str] = []
        self.entries: list[dict[str, Any]] = []
        self.runs: dict[str, RunAccount] = {}
        self.overlaps: list[str] = []
        self.lineage: Lineage

    # ---- appearing, being read

    @classmethod
    def create(cls, folder: Path, lineage: Lineage, *, anchor: Path | None = None) -> Ledger:
        """A new account; `LedgerError` when there is one already."""
        if (folder / FILE).exists() and b"\n" in (folder / FILE).read_bytes():
            raise LedgerError(
                f"there is a ledger of lineage '{lineage.name}' already: {folder / FILE}",
                hint="a lineage has one ledger for its lifetime; use it, or choose the name of other records",
            )
        if math.isinf(lineage.lifetime.max_epsilon) and not lineage.simulated:
            raise LedgerError("a ledger without a ceiling is no ledger", hint="name a finite lifetime epsilon")
        make_folder(folder, durable=not lineage.simulated)
        ledger = cls.__new__(cls)
        ledger.folder, ledger.path, ledger.anchor = folder, folder / FILE, anchor
        ledger._locked = ledger._anchor_is_due = False
        ledger._forget()
        ledger.lineage = lineage
        with _lock(folder, 0.0):
            ledger._locked = True
            (folder / FILE).unlink(missing_ok=True)  # a first line that a crash left unfinished
            ledger._append(
                "opened", format=FORMAT, lineage=lineage.name, unit=lineage.unit, adjacency=ADJACENCY,
                simulated=lineage.simulated, nonce=os.urandom(16).hex(), **asdict(lineage.lifetime),
            )  # fmt: skip
            ledger._write_anchor()
            ledger._locked = False
        return cls(folder, anchor=anchor)

    def refresh(self, *, check_anchor: bool = True) -> None:
        """Reads what changed on disk; `LedgerError` when it does not continue what was known."""
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                state = (about.st_ino, about.st_size, about.st_mtime_ns)
                if state != self._state:
                    known, before = self.hashes, dict(self.__dict__)
                    try:
                        self._forget()
                        self._read(file.read())
                        if known and self.hashes[len(known) - 1 : len(known)] != known[-1:]:
                            raise _behind(self.path, len(known) - 1)
                    except BaseException:
                        self.__dict__.update(before)  # what was known stays known: the next reading compares again
                        raise
                    self._state = state
        except FileNotFoundError:
            raise LedgerError(
                f"there is no ledger at {self.path}",
                hint="`fedcanvas client init` opens one; if it was moved or lost, restore it: never begin a new one"
                " for the same records",
            ) from None
        except OSError as error:
            raise LedgerError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if check_anchor:
            self._check_anchor()

    @contextmanager
    def locked(self, *, wait_seconds: float = LOCK_SECONDS) -> Iterator[None]:
        """The right to write, for one message: `LedgerError` when another process keeps it longer than the wait."""
        with _lock(self.folder, wait_seconds):
            self._locked = True
            try:
                self.refresh()
                try:
                    yield
                finally:
                    if self._anchor_is_due:
                        self._write_anchor()
            finally:
                self._locked = False

    # ---- what is admitted

    @property
    def reserved(self) -> list[Price]:
        return [account.price for account in self.runs.values()]

    @property
    def left(self) -> Left:
        return what_is_left(self.reserved, self.lineage.lifetime)

    def check_fits(self, terms: RunTerms, price: Price, *, lifetime: Lifetime | None = None) -> None:
        """`BudgetExhausted`, with the run that would still fit, where this one would pass the lifetime.

        Args:
            lifetime: a lower one that the site's policy sets; default is the lineage's own.
        """
        lifetime = lifetime or self.lineage.lifetime
        if fits(price, self.reserved, lifetime):
            return
        left = what_is_left(self.reserved, lifetime)
        fitting = f"a run of {left} would still fit" if left.epsilon > 0 and left.delta > 0 else "nothing is left"
        steps = steps_that_fit(price, self.reserved, lifetime)
        if 0 < steps < terms.plan.reserved_steps:
            fitting += f", and so would the first {steps} of this run's {terms.plan.reserved_steps} steps"
        raise BudgetExhausted(
            f"run {terms.run} costs epsilon {price.epsilon:.3g} at delta {price.delta:.1e}, and lineage"
            f" '{self.lineage.name}' has {left} left of {lifetime.max_epsilon:g} at {lifetime.delta:.0e}",
            hint=fitting,
        )

    def reserve(
        self, terms: RunTerms, price: Price, *, lifetime: Lifetime | None = None, through: str = ""
    ) -> RunAccount:  # fmt: skip
        """Reserves a run whole, durably, before anything of it is released.

        Args:
            through: the lineage on which the run takes place, where this one only shares records with it.
        Raises:
            BudgetExhausted: it would pass the lifetime; nothing is written.
        """
        if terms.run in self.runs:
            raise LedgerError(f"run {terms.run} is reserved already")
        self.check_fits(terms, price, lifetime=lifetime)
        self._append(
            "run", run=terms.run, federation=terms.federation, config_digest=terms.config_digest,
            prompts_digest=terms.prompts_digest, code_digest=terms.code_digest,
            mechanism=MECHANISMS[terms.plan.private], plan=terms.plan.to_dict(), rows_cap=terms.rows_cap,
            adjacency=ADJACENCY, through=through, **asdict(price),
        )  # fmt: skip
        return self.runs[terms.run]

    def charge(
        self, run: str, *, server_round: int, attempt: int, release: str, steps: int, instruction_digest: str,
        nonce: bytes, again: bool = False,
    ) -> Charge:  # fmt: skip
        """Counts a release as spent, durably; call it before training.

        Args:
            release: "gradient", "update", "moments" or "query".
            steps: subsampled steps of it; 0 for an unsampled one.
            nonce: 16 random bytes that make the run's head one that nobody else's copy can have.
            again: seeded noise repeats an unsampled release bit for bit, so it may be charged a second time.
        Raises:
            BudgetExhausted: the run's reservation does not cover it; nothing is written.
        """
        account = self.runs[run]
        plan = account.terms.plan
        if account.closed is not None:
            raise BudgetExhausted(f"run {run} was closed here: {account.closed}", hint="a closed run stays closed")
        if account.steps + steps > plan.reserved_steps:
            raise BudgetExhausted(
                f"round {server_round} of run {run} needs {steps} more steps, {account.steps} of"
                f" {plan.reserved_steps} reserved steps are spent",
                hint="the slack for repeated rounds is used up; the federation must begin a new run",
            )
        if release in UNSAMPLED:
            if plan.private and plan.warm_start_noise_multiplier is None:
                raise BudgetExhausted(f"run {run} has no unsampled release reserved")
            if account.unsampled and not again:
                raise BudgetExhausted(
                    f"the {release} of run {run} were released or begun once, and one release is reserved",
                    hint="the federation must begin a new run",
                )
        before = account.epsilon_spent
        self._append(
            "charge", run=run, server_round=server_round, attempt=attempt, release=release,
            mechanism=MECHANISMS[plan.private] if release not in UNSAMPLED else "gaussian",
            sampling_rate=1.0 if release in UNSAMPLED else plan.sampling_rate,
            noise_multiplier=plan.warm_start_noise_multiplier if release in UNSAMPLED else plan.noise_multiplier,
            clipping_norm=1.0 if release == "moments" else plan.clipping_norm, steps=steps, unit=plan.unit,
            adjacency=ADJACENCY, code_digest=account.terms.code_digest, config_digest=account.terms.config_digest,
            instruction_digest=instruction_digest, nonce=nonce.hex(),
        )  # fmt: skip
        return Charge(
            len(self.entries) - 1, run, server_round, release, steps, account.head, before, account.epsilon_spent
        )

    def commit(self, charge: Charge, *, size: int, sha256: str, fields: list[list[Any]]) -> None:
        """Notes what is about to leave for `charge`, durably; call it last, before the reply is handed over.

        No clock here: how long training took depends on the records.
        """
        self._append(
            "commit", of=charge.seq, run=charge.run, server_round=charge.server_round, bytes=size, sha256=sha256,
            fields=fields, epsilon_before=charge.epsilon_before, epsilon_after=charge.epsilon_after,
        )  # fmt: skip

    def resend(self, run: str, *, server_round: int, size: int, sha256: str) -> None:
        """Notes that the same bytes leave again, at no cost."""
        self._append("resent", run=run, server_round=server_round, bytes=size, sha256=sha256)

    def close(self, run: str, reason: str) -> None:
        """No further release of `run`; nothing of its price comes back."""
        if run not in self.runs:
            raise LedgerError(f"no run {run} in {self.path}", hint="`fedcanvas client runs` lists them")
        self._append("closed", run=run, reason=reason)

    def note(self, kind: str, **fields: Any) -> None:
        """What a person decides about the lineage: "ceiling", "overlap" or "records"."""
        assert kind in ("ceiling", "overlap", "records"), kind
        self._append(kind, **fields)

    # ---- lines

    def _append(self, kind: str, **fields: Any) -> None:
        assert self._locked, "an entry was written without the lock"
        if self._state is None and self.entries:
            self.refresh(check_anchor=False)  # an entry failed, and may have left a part of itself
        if self._torn:
            self._cut_torn_line()
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        last = self.entries[-1]["time"] if self.entries else ""
        entry = {"kind": kind, "seq": len(self.entries), "time": max(now, last), "previous": self.head, **fields}
        if now < last:
            entry["clock_behind"] = now  # spending does not depend on clocks; the order of entries is what counts
        if kind == "commit":
            entry["time"] = last
        body = json.dumps(plain(entry), separators=(",", ":"), sort_keys=True)[1:].encode()
        line = HEAD + hashlib.sha256(body).hexdigest().encode() + b'",' + body + b"\n"
        durable = not self.lineage.simulated
        try:
            appeared = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                before = os.fstat(descriptor).st_size
                if self._state is not None and before != self._state[1]:
                    # The lock keeps others out, unless somebody removed its file or the disk is a network's.
                    raise OSError(errno.EBUSY, "another process has written to it")
                try:
                    _write_all(descriptor, line)
                    if durable:
                        os.fsync(descriptor)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(descriptor, before)
                    raise
                about = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if appeared and durable:
                fsync_folder(self.folder)
        except OSError as error:
            self._state = None  # what is on disk now is read again before anything else is decided
            raise _unwritable(self.path, error) from None
        self._apply(entry, line[len(HEAD) : len(HEAD) + 64].decode())
        self._state = (about.st_ino, about.st_size, about.st_mtime_ns)
        if durable:
            self._write_anchor()
        else:
            self._anchor_is_due = True  # once a message: thousands of simulated sites share one disk

    def _cut_torn_line(self) -> None:
        """A line that a crash left unfinished was never confirmed to anyone; it is cut, and that is noted."""
        torn, self._torn = self._torn, b""
        try:
            os.truncate(self.path, self.path.stat().st_size - len(torn))
            about = self.path.stat()
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._state = (about.st_ino, about.st_size, about.st_mtime_ns)
        self._append("repaired", cut_bytes=len(torn), cut_sha256=hashlib.sha256(torn).hexdigest())

    def _read(self, content: bytes) -> None:
        *lines, torn = content.split(b"\n")
        if not torn and lines and b"\0" in lines[-1]:  # a power cut can leave zeros where a line was being written
            torn = lines.pop() + b"\n"
        self._torn = torn
        previous = BEFORE_THE_FIRST
        for place, line in enumerate(lines):
            digest, body = line[len(HEAD) : len(HEAD) + 64].decode("ascii", "replace"), line[BODY:]
            framed = line.startswith(HEAD) and line[BODY - 2 : BODY] == b'",'
            if not framed or hashlib.sha256(body).hexdigest() != digest:
                raise _edited(self.path, place)
            try:
                entry = json.loads(b"{" + body)
                if entry["previous"] != previous or entry["seq"] != place:
                    raise _edited(self.path, place)
                self._apply(entry, digest)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise _edited(self.path, place) from None
            previous = digest
        if not lines:
            raise LedgerError(
                f"{self.path} is empty", hint="restore it from a copy: what was spent is read from it"
            )

    def _apply(self, entry: dict[str, Any], digest: str) -> None:
        """What an entry means; the one place for entries from disk and new ones."""
        kind = entry["kind"]
        if kind == "opened":
            if entry["format"] != FORMAT:
                raise LedgerError(
                    f"{self.path} has format {entry['format']}, this release reads {FORMAT}",
                    hint="use the release that wrote it, or a later one",
                )
            self.lineage = Lineage(entry["lineage"], entry["unit"], _lifetime(entry), bool(entry["simulated"]))
        elif kind == "run":
            terms = RunTerms(
                entry["run"], entry["federation"], entry["config_digest"], entry["prompts_digest"],
                entry["code_digest"], PrivacyPlan.from_dict(entry["plan"]), entry["rows_cap"],
            )  # fmt: skip
            renyi = None if entry["renyi"] is None else float(entry["renyi"])
            rows = tuple(tuple(row) for row in entry["rows"])
            price = Price(
                float(entry["epsilon"]), float(entry["delta"]), renyi, rows, float(entry["overflow"]),
                float(entry["overflow_epsilon"]),
            )  # fmt: skip
            self.runs[terms.run] = RunAccount(terms, price, entry["seq"], entry["time"])
        elif kind == "charge":
            account = self.runs[entry["run"]]
            account.charges += 1
            account.furthest = max(account.furthest, (entry["server_round"], entry["attempt"]))
            account.steps += entry["steps"]
            account.unsampled += entry["release"] in UNSAMPLED
            account.head = run_head(account.head, entry)
            account.heads.add(account.head)
        elif kind == "commit":
            self.runs[entry["run"]].commits += 1
        elif kind == "closed":
            self.runs[entry["run"]].closed = entry["reason"]
        elif kind == "ceiling":
            self.lineage = Lineage(self.lineage.name, self.lineage.unit, _lifetime(entry), self.lineage.simulated)
        elif kind == "overlap":
            self.overlaps.append(entry["lineage"])
        elif kind not in ("resent", "records", "repaired"):
            raise _edited(self.path, entry["seq"])
        self.entries.append(entry)
        self.hashes.append(digest)

    @property
    def head(self) -> str:
        return self.hashes[-1] if self.hashes else BEFORE_THE_FIRST

    # ---- the anchor

    def renew_anchor(self, anchor: Path) -> None:
        """Trusts the ledger as it is now and notes its end in `anchor`, which is checked from then on.

        For a site's first look at a ledger; later only a person decides that.
        """
        with _lock(self.folder, LOCK_SECONDS):
            self.refresh(check_anchor=False)
            self.anchor = anchor
            self._write_anchor()

    def _check_anchor(self) -> None:
        if self.anchor is None:
            return
        try:
            anchor = json.loads(self.anchor.read_text(encoding="ascii"))
            name, seq, digest = str(anchor["lineage"]), int(anchor["seq"]), str(anchor["hash"])
        except (OSError, ValueError, KeyError, TypeError):
            raise LedgerError(
                f"the anchor {self.anchor} is missing or damaged, so an older ledger could not be told from this one",
                hint="when you are sure that no entry is missing: `fedcanvas client ledger SITE_DIR --renew-anchor`",
            ) from None
        if name != self.lineage.name:
            raise LedgerError(f"the anchor {self.anchor} is of lineage '{name}', the ledger of '{self.lineage.name}'")
        if self.hashes[seq : seq + 1] != [digest]:
            raise _behind(self.path, seq)

    def _write_anchor(self) -> None:
        self._anchor_is_due = False
        if self.anchor is not None:
            content = {"lineage": self.lineage.name, "seq": len(self.entries) - 1, "hash": self.head}
            write_note(self.anchor, json.dumps(content) + "\n", durable=not self.lineage.simulated)


def run_head(before: str, charge: Mapping[str, Any]) -> str:
    """Names a run's charges in order: SHA-256 over the last head and the charge's round, attempt, kind and nonce.

    Nothing in it depends on records or clocks; the nonce makes the heads of two copies of a ledger differ.
    """
    parts = [before, *(charge[name] for name in ("server_round", "attempt", "release", "instruction_digest", "nonce"))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_folder(path: Path, *, durable: bool) -> None:
    """A folder of the site with all above it; for its owner only. Each new name is on disk before this returns."""
    try:
        disk.make_folder(path, durable=durable, mode=0o700)
    except OSError as error:
        raise _unwritable(path, error) from None


def write_note(path: Path, content: str | bytes, *, durable: bool) -> None:
    """A small file of the site, whole or as it was before; readable by its owner only."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, content.encode() if isinstance(content, str) else content)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        if durable:
            fsync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None


@contextmanager
def _lock(folder: Path, wait_seconds: float) -> Iterator[None]:
    until = time.monotonic() + wait_seconds
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(folder / LOCK, error) from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                    raise LedgerError(
                        f"the ledger in {folder} is in use by process {holder or 'unknown'}",
                        hint="wait until it ends, or stop it; the lock of a process that died is free by itself",
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                raise _unwritable(folder / LOCK, error) from None
        with contextlib.suppress(OSError):  # the number is for people; a full disk must not cost the lock
            number = str(os.getpid()).encode()
            if os.pread(descriptor, 32, 0) != number:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, number, 0)
        yield
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _lifetime(entry: Mapping[str, Any]) -> Lifetime:
    return Lifetime(float(entry["max_epsilon"]), float(entry["delta"]), entry["filter"], entry["order"])


def _edited(path: Path, place: int) -> LedgerError:
    return LedgerError(
        f"line {place + 1} of {path} was changed or does not follow the line before it",
        hint="restore the ledger from a copy; until then the site answers nothing",
    )


def _behind(path: Path, seq: int) -> LedgerError:
    return LedgerError(
        f"{path} is behind what this site has noted: entry {seq} is missing or another one",
        hint="an older copy was put back, or lines were removed: restore the newest ledger; what was spent since"
        " cannot be forgotten",
    )


def _unwritable(path: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{path} cannot be written: {error.strerror or error}",
        hint="nothing leaves the site until it can: free space, or make the folder writable",
    )
