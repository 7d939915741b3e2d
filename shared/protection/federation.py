"""Who a federation is, which keys of its aggregator are in force, and which sites belong to it: signed statements.

    federation        its name, address, certificate authority and identity key; in every kit, compared once by people
    aggregator-keys   the key that instructions are signed with and the one that replies are sealed to, for a while;
                      signed by the identity, so that keys rotate without new kits
    join-request      a site's own public keys, signed by the site; nothing in it is secret
    admission         a site's public keys, as the federation took them up; signed by the identity

The identity key signs only these. It is needed on the day of a rotation or an admission, not while rounds run.
Formats: docs/protocol.md. Not here: files and folders of either side.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from shared.errors import TrustError
from shared.protection.keys import SealFor, SigningKey, VerifyKey, fingerprint, node_key_pem
from shared.protection.statements import canonical, read_statement, sign_statement

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")  # a federation's, and short enough for a certificate
_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\n(?:[A-Za-z0-9+/=]{1,76}\n)+-----END CERTIFICATE-----\n?")
KEYS_DAYS = 90  # of an aggregator's keys
CLOCKS = timedelta(minutes=10)  # by which two clocks may differ


@dataclass(frozen=True)
class Federation:
    """What a site trusts, once a person has compared the fingerprint.

    Attributes:
        address: host and port that sites connect to.
        authority: PEM of the certificate that the server's TLS certificate is issued under.
        identity: whose signature on keys and admissions counts.
    """

    name: str
    address: str
    authority: str
    identity: VerifyKey

    def statement(self, key: SigningKey) -> dict[str, Any]:
        assert key.public == self.identity
        fields = {"name": self.name, "address": self.address, "authority": self.authority}
        return sign_statement("federation", {**fields, "signing-key": self.identity.text}, key)

    @classmethod
    def read(cls, content: bytes, *, what: str) -> Self:
        """Raises `TrustError`. The statement vouches for itself: only the fingerprint says whose it is."""
        types = {"name": str, "address": str, "authority": str, "signing-key": str}
        found = read_statement(content, "federation", types, None, what=what)
        if not NAME.fullmatch(found["name"]):
            raise TrustError(f"{what}: the name of the federation is not 1 to 40 small letters, digits and dashes")
        # Both are shown to people or read by TLS: an address with a line break could show them another fingerprint.
        if not _ADDRESS.fullmatch(found["address"]):
            raise TrustError(f"{what}: the address is no host and port")
        if not _CERTIFICATE.fullmatch(found["authority"]):
            raise TrustError(f"{what}: the authority is no certificate in PEM")
        return cls(found["name"], found["address"], found["authority"], VerifyKey.from_text(found["signing-key"]))

    @property
    def fingerprint(self) -> str:
        """Of name, authority and identity. The address may change: TLS and signatures hold wherever the server is."""
        about = {"name": self.name, "authority": self.authority, "identity": self.identity.text}
        return fingerprint(b"fedcanvas federation 1\0" + canonical(about))


@dataclass(frozen=True)
class AggregatorKeys:
    """The keys of the process that sums.

    Attributes:
        serial: from 1, one more with every rotation.
        signing: instructions are signed with it.
        sealing: replies are sealed to it.
    """

    federation: str
    serial: int
    signing: VerifyKey
    sealing: SealFor
    not_before: datetime
    not_after: datetime

    @property
    def fingerprint(self) -> str:
        """Of both keys, which a site's policy may name: with one of them alone another could be put beside it."""
        about = {
            "federation": self.federation, "instruction-key": self.signing.text, "sealing-key": self.sealing.text
        }  # fmt: skip
        return fingerprint(b"fedcanvas aggregator 1\0" + canonical(about))

    def statement(self, identity: SigningKey) -> dict[str, Any]:
        fields = {
            "federation": self.federation, "serial": self.serial, "instruction-key": self.signing.text,
            "sealing-key": self.sealing.text, "not-before": _text(self.not_before), "not-after": _text(self.not_after),
        }  # fmt: skip
        return sign_statement("aggregator-keys", fields, identity)

    @classmethod
    def read(cls, content: bytes, federation: Federation, *, now: datetime | None = None) -> Self:
        """Raises `TrustError` when they are not by the federation's identity, or are not in force now."""
        keys, now = cls.read_whenever(content, federation), now or datetime.now(UTC)
        if not keys.not_before - CLOCKS <= now <= keys.not_after + CLOCKS:
            raise TrustError(
                f"the aggregator's keys {keys.serial} are in force from {keys.not_before:%Y-%m-%d} to"
                f" {keys.not_after:%Y-%m-%d}, and it is {now:%Y-%m-%d %H:%M} UTC here",
                hint="check the clock; if it is right the operator must rotate: `fedcanvas server rotate`",
            )
        return keys

    @classmethod
    def read_whenever(cls, content: bytes, federation: Federation) -> Self:
        """Whether they are in force is not asked."""
        types = {
            "federation": str, "serial": int, "instruction-key": str, "sealing-key": str, "not-before": str,
            "not-after": str,
        }  # fmt: skip
        what = "the statement of the aggregator's keys"
        found = read_statement(content, "aggregator-keys", types, federation.identity, what=what)
        if found["federation"] != federation.name:
            raise TrustError(f"{what} is of federation '{found['federation']}'")
        return cls(
            found["federation"], found["serial"], VerifyKey.from_text(found["instruction-key"]),
            SealFor.from_text(found["sealing-key"]), _time(found["not-before"], what), _time(found["not-after"], what),
        )  # fmt: skip


