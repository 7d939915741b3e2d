"""The side of Flower's Runtime API that hands out work: a SuperLink's or a SuperNode's, on this machine's loopback.

Flower gives a run or a message to whatever process asks for it with the shared secret (process isolation). Its own
SuperExec then unpacks the bundle that the coordinator shipped and imports the app from it. Ours take the work here
(`client.worker` at a site, `server.worker` beside the SuperLink) and run what is installed.

    FOLDER/run/runtime-address        host and port, on loopback; another port where somebody else took it meanwhile
    FOLDER/keys/runtime-*.crt, .key   its own certificate, and the authority that signed it and nothing else
    FOLDER/keys/runtime-secret        whoever knows it may take work

Uses parts of Flower 1.41 that are not public; they are imported here, in `client.worker`, `client.node`,
`server.worker`, `server.superlink` and `server.mailbox` alone.
"""

from __future__ import annotations

import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, constant, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient

from shared.disk import write_whole
from shared.protection.certificates import issue_server_certificate, make_authority
from shared.protection.keys import read_private, write_private
from shared.supervisor import is_held

ADDRESS, SECRET = "run/runtime-address", "keys/runtime-secret"
AUTHORITY, AUTHORITY_KEY = "keys/runtime-authority.crt", "keys/runtime-authority.key"
CERTIFICATE, CERTIFICATE_KEY = "keys/runtime.crt", "keys/runtime.key"
CERTIFICATE_DAYS = 3650
# Flower says nothing to anybody but the server, and installs nothing; nor is loopback reached through a proxy.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "NO_PROXY": "localhost,127.0.0.1",
    "no_proxy": "localhost,127.0.0.1",
}  # fmt: skip
RETRY_SECONDS = 1.0
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@dataclass(frozen=True)
class Runtime:
    """Where work is handed out.

    Attributes:
        address: host and port, on loopback.
        authority: PEM of what its certificate is signed by.
        secret: shared by both ends.
    """

    address: str
    authority: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def prepare(cls, folder: Path) -> Self:
        """What both ends in `folder` need, before they are started; each is made once, but for a port that is taken."""
        if not (folder / CERTIFICATE).exists():
            for name in (AUTHORITY_KEY, CERTIFICATE_KEY):
                (folder / name).unlink(missing_ok=True)  # of an attempt that was cut off
            make_authority("this machine", certificate=folder / AUTHORITY, key=folder / AUTHORITY_KEY)
            issue_server_certificate(
                ["localhost", "127.0.0.1"], authority=folder / AUTHORITY, authority_key=folder / AUTHORITY_KEY,
                certificate=folder / CERTIFICATE, key=folder / CERTIFICATE_KEY, days=CERTIFICATE_DAYS,
            )  # fmt: skip
            (folder / AUTHORITY_KEY).unlink()  # it signs nothing more
        if not (folder / SECRET).exists():
            write_private(folder / SECRET, secrets.token_hex(32).encode())
        # The kernel gives such ports to any connection. While the folder is started it is its own that listens.
        if not (folder / ADDRESS).exists() or not (is_held(folder) or is_free(cls.read(folder).port)):
            write_whole(folder / ADDRESS, f"127.0.0.1:{free_port()}\n".encode())
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """As `prepare` left it; `TrustError` where others can read the secret."""
        return cls(
            (folder / ADDRESS).read_text().strip(), (folder / AUTHORITY).read_bytes(), read_private(folder / SECRET)
        )

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def options(self, folder: Path) -> list[str]:
        """What the SuperLink or SuperNode in `folder` is started with, so that it hands out work this way."""
        return [
            "--host", "127.0.0.1", "--port", str(self.port), "--isolation", "process",
            "--superexec-auth-secret-file", str(folder / SECRET), "--ssl-ca-certfile", str(folder / AUTHORITY),
            "--ssl-certfile", str(folder / CERTIFICATE), "--ssl-keyfile", str(folder / CERTIFICATE_KEY),
        ]  # fmt: skip

    def client(
        self, interceptors: list[ProtobufClientInterceptor], *, retry: RetryInvoker | None = None
    ) -> RuntimeHttpClient:
        """To be closed by the caller."""
        return RuntimeHttpClient.from_server_address(
            server_address=self.address, insecure=False, root_certificates=self.authority, interceptors=interceptors,
            retry_invoker=retry,
        )  # fmt: skip

    def client_of_task(self, token: str, *, program: str) -> RuntimeHttpClient:
        """For one piece of work; `program` is the one of Flower's that would do it."""
        return self.client(
            [RuntimeVersionHttpInterceptor(component_name=program), RuntimeTokenHttpInterceptor(token)],
            retry=loopback_retries(),
        )


class WorkSource:
    """Asks for work of one kind (`flwr.supercore.constant.TaskType`). Use it as a context manager."""

    def __init__(self, runtime: Runtime, kind: str) -> None:
        auth = SuperExecAuthHttpInterceptor(master_secret=runtime.secret, protected_methods=_ACQUIRE)
        self._client = runtime.client([RuntimeVersionHttpInterceptor(component_name="SuperExec"), auth])
        self._kind = kind

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def take(self) -> str | None:
        """The token of a piece of work, or `None` when there is none now, or nobody there to hand it out."""
        # Flower would wait longer and longer for a process that starts at the same time as this one.
        with suppress(httpx.TransportError):
            return self._take()
        return None

    def _take(self) -> str | None:
        found: AcquireTaskResponse = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._kind]))
        return found.token if found.HasField("task") and found.token else None


def loopback_retries() -> RetryInvoker:
    """For as long as the other end, a process of this machine, is being started again.

    Flower's own wait up to 20 s, and threads that share them wait one after another.
    """
    retries = outlive_broken_tls(make_simple_http_retry_invoker())
    retries.wait_gen_factory, retries.wait_function = lambda: constant(RETRY_SECONDS), time.sleep
    retries.on_backoff = None  # it logs every try
    return retries


def outlive_broken_tls(retries: RetryInvoker) -> RetryInvoker:
    """The same, which also tries again after a connection broke within TLS, unless a certificate was the reason."""
    gives_up = retries.should_giveup

    def should_give_up(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower():
            return False
        return gives_up is not None and gives_up(error)

    retries.should_giveup = should_give_up
    return retries


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of loopback now, as Flower does: closed connections do not matter."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
            tried.listen(1)
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port
