"""The server under the API: uvicorn, with an end to every wait that uvicorn leaves open.

Connections that send no whole request head, or take nothing of their answer, are closed after a time, and those that
take it too slowly on the whole; beyond a number of
connections a request is answered with 429 and more are dropped; what is no HTTP is answered in the API's own shape.
Signals end it in order: nothing new, work under way is finished, then exit code 0.
Not here: what is served (`server.serving.app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.serving.errors import ApiError
from server.serving.guard import HEADERS, PIECE
from server.serving.settings import ServingSettings

MOST_HEAD_BYTES = 2**15
SPARE_CONNECTIONS = 256  # above the limit, that are told why; more are dropped
SWEEP_TICKS = 5  # of a tenth of a second


class Service(uvicorn.Server):
    """Serves until `should_exit`, or a signal."""

    def __init__(self, app: FastAPI, settings: ServingSettings) -> None:
        self.settings = settings
        self._connections = app.state.studio.metrics.connections
        super().__init__(
            uvicorn.Config(
                app, http=PatientProtocol, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
                server_header=False, h11_max_incomplete_event_size=MOST_HEAD_BYTES,
                timeout_keep_alive=settings.keep_alive_seconds, timeout_graceful_shutdown=settings.ending_seconds,
                # A proxy on this machine says whether its client came over TLS, which URLs of pictures repeat.
                proxy_headers=True, forwarded_allow_ips="127.0.0.1,::1",
            )
        )  # fmt: skip
        # Each connection needs to know how patient to be, and uvicorn makes them from its own settings alone.
        self.config.serving = settings  # type: ignore[attr-defined]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it in order, the second at once; uvicorn would raise it again at the end."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % SWEEP_TICKS == 0:
            connections = cast(set["PatientProtocol"], self.server_state.connections)
            self._connections.set(len(connections))
            now = time.monotonic()
            for connection in list(connections):
                connection.sweep(now)
        return await super().on_tick(counter)


class CountingTransport:
    """A transport that counts what is written to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self.written = transport, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    @property
    def taken(self) -> int:
        """Bytes that the kernel has, which takes more as the client does."""
        return self.written - self._transport.get_write_buffer_size()


class PatientProtocol(H11Protocol):
    """One connection, with its deadlines.

    Attributes:
        head_since: when the connection was made or gave its last answer: a head has to come in time from then.
    """

    def __init__(self, config: uvicorn.Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self._settings: ServingSettings = config.serving  # type: ignore[attr-defined]
        self.head_since = time.monotonic()
        self._sending: _Sending | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=PIECE)
        self._counting = CountingTransport(transport)
        super().connection_made(cast(asyncio.Transport, self._counting))
        above = len(self.connections) - self._settings.most_connections
        if above > SPARE_CONNECTIONS:
            transport.abort()
        elif above > 0:
            self.app = _full

    def sweep(self, now: float) -> None:
        if self._is_too_slow(now):
            self.transport.abort()
            return
        waits_for_head = self.conn.their_state is h11.IDLE
        if waits_for_head and now - self.head_since > self._settings.head_seconds:
            self.transport.abort()

    def _is_too_slow(self, now: float) -> bool:
        """Whether the client takes nothing, or so little on average that it would hold its answer for hours."""
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not begun and self.transport.get_write_buffer_size() == 0:
            self._sending = None
            return False
        taken, patience = self._counting.taken, self._settings.sending_seconds
        if self._sending is None:
            self._sending = _Sending(since=now, first=taken, last=taken, moved=now)
        sending = self._sending
        if taken > sending.last:
            sending.last, sending.moved = taken, now
        allowed = patience + (taken - sending.first) / self._settings.least_sending_rate
        return now - sending.moved > patience or now - sending.since > allowed

    def on_response_complete(self) -> None:
        self.head_since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        # Not by `self.conn`: it may be in the middle of another answer, and would raise.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_raw(ApiError(400, "this is no HTTP request", code="bad_http", close=True)))
        self.transport.close()


@dataclass
class _Sending:
    """Answers on their way: since when, bytes taken at first and at last, and when that became more."""

    since: float
    first: int
    last: int
    moved: float


async def _full(scope: Any, receive: Any, send: Any) -> None:
    """The whole application, for connections above the limit."""
    error = ApiError(
        429, "the service has as many connections as it takes; come again after the seconds in Retry-After",
        code="rate_limit_exceeded", retry_after=5, close=True,
    )  # fmt: skip
    headers = {**error.headers, **HEADERS, "content-length": str(len(error.body()))}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": error.body()})


def _raw(error: ApiError) -> bytes:
    body = error.body()
    headers = {**error.headers, **HEADERS, "content-length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {error.status} Bad Request\r\n{head}\r\n".encode() + body


def serve(app: FastAPI, settings: ServingSettings, listening: socket.socket) -> None:
    """Returns when it was told to stop."""
    with contextlib.closing(listening):
        Service(app, settings).run(sockets=[listening])
