"""How far one step is that counts things, such as decoding pictures: to stderr, for people."""

from __future__ import annotations

import sys
import time

from shared.cli import say

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
