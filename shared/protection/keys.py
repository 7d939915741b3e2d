"""Key pairs in files that only their owner can read, and fingerprints that two people can compare by telephone.

    signing   Ed25519: a federation's identity, the aggregator's instructions, a site's replies and requests
    sealing   X25519 and ML-KEM-768 together, the recipient of HPKE: broken only when both are

A private key file is PEM (PKCS #8), one block for each part, mode 0600, with a passphrase where one is given. It is
written whole or not at all and never replaced. Public keys are raw bytes, base64 in JSON.
Keys that are needed while rounds run (a site's, the aggregator's) have the passphrase in the file that the environment
names (FEDCANVAS_PASSPHRASE_FILE): who has a disk or a backup alone then has no key.
Sources: RFC 8032 (Ed25519), RFC 7748 (X25519), FIPS 203 (ML-KEM), RFC 9180 (HPKE), RFC 7468 (PEM).
The key of a Flower node is Flower's kind, and is only made and read here.
Not here: keys of TLS (`shared.protection.certificates`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey

from shared.disk import fsync_folder
from shared.errors import TrustError, UsageError

SIGNATURE_BYTES, SIGNING_BYTES = 64, 32
MLKEM_BYTES, X25519_BYTES = 1184, 32
SEALING_BYTES = MLKEM_BYTES + X25519_BYTES
MOST_KEY_BYTES = 2**16
PASSPHRASE_FILE = "FEDCANVAS_PASSPHRASE_FILE"
GROUPS = 6  # of four letters of a fingerprint, 5 bits each: 120 bits, out of reach of a search for a second preimage
_BLOCK = re.compile(rb"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----\s*", re.DOTALL)


@dataclass(frozen=True)
class _PublicKey:
    """Raw bytes of a fixed size; `TrustError` for any other."""

    SIZE: ClassVar[int]
    WHAT: ClassVar[str]
    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != self.SIZE:
            raise TrustError(f"a {self.WHAT} has {self.SIZE} bytes, not {len(self.raw)}")

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(from_base64(text))

    @property
    def text(self) -> str:
        return to_base64(self.raw)


class VerifyKey(_PublicKey):
    """The public half of a `SigningKey`: 32 bytes."""

    SIZE, WHAT = SIGNING_BYTES, "public signing key"

    def check(self, signature: bytes, content: bytes, what: str) -> None:
        """`TrustError` unless the signature over exactly this content is by this key; `what` names it to a person."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, content)
        except (InvalidSignature, ValueError):
            raise TrustError(
                f"{what} is not signed by the key {fingerprint(self.raw)}",
                hint="it was changed on the way, or is by somebody else: use nothing of it",
            ) from None


@dataclass(frozen=True)
class SigningKey:
    """Ed25519. Its text form shows nothing of it."""

    _private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def read(cls, path: Path, *, passphrase: bytes | None = None) -> Self:
        """
        Args:
            passphrase: `None` for that of the environment, where the key has one.
        Raises:
            TrustError: it is missing, damaged, readable by others, or needs another passphrase.
        """
        return cls(_only(_read_keys(path, (Ed25519PrivateKey,), passphrase)))

    def write(self, path: Path, *, passphrase: bytes | None = None) -> None:
        """Raises `TrustError` when there is a file already: a key is never replaced by the way."""
        write_private(path, _pem([self._private], passphrase))

    @property
    def public(self) -> VerifyKey:
        return VerifyKey(self._private.public_key().public_bytes_raw())

    def sign(self, content: bytes) -> bytes:
        return self._private.sign(content)


