"""One thread draws; pictures of several requests share a batch, and are the same whatever else is in it.

Nobody waits for a batch to fill: what arrives while one is drawn makes the next. A request that was given up is left
out of the batches to come; what fails in a shared batch is drawn again one by one, so that it fails alone.
Not here: who is let in (`server.serving.load`), and files of pictures (`server.serving.app`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from server.generator import Generator
from server.serving.errors import ApiError

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


class Batcher:
    """The thread and what waits for it. Any thread may `submit`.

    Args:
        observe: told the pictures and the seconds of every batch that was drawn.
    """

    def __init__(
        self, generator: Generator, *, batch: int = BATCH, observe: Callable[[int, float], None] = lambda n, s: None
    ) -> None:
        self._generator, self._batch, self._observe = generator, batch, observe
        self._waiting: deque[Drawing] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._since: float | None = None
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the batch that is drawn now; whatever waits is refused."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        for drawing in self._waiting:
            _fail(drawing, ApiError(503, "the service is being stopped", retry_after=5))

    def submit(self, prompt: str, *, n: int, seed: int, truncation: float) -> Future[list[np.ndarray]]:
        """`n` arrays, later; indices from 0. Its `cancel` is always obeyed, but for a batch that is being drawn."""
        drawing = Drawing(prompt, n, seed, truncation)
        with self._changed:
            if self._stopped:
                raise ApiError(503, "the service is being stopped", retry_after=5)
            self._waiting.append(drawing)
            self._changed.notify()
        return drawing.done

    def working(self, within_seconds: float) -> bool:
        """Whether the thread lives and no batch takes longer than this."""
        since = self._since
        return self._thread.is_alive() and (since is None or time.monotonic() - since < within_seconds)

    def _run(self) -> None:
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
        with self._changed:
            while True:
                if self._stopped:
                    return []
                parts = self._gather()
                if parts:
                    return parts
                self._changed.wait()

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
    if not drawing.done.done() and drawing.done.set_running_or_notify_cancel():
        drawing.done.set_exception(error)
