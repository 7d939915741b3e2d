"""Certificates of every kind, a small TLS server that answers as it is told, and an HTTP proxy that takes CONNECT.

Nothing here is made by our code: certificates come from `cryptography`, TLS from `ssl`.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def sha256(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()


def certificate(
    name: str, *, by: Pair | None = None, start: datetime.timedelta = -DAY, end: datetime.timedelta = 90 * DAY,
    names: tuple[str, ...] = ("localhost", "127.0.0.1"),
) -> Pair:  # fmt: skip
    """An authority, or what one signs for `names`."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if by is not None:
        listed = [x509.IPAddress(ip_address(n)) if n[0].isdecimal() else x509.DNSName(n) for n in names]
        made = made.add_extension(x509.SubjectAlternativeName(listed), critical=False)
    return Pair(made.sign(by.key if by else key, hashes.SHA256()), key)


def write_pair(folder: Path, pair: Pair) -> ssl.SSLContext:
    """What a server with this certificate speaks TLS with; its files are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "server.pem").write_text(pair.pem)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.key").write_bytes(pair.key.private_bytes(*form))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return context


@dataclass
class Server:
    """What it was asked, and where it is.

    Attributes:
        answers: path to status; anything else is 404.
        ahead: seconds by which its clock differs from this machine's; `None`: it tells no time.
    """

    port: int
    answers: dict[str, int]
    ahead: float | None = 0.0
    requests: list[bytes] = field(default_factory=list)


@contextmanager
def tls_server(folder: Path, pair: Pair, **about: object) -> Iterator[Server]:
    """Speaks TLS with this certificate and HTTP within."""
    context = write_pair(folder, pair)
    usual: dict[str, object] = {"answers": {"/v1/fleet/pull-messages": 401, "/v1/control/list-nodes": 403}}

    def answer(raw: socket.socket) -> None:
        with context.wrap_socket(raw, server_side=True) as connection:
            asked = b""
            while b"\r\n\r\n" not in asked and (piece := connection.recv(2**16)):
                asked += piece
            if not asked:
                return
            server.requests.append(asked)
            status = server.answers.get(asked.split(b" ")[1].decode(), 404)
            now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=server.ahead or 0.0)
            date = "" if server.ahead is None else f"Date: {format_datetime(now, usegmt=True)}\r\n"
            head = f"HTTP/1.1 {status} Said\r\n{date}Content-Length: 0\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode())

    with listening(answer) as port:
        server = Server(port, **{**usual, **about})  # type: ignore[arg-type]
        yield server


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A thread for each connection, on a port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=once, args=(connection,), daemon=True).start()

        def once(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@dataclass
class ConnectProxy:
    """An HTTP proxy that takes CONNECT alone.

    Attributes:
        leads: name and port that may be asked for, to where they are; anything else is refused.
        login: `NAME:PASSWORD` in base64, or "" where it wants none.
    """

    port: int
    leads: dict[str, tuple[str, int]]
    login: str
    asked: list[str] = field(default_factory=list)


@contextmanager
def connect_proxy(leads: dict[str, tuple[str, int]], *, login: str = "") -> Iterator[ConnectProxy]:
    def answer(connection: socket.socket) -> None:
        asked = b""
        while not asked.endswith(b"\r\n\r\n") and (piece := connection.recv(1)):
            asked += piece
        head = asked.decode()
        method, target = head.split(" ")[:2]
        proxy.asked.append(f"{method} {target}")
        if proxy.login and f"Proxy-Authorization: Basic {proxy.login}\r\n" not in head:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        elif method != "CONNECT" or target not in proxy.leads:
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        else:
            with socket.create_connection(proxy.leads[target]) as beyond:
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=copy, args=(beyond, connection), daemon=True)
                back.start()
                copy(connection, beyond)
                back.join()

    with listening(answer) as port:
        proxy = ConnectProxy(port, leads, login)
        yield proxy


def copy(source: socket.socket, to: socket.socket, record: bytearray | None = None) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(2**16):
            if record is not None:
                record += piece
            to.sendall(piece)
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_WR)