class SealFor(_PublicKey):
    """The public half of an `OpeningKey`: the recipient of sealed replies. ML-KEM's 1,184 bytes, then X25519's 32."""

    SIZE, WHAT = SEALING_BYTES, "public sealing key"

    @property
    def id(self) -> bytes:
        """8 bytes that name the key in an envelope."""
        return hashlib.sha256(self.raw).digest()[:8]

    def hpke(self) -> MLKEM768X25519PublicKey:
        try:
            return MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.raw[:MLKEM_BYTES]),
                X25519PublicKey.from_public_bytes(self.raw[MLKEM_BYTES:]),
            )
        except ValueError:
            raise TrustError(f"the public sealing key {self.id.hex()} is none") from None


@dataclass(frozen=True)
class OpeningKey:
    """X25519 and ML-KEM-768, of the aggregator. Its text form shows nothing of it."""

    _mlkem: MLKEM768PrivateKey = field(repr=False)
    _x25519: X25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> Self:
        return cls(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def read(cls, path: Path, *, passphrase: bytes | None = None) -> Self:
        """Raises `TrustError` as `SigningKey.read` does."""
        mlkem, x25519 = _read_keys(path, (MLKEM768PrivateKey, X25519PrivateKey), passphrase)
        return cls(mlkem, x25519)

    def write(self, path: Path, *, passphrase: bytes | None = None) -> None:
        """Raises `TrustError` when there is a file already."""
        write_private(path, _pem([self._mlkem, self._x25519], passphrase))

    @property
    def public(self) -> SealFor:
        return SealFor(
            self._mlkem.public_key().public_bytes_raw() + self._x25519.public_key().public_bytes_raw()
        )

    def hpke(self) -> MLKEM768X25519PrivateKey:
        return MLKEM768X25519PrivateKey(self._mlkem, self._x25519)


def read_passphrase(file: Path) -> bytes:
    """The first line: on a command line or in the environment itself other processes could read it.

    Raises:
        UsageError: it cannot be read, is empty, or everybody on this machine can read it.
    """
    try:
        # Not its group: systemd hands out credentials by an access list, which shows as such.
        exposed = file.stat().st_mode & stat.S_IRWXO
        line = file.read_bytes().split(b"\n", 1)[0].rstrip(b"\r")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from None
    if exposed:
        raise UsageError(f"everybody on this machine can read {file}", hint=f"chmod 600 {file}")
    if not line:
        raise UsageError(f"the first line of {file} is empty", hint="it is the passphrase")
    return line


def passphrase_at_hand() -> bytes | None:
    """Of the file that the environment names; `None` where it names none; raises as `read_passphrase` does."""
    name = os.environ.get(PASSPHRASE_FILE)
    return read_passphrase(Path(name)) if name else None


def write_node_key(path: Path) -> None:
    """The key that Flower knows a node by: ECDSA P-384 in OpenSSH's form; `TrustError` when there is one already."""
    private = ec.generate_private_key(ec.SECP384R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    write_private(path, private.private_bytes(*form))


def read_node_key(path: Path) -> str:
    """Its public half in one line, as OpenSSH writes it; `TrustError` when it cannot be read, or others can."""
    try:
        private = serialization.load_ssh_private_key(read_private(path), None)
    except (ValueError, TypeError) as error:
        raise TrustError(f"the node's key {path} cannot be read: {error}") from None
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


def node_key_pem(line: str) -> bytes:
    """The public key of `read_node_key` as Flower's SuperLink keeps it: PEM.

    Raises:
        TrustError: it is no point of P-384, or is spelled otherwise than `read_node_key` does.
    """
    public = None
    with contextlib.suppress(ValueError, UnsupportedAlgorithm):
        public = serialization.load_ssh_public_key(line.encode())
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP384R1):
        raise TrustError("the node key is none of the kind that is made here (ECDSA, P-384, OpenSSH)")
    # In its one form: a revoked key under another spelling would be a new one.
    if public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) != line.encode():
        raise TrustError("the node key is not in its one form")
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(content: bytes) -> str:
    """Six groups of four letters and digits, such as `k3xa 7mqe 2zpd w4hu tn6c yb5s`: 120 bits of SHA-256.

    Base32 has neither 0, 1, 8 nor 9, so that nothing is misread for a letter.
    """
    letters = base64.b32encode(hashlib.sha256(content).digest()).decode().lower()
    return " ".join(letters[4 * place : 4 * place + 4] for place in range(GROUPS))


