"""The operator's folder of one federation: its identity, its keys and certificates, and the roster of its sites.

    federation.json          statement `federation`; public
    aggregator-keys.json     statement of the keys in force; public
    keys/identity.pem        signs statements; needed on the day of an admission or a rotation, not while rounds run
    keys/aggregator-N-*.pem  of serial N: what instructions are signed with, and what replies are opened with
    keys/authority.*         the certificate authority; its certificate is in every kit
    keys/server.pem          the server's TLS certificate and then its key: one file, so that they change together
    sites/SITE.json          statement `admission`; removing it (`revoke`) ends the site's part at once
    revoked/SITE-N.json      admissions that were ended; no key in them counts again, wherever it stands
    lock                     held while something is changed

Private keys are 0600, and but for TLS's never replaced. The identity may have a passphrase of its own, the
aggregator's keys that of the environment (`shared.protection.keys`). The folder comes about whole or not at all.
Not here: processes (`server.deployment`) and runs (`server.rounds`).
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from shared.disk import fsync_folder, locked, make_folder, write_whole
from shared.errors import FederationError, TrustError, UsageError
from shared.protection.certificates import (
    issue_server_certificate,
    make_authority,
    read_certificate,
    validity,
)
from shared.protection.channel import AggregatorChannel
from shared.protection.federation import KEYS_DAYS, NAME, SITE_NAME, AggregatorKeys, Federation, SiteKeys
from shared.protection.keys import (
    PASSPHRASE_FILE,
    OpeningKey,
    SigningKey,
    VerifyKey,
    passphrase_at_hand,
    read_private,
)
from shared.protection.kit import Kit, write_kit
from shared.supervisor import is_held

FEDERATION, KEYS = "federation.json", "aggregator-keys.json"
IDENTITY = "keys/identity.pem"
AUTHORITY, AUTHORITY_KEY = "keys/authority.crt", "keys/authority.key"
CERTIFICATE = CERTIFICATE_KEY = "keys/server.pem"
USES_KEYS = ("proxy", "worker")  # programs of `server.deployment` that read keys when they start
SITES, REVOKED, LOCK = "sites", "revoked", "lock"
LOOPBACK = ("localhost", "127.0.0.1")  # the server's own processes call it by these


@dataclass(frozen=True)
class FederationFolder:
    """Build it with `create` or `open`."""

    path: Path
    federation: Federation

    @classmethod
    def create(cls, path: Path, *, name: str, address: str, passphrase: bytes | None = None) -> FederationFolder:
        """
        Args:
            address: host and port that sites will connect to, such as `fl.example.org:9443`.
            passphrase: of the identity's key file.
        Raises:
            UsageError: the name or the address cannot be one, or something is there already.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"'{name}' is no name of a federation", hint="1 to 40 small letters, digits and dashes")
        host, port = split_address(address)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is there already", hint="name a new folder: keys are never replaced")
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700, parents=True)
        try:
            (partial / "keys").mkdir(mode=0o700)
            make_authority(name, certificate=partial / AUTHORITY, key=partial / AUTHORITY_KEY)
            _issue(partial, host)
            identity = SigningKey.generate()
            identity.write(partial / IDENTITY, passphrase=passphrase)
            authority = (partial / AUTHORITY).read_text()
            federation = Federation(name, f"{host}:{port}", authority, identity.public)
            write_whole(partial / FEDERATION, _json(federation.statement(identity)))
            made = cls(partial, federation)
            made._new_keys(identity, serial=1)
            (partial / SITES).mkdir()
            (partial / LOCK).touch(mode=0o600)
            if path.exists():
                path.rmdir()
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fsync_folder(path.parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> FederationFolder:
        """Raises `UsageError` when it is none, `TrustError` when its statement is damaged."""
        if not (path / FEDERATION).is_file():
            raise UsageError(f"{path} is no federation's folder", hint="`fedcanvas server init` makes one")
        return cls(path, Federation.read((path / FEDERATION).read_bytes(), what=str(path / FEDERATION)))

    # ---- keys

    @property
    def keys(self) -> AggregatorKeys:
        """In force or not."""
        return AggregatorKeys.read_whenever((self.path / KEYS).read_bytes(), self.federation)

    def channel(self) -> AggregatorChannel:
        """The aggregator's end of the way to the sites; `TrustError` when the keys are not in force."""
        statement = (self.path / KEYS).read_bytes()
        keys = AggregatorKeys.read(statement, self.federation)
        opening = [keys.serial, *([keys.serial - 1] if self._opening(keys.serial - 1).exists() else [])]
        return AggregatorChannel(
            self.federation.name, statement=statement, signing=SigningKey.read(self._signing(keys.serial)),
            opening=tuple(OpeningKey.read(self._opening(serial)) for serial in opening),
            sites=_Roster(self),
        )  # fmt: skip

    def rotate(self, *, passphrase: bytes | None = None) -> AggregatorKeys:
        """New keys of the aggregator and a new TLS certificate; sites need no new kit.

        The keys before go on opening what was sealed to them; those before these are removed.
        """
        with self._changing():
            identity = SigningKey.read(self.path / IDENTITY, passphrase=passphrase)
            before = self.keys.serial
            self._check_passphrase(before)
            _issue(self.path, split_address(self.federation.address)[0])  # first: without the authority nothing changes
            self._new_keys(identity, serial=before + 1)
            for serial in range(1, before + 1):  # all: an earlier rotation may have been cut off here
                self._signing(serial).unlink(missing_ok=True)
                if serial < before:
                    self._opening(serial).unlink(missing_ok=True)
            return self.keys

    def _check_passphrase(self, serial: int) -> None:
        """That new keys may be written with what the environment says, and that a server at work can read them."""
        path = self._signing(serial)
        if b"ENCRYPTED" in read_private(path):
            if passphrase_at_hand() is None:
                raise UsageError(
                    "the aggregator's keys have a passphrase, and new ones would have none",
                    hint=f"name the file of the passphrase in the environment of this command too: {PASSPHRASE_FILE}",
                )
            SigningKey.read(path)  # with the same one, or the server could not open what was sealed to the keys before
        elif passphrase_at_hand() is not None and is_held(self.path):
            raise UsageError(
                "new keys would have a passphrase, and the server was started without one",
                hint=f"stop the server, rotate, and start it with {PASSPHRASE_FILE} in its environment",
            )

    def _new_keys(self, identity: SigningKey, *, serial: int) -> None:
        signing, opening, passphrase = SigningKey.generate(), OpeningKey.generate(), passphrase_at_hand()
        for path in (self._signing(serial), self._opening(serial)):
            path.unlink(missing_ok=True)  # of a rotation that was cut off before its statement came about
        signing.write(self._signing(serial), passphrase=passphrase)
        opening.write(self._opening(serial), passphrase=passphrase)
        now = datetime.now(UTC).replace(microsecond=0)
        keys = AggregatorKeys(
            self.federation.name, serial, signing.public, opening.public, now, now + timedelta(days=KEYS_DAYS)
        )
        write_whole(self.path / KEYS, _json(keys.statement(identity)))  # last: from here on they are in force

    def _signing(self, serial: int) -> Path:
        return self.path / f"keys/aggregator-{serial}-signing.pem"

    def _opening(self, serial: int) -> Path:
        return self.path / f"keys/aggregator-{serial}-opening.pem"

    # ---- sites

    def kit(self, site: str, out: Path) -> Kit:
        """Raises `UsageError` when the site's name cannot be one."""
        _check_site(site)
        statements = {"federation": (self.path / FEDERATION).read_bytes(), "keys": (self.path / KEYS).read_bytes()}
        return write_kit(out, **statements, site=site)

    def read_request(self, content: bytes, *, what: str) -> SiteKeys:
        """What a site asks for, before anybody has said yes.

        Raises:
            TrustError: it is none, of another federation, or one of its keys was revoked or is another site's.
            UsageError: the site was admitted already.
        """
        asked = SiteKeys.read_request(content, what=what)
        self._check_asked(asked, what)
        return asked

    def _check_asked(self, asked: SiteKeys, what: str) -> None:
        if asked.federation != self.federation.name:
            raise TrustError(f"{what} asks to join federation '{asked.federation}', this is '{self.federation.name}'")
        for known in self.roster():
            if known.site == asked.site:
                again = "the same keys" if known == asked else f"other keys: {known.fingerprint}"
                raise UsageError(
                    f"site {asked.site} is admitted already, with {again}",
                    hint="`fedcanvas server revoke` ends that first; ask the site whether it lost its folder",
                )
            if _keys_of(known) & _keys_of(asked):
                raise TrustError(f"{what} holds a key of site {known.site}: no two sites may have one")
        if _keys_of(asked) & self._revoked():
            raise TrustError(
                f"{what} holds a key that was revoked",
                hint="a site comes back with new keys only: it removes keys/signing.pem and keys/node, and joins again",
            )

    def admit(self, asked: SiteKeys, *, passphrase: bytes | None = None) -> None:
        """Raises as `read_request` does, for what has changed since."""
        with self._changing():
            self._check_asked(asked, f"the request of site {asked.site}")
            identity = SigningKey.read(self.path / IDENTITY, passphrase=passphrase)
            write_whole(self.path / SITES / f"{asked.site}.json", _json(asked.admission(identity)))

    def revoke(self, site: str) -> SiteKeys:
        """Raises `UsageError` when there is no such site."""
        with self._changing():
            path = self.path / SITES / f"{_check_site(site)}.json"
            if not path.is_file():
                known = ", ".join(keys.site for keys in self.roster()) or "none"
                raise UsageError(f"there is no site '{site}' to revoke", hint=f"admitted are: {known}")
            keys = self._read(path)
            make_folder(self.path / REVOKED, durable=True)
            places = (self.path / REVOKED / f"{site}-{number}.json" for number in itertools.count(1))
            path.rename(next(place for place in places if not place.exists()))
            fsync_folder(self.path / REVOKED)
            fsync_folder(self.path / SITES)
            return keys

    def roster(self) -> list[SiteKeys]:
        """By name, without those whose keys were revoked, and without what is no admission by the identity: `warnings`
        names it, and no other site pays for it.

        Raises:
            TrustError: what was revoked cannot be read, so that nobody knows which keys do not count.
        """
        admitted, revoked = self._admitted(), self._revoked()
        return [keys for keys in admitted if isinstance(keys, SiteKeys) and not _keys_of(keys) & revoked]

    def _admitted(self) -> list[SiteKeys | TrustError]:
        """As the files say: somebody may have copied one back that was revoked, or put something else there."""
        found: list[SiteKeys | TrustError] = []
        for path in sorted((self.path / SITES).glob("*.json")):
            try:
                found.append(self._read(path))
            except FileNotFoundError:
                pass  # revoked a moment ago
            except TrustError as error:
                found.append(error)
            except OSError as error:
                found.append(TrustError(f"{path} cannot be read: {error.strerror or error}"))
        return found

    def _revoked(self) -> set[str]:
        """Every key, signing or node, of every admission that was ended."""
        found = [self._read(path, moved=True) for path in sorted((self.path / REVOKED).glob("*.json"))]
        return set().union(*map(_keys_of, found))

    def _read(self, path: Path, *, moved: bool = False) -> SiteKeys:
        keys = SiteKeys.read_admission(path.read_bytes(), self.federation.identity, what=str(path))
        if keys.federation != self.federation.name or (path.stem != keys.site and not moved):
            raise TrustError(f"{path} is the admission of another site or federation")
        return keys

    def _changing(self) -> AbstractContextManager[None]:
        busy = FederationError(f"another command is changing {self.path}", hint="wait until it ends")
        return locked(self.path / LOCK, busy)

    # ---- what is due

    def warnings(self, *, now: datetime | None = None) -> list[str]:
        """In words, what ends soon or has ended, and what stands in the folder and does not count."""
        now = now or datetime.now(UTC)
        found = []
        revoked = self._revoked()
        for keys in self._admitted():
            if isinstance(keys, TrustError):
                found.append(f"a file in {SITES}/ is no admission and does not count: {keys.message}")
            elif _keys_of(keys) & revoked:
                found.append(f"{SITES}/{keys.site}.json holds keys that were revoked: it does not count, remove it")
        for name in (AUTHORITY, CERTIFICATE):
            if words := validity(read_certificate(self.path / name)).warning(now):
                found.append(f"the certificate {name} {words}")
        left = (self.keys.not_after - now).total_seconds() / 86400
        if left < KEYS_DAYS / 3:
            when = f"end in {left:.0f} days" if left > 0 else f"ended on {self.keys.not_after:%Y-%m-%d}"
            found.append(f"the aggregator's keys {self.keys.serial} {when}")
        return found


class _Roster(Mapping[str, VerifyKey]):
    """Site to signing key, read anew each time: what was revoked a moment ago is no site."""

    def __init__(self, folder: FederationFolder) -> None:
        folder.roster()  # where nothing can be said about any site, that is said at once
        self._folder = folder

    def __getitem__(self, site: str) -> VerifyKey:
        return {keys.site: keys.signing for keys in self._folder.roster()}[site]

    def __iter__(self) -> Iterator[str]:
        return iter([keys.site for keys in self._folder.roster()])

    def __len__(self) -> int:
        return len(self._folder.roster())


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of `fl.example.org:9443`; `UsageError` when it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535 or any(c.isspace() or c in "/@" for c in host):
        raise UsageError(f"'{address}' is no address of a server", hint="host and port, such as fl.example.org:9443")
    return host, int(port)


def _issue(folder: Path, host: str) -> None:
    names: Sequence[str] = tuple(dict.fromkeys((host, *LOOPBACK)))
    issue_server_certificate(
        names, authority=folder / AUTHORITY, authority_key=folder / AUTHORITY_KEY, certificate=folder / CERTIFICATE,
        key=folder / CERTIFICATE_KEY,
    )  # fmt: skip


def _keys_of(site: SiteKeys) -> set[str]:
    return {site.signing.text, site.node}


def _check_site(site: str) -> str:
    if not SITE_NAME.fullmatch(site):
        raise UsageError(f"'{site}' is no name of a site", hint="1 to 64 letters, digits, dots, dashes, underscores")
    return site


def _json(statement: object) -> bytes:
    return json.dumps(statement, indent=2, sort_keys=True).encode() + b"\n"
