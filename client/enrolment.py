"""Beginning a site: its folder, its policy, its lineage; and what other lineages on this machine hold already.

Two lineages may not hold the same record without saying so: each record leaves a keyed digest beside its lineage's
ledger, and a data set that shares one with another lineage is refused until that is declared. The key never leaves
the machine, so the digests tell nothing to who has only them.
Not covered: the same records in another format or resolution, and lineages on another machine.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from client.account import ANCHOR
from client.policy import FILE as POLICY
from client.policy import SitePolicy
from client.site import SETTINGS, SiteConfig, forget_site
from shared.data import ImageCaptionDataset
from shared.errors import ConfigError, LedgerError
from shared.privacy.ledger import Ledger, Lineage, write_note

KEY, DIGESTS = "key", "records"
DIGEST_BYTES = 16


def create_site(folder: Path, config: SiteConfig, policy: SitePolicy, lineage: Lineage) -> Ledger:
    """A new site folder; `site.toml` comes last, so that its existence means that the rest is there.

    An existing lineage is joined: its ledger goes on, and its unit and ceiling are its own.

    Raises:
        ConfigError: there is a site already, or the lineage has another unit.
    """
    if (folder / SETTINGS).exists():
        raise ConfigError(f"{folder} holds a site already", hint="name a new folder, or edit its site.toml")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    place = folder / config.store / lineage.name
    durable = not lineage.simulated
    try:
        ledger = Ledger(place)
    except LedgerError:
        ledger = Ledger.create(place, lineage)
    if ledger.lineage.unit != lineage.unit or ledger.lineage.simulated != lineage.simulated:
        raise ConfigError(
            f"lineage '{lineage.name}' has the unit '{ledger.lineage.unit}' and this site wants '{lineage.unit}'",
            hint="units are never mixed in one ledger: take the lineage's own",
        )
    ledger.anchor = folder / ANCHOR
    with ledger.locked(fresh_anchor=True):
        pass
    write_note(folder / POLICY, policy.to_toml(), durable=durable)
    config.write(folder)
    return ledger


def remove_simulated_site(folder: Path) -> None:
    """Ends a simulated site with its ledger; a deployed one is never removed by this."""
    if (folder / SETTINGS).is_file() and SiteConfig.read(folder).simulated_seed is None:
        raise ConfigError(f"{folder} is a deployed site", hint="name another folder for the simulation")
    forget_site(folder)
    shutil.rmtree(folder)


def record_digests(dataset: ImageCaptionDataset, store: Path) -> set[bytes]:
    """One keyed digest for each picture, over its prepared pixels."""
    key = _machine_key(store)
    return {hmac.digest(key, image.tobytes(), hashlib.sha256)[:DIGEST_BYTES] for image in dataset.images}


def sharing_lineages(digests: set[bytes], store: Path, *, but: str) -> dict[str, int]:
    """Lineages of this machine that hold some of these records, and how many."""
    found = {}
    for path in sorted(store.glob(f"*/{DIGESTS}")):
        shared = len(digests & set(_read_digests(path)))
        if path.parent.name != but and shared:
            found[path.parent.name] = shared
    return found


def keep_digests(digests: set[bytes], store: Path, lineage: str) -> None:
    """Adds to what the lineage holds; a record that was withdrawn stays: what was spent on it stays spent."""
    path = store / lineage / DIGESTS
    known = set(_read_digests(path)) if path.exists() else set()
    write_note(path, b"".join(sorted(known | digests)), durable=True)


def _read_digests(path: Path) -> Iterable[bytes]:
    content = path.read_bytes()
    return (content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES))


def _machine_key(store: Path) -> bytes:
    path = store / KEY
    if not path.exists():
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_note(path, os.urandom(32), durable=True)
    return path.read_bytes()