def same_fingerprint(one: str, other: str) -> bool:
    """However people wrote them down: in capitals, with dashes, without blanks. A text without letters is none."""
    first, second = (re.sub(r"[\s:-]", "", text).lower() for text in (one, other))
    return first == second and len(first) == 4 * GROUPS


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def from_base64(text: str) -> bytes:
    """Raises `TrustError`; only the one way to write the bytes is read."""
    try:
        content = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        raise TrustError("a key or signature is not base64") from None
    if to_base64(content) != text:
        raise TrustError("a key or signature is not base64 in its one form")
    return content


def write_private(path: Path, content: bytes, *, replace: bool = False) -> None:
    """Appears whole, mode 0600 from its first moment; `TrustError` when something is there that it may not replace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}.", dir=path.parent)
    partial = Path(name)
    try:
        try:
            os.fchmod(descriptor, 0o600)
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            if replace:
                os.replace(partial, path)
            else:
                os.link(partial, path)  # unlike a rename it fails where the name is taken
        except FileExistsError:
            raise TrustError(
                f"there is a key at {path} already", hint="a key is never replaced by the way: move it first"
            ) from None
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_private(path: Path) -> bytes:
    """Raises `TrustError` when it is missing, readable by others than its owner, or larger than any key."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            content = file.read(MOST_KEY_BYTES + 1)
    except OSError as error:
        raise TrustError(f"the key {path} cannot be read: {error.strerror or error}") from None
    if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise TrustError(
            f"the key {path} can be read by others than its owner (mode {stat.S_IMODE(about.st_mode):o})",
            hint=f"chmod 600 {path}; if others have had access, make new keys",
        )
    if len(content) > MOST_KEY_BYTES:
        raise TrustError(f"the key {path} is larger than any key")
    return content


def _remove_partial(path: Path) -> None:
    """What processes that were killed left of this key; it is as private as the key."""
    for left in path.parent.iterdir():
        number = left.name.removeprefix(f".{path.name}.").partition(".")[0]
        if left.name.startswith(f".{path.name}.") and number.isdecimal() and not _lives(int(number)):
            left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def _pem(keys: Sequence[Any], passphrase: bytes | None) -> bytes:
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        how = serialization.BestAvailableEncryption(passphrase)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how
    return b"".join(key.private_bytes(*form) for key in keys)


def _read_keys(path: Path, kinds: Sequence[type], passphrase: bytes | None) -> list[Any]:
    content = read_private(path)
    blocks = _BLOCK.findall(content)
    if b"".join(blocks) != content or len(blocks) != len(kinds):
        raise TrustError(f"{path} holds no private key of the kind that is wanted")
    keys = []
    for block, kind in zip(blocks, kinds, strict=True):
        key, is_encrypted = None, b"ENCRYPTED" in block.splitlines()[0]
        if is_encrypted and passphrase is None:
            try:
                passphrase = passphrase_at_hand()
            except UsageError as error:
                raise TrustError(f"the passphrase of the key {path}: {error.message}", hint=error.hint) from None
        with contextlib.suppress(ValueError, TypeError):
            key = serialization.load_pem_private_key(block, passphrase if is_encrypted else None)
        if key is None and is_encrypted:
            raise TrustError(
                f"the passphrase of the key {path} is {'wrong' if passphrase else 'missing'}",
                hint=f"a file has it in its first line: --passphrase-file, or {PASSPHRASE_FILE} in the environment",
            )
        if not isinstance(key, kind):
            raise TrustError(f"{path} holds no private key of the kind that is wanted")
        keys.append(key)
    return keys


def _only(keys: Sequence[Any]) -> Any:
    (key,) = keys
    return key
