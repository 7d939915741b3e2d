"""Leaving a federation: a site's keys for it and all that belongs to the membership go, its account stays.

Keys go first and `federation.json` last: a leaving that was cut off leaves a site that answers nothing, and is ended by
leaving again. What was spent stays spent, so ledger, anchor, policy, decisions and receipts are not touched.
Not here: runs that are open; `fedcanvas client ledger --leave-federation` closes them.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from client.account import REPLIES
from client.joining import AUTHORITY
from client.membership import FEDERATION, NODE, REQUEST, SIGNING, read_federation
from client.network import ALSO_TRUSTED, TRUSTED
from client.settings import SiteConfig
from shared import flower_runtime as runtime
from shared.disk import fsync_folder
from shared.errors import TrustError
from shared.protection.channel import NEWEST
from shared.protection.federation import SiteKeys
from shared.protection.keys import SigningKey, read_node_key
from shared.supervisor import LOGS, RUN, stop

MEMBERSHIP = (
    SIGNING, NODE, REQUEST, NEWEST, AUTHORITY, ALSO_TRUSTED, TRUSTED, runtime.SECRET, runtime.CERTIFICATE_KEY,
    runtime.CERTIFICATE, runtime.AUTHORITY_KEY, runtime.AUTHORITY, RUN, FEDERATION,
)  # fmt: skip


@dataclass(frozen=True)
class Membership:
    """What is left of one.

    Attributes:
        federation: "" where its file is gone or damaged.
        fingerprint: of the site's keys, as the operator's roster shows it; "" where they cannot be read any more.
        names: of what is there, in the site's folder.
    """

    federation: str
    fingerprint: str
    names: list[str]


def membership(folder: Path) -> Membership:
    name = fingerprint = ""
    with contextlib.suppress(TrustError):
        federation = read_federation(folder)
        name = federation.name if federation else ""
    with contextlib.suppress(TrustError):
        site_id, signing = SiteConfig.read(folder).site_id, SigningKey.read(folder / SIGNING)
        fingerprint = SiteKeys(name, site_id, signing.public, read_node_key(folder / NODE)).fingerprint
    return Membership(name, fingerprint if name else "", [part for part in MEMBERSHIP if (folder / part).exists()])


def leave(folder: Path) -> None:
    """Stops the processes and removes what `membership` names; nothing where nothing is left.

    Raises:
        FederationError: the processes do not end.
    """
    stop(folder)
    for name in membership(folder).names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()
        fsync_folder((folder / name).parent)  # in this order on the disk, too


def may_be_deleted(folder: Path) -> dict[str, str]:
    """What of the rest can be deleted without loss, by its place: what it is."""
    found = {
        str(folder / SiteConfig.read(folder).cache_dir): "decoded pictures; they are made again",
        str(folder / LOGS): "what the two processes said",
        str(folder / REPLIES): "last answers, sealed; their size and SHA-256 stay in the ledger",
    }
    return {place: what for place, what in found.items() if Path(place).exists()}