@dataclass(frozen=True)
class SiteKeys:
    """The public keys of one site.

    Attributes:
        signing: its replies are signed with it.
        node: OpenSSH text of the key that Flower knows its node by.
    """

    federation: str
    site: str
    signing: VerifyKey
    node: str

    def request(self, key: SigningKey) -> dict[str, Any]:
        """What a site sends to be admitted, signed by itself."""
        assert key.public == self.signing
        return sign_statement("join-request", self._fields(), key)

    def admission(self, identity: SigningKey) -> dict[str, Any]:
        return sign_statement("admission", self._fields(), identity)

    @classmethod
    def read_request(cls, content: bytes, *, what: str) -> Self:
        """Raises `TrustError`. It proves that whoever wrote it has the key; a person says whether that is the site."""
        return cls._of(read_statement(content, "join-request", _SITE_TYPES, None, what=what), what)

    @classmethod
    def read_admission(cls, content: bytes, identity: VerifyKey, *, what: str) -> Self:
        return cls._of(read_statement(content, "admission", _SITE_TYPES, identity, what=what), what)

    @property
    def fingerprint(self) -> str:
        """Of everything: what the operator reads to the site, or the site to the operator."""
        return fingerprint(b"fedcanvas site 1\0" + canonical(self._fields()))

    def _fields(self) -> dict[str, Any]:
        return {
            "federation": self.federation, "site": self.site, "signing-key": self.signing.text, "node-key": self.node
        }  # fmt: skip

    @classmethod
    def _of(cls, found: dict[str, Any], what: str) -> Self:
        keys = cls(found["federation"], found["site"], VerifyKey.from_text(found["signing-key"]), found["node-key"])
        if not NAME.fullmatch(keys.federation) or not SITE_NAME.fullmatch(keys.site):
            raise TrustError(f"{what} names no federation or site that could be")
        if not _NODE_KEY.fullmatch(keys.node):
            raise TrustError(f"{what} has no node key of the kind that is made here (ECDSA, P-384, OpenSSH)")
        try:
            node_key_pem(keys.node)
        except TrustError as error:  # a key that is none would stop at the SuperLink, long after a person said yes
            raise TrustError(f"{what}: {error.message}") from None
        return keys


SITE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_SITE_TYPES = {"federation": str, "site": str, "signing-key": str, "node-key": str}
_NODE_KEY = re.compile(r"ecdsa-sha2-nistp384 [A-Za-z0-9+/]{160,220}={0,2}")


def _text(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(text: str, what: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise TrustError(f"{what}: '{text}' is no time such as 2026-11-26T12:00:00Z") from None
