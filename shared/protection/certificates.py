"""The federation's own certificate authority and the server's TLS certificate, and what is wrong with a certificate.

The authority signs nothing but the server's certificate, and its own says so (path length 0). Its certificate is in
every site's kit and lasts ten years; the server's lasts a year and is renewed under it without a new kit. All keys are
EC P-256, which every TLS stack knows.
Source: RFC 5280. Not here: keys of the protocol itself (`shared.protection.keys`), and who may connect.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.disk import fsync_folder
from shared.errors import TrustError
from shared.protection.keys import read_private, write_private

AUTHORITY_DAYS, SERVER_DAYS = 3650, 365
WARN_DAYS = 30  # before a certificate ends
BACKDATED = datetime.timedelta(hours=1)  # for clocks that are behind


@dataclass(frozen=True)
class Validity:
    """From when to when a certificate is good, in UTC."""

    not_before: datetime.datetime
    not_after: datetime.datetime

    def days_left(self, now: datetime.datetime) -> float:
        return (self.not_after - now).total_seconds() / 86400

    def warning(self, now: datetime.datetime) -> str:
        """In words; "" where nothing needs to be done."""
        if now < self.not_before:
            return f"is not valid before {self.not_before:%Y-%m-%d %H:%M} UTC: is the clock right?"
        left = self.days_left(now)
        if left < 0:
            return f"ended on {self.not_after:%Y-%m-%d %H:%M} UTC"
        return f"ends in {left:.0f} days, on {self.not_after:%Y-%m-%d}" if left < WARN_DAYS else ""


def make_authority(name: str, *, certificate: Path, key: Path, now: datetime.datetime | None = None) -> None:
    """A self-signed authority for the federation `name`; `TrustError` when there is one already."""
    private, now = ec.generate_private_key(ec.SECP256R1()), now or _now()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedcanvas federation {name}"[:64])])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .sign(private, hashes.SHA256())
    )
    write_private(key, _pem_of(private))
    _write_public(certificate, made.public_bytes(serialization.Encoding.PEM))


def issue_server_certificate(
    names: Sequence[str], *, authority: Path, authority_key: Path, certificate: Path, key: Path,
    days: int = SERVER_DAYS, now: datetime.datetime | None = None,
) -> None:  # fmt: skip
    """A certificate and a new key for the server, in place of those that are there.

    Args:
        names: host names and IP addresses that clients may call it by; the first is the common name.
        certificate, key: the same file holds both, where both are to be replaced at once.
        days: never beyond the authority's own end.
    """
    above, signer = read_certificate(authority), _read_key(authority_key)
    if _public_bytes(above.public_key()) != _public_bytes(signer.public_key()):
        raise TrustError(f"{authority_key} is not the key of {authority}")
    private, now = ec.generate_private_key(ec.SECP256R1()), now or _now()
    end = min(now + datetime.timedelta(days=days), above.not_valid_after_utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])]))
        .issuer_name(above.subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    certificate_pem, key_pem = made.public_bytes(serialization.Encoding.PEM), _pem_of(private)
    if certificate == key:
        write_private(key, certificate_pem + key_pem, replace=True)
        return
    write_private(key, key_pem, replace=True)
    _write_public(certificate, certificate_pem)


def read_certificate(path: Path) -> x509.Certificate:
    """Raises `TrustError` when there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise TrustError(f"the certificate {path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise TrustError(f"{path} is no certificate in PEM") from None


def validity(certificate: x509.Certificate) -> Validity:
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def check_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """`TrustError` unless `authority` signed `certificate`; TLS itself checks names and times."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise TrustError(
            "the server's certificate is not by this federation's authority",
            hint="somebody stands between, such as an institution's TLS inspection, or this is another server",
        ) from None


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except (ValueError, TypeError):
        raise TrustError(f"{path} holds no private key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TrustError(f"{path} holds no elliptic-curve key")
    return key


def _public_bytes(key: object) -> bytes:
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_public(path: Path, content: bytes) -> None:
    """Whole, readable by all."""
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
    os.replace(partial, path)
    fsync_folder(path.parent)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
