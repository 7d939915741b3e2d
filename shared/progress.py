"""How far work is that takes long: to stderr, for people; in place on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shared.cli import say

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 20.0


class StepProgress:
    """`StepProgress("drawing")(done, total)`: in place on a terminal, a line now and then in a log."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now, finished = time.monotonic(), done >= total
        if sys.stderr.isatty():
            if finished or now - self._told > 0.1:
                self._told = now
                print(f"\r{self.what}: {done} of {total}", end="\n" if finished else "", file=sys.stderr, flush=True)
        elif finished or now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            say(f"{self.what}: {done} of {total}")


class Barred:
    """A context manager, since a bar must be taken down again.

    Args:
        bar: of `rich`; `None` where no terminal shows one.
    """

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def on_terminal(terminal: bool | None) -> bool:
    """Whether people see a terminal; a test says so itself."""
    return sys.stderr.isatty() if terminal is None else terminal
