"""Answers as they come from the engine, each apart from the others.

Between institutions an answer's parts arrive over a site's own line, and Flower waits for them where it is asked for
the answer, for up to two hours: every message has a thread that waits, so that a slow or hostile site holds up nobody.
What a site sent and Flower cannot put together is that site's, not the engine's.
Not here: whether an answer is one (`server.cohort`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection
from typing import Protocol

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from shared.errors import ProtocolError

POLL_SECONDS = 0.5  # of a thread, for its message
MOST_POLLS = 20.0  # a second, of all threads together


class Mailbox(Protocol):
    def arrived(self, wanted: Collection[str]) -> list[tuple[str, Message | ProtocolError]]:
        """Answers that came to these messages, by the id of the message; each is handed out once."""
        ...


class OneByOne:
    """Everything is asked for at once, in this thread: where an answer is whole when it is there."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def arrived(self, wanted: Collection[str]) -> list[tuple[str, Message | ProtocolError]]:
        found = [(message.metadata.reply_to_message_id, message) for message in self._grid.pull_messages(set(wanted))]
        return [(name, message) for name, message in found if name in wanted]


class Apart:
    """A thread for each message."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._wanted: frozenset[str] = frozenset()
        self._waiting: set[str] = set()  # messages that have a thread
        self._came: queue.SimpleQueue[tuple[str, Message | ProtocolError | BaseException]] = queue.SimpleQueue()

    def arrived(self, wanted: Collection[str]) -> list[tuple[str, Message | ProtocolError]]:
        """Raises what the engine raised, where it is not one site's doing."""
        self._wanted = frozenset(wanted)
        for name in self._wanted - self._waiting:
            self._waiting.add(name)
            threading.Thread(target=self._wait, args=(name,), name="mailbox", daemon=True).start()
        found: list[tuple[str, Message | ProtocolError]] = []
        while not self._came.empty():
            name, came = self._came.get()
            self._waiting.discard(name)
            if isinstance(came, BaseException) and not isinstance(came, ProtocolError):
                raise came
            if name in self._wanted:
                found.append((name, came))
        return found

    def _wait(self, name: str) -> None:
        came: Message | BaseException | None = None
        while came is None and name in self._wanted:
            try:
                # Only one is asked for: what the answer itself says it answers is a site's word.
                found: list[object] = list(self._grid.pull_messages([name]))
                if found:
                    came = found[0] if isinstance(found[0], Message) else ProtocolError("it is no message")
            except (httpx.HTTPError, RunNotRunningException) as error:
                came = error
            except Exception as error:  # of what a site sent
                came = ProtocolError(f"it cannot be put together ({type(error).__name__})")
            if came is None:
                time.sleep(max(POLL_SECONDS, len(self._waiting) / MOST_POLLS))
        if came is None:
            self._waiting.discard(name)
        else:
            self._came.put((name, came))
