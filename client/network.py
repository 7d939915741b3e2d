"""How a site reaches its federation's server: whose certificates count, and through which proxy.

    keys/federation-authority.crt   from the kit; enough where nobody stands in between
    keys/also-trusted.crt           an institution's own authorities, where it opens TLS at its border
    keys/trusted.crt                both, as the node takes them; written at each start
    https-proxy in site.toml        or HTTPS_PROXY and NO_PROXY of the environment of `client start`

Whoever holds an authority that is trusted here can stand in for the server and for the node; what such a one sees and
can do is in docs/site-guide.md. It is decided once, here, and the node is told so; `client.doctor` goes the same way.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from client.joining import AUTHORITY
from client.settings import SiteConfig
from shared.disk import write_whole
from shared.errors import ConfigError, TrustError

ALSO_TRUSTED, TRUSTED = "keys/also-trusted.crt", "keys/trusted.crt"
LOOPBACK = ("localhost", "127.0.0.1")
MOST_BYTES = 2**20
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\s.+?\s-----END CERTIFICATE-----", re.DOTALL)
_PROXY = re.compile(r"(?:http://)?(?:(?P<login>[^\s/@]+)@)?(?P<host>[^\s/@:]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})/?")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that is asked to CONNECT.

    Attributes:
        source: where it is set, for people.
    """

    url: str
    host: str
    port: int
    login: str
    source: str

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        found = _PROXY.fullmatch(text.strip())
        if found is None or not 0 < int(found["port"]) < 65536:
            raise ConfigError(
                f"the proxy of {source} is not of the form http://HOST:PORT",
                hint="other kinds of proxy (https, socks) are not supported",
            )
        login, host, port = found["login"] or "", found["host"], int(found["port"])
        return cls(f"http://{login}{'@' if login else ''}{host}:{port}", host.strip("[]"), port, login, source)

    def __str__(self) -> str:
        return f"http://{'***@' if self.login else ''}{self.host}:{self.port} ({self.source})"

    @property
    def authorization(self) -> str:
        """Of the header `Proxy-Authorization`; "" where no login is set."""
        return f"Basic {base64.b64encode(self.login.encode()).decode()}" if self.login else ""


@dataclass(frozen=True)
class Authority:
    """Of an institution, that a site trusts beside its federation's."""

    name: str
    ends: str
    sha256: str


def split(address: str) -> tuple[str, int]:
    """Of a federation's statement, which says that it is a host and a port."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# ---- certificates


def also_trust(folder: Path, file: Path) -> list[Authority]:
    """The authorities in `file` (PEM) are trusted from the next start on, and no others beside the federation's.

    Raises:
        TrustError: none is in it, or something else is.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TrustError(f"{file} cannot be read: {error.strerror or error}") from None
    blocks = _PEM.findall(content.decode("latin-1")) if len(content) <= MOST_BYTES else []
    found, whole = [], ""
    for block in blocks:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with contextlib.suppress(ssl.SSLError, ValueError):
            context.load_verify_locations(cadata=block)
        if not context.get_ca_certs():
            raise TrustError(
                f"{file} holds a certificate that is none of an authority",
                hint="ask the IT department for the certificate of the authority that its TLS inspection signs with",
            )
        der = ssl.PEM_cert_to_DER_cert(block.strip())
        found.append(_described(context.get_ca_certs()[0], der))
        whole += ssl.DER_cert_to_PEM_cert(der)  # without what may stand between certificates
    if not found:
        raise TrustError(f"{file} holds no certificate in PEM")
    write_whole(folder / ALSO_TRUSTED, whole.encode())
    return found


def trust_no_other(folder: Path) -> bool:
    """Back to the federation's authority alone; false where that was so."""
    known = (folder / ALSO_TRUSTED).exists()
    (folder / ALSO_TRUSTED).unlink(missing_ok=True)
    return known


def trusted(folder: Path) -> str:
    """PEM of everything whose certificates count."""
    parts = [folder / AUTHORITY, *([folder / ALSO_TRUSTED] if (folder / ALSO_TRUSTED).exists() else [])]
    try:
        return "".join(f"{part.read_text(encoding='ascii').strip()}\n" for part in parts)
    except (OSError, UnicodeDecodeError) as error:
        raise TrustError(f"what {folder} trusts cannot be read: {error}") from None


def write_trusted(folder: Path) -> Path:
    """The file that the node is given."""
    return write_whole(folder / TRUSTED, trusted(folder).encode())


def _described(certificate: Mapping[str, object], der: bytes) -> Authority:
    names = [value for part in certificate["subject"] for _, value in part]  # type: ignore[attr-defined]
    return Authority(", ".join(names), str(certificate["notAfter"]), hashlib.sha256(der).hexdigest())


# ---- the proxy


def proxy_of(config: SiteConfig, address: str, environment: Mapping[str, str]) -> Proxy | None:
    """Through which the server at `address` is reached: the site's own setting, else the environment's.

    Raises:
        ConfigError: it is of a kind that cannot be used.
    """
    source, text = f"https-proxy in {config.site_id}'s site.toml", config.https_proxy or ""
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        if not text and environment.get(name):
            source, text = name, environment[name]
    if not text or _bypasses(split(address)[0], _no_proxy(environment)):
        return None
    return Proxy.parse(text, source)


def environment_of(proxy: Proxy | None, environment: Mapping[str, str]) -> dict[str, str]:
    """What the node is told: this proxy or none, and never one on the way to its own machine."""
    told = {name: "" for name in ("http_proxy", "https_proxy", "all_proxy")}
    told["https_proxy"] = proxy.url if proxy else ""
    told["no_proxy"] = ",".join(dict.fromkeys([*_no_proxy(environment), *LOOPBACK]))
    return told | {name.upper(): value for name, value in told.items()}


def _no_proxy(environment: Mapping[str, str]) -> list[str]:
    text = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return [entry for part in text.split(",") if (entry := part.strip())]


def _bypasses(host: str, entries: list[str]) -> bool:
    """As curl reads NO_PROXY: names with what is below them, addresses, networks."""
    host = host.lower()
    for entry in (*entries, *LOOPBACK):
        name = entry.lower().partition("://")[2] or entry.lower()
        if name == "*" or host == name.strip("[]"):
            return True
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
            continue
        if host.endswith(f".{name.removeprefix('.')}"):
            return True
    return False
