"""Whose data are these? What a site or a lineage of this machine holds is not public, whatever path it is named by.

A path is a site's when it is the site's folder or lies in one, when a site nearby names it as its data, and when the
pictures there are records of a lineage in this machine's store (`client.enrolment`). Simulated sites hold public data
and are passed over. What looks like a site and cannot be read counts as one.
Not covered: a site of another machine or user, records that no lineage was told of, and pictures that were changed in
any way, were it one pixel. Nothing is written, and nothing here says how many records are shared.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from client.account import default_store
from client.data_check import open_as_training
from client.enrolment import KEY, record_digests, sharing_lineages
from client.settings import SETTINGS, SiteConfig
from shared.data import unseen_split
from shared.data.source import Split
from shared.errors import ConfigError, DataError, LedgerError
from shared.privacy.ledger import Ledger

LEVELS = 3  # folders above the data in which sites are looked for
SIDE, CHANNELS = 32, 3  # of the pictures that lineages keep digests of


def site_that_holds(path: Path) -> str | None:
    """See `shared.private_data.site_that_holds`."""
    if not path.exists():
        return None
    place = path.resolve()
    for folder in (place, *place.parents):
        if (folder / SETTINGS).is_file():
            config = _settings(folder)
            if config is None:
                return f"{folder}, whose {SETTINGS} cannot be read"
            if config.simulated_seed is None:
                return f"site {config.site_id} ({folder})"
    stores = {default_store().absolute()}
    for folder in _sites_near(place):
        config = _settings(folder)
        if config is None or config.simulated_seed is not None:
            continue
        stores.add((folder / config.store).absolute())
        data = (folder / config.data).resolve()
        if place == data or place in data.parents or data in place.parents:
            return f"site {config.site_id} ({folder})"
    for store in sorted(stores):
        lineage = _lineage_that_holds(place, store)
        if lineage is not None:
            return f"lineage '{lineage}' in {store}"
    return None


def _settings(folder: Path) -> SiteConfig | None:
    try:
        return SiteConfig.read(folder)
    except (ConfigError, OSError):
        return None


def _sites_near(place: Path) -> Iterator[Path]:
    """Folders with a site's settings, at, below and beside the folders above `place`."""
    for folder in (place, *list(place.parents)[:LEVELS]):
        for pattern in (SETTINGS, f"*/{SETTINGS}", f"*-sites/*/{SETTINGS}", f"sites/*/{SETTINGS}"):
            try:
                found = sorted(folder.glob(pattern)) if folder.is_dir() else []
            except OSError:  # a folder of somebody else
                continue
            yield from (path.parent for path in found)


def _lineage_that_holds(place: Path, store: Path) -> str | None:
    """The first lineage of the store that holds one of the pictures; a ledger that cannot be read is no excuse."""
    if not (store / KEY).is_file() or not os.access(store / KEY, os.R_OK):
        return None  # no lineage keeps digests there
    digests: set[bytes] = set()
    # Both splits of arrays: whichever is read later, a lineage's pictures may lie in the other.
    splits: set[Split] = {"train", unseen_split(place)}
    for split in sorted(splits):
        try:
            with tempfile.TemporaryDirectory(prefix="fedcanvas-whose-") as cache:
                opened = open_as_training(
                    place, cache_dir=Path(cache), image_size=SIDE, channels=CHANNELS, split=split
                )  # fmt: skip
                digests.update(record_digests(opened, store))
                del opened
        except DataError:
            continue  # no data that anybody could use
    for name in sharing_lineages(digests, store, but=""):
        try:
            if Ledger(store / name).lineage.simulated:
                continue
        except LedgerError:
            pass
        return name
    return None
