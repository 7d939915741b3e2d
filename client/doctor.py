"""Every check of a deployed site in one go: what is right, what is worth a look, what is wrong, and what to do next.

What is looked at over the network goes the way that the node's own connection goes (`client.network`): the same proxy,
the same authorities. What is sent is an empty question without signature, to see that the server asks for one, and
another to see that its operator's side cannot be reached from here; nothing of the site, and nothing that depends on
its data. Not here: what the site is doing (`client.status`).
"""

from __future__ import annotations

import email.utils
import http.client
import os
import platform
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from client.data_check import Progress, advice, data_figures, open_as_training
from client.membership import FEDERATION, NODE, SIGNING, read_federation
from client.network import Proxy, proxy_of, split, trusted
from client.policy import FILE as POLICY
from client.policy import SitePolicy
from client.settings import RELEASE_CODE, SiteConfig
from client.status import open_account, read_connection
from shared import __version__
from shared.errors import ConfigError, DataError, FedCanvasError, FederationError, RunDirectoryError, TrustError
from shared.flower_runtime import CERTIFICATE_KEY, SECRET
from shared.protection.channel import NEWEST
from shared.protection.federation import CLOCKS, AggregatorKeys, Federation
from shared.protection.handshake import Seen, Trouble, shake
from shared.protection.keys import SigningKey, read_node_key
from shared.supervisor import log_lines, status

