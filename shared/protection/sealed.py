"""The sealed reply of a site, and the signature on what comes down to it.

Up: everything that leaves a deployed site, reply or refusal, is encrypted to the aggregator's key and signed by the
site, bound to the one question that it answers. The relay, its database and whatever stands between see who, which
round and how many bytes.

    byte 0    4   `FCS1`
         4    1   suite: 1 is HPKE base mode, MLKEM768-X25519, HKDF-SHA256, ChaCha20-Poly1305
         5    8   first bytes of SHA-256 of the public key that it is sealed to
        13   64   Ed25519 by the site over `fedcanvas sealed 1`, a zero byte, bytes 0 to 12, the context, and SHA-256 of
                  the rest
        77        HPKE's ciphertext (1,120 bytes of encapsulated key, then the text's length and 16 more); its `info` is
                  `fedcanvas sealed 1`, a zero byte, and the context

    context: federation, run, site (each two bytes of length, big-endian, and UTF-8), server round (4 bytes,
             big-endian), config digest and instruction digest (32 bytes each); what is not known is empty or zero. The
             instruction digest of what could not be read is that of the records that came

Down: the aggregator signs the digest of an instruction's records, and a site checks that before any of it is decoded.
Sources: RFC 9180 (HPKE); draft-ietf-hpke-pq for the hybrid. Not here: whose keys these are
(`shared.protection.statements`), and replay of whole rounds, which the ledger and the run's state decide.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from shared.errors import TrustError
from shared.protection.keys import SIGNATURE_BYTES, OpeningKey, SealFor, SigningKey, VerifyKey

MAGIC, SUITE_ID = b"FCS1", 1
DOMAIN, DOWN_DOMAIN = b"fedcanvas sealed 1\0", b"fedcanvas instruction 1\0"
HEADER_BYTES = 4 + 1 + 8
OVERHEAD = HEADER_BYTES + SIGNATURE_BYTES + 1120 + 16
UNKNOWN = "0" * 64
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True)
class Context:
    """The one question that a message answers; both sides know it without the message.

    Attributes:
        run: "" where the site could not tell what it was asked.
        instruction_digest: of the instruction or, where it could not be read, of the records that came
            (`shared.records.records_digest`).
    """

    federation: str
    run: str
    site: str
    server_round: int
    config_digest: str = UNKNOWN
    instruction_digest: str = UNKNOWN

    def to_bytes(self) -> bytes:
        names = b"".join(
            struct.pack(">H", len(encoded)) + encoded
            for encoded in (name.encode() for name in (self.federation, self.run, self.site))
        )
        digests = bytes.fromhex(self.config_digest) + bytes.fromhex(self.instruction_digest)
        return names + struct.pack(">I", self.server_round) + digests


def seal(content: bytes, *, to: SealFor, by: SigningKey, context: Context) -> bytes:
    """`content` and `OVERHEAD` bytes more; other bytes at every call."""
    bound = context.to_bytes()
    header = MAGIC + bytes([SUITE_ID]) + to.id
    rest = _SUITE.encrypt(content, to.hpke(), DOMAIN + bound)
    return header + by.sign(_signed(header, bound, rest)) + rest


def check_recipient(key: SealFor) -> None:
    """`TrustError` unless something can be sealed to it: not all bytes of the right length are a key."""
    try:
        _SUITE.encrypt(b"", key.hpke(), DOMAIN)
    except ValueError:  # such as a point of X25519 with which every secret is zero
        raise TrustError(f"nothing can be sealed to the public key {key.id.hex()}") from None


def open_sealed(sealed: bytes, *, keys: Mapping[bytes, OpeningKey], by: VerifyKey, context: Context) -> bytes:
    """What was sealed.

    Args:
        keys: by `SealFor.id`; during a rotation there are two.
        by: the site's, from the roster.
    Raises:
        TrustError: another format, an unknown recipient, another signer, another question, or a changed byte.
    """
    what = f"the reply of site {context.site} in round {context.server_round}"
    if len(sealed) < OVERHEAD or sealed[:4] != MAGIC:
        raise TrustError(f"{what} is no sealed message")
    if sealed[4] != SUITE_ID:
        raise TrustError(f"{what} is sealed by suite {sealed[4]}, this release knows {SUITE_ID}")
    header, signature = sealed[:HEADER_BYTES], sealed[HEADER_BYTES : HEADER_BYTES + SIGNATURE_BYTES]
    rest, bound = sealed[HEADER_BYTES + SIGNATURE_BYTES :], context.to_bytes()
    # The signature first: nobody but a site of the roster gets anything decrypted.
    by.check(signature, _signed(header, bound, rest), what)
    key = keys.get(header[5:])
    if key is None:
        raise TrustError(
            f"{what} is sealed to the key {header[5:].hex()}, which is not in force",
            hint="the site takes the keys in force from the next instruction",
        )
    try:
        return _SUITE.decrypt(rest, key.hpke(), DOMAIN + bound)
    except (InvalidTag, ValueError):
        raise TrustError(f"{what} cannot be opened") from None


def sign_instruction(records_digest: bytes, *, federation: str, by: SigningKey) -> bytes:
    return by.sign(_down(records_digest, federation))


def check_instruction(signature: bytes, records_digest: bytes, *, federation: str, by: VerifyKey) -> None:
    """`TrustError` unless the aggregator of this federation signed exactly these records."""
    by.check(signature, _down(records_digest, federation), "the instruction")


def _signed(header: bytes, bound: bytes, rest: bytes) -> bytes:
    return DOMAIN + header + bound + hashlib.sha256(rest).digest()


def _down(records_digest: bytes, federation: str) -> bytes:
    assert len(records_digest) == 32
    name = federation.encode()
    return DOWN_DOMAIN + struct.pack(">H", len(name)) + name + records_digest
