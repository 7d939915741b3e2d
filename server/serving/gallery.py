"""Pictures that are fetched by a URL: kept in memory, for a time, up to a number of bytes.

A name is 128 random bits: whoever has it may see the picture, and nobody can guess one. When there is no room the
oldest go first. Not here: pictures that outlive the service; ask for `b64_json` and keep them.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_OVERHEAD = 512  # bytes that a picture costs beside its file, about


class Gallery:
    """Threads may share it."""

    def __init__(self, *, most_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._seconds, self._clock = most_bytes, seconds, clock
        self._files: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # oldest first
        self._lock = threading.Lock()
        self.size = 0

    def __len__(self) -> int:
        return len(self._files)

    def keep(self, png: bytes) -> str:
        """The name under which `find` gives it; at least until newer ones need its room."""
        name = secrets.token_hex(16)
        with self._lock:
            self._files[name] = (self._clock() + self._seconds, png)
            self.size += len(png) + _OVERHEAD
            self._expire()
            while self.size > self._most and len(self._files) > 1:
                self._drop_oldest()
        return name

    def find(self, name: str) -> bytes | None:
        with self._lock:
            self._expire()
            kept = self._files.get(name)
        return None if kept is None else kept[1]

    def _expire(self) -> None:
        now = self._clock()
        while self._files and next(iter(self._files.values()))[0] <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, png) = self._files.popitem(last=False)
        self.size -= len(png) + _OVERHEAD
