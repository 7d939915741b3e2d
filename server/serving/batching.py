"""One thread draws; pictures of several requests share a batch, and are the same whatever else is in it.

Nobody waits for a batch to fill: what arrives while one is drawn makes the next. A request that was given up is left
out of the batches to come; what fails in a shared batch is drawn again one by one, so that it fails alone.
Not here: who is let in (`server.serving.load`), and files of pictures (`server.serving.app`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from server.generator import Generator
from server.serving.serving_thread import ServingThread, settle

BATCH = 32


@dataclass(eq=False)
class Drawing:
    """The pictures of one request, some of them drawn.

    Attributes:
        arrays: those that are drawn, in order.
        done: all of them; cancelled by whoever no longer wants them.
        given: how many were taken into a batch.
    """

    prompt: str
    n: int
    seed: int
    truncation: float
    done: Future[list[np.ndarray]] = field(default_factory=Future)
    arrays: list[np.ndarray] = field(default_factory=list)
    given: int = 0


class Batcher(ServingThread):
    """The thread and what waits for it. Any thread may `submit`.

    Args:
        observe: told the pictures and the seconds of every batch that was drawn.
    """

    def __init__(
        self, generator: Generator, *, batch: int = BATCH, observe: Callable[[int, float], None] = lambda n, s: None
    ) -> None:
        super().__init__("drawing")
        self._generator, self._batch, self._observe = generator, batch, observe
        self._waiting: deque[Drawing] = deque()
        self._since: float | None = None

    def waiting(self) -> list[Future[list[np.ndarray]]]:
        return [drawing.done for drawing in self._waiting]

    def submit(self, prompt: str, *, n: int, seed: int, truncation: float) -> Future[list[np.ndarray]]:
        """`n` arrays, later; indices from 0. Its `cancel` is always obeyed, but for a batch that is being drawn."""
        drawing = Drawing(prompt, n, seed, truncation)
        with self.changed:
            self.check_not_stopped()
            self._waiting.append(drawing)
            self.changed.notify()
        return drawing.done

    def working(self, within_seconds: float) -> bool:
        """Whether the thread lives and no batch takes longer than this."""
        since = self._since
        return self.alive and (since is None or time.monotonic() - since < within_seconds)

    def run(self) -> None:
        while parts := self._take():
            self._since = time.monotonic()
            try:
                self._draw(parts)
            except Exception as error:
                if len(parts) == 1:
                    _fail(parts[0][0], error)
                else:
                    for part in parts:
                        self._draw_alone(part)
            count = sum(len(indices) for _, indices in parts)
            self._observe(count, time.monotonic() - self._since)
            self._since = None
            del parts  # a request's pictures are not held until the next one comes

    def _take(self) -> list[tuple[Drawing, range]]:
        """The next batch: the first that waits, and who wants the same truncation; empty once stopped."""
        with self.changed:
            while True:
                if self.stopped:
                    return []
                parts = self._gather()
                if parts:
                    return parts
                self.changed.wait()

    def _gather(self) -> list[tuple[Drawing, range]]:
        parts: list[tuple[Drawing, range]] = []
        room, kept = self._batch, deque[Drawing]()
        while self._waiting and room:
            drawing = self._waiting.popleft()
            if drawing.done.cancelled():
                continue
            if parts and drawing.truncation != parts[0][0].truncation:
                kept.append(drawing)
                continue
            indices = range(drawing.given, min(drawing.n, drawing.given + room))
            drawing.given = indices.stop
            room -= len(indices)
            parts.append((drawing, indices))
            if drawing.given < drawing.n:
                kept.append(drawing)
        self._waiting.extendleft(reversed(kept))
        return parts

    def _draw(self, parts: Sequence[tuple[Drawing, range]]) -> None:
        rows = [(drawing, index) for drawing, indices in parts for index in indices]
        arrays = self._generator.arrays(
            [drawing.prompt for drawing, _ in rows], seeds=[drawing.seed for drawing, _ in rows],
            indices=[index for _, index in rows], truncation=parts[0][0].truncation,
        )  # fmt: skip
        for (drawing, _), array in zip(rows, arrays, strict=True):
            drawing.arrays.append(array)
        for drawing, _ in parts:
            if len(drawing.arrays) == drawing.n and drawing.done.set_running_or_notify_cancel():
                drawing.done.set_result(drawing.arrays)

    def _draw_alone(self, part: tuple[Drawing, range]) -> None:
        try:
            self._draw([part])
        except Exception as error:
            _fail(part[0], error)


def _fail(drawing: Drawing, error: Exception) -> None:
    drawing.given = drawing.n
    settle(drawing.done, error)
