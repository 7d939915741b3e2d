"""A TLS handshake looked at closely: which certificate was seen, and why it does not count.

A certificate that is refused is looked at in a second handshake, on a connection that is closed right after it.
Not here: what a connection is used for, and Flower's own, which takes the same authorities and checks the same.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from shared.errors import TrustError
from shared.protection.certificates import check_issued

Trouble = Literal["expired", "not-yet-valid", "wrong-authority", "wrong-name", "no-tls"]

# OpenSSL's numbers, x509_vfy.h; every other one is about who signed.
_TROUBLE: dict[int, Trouble] = {9: "not-yet-valid", 10: "expired", 62: "wrong-name", 64: "wrong-name"}


@dataclass(frozen=True)
class Seen:
    """The server's own certificate, as it came.

    Attributes:
        names: that it is for.
        sha256: of its DER, 64 hex digits: its fingerprint, as browsers and `openssl x509` show it.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    sha256: str
    certificate: x509.Certificate

    @classmethod
    def parse(cls, der: bytes) -> Seen:
        made = x509.load_der_x509_certificate(der)
        names: tuple[str, ...] = ()
        with contextlib.suppress(x509.ExtensionNotFound):
            listed = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = tuple(str(name.value) for name in listed)
        return cls(
            made.subject.rfc4514_string(), made.issuer.rfc4514_string(), names, made.not_valid_before_utc,
            made.not_valid_after_utc, made.fingerprint(hashes.SHA256()).hex(), made,
        )  # fmt: skip

    def is_by(self, authority: str) -> bool:
        """Whether the authority (PEM) signed it itself."""
        try:
            check_issued(self.certificate, x509.load_pem_x509_certificate(authority.encode()))
        except (TrustError, ValueError):
            return False
        return True


@dataclass(frozen=True)
class Handshake:
    """
    Attributes:
        trouble: `None` where the certificate counts.
        words: OpenSSL's.
        seen: `None` where none came.
        connection: to be closed by the caller; `None` where there is trouble.
    """

    trouble: Trouble | None
    words: str
    seen: Seen | None
    connection: ssl.SSLSocket | None


def shake(connect: Callable[[], socket.socket], host: str, *, trusted: str) -> Handshake:
    """
    Args:
        connect: a new connection to the server each time; what it raises is not caught.
        host: name or address that the certificate must be for.
        trusted: PEM of the authorities that count, and no others.
    """
    # As Flower's client makes it from these bytes (`flwr.supercore.protobuf.client`).
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=trusted)
    except ssl.SSLError as error:
        raise TrustError(f"the authorities that are trusted cannot be read: {error.reason}") from None
    raw = connect()
    try:
        connection = context.wrap_socket(raw, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        raw.close()
        trouble = _TROUBLE.get(error.verify_code, "wrong-authority")
        return Handshake(trouble, error.verify_message, _look(connect, host), None)
    except (ssl.SSLError, OSError) as error:
        raw.close()
        return Handshake("no-tls", str(getattr(error, "reason", None) or error), None, None)
    der = connection.getpeercert(binary_form=True)
    assert der is not None
    return Handshake(None, "", Seen.parse(der), connection)


def _look(connect: Callable[[], socket.socket], host: str) -> Seen | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent on it
    try:
        with connect() as raw, context.wrap_socket(raw, server_hostname=host) as connection:
            der = connection.getpeercert(binary_form=True)
            return Seen.parse(der) if der else None
    except (OSError, ValueError):
        return None