NETWORK_SECONDS = 10.0  # for each step
FLOWER = "1.41."
# Flower's server takes the signature of a node whose clock is this far ahead of its own, or behind.
MOST_AHEAD, MOST_BEHIND = 5.0, 300.0
DATE_SECONDS = 1.0  # of the header's precision
DISK_LOW, DISK_FULL = 2_000_000_000, 200_000_000  # bytes
FLEET, CONTROL = "/v1/fleet/pull-messages", "/v1/control/list-nodes"
NOT_THERE = (403, 404, 405, 421)  # what a server says of a path that it does not hand on

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        next: what to do; "" where there is nothing.
        code: the exit code of the error's kind; 0 unless it failed.
    """

    check: str
    state: State
    words: str
    next: str = ""
    code: int = 0


Look = Callable[[], Iterator[Finding]]


def examine(
    site_dir: Path, *, environment: Mapping[str, str] = os.environ, with_data: bool = True,
    progress: Progress | None = None,
) -> Iterator[Finding]:  # fmt: skip
    """Each finding as it is made, in order.

    Raises:
        ConfigError: there is no site.
    """
    config = SiteConfig.read(site_dir)
    checks: dict[str, Look] = {
        "versions": _versions,
        "federation": partial(_federation, site_dir),
        "policy": partial(_policy, site_dir),
        "ledger": partial(_ledger, site_dir),
        "keys": partial(_keys, site_dir),
        "disk": partial(_disk, site_dir, config),
        **({"data": partial(_data, site_dir, config, progress)} if with_data else {}),
        "network": partial(_network, site_dir, config, environment),
        "processes": partial(_processes, site_dir),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except FedCanvasError as error:
            yield Finding(name, "failed", error.message, error.hint or "", error.exit_code)


# ---- the site's own files


def _versions() -> Iterator[Finding]:
    flower = version("flwr")
    words = f"fedcanvas {__version__}, Flower {flower}, Python {platform.python_version()}, code {RELEASE_CODE[:12]}"
    if not flower.startswith(FLOWER):
        raise ConfigError(f"{words}: this release needs Flower {FLOWER}x", hint="install fedcanvas anew")
    yield Finding("versions", "ok", words)


def _federation(site_dir: Path) -> Iterator[Finding]:
    federation = _joined(site_dir)
    yield Finding(
        "federation", "ok", f"{federation.name} at {federation.address}, fingerprint {federation.fingerprint}",
        "compare it with what the operator tells you, if nobody has yet",
    )  # fmt: skip
    now = datetime.now(UTC)
    keys = AggregatorKeys.read_whenever((site_dir / NEWEST).read_bytes(), federation)
    period = f"from {keys.not_before:%Y-%m-%d} to {keys.not_after:%Y-%m-%d}"
    words = f"the aggregator's keys {keys.serial} are in force {period}"
    if now < keys.not_before - CLOCKS:
        raise TrustError(f"{words}, and it is {now:%Y-%m-%d %H:%M} UTC here", hint="set the clock of this machine")
    if now > keys.not_after + CLOCKS:
        yield Finding(
            "federation", "warning", f"{words}, and those are the newest that this site has seen",
            "set the clock if it is wrong; else an instruction with newer ones must come: ask the operator",
        )  # fmt: skip
    else:
        yield Finding("federation", "ok", words)


def _policy(site_dir: Path) -> Iterator[Finding]:
    policy = SitePolicy.read(site_dir)
    path, federation = site_dir / POLICY, read_federation(site_dir)
    if policy.code and RELEASE_CODE not in policy.code:
        raise ConfigError(
            f"nothing is answered: the installed code {RELEASE_CODE[:12]} is not in the policy's list",
            hint=f'when you trust this release, put "{RELEASE_CODE}" into `code` of {path}',
        )
    if federation is not None and policy.federations and federation.name not in policy.federations:
        raise ConfigError(f"nothing is answered: federation {federation.name} is not in the policy's list",
                          hint=f"`federations` in {path}")  # fmt: skip
    if not policy.federations and not policy.approve_each_run:
        raise ConfigError("nothing is answered: no federation is named, and runs are not approved one by one",
                          hint=f"`federations` or `approve-each-run` in {path}")  # fmt: skip
    if not policy.models or not policy.kernels or not policy.text_encoders or not policy.noise:
        raise ConfigError("nothing is answered: a list of what is allowed is empty",
                          hint=f"`models`, `kernels`, `text-encoders`, `noise` in {path}")  # fmt: skip
    how = "a person approves each run" if policy.approve_each_run else "runs within it begin by themselves"
    yield Finding("policy", "ok", f"epsilon {policy.max_epsilon:g} at delta {policy.delta:.0e} at most; {how}")
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding("policy", "warning", "others than its owner may write it", f"chmod go-w {path}")


def _ledger(site_dir: Path) -> Iterator[Finding]:
    _, account = open_account(site_dir)
    for ledger in account.ledgers:
        words = f"lineage {ledger.lineage.name}: each of its {len(ledger.entries):,} lines is as it was written"
        yield Finding("ledger", "ok", f"{words}, and the site's anchor fits")


def _keys(site_dir: Path) -> Iterator[Finding]:
    if not (site_dir / FEDERATION).exists():
        return
    SigningKey.read(site_dir / SIGNING)
    read_node_key(site_dir / NODE)
    for name in (SIGNING, NODE, CERTIFICATE_KEY, SECRET):
        path = site_dir / name
        if path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            raise TrustError(
                f"the key {path} can be read by others than its owner (mode {mode:o})",
                hint=f"chmod 600 {path}; if others have had access, leave and join again",
            )
    yield Finding("keys", "ok", "signing key and node key are there, and their owner's alone")


def _disk(site_dir: Path, config: SiteConfig) -> Iterator[Finding]:
    for path in {path.stat().st_dev: path for path in (site_dir / config.store, site_dir) if path.exists()}.values():
        free = shutil.disk_usage(path).free
        words = f"{free / 1e9:,.1f} GB free on the disk of {path.resolve()}"
        if free < DISK_FULL:
            raise RunDirectoryError(words, hint="free space: nothing is answered that cannot be written down first")
        if free < DISK_LOW:
            yield Finding("disk", "warning", words, "free space soon")
        else:
            yield Finding("disk", "ok", words)


def _data(site_dir: Path, config: SiteConfig, progress: Progress | None) -> Iterator[Finding]:
    dataset = open_as_training(site_dir / config.data, cache_dir=site_dir / config.cache_dir, progress=progress)
    figures, policy = data_figures(dataset), SitePolicy.read(site_dir)
    units = figures.units(policy.unit)
    if not units:
        raise DataError(f"no {policy.unit} can be used in {site_dir / config.data}",
                        hint="`fedcanvas client check-data` says why")  # fmt: skip
    published = config.published_records if config.indices is None else None
    yield Finding("data", "ok", f"{figures.records:,} records can be read")
    for words in advice(figures, unit=policy.unit, delta=policy.delta, published_records=published):
        yield Finding("data", "warning", words, "`fedcanvas client check-data` says more")


def _processes(site_dir: Path) -> Iterator[Finding]:
    running = status(site_dir)
    if running is None:
        yield Finding("processes", "warning", "not started", "`fedcanvas client start`")
        return
    for name, program in running["programs"].items():
        if program["pid"]:
            yield Finding("processes", "ok", f"the {name} is up since {program['since']}")
        else:
            yield Finding("processes", "warning", f"the {name} is down; it ended {program['ended']}",
                          f"{site_dir / f'logs/{name}.log'} says why; it is started again")  # fmt: skip
    connection = read_connection(log_lines(site_dir, "node"))
    if connection.state == "connected":
        yield Finding("processes", "ok", f"the node is connected since {connection.since}")
    else:
        hint = "send request.json to the operator, who admits it" if connection.state == "refused" else ""
        yield Finding("processes", "warning", f"the node's connection: {connection.words}", hint)


# ---- the way to the server


def _network(site_dir: Path, config: SiteConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    federation, step = _joined(site_dir), "proxy"
    host, port = split(federation.address)
    try:
        proxy = proxy_of(config, federation.address, environment)
        words = f"{proxy}; it looks the server's name up itself" if proxy else "none: the server is called directly"
        yield Finding("proxy", "ok", words)
        step = "name"
        yield _resolved(proxy.host, proxy.port, "proxy's ") if proxy else _resolved(host, port, "")
        step = "connection"
        connect = partial(_connect, host, port, proxy)
        connect().close()
        yield Finding("connection", "ok", f"{federation.address} takes connections{' through the proxy' * bool(proxy)}")
        step, authorities = "certificate", trusted(site_dir)
        seen, connection = _shaken(connect, host, authorities)
        yield _certificate(seen, federation)
        step = "server"
        answer = _spoken(connection, host, FLEET, "application/protobuf")
        yield _fleet(answer.status)
        step = "clock"
        yield _clock(answer.date, answer.came)
        step = "control"
        _, connection = _shaken(connect, host, authorities)
        # Of a kind that Flower refuses before it does anything.
        yield _control(_spoken(connection, host, CONTROL, "text/plain").status)
    except FedCanvasError as error:
        yield Finding(step, "failed", error.message, error.hint or "", error.exit_code)


def _resolved(host: str, port: int, whose: str) -> Finding:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FederationError(
            f"the {whose}name {host} cannot be resolved: {error.strerror or error}",
            hint="ask the IT department whether this machine's name server knows it, or whether a proxy must be used"
            " (`https-proxy` in site.toml)",
        ) from None
    addresses = ", ".join(dict.fromkeys(str(entry[4][0]) for entry in found))
    return Finding("name", "ok", f"{host} is {addresses}")


def _connect(host: str, port: int, proxy: Proxy | None) -> socket.socket:
    to = (proxy.host, proxy.port) if proxy else (host, port)
    try:
        connection = socket.create_connection(to, timeout=NETWORK_SECONDS)
    except ConnectionRefusedError:
        raise FederationError(
            f"{to[0]}:{to[1]} refuses connections: nothing listens there, or a firewall turns them away",
            hint=f"ask the {'IT department' if proxy else 'operator'} whether it is up, and on that port",
        ) from None
    except TimeoutError:
        raise FederationError(
            f"{to[0]}:{to[1]} does not answer: most likely a firewall drops what goes there",
            hint=f"ask the IT department to let this machine connect to {to[0]}, port {to[1]}, outwards",
        ) from None
    except OSError as error:
        raise FederationError(f"{to[0]}:{to[1]} cannot be reached: {error.strerror or error}",
                              hint="is this machine connected?") from None  # fmt: skip
    return connection if proxy is None else _tunnel(connection, host, port, proxy)


def _tunnel(connection: socket.socket, host: str, port: int, proxy: Proxy) -> socket.socket:
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    login = f"Proxy-Authorization: {proxy.authorization}\r\n" if proxy.authorization else ""
    answer = b""
    try:
        connection.sendall(f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n{login}\r\n".encode())
        while not answer.endswith(b"\r\n\r\n") and len(answer) < 2**14:
            piece = connection.recv(1)  # not a byte of what comes after it
            if not piece:
                break
            answer += piece
    except OSError as error:
        answer = f"nothing: {error.strerror or error}".encode()
    first = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if first.split(" ")[1:2] == ["200"]:
        return connection
    connection.close()
    raise FederationError(
        f"the proxy {proxy} does not connect to {name}; it says: {first or 'nothing'}",
        hint=(
            "it wants a login: https-proxy = \"http://NAME:PASSWORD@HOST:PORT\" in site.toml" if " 407" in first
            else f"ask the IT department to let this machine CONNECT to {name}"
        ),
    )  # fmt: skip


def _shaken(connect: Callable[[], socket.socket], host: str, authorities: str) -> tuple[Seen, ssl.SSLSocket]:
    made = shake(connect, host, trusted=authorities)
    if made.connection is None or made.seen is None:
        assert made.trouble is not None
        raise _refused(made.trouble, made.words, made.seen, host)
    return made.seen, made.connection


@dataclass(frozen=True)
class _Answer:
    """
    Attributes:
        date: as the server wrote it; "" where it wrote none.
        came: POSIX, by this machine's clock.
    """

    status: int
    date: str
    came: float


def _spoken(connection: ssl.SSLSocket, host: str, path: str, kind: str) -> _Answer:
    """The answer to an empty question."""
    with closing(connection):
        speaker = http.client.HTTPConnection(host)
        speaker.sock = connection
        try:
            before = time.time()
            speaker.request("POST", path, body=b"", headers={"Content-Type": kind, "Connection": "close"})
            answer = speaker.getresponse()
            return _Answer(answer.status, answer.getheader("Date") or "", (before + time.time()) / 2)
        except (OSError, http.client.HTTPException) as error:
            raise FederationError(f"the server does not answer over HTTP: {type(error).__name__} {error}".rstrip(),
                                  hint="ask the operator whether it is up") from None  # fmt: skip


def _refused(trouble: Trouble, words: str, seen: Seen | None, host: str) -> FedCanvasError:
    if trouble == "no-tls":
        return FederationError(
            f"there is no TLS at the other end: {words}",
            hint="is the address that of a federation's server? something else may answer there, or cut TLS off",
        )
    which = "none could be looked at"
    if seen is not None:
        which = f"SHA-256 {seen.sha256}, for {', '.join(seen.names) or seen.subject}, by {seen.issuer}"
    from_when = f" before {seen.not_before:%Y-%m-%d %H:%M} UTC" if seen else " yet"
    said, hint = {
        "expired": (
            f"the server's certificate ended{f' on {seen.not_after:%Y-%m-%d %H:%M} UTC' if seen else ''}",
            "is this machine's clock right? if it is, the operator must renew it: `fedcanvas server rotate`",
        ),
        "not-yet-valid": (
            f"the server's certificate is not valid{from_when}",
            "set the clock of this machine; if it is right, the operator's is not",
        ),
        "wrong-authority": (
            "the server's certificate is not by the federation's authority, nor by one that is trusted here too",
            "if the issuer is your institution, its TLS inspection stands in between: ask for an exception, or read"
            " docs/site-guide.md and `fedcanvas client trust`; else this is another server: ask the operator",
        ),
        "wrong-name": (
            f"the server's certificate is not for {host}",
            "ask the operator: the certificate must name the address of the kit",
        ),
    }[trouble]
    return TrustError(f"{said} ({words}); seen was: {which}", hint=hint)


def _certificate(seen: Seen, federation: Federation) -> Finding:
    words = f"SHA-256 {seen.sha256}, until {seen.not_after:%Y-%m-%d}"
    if not seen.is_by(federation.authority):
        return Finding(
            "certificate", "warning", f"by an authority that is trusted here beside the federation's: {seen.issuer};"
            f" {words}", "TLS is opened on the way; docs/site-guide.md says what that one sees and can do",
        )  # fmt: skip
    left = (seen.not_after - datetime.now(UTC)).total_seconds() / 86400
    if left < 14:
        return Finding("certificate", "warning", f"by the federation's authority; ends in {left:.0f} days; {words}",
                       "the operator must renew it: `fedcanvas server rotate`")  # fmt: skip
    return Finding("certificate", "ok", f"by the federation's authority; {words}")


def _fleet(code: int) -> Finding:
    if code == 401:
        return Finding("server", "ok", "it answers, and asks for a node's signature")
    if code in (502, 503, 504):
        raise FederationError(f"the server's front answers, and Flower behind it does not (HTTP {code})",
                              hint="ask the operator")  # fmt: skip
    raise FederationError(
        f"what answers is no federation's server: HTTP {code} where Flower asks for a signature",
        hint="ask the operator for the address; a proxy's page for visitors answers in this way too",
    )


def _control(code: int) -> Finding:
    if code in NOT_THERE or code == 401 or code >= 500:
        return Finding("control", "ok", "the operator's side of the server cannot be reached from here")
    return Finding(
        "control", "warning", f"the operator's side of the server answers from here (HTTP {code}): whoever reaches it"
        " can start runs", "tell the operator: only /v1/fleet/ may be reachable; this site's own policy still holds",
    )  # fmt: skip


def _clock(date: str, came: float) -> Finding:
    try:
        there = email.utils.parsedate_to_datetime(date).timestamp() + DATE_SECONDS / 2  # it is cut off to a second
    except (TypeError, ValueError):
        return Finding("clock", "warning", "the server tells no time to compare this machine's clock with",
                       "see that time is synchronised: `timedatectl`")  # fmt: skip
    ahead = came - there
    words = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    hint = "synchronise this machine's time (`timedatectl set-ntp true`), or the operator the server's"
    if not -MOST_BEHIND < ahead < MOST_AHEAD:
        raise FederationError(f"{words}: the server refuses the node", hint=hint)
    if not -MOST_BEHIND / 5 < ahead < MOST_AHEAD / 2:
        return Finding("clock", "warning", f"{words}; the server takes {MOST_AHEAD:g} s ahead and {MOST_BEHIND:g} s"
                       " behind", hint)  # fmt: skip
    return Finding("clock", "ok", f"{words}, as far as a second tells" if abs(ahead) >= 1 else "as the server's")


def _joined(site_dir: Path) -> Federation:
    federation = read_federation(site_dir)
    if federation is None:
        raise ConfigError(
            f"the site joined no federation: there is no {site_dir / FEDERATION}",
            hint="`fedcanvas client join KIT SITE_DIR` does that",
        )
    return federation
