"""What every request passes: host, body, key; and what every answer gets: headers, an end, a line in the log.

A request's body is read here to its end before anything is done, within a time and up to a size, so that nothing
behind waits for a client; an answer is sent piece by piece, so that one that nobody takes lies in memory once.
Errors of all kinds become the API's own shape here. Not here: connections that send no request at all
(`server.serving.service`).
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from server.serving.errors import ApiError
from server.serving.keys import ApiKeys
from server.serving.log import LOG, where
from server.serving.metrics import Metrics
from server.serving.settings import ServingSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

CLIENT_LEFT = 499  # never sent; nginx's number for it, in logs and metrics
PIECE = 2**15
DISCARDED = 2**23  # bytes of a body that is too long which are read, so that the client gets to read the answer
OPEN = ("/", "/health", "/openapi.json")  # without a key
OPEN_BELOW = ("/page/", "/v1/images/files/")
QUIET = ("/health", "/metrics")  # successes that stand in no log

HEADERS = {
    # Scripts and styles only from here, never in the page itself; pictures also from what a script was given.
    "content-security-policy": (
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self';"
        " object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_ENCODED = [(name.encode(), value.encode()) for name, value in {**HEADERS, "cache-control": "no-store"}.items()]
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


class ClientLeft(Exception):
    """There is nobody to answer any more."""


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: App, *, settings: ServingSettings, keys: ApiKeys | None, metrics: Metrics) -> None:
        self._app, self._settings, self._keys, self._metrics = app, settings, keys, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        answer = _Answer(send)
        try:
            body = await self._accepted(scope, receive)
            await self._app(scope, _replaying(body, receive), answer.send)
        except ApiError as error:
            await answer.error(error)
        except ClientLeft:
            answer.status = CLIENT_LEFT
            self._metrics.given_up.inc()
        except asyncio.CancelledError:
            # The time for work under way is over. uvicorn would call it an error of the service.
            await answer.error(ApiError(503, "the service is being stopped", retry_after=5, close=True))
        except Exception as error:
            LOG.error("an error of the service itself: %s", where(error), extra={"fields": {"id": answer.id}})
            await answer.error(ApiError(500, f"the service made an error; its log has it under {answer.id}"))
        finally:
            self._note(scope, answer)

    async def _accepted(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """The body of a request that may come in."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        body = await self._read(receive, most=0 if refusal else self._settings.most_body_bytes)
        if refusal is not None:
            raise refusal
        return body

    def _refusal(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> ApiError | None:
        host = _HOST.fullmatch(headers.get("host", "localhost"))
        if host is None:
            return ApiError(400, "the Host header is no host", code="bad_host")
        if self._settings.hosts is not None and host["name"].lower() not in self._settings.hosts:
            # A page on the internet may give its own name this machine's address; its requests carry that name.
            return ApiError(
                421, "this service is not called by that name; its operator can add it with --allow-host",
                code="bad_host",
            )  # fmt: skip
        path = scope["path"]
        if self._keys is None or path in OPEN or path.startswith(OPEN_BELOW):
            return None
        kind, _, presented = headers.get("authorization", "").partition(" ")
        holder = self._keys.holder(presented.strip()) if kind.lower() == "bearer" else None
        if holder is None:
            self._metrics.refused.labels("key").inc()
            return ApiError(
                401, "an API key is needed: Authorization: Bearer fc-...", headers={"www-authenticate": "Bearer"}
            )
        scope["state"]["holder"] = holder
        return None

    async def _read(self, receive: Receive, *, most: int) -> bytes:
        """The body; `most` 0 reads and drops it, for a request that is refused anyway."""
        size, parts = 0, []
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size <= most:
                        parts.append(piece)
                    if size > DISCARDED or not message.get("more_body", False):
                        break
        except TimeoutError:
            self._metrics.refused.labels("slow").inc()
            raise ApiError(
                408, f"the request did not arrive within {self._settings.body_seconds:g} s", code="timeout", close=True
            ) from None
        if size > most > 0 or size > DISCARDED:
            self._metrics.refused.labels("body").inc()
            raise ApiError(
                413, f"the body is longer than {self._settings.most_body_bytes} bytes", code="body_too_long", close=True
            )
        return b"".join(parts)

    def _note(self, scope: MutableMapping[str, Any], answer: _Answer) -> None:
        seconds = time.perf_counter() - answer.began
        # The route's pattern, one of ours; a path is the client's own text.
        route = str(getattr(scope.get("route"), "path", "other"))
        self._metrics.answer(scope["method"], route, answer.status, seconds)
        if route in QUIET and answer.status == 200:
            return
        client = scope.get("client")
        fields = {
            "status": answer.status, "ms": round(seconds * 1e3), "client": client[0] if client else "",
            "id": answer.id, **{name: scope["state"][name] for name in _NOTED if name in scope["state"]},
        }  # fmt: skip
        method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
        LOG.info("%s %s", method, route, extra={"fields": fields})


_NOTED = ("holder", "pictures", "seed", "prompt")


class _Answer:
    """One answer on its way out.

    Attributes:
        id: 64 random bits, in the answer's `x-request-id` and in the log.
        status: 0 before it is known.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.id, self.status, self.began = send, secrets.token_hex(8), 0, time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message.get("headers", [])}
            extra = [header for header in _ENCODED if header[0] not in given]
            identity = (b"x-request-id", self.id.encode())
            await self._send({**message, "headers": [*message.get("headers", []), *extra, identity]})
            return
        body = message.get("body", b"")
        # Each piece waits until the client has taken most of what was sent before.
        for start in range(PIECE, len(body) + PIECE, PIECE):
            more = start < len(body) or message.get("more_body", False)
            await self._send({**message, "body": body[start - PIECE : start], "more_body": more})
        if not body:
            await self._send(message)

    async def error(self, error: ApiError) -> None:
        """Nothing can be said any more once an answer has begun."""
        if self.status:
            return
        body = error.body()
        headers = {**error.headers, "content-length": str(len(body))}
        await self.send({
            "type": "http.response.start", "status": error.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        })  # fmt: skip
        await self.send({"type": "http.response.body", "body": body})


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes: the client leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
