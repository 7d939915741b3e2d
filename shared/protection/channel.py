"""Both ends of the way between aggregator and site: what is signed and sealed on it, message by message.

    aggregator  signs what it sends and sends the statement of its keys along; opens what comes back
    site        checks both before anything of the message is decoded; seals its answer to those keys

A site remembers the newest keys that it has seen and takes no older ones, so keys that were rotated away because they
leaked are worth nothing to who has them. It seals to them whatever it could not read: no refusal travels in clear.
Not here: Flower's records (`shared.records`) and what an instruction may ask for (`client.site`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from shared.disk import write_whole
from shared.errors import TrustError
from shared.protection.federation import AggregatorKeys, Federation
from shared.protection.keys import OpeningKey, SigningKey, VerifyKey
from shared.protection.sealed import (
    Context,
    check_instruction,
    check_recipient,
    open_sealed,
    seal,
    sign_instruction,
)

NEWEST = "aggregator-keys.json"  # in the site's folder
REPLY, CODE, STATEMENT = b"\0", b"\1", b"\2"  # first byte of what is sealed
_FIRST = {"reply": REPLY, "statement": STATEMENT}
CODE_BYTES = 16  # of a code, filled up with zeros: the length tells nothing
MOST_STATEMENT_BYTES = 2**14


@dataclass(frozen=True)
class Opened:
    """What a site said, and nobody else could have said or read."""

    kind: Literal["reply", "code", "statement"]
    content: bytes


class AggregatorChannel:
    """The aggregator's end.

    Args:
        statement: of the keys in force, signed by the federation's identity.
        opening: the key in force, and during a rotation the one before.
        sites: site id to the key that its answers are signed with: the roster.
    """

    def __init__(
        self, federation: str, *, statement: bytes, signing: SigningKey, opening: tuple[OpeningKey, ...],
        sites: Mapping[str, VerifyKey],
    ) -> None:  # fmt: skip
        self.federation, self.statement, self.sites = federation, statement, sites
        self._signing = signing
        self._opening = {key.public.id: key for key in opening}

    def sign(self, records_digest: bytes) -> bytes:
        return sign_instruction(records_digest, federation=self.federation, by=self._signing)

    def open(self, sealed: bytes, *, context: Context) -> Opened:
        """Raises `TrustError`: no site of the roster, or not its answer to this question."""
        # Looked up once: between two looks it may be revoked.
        by = self.sites.get(context.site) if context.federation == self.federation else None
        if by is None:
            raise TrustError(f"'{context.site}' is no site of federation {self.federation}")
        content = open_sealed(sealed, keys=self._opening, by=by, context=context)
        if content[:1] == CODE:
            return Opened("code", content[1:].rstrip(b"\0"))
        if content[:1] == REPLY:
            return Opened("reply", content[1:])
        if content[:1] == STATEMENT:
            return Opened("statement", content[1:])
        raise TrustError(f"the reply of site {context.site} is of an unknown kind")


class SiteChannel:
    """The site's end."""

    def __init__(self, folder: Path, federation: Federation, *, site: str, signing: SigningKey) -> None:
        """
        Args:
            folder: of the site; holds the statement of the newest keys, from the kit on.
        Raises:
            TrustError: that statement is missing or damaged.
        """
        self.federation, self.site = federation, site
        self._path, self._signing = folder / NEWEST, signing
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise TrustError(f"{self._path} cannot be read: {error.strerror or error}") from None
        # Read as of their own first moment: keys that ended since still seal a refusal.
        self._newest = AggregatorKeys.read_whenever(content, federation)
        check_recipient(self._newest.sealing)

    def check(
        self, records_digest: bytes, *, statement: bytes, signature: bytes, now: datetime | None = None
    ) -> AggregatorKeys:
        """The keys by which the aggregator signed these records; `TrustError` unless they are in force and as new as
        any seen here.
        """
        if len(statement) > MOST_STATEMENT_BYTES:
            raise TrustError("the statement of the aggregator's keys is too long")
        keys = AggregatorKeys.read(statement, self.federation, now=now)
        if keys.serial < self._newest.serial:
            raise TrustError(
                f"the instruction is signed with the keys {keys.serial}, and the keys {self._newest.serial} have been"
                " in force here already",
                hint="rotated keys stay rotated; the operator signs with the newest",
            )
        if keys.serial == self._newest.serial and keys != self._newest:
            raise TrustError(f"there are two statements of the aggregator's keys {keys.serial}")
        check_instruction(signature, records_digest, federation=self.federation.name, by=keys.signing)
        if keys.serial > self._newest.serial:
            check_recipient(keys.sealing)  # before it replaces one that every answer can be sealed to
            write_whole(self._path, statement)
            self._newest = keys
        return keys

    def seal(
        self, kind: Literal["reply", "code", "statement"], content: bytes, *, context: Context,
        to: AggregatorKeys | None = None,
    ) -> bytes:  # fmt: skip
        """
        Args:
            content: a code has at most `CODE_BYTES` ASCII letters.
            to: the keys that the question was signed with; `None` where none could be told: the newest.
        """
        assert (context.federation, context.site) == (self.federation.name, self.site)
        assert kind != "code" or len(content) <= CODE_BYTES
        whole = CODE + content.ljust(CODE_BYTES, b"\0") if kind == "code" else _FIRST[kind] + content
        return seal(whole, to=(to or self._newest).sealing, by=self._signing, context=context)
