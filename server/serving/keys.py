"""API keys: made here, shown once, on disk only as digests.

    # a comment
    NAME sha256:64-HEX-DIGITS

A key is 256 random bits, so a plain SHA-256 of it cannot be turned back, salted or not. The file is mode 0600, written
whole, and read again when it changes: a line that is taken out ends its key at once. A file that cannot be read any
more lets nobody in. Not here: who may do what; every key may do everything.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from pathlib import Path

from shared.disk import fsync_folder, locked
from shared.errors import TrustError, UsageError

PREFIX = "fc-"
MOST_KEYS, MOST_BYTES = 10_000, 2**22
_ENCODING = "utf-8-sig"  # some editors begin a file with a byte order mark
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LINE = re.compile(r"(\S+) sha256:([0-9a-f]{64})")
_LOG = logging.getLogger("fedcanvas.serve")


class ApiKeys:
    """The keys of a file.

    Raises:
        TrustError: the file is missing, damaged, or others on this machine could write into it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _version(path)  # before it is read: what changes in between is read again
        self._digests = read_keys(path)

    def __len__(self) -> int:
        return len(self._digests)

    def holder(self, presented: str) -> str | None:
        """Whose key it is; `None` for none."""
        self._follow()
        digest, found = _digest(presented), None
        # Every key is compared, and each in constant time: how long it takes says nothing about any of them.
        for name, known in self._digests.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _follow(self) -> None:
        """Reads the file again where it has changed."""
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._digests = read_keys(self._path)
            _LOG.warning("the file of API keys was read again: %d keys", len(self._digests))
        except TrustError as error:
            self._digests = {}
            _LOG.error("nobody is let in: %s", error.message)


def read_keys(path: Path) -> dict[str, str]:
    """Digest of each key, by name; `TrustError` as in `ApiKeys`."""
    try:
        about = path.stat()
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise TrustError(f"others can write into {path}", hint=f"chmod 600 {path}")
        if about.st_size > MOST_BYTES:
            raise TrustError(f"{path} is too large for a file of API keys")
        text = path.read_text(encoding=_ENCODING)
    except FileNotFoundError:
        raise TrustError(f"there is no file of API keys at {path}", hint=_HOW.format(path=path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TrustError(f"{path} cannot be read as a file of API keys: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        entry = _LINE.fullmatch(line.strip())
        if entry is None or not _NAME.fullmatch(entry[1]) or entry[1] in found:
            raise TrustError(
                f"{path}, line {number} is not a name and a digest, or its name stands twice",
                hint=f"it does not hold keys themselves: {_HOW.format(path=path)}",
            )
        found[entry[1]] = entry[2]
    return found


def add_key(path: Path, name: str) -> str:
    """A new key for `name`; nothing but what is returned has it.

    Raises:
        UsageError: the name is none, or has a key already.
        TrustError: the file is damaged, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"a name of a key is letters, digits, '.', '_' and '-', not {name!r}")
    path = Path(os.path.realpath(path))  # a link stays a link, and who follows it another way takes the same lock
    try:
        with locked(path.with_name(f".{path.name}.lock"), UsageError(f"somebody else is changing {path}")):
            known = read_keys(path) if path.exists() else {}
            if name in known:
                raise UsageError(
                    f"{name} has a key already", hint=f"take its line out of {path} first, or use another name"
                )
            if len(known) >= MOST_KEYS:
                raise UsageError(f"{path} holds {MOST_KEYS} keys, which is the most")
            key = PREFIX + secrets.token_urlsafe(32)
            before = path.read_text(encoding=_ENCODING) if path.exists() else _HEADER
            _write_private(path, before.rstrip("\n") + f"\n{name} sha256:{_digest(key)}\n")
    except OSError as error:
        raise TrustError(f"{path} cannot be written: {error.strerror or error}") from None
    return key


_HOW = "make a key with `fedcanvas serve --api-keys {path} --new-key NAME`"
_HEADER = "# API keys of fedcanvas serve: a name and the digest of its key, one a line. Take out a line to end a key.\n"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _version(path: Path) -> tuple[int, ...]:
    try:
        about = path.stat()
    except OSError:
        return ()
    return about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)
