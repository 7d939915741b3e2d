"""A thread that serves what waits for it, from its start to its end: drawing and describing are such threads.

Not here: what waits, in which order it is served, and who is let in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from server.serving.errors import ApiError


class ServingThread:
    """Subclasses serve in `run` until `stopped`; they hold `changed` while they look at what waits, or change it."""

    def __init__(self, name: str) -> None:
        self.changed, self.stopped = threading.Condition(), False
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)

    def run(self) -> None:
        raise NotImplementedError

    def waiting(self) -> Iterable[Future[Any]]:
        """What nobody has served yet."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After what is served now; whatever waits is refused."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        for done in self.waiting():
            settle(done, _stopping())

    def check_not_stopped(self) -> None:
        """`ApiError` (503) once it was told to stop."""
        if self.stopped:
            raise _stopping()


def settle(done: Future[Any], found: Any) -> None:
    """Its result or, of an `Exception`, its failure; nothing where it is settled or nobody wants it any more."""
    if done.done() or not done.set_running_or_notify_cancel():
        return
    if isinstance(found, Exception):
        done.set_exception(found)
    else:
        done.set_result(found)


def _stopping() -> ApiError:
    return ApiError(503, "the service is being stopped", retry_after=5)
