"""Joining a federation: a site's own keys, made here, and the request that carries their public halves away.

Nothing that is written here leaves by itself: a person sends `request.json`. Joining again with the same kit keeps the
keys and writes the same request.
Not here: the site's settings, policy and ledger (`client.enrolment`), and what a kit is (`shared.protection.kit`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from client.membership import FEDERATION, NODE, REQUEST, SIGNING, read_federation
from shared.disk import write_whole
from shared.errors import TrustError
from shared.protection.channel import NEWEST
from shared.protection.federation import AggregatorKeys, SiteKeys
from shared.protection.keys import SigningKey, passphrase_at_hand, read_node_key, write_node_key
from shared.protection.kit import Kit

AUTHORITY = "keys/federation-authority.crt"


@dataclass(frozen=True)
class Joined:
    """What a person is told.

    Attributes:
        request: the file to send to the operator.
    """

    keys: SiteKeys
    request: Path


def join(folder: Path, kit: Kit, *, site_id: str) -> Joined:
    """Makes what is missing of the site's keys, and the request.

    Raises:
        TrustError: the site belongs to another federation, or a key is damaged.
    """
    known = read_federation(folder)
    if known is not None and known.fingerprint != kit.federation.fingerprint:
        raise TrustError(
            f"{folder} belongs to federation '{known.name}' ({known.fingerprint})",
            hint="a site has one federation: make another site for this one, on the same lineage",
        )
    if not (folder / SIGNING).exists():
        SigningKey.generate().write(folder / SIGNING, passphrase=passphrase_at_hand())
    if not (folder / NODE).exists():
        write_node_key(folder / NODE)
    signing = SigningKey.read(folder / SIGNING)
    keys = SiteKeys(kit.federation.name, site_id, signing.public, read_node_key(folder / NODE))
    write_whole(folder / REQUEST, json.dumps(keys.request(signing), indent=2).encode() + b"\n")
    write_whole(folder / AUTHORITY, kit.federation.authority.encode())
    if _is_newer(kit, folder / NEWEST):
        write_whole(folder / NEWEST, kit.keys_statement)
    write_whole(folder / FEDERATION, kit.federation_statement)  # last: its existence means that the rest is there
    return Joined(keys, folder / REQUEST)


def _is_newer(kit: Kit, path: Path) -> bool:
    """Whether the kit's keys of the aggregator replace those that are there: newer ones may have come in between."""
    try:
        known = AggregatorKeys.read_whenever(path.read_bytes(), kit.federation)
    except (OSError, TrustError):
        return True  # none, damaged, or of another federation whose joining was cut off
    return AggregatorKeys.read_whenever(kit.keys_statement, kit.federation).serial > known.serial
