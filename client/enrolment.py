"""Beginning a site: its folder, its policy, its lineage; and what other lineages on this machine hold already.

Two lineages may not hold the same record without saying so: each record leaves a keyed digest beside its lineage's
ledger, and a data set that shares one with another lineage is refused until that is declared. The key never leaves
the machine, so the digests tell nothing to who has only them.
A site comes about whole: digests, ledger and declared overlaps first, `site.toml` last.
Not covered: the same records in another format or resolution, a subject whose other images lie in another lineage,
and lineages on another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from client.account import ANCHOR
from client.policy import FILE as POLICY
from client.policy import SitePolicy
from client.settings import OVERFLOW_SHARE, SETTINGS, SiteConfig
from client.site import forget_site
from shared.data import ImageCaptionDataset
from shared.disk import locked
from shared.errors import ConfigError, LedgerError
from shared.privacy.budget import Price, fits, price_run
from shared.privacy.ledger import FILE as LEDGER
from shared.privacy.ledger import Ledger, Lineage, write_note

KEY, DIGESTS, LOCK = "key", "records", "lock"
DIGEST_BYTES = 16


def create_site(
    folder: Path, config: SiteConfig, policy: SitePolicy, lineage: Lineage, *, digests: Collection[bytes] = (),
    overlaps: Sequence[str] = (),
) -> Ledger:  # fmt: skip
    """A new site folder; `site.toml` comes last, so that its existence means that the rest is there.

    An existing lineage is joined: its ledger goes on, and its unit and ceiling are its own.

    Args:
        digests: of the site's records, for the lineage to keep.
        overlaps: other lineages of the store that share records with this one.
    Raises:
        ConfigError: there is a site already, or a lineage has another unit.
        LedgerError: a declared lineage is not there, or what was reserved on it does not fit here.
    """
    if (folder / SETTINGS).exists():
        raise ConfigError(f"{folder} holds a site already", hint="name a new folder, or edit its site.toml")
    store = folder / config.store
    others = [other_lineage(store, name, lineage) for name in overlaps]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = store / lineage.name
    durable = not lineage.simulated
    if has_ledger(place):
        ledger = Ledger(place)
        if ledger.lineage.unit != lineage.unit or ledger.lineage.simulated != lineage.simulated:
            raise _another_unit(ledger.lineage, lineage)
        if digests:
            add_records(ledger, digests)
    else:
        if (place / DIGESTS).exists():
            raise LedgerError(
                f"lineage '{lineage.name}' was here before: its records are noted in {place}, and its ledger is gone",
                hint="restore the ledger, or what was spent is forgotten; if an earlier `init` was killed before it"
                f" ended, and only then, remove {place / DIGESTS}",
            )
        if digests:
            keep_digests(digests, store, lineage.name)  # a ledger whose records are unknown would let others share them
        ledger = Ledger.create(place, lineage)
    ledger.renew_anchor(folder / ANCHOR)
    if others:
        declare_overlaps(ledger, others)
    write_note(folder / POLICY, policy.to_toml(), durable=durable)
    config.write(folder)
    return ledger


def remove_simulated_site(folder: Path) -> None:
    """Ends a simulated site with its ledger; a deployed one is never removed by this."""
    if (folder / SETTINGS).is_file() and SiteConfig.read(folder).simulated_seed is None:
        raise ConfigError(f"{folder} is a deployed site", hint="name another folder for the simulation")
    forget_site(folder)
    shutil.rmtree(folder)


@contextmanager
def whole_or_nothing(folder: Path, place: Path) -> Iterator[None]:
    """Removes what appeared in a site's `folder` and its lineage's `place` when no site comes about.

    A ledger with any entry besides its first stays, whatever happens: something was decided or spent on it.
    """
    before = {path: set(os.listdir(path)) if path.is_dir() else None for path in (folder, place)}
    try:
        yield
    except BaseException:  # Ctrl-C too
        if not (folder / SETTINGS).exists():
            for path, known in before.items():
                if path == place and _lines(place) > 1:
                    continue
                _remove_new(path, known)
        raise


def store_locked(store: Path) -> AbstractContextManager[None]:
    """One enrolment at a time: between the search for shared records and keeping the digests none else may come.

    Raises:
        LedgerError: another one is at work.
    """
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    return locked(store / LOCK, LedgerError(f"another enrolment is at work in {store}", hint="wait until it ends"))


def declare_overlaps(ledger: Ledger, others: Sequence[Ledger]) -> None:
    """Notes in each ledger that it shares records with the other, and carries over what was reserved there before.

    A record of both has been in the runs of both. So each ledger takes over the other's earlier runs, reserved whole
    and charged as far as they were, and from then on every run is charged in both. Done again after a crash, it goes
    on where it stopped.

    Raises:
        LedgerError: the earlier runs do not fit, or both ledgers have a run of one name; nothing is written.
    """
    with contextlib.ExitStack() as stack:
        for each in sorted([ledger, *others], key=lambda each: each.lineage.name):
            stack.enter_context(each.locked())
        pairs = [
            (here, there, _prices_of_earlier_runs(here, there))
            for other in others
            # Both ways until both say so: between a crash and now, the one that did not may have begun a run alone.
            if not (other.lineage.name in ledger.overlaps and ledger.lineage.name in other.overlaps)
            for here, there in ((ledger, other), (other, ledger))
        ]
        for here, there, prices in pairs:
            for run, price in prices.items():
                _carry_over(here, there, run, price)
            if there.lineage.name not in here.overlaps:
                here.note("overlap", lineage=there.lineage.name)


def _prices_of_earlier_runs(here: Ledger, there: Ledger) -> dict[str, Price]:
    """What each run of `there` costs `here`; checked to fit before anything is written."""
    lifetime, prices, reserved = here.lineage.lifetime, {}, here.reserved
    for run, account in there.runs.items():
        if there.entries[account.seq]["through"] == here.lineage.name:
            continue  # it came from here
        known = here.runs.get(run)
        if known is None:
            overflow_share = OVERFLOW_SHARE if account.terms.rows_cap is not None else 0.0
            prices[run] = price_run(account.terms.plan, lifetime, overflow_share=overflow_share)
            if not fits(prices[run], reserved, lifetime):
                raise LedgerError(
                    f"lineage '{there.lineage.name}' has reserved {len(there.runs)} run(s) already, and with run {run}"
                    f" they pass what '{here.lineage.name}' may spend: epsilon {lifetime.max_epsilon:g} at delta"
                    f" {lifetime.delta:.0e}",
                    hint="records of both have spent it: join that lineage, or name a larger --max-epsilon",
                )
            reserved.append(prices[run])
        elif here.entries[known.seq]["through"] == there.lineage.name:
            prices[run] = known.price  # carried over, perhaps not to the end
        else:
            raise LedgerError(
                f"lineages '{here.lineage.name}' and '{there.lineage.name}' were both in run {run}, so what it cost a"
                " record of both is in neither ledger",
                hint="make one lineage of the records of both",
            )
    return prices


def _carry_over(here: Ledger, there: Ledger, run: str, price: Price) -> None:
    account = there.runs[run]
    taken = here.runs.get(run) or here.reserve(account.terms, price, through=there.lineage.name)
    missing = account.steps - taken.steps
    unsampled = "moments" if account.terms.plan.steps else "query"
    for release, steps, due in (
        (unsampled, 0, account.unsampled > taken.unsampled), ("gradient", missing, missing > 0),
    ):  # fmt: skip
        if due:
            here.charge(
                run, server_round=0, attempt=1, release=release, steps=steps, instruction_digest="",
                nonce=os.urandom(16), again=True,
            )  # fmt: skip
    if account.closed is not None and taken.closed is None:
        here.close(run, account.closed)


def record_digests(dataset: ImageCaptionDataset, store: Path) -> set[bytes]:
    """One keyed digest for each picture, over its prepared pixels."""
    key = _machine_key(store)
    return {hmac.digest(key, image.tobytes(), hashlib.sha256)[:DIGEST_BYTES] for image in dataset.images}


def sharing_lineages(digests: Collection[bytes], store: Path, *, but: str) -> dict[str, int]:
    """Lineages of this machine that hold some of these records, and how many."""
    found = {}
    for path in sorted(store.glob(f"*/{DIGESTS}")):
        shared = len(set(digests).intersection(_read_digests(path)))
        if path.parent.name != but and shared:
            found[path.parent.name] = shared
    return found


def check_sharing(
    digests: Collection[bytes], store: Path, *, lineage: str, declared: Collection[str]
) -> dict[str, int]:  # fmt: skip
    """How many records each declared lineage shares; `LedgerError` where one shares some and is not declared."""
    shared = sharing_lineages(digests, store, but=lineage)
    for name, count in shared.items():
        if name not in declared:
            raise LedgerError(
                f"{count:,} of these {len(digests):,} pictures are records of lineage '{name}' already",
                hint=f"take that lineage with --lineage {name}, so that one account holds all that is spent on them;"
                f" or say that the two overlap: --shares-records-with {name}, and each run is charged in both",
            )
    return shared


def check_declared(store: Path, name: str, *, lineage: str) -> None:
    """`LedgerError` unless `name` is another lineage of the store."""
    known = sorted(path.parent.name for path in store.glob(f"*/{LEDGER}"))
    if name == lineage or name not in known:
        others = [other for other in known if other != lineage]
        raise LedgerError(
            f"there is no other lineage '{name}' in {store}",
            hint=f"records can be shared with: {', '.join(others) or 'none, it is the only one'}",
        )


def other_lineage(store: Path, name: str, lineage: Lineage) -> Ledger:
    """The ledger of a lineage that is declared to share records with `lineage`."""
    check_declared(store, name, lineage=lineage.name)
    other = Ledger(store / name)
    if other.lineage.unit != lineage.unit or other.lineage.simulated != lineage.simulated:
        raise _another_unit(other.lineage, lineage)
    return other


def keep_digests(digests: Collection[bytes], store: Path, lineage: str) -> int:
    """Adds to what the lineage holds and returns how many were new.

    A record that was withdrawn stays: what was spent on it stays spent.
    """
    path = store / lineage / DIGESTS
    known = set(_read_digests(path)) if path.exists() else set()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if new := set(digests) - known:
        write_note(path, b"".join(sorted(known | new)), durable=True)
    return len(new)


def add_records(ledger: Ledger, digests: Collection[bytes]) -> int:
    """Records that come to a lineage later; the ledger notes that, and not how many they are."""
    store, name = ledger.folder.parent, ledger.lineage.name
    with ledger.locked():
        added = keep_digests(digests, store, name)
        if added:
            held = (store / name / DIGESTS).read_bytes()
            ledger.note("records", change="added", sha256=hashlib.sha256(held).hexdigest())
    return added


def _read_digests(path: Path) -> Iterable[bytes]:
    content = path.read_bytes()
    return (content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES))


def _machine_key(store: Path) -> bytes:
    path = store / KEY
    if not path.exists():
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_note(path, os.urandom(32), durable=True)
    return path.read_bytes()


def _another_unit(known: Lineage, wanted: Lineage) -> ConfigError:
    if known.simulated != wanted.simulated:
        return ConfigError(
            f"lineage '{known.name}' is {'' if known.simulated else 'not '}simulated, and this site is the other",
            hint="simulated sites have their own store",
        )
    return ConfigError(
        f"lineage '{known.name}' has the unit '{known.unit}' and this site wants '{wanted.unit}'",
        hint=f"units are never mixed in one ledger, nor over shared records: --unit {known.unit}",
    )


def has_ledger(place: Path) -> bool:
    """Whether a lineage was opened in `place`; a first line that a crash left unfinished opened none."""
    return _lines(place) > 0


def _lines(place: Path) -> int:
    try:
        return (place / LEDGER).read_bytes().count(b"\n")
    except OSError:
        return 0


def _remove_new(path: Path, known: set[str] | None) -> None:
    """What is in `path` and was not, and `path` itself where it was not there."""
    if not path.is_dir():
        return
    for name in set(os.listdir(path)) - (known or set()):
        inner = path / name
        if inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner, ignore_errors=True)
        else:
            inner.unlink(missing_ok=True)
    if known is None:
        with contextlib.suppress(OSError):
            path.rmdir()
