"""Deployed toy sites that joined a federation, and the aggregator's end of it: keys as both sides make them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import make_app
from client.membership import FEDERATION, REQUEST, SIGNING
from client.site import forget_site
from shared.protection.channel import NEWEST, AggregatorChannel
from shared.protection.federation import AggregatorKeys, Federation, SiteKeys
from shared.protection.keys import OpeningKey, SigningKey, VerifyKey
from shared.records import (
    ModelOffer,
    Refusal,
    RoundInstruction,
    SiteReply,
    attach_signature,
    decode_reply,
    encode_instruction,
    encode_offer,
    records_digest,
)

PEM = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"  # of the form alone
NODE_KEY = (
    ec.generate_private_key(ec.SECP384R1()).public_key()
    .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
)  # fmt: skip


@dataclass
class Operator:
    """Holds the federation's identity and the aggregator's keys of one serial."""

    name: str = "simulation"  # what toy configs call their federation
    serial: int = 0

    def __post_init__(self) -> None:
        self.identity = SigningKey.generate()
        self.federation = Federation(self.name, "localhost:9443", PEM, self.identity.public)
        self.opening: tuple[OpeningKey, ...] = ()
        self.sites: dict[str, VerifyKey] = {}
        self.rotate()

    def rotate(self) -> None:
        self.serial += 1
        self.signing, self.opening = SigningKey.generate(), (OpeningKey.generate(), *self.opening[:1])
        now = datetime.now(UTC)
        keys = AggregatorKeys(
            self.name, self.serial, self.signing.public, self.opening[0].public, now, now + timedelta(days=90)
        )
        self.statement = json.dumps(keys.statement(self.identity)).encode()

    @property
    def channel(self) -> AggregatorChannel:
        return AggregatorChannel(
            self.name, statement=self.statement, signing=self.signing, opening=self.opening, sites=self.sites
        )

    def admit(self, folders: Sequence[Path]) -> None:
        """As `client join` and `server admit` leave them."""
        for folder in folders:
            key = SigningKey.generate()
            key.write(folder / SIGNING)
            (folder / FEDERATION).write_text(json.dumps(self.federation.statement(self.identity)))
            (folder / NEWEST).write_bytes(self.statement)
            asked = SiteKeys(self.name, folder.name, key.public, NODE_KEY)
            (folder / REQUEST).write_text(json.dumps(asked.request(key)))
            self.sites[folder.name] = key.public
            forget_site(folder)


def signed(channel: AggregatorChannel, asked: RoundInstruction | ModelOffer) -> RecordDict:
    records = encode_offer(asked) if isinstance(asked, ModelOffer) else encode_instruction(asked)
    attach_signature(records, keys=channel.statement, signature=channel.sign(records_digest(records)))
    return records


def sent(site: Path, records: RecordDict, *, kind: str = "train") -> SiteReply | Refusal:
    """What leaves the site, as Flower gets it, sealed or not."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # a message asks for them
    context = Context(1, 5, {"site-dir": str(site), "partition-id": 0}, RecordDict(), {})
    message = make_app()(Message(records, 5, kind), context)
    assert not message.has_error()
    return decode_reply(message.content)
