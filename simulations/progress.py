"""What a person sees while a run goes on: a bar with the remaining time on a terminal, a line now and then in a log.

Everything goes to stderr. Not here: what is measured (`server.rounds`), and the result (`simulations.cli`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cli import say
from shared.progress import SECONDS_BETWEEN_LINES, Barred, on_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

MEMORY = 0.9  # of the moving average of a round's seconds


class RunProgress(Barred):
    """An `Observer` (`shared.observer`) for people."""

    def __init__(self, total_rounds: int, *, done: int = 0, terminal: bool | None = None) -> None:
        self.total, self.done = total_rounds, done
        self.seconds: float | None = None  # of a round, a moving average
        self._since = self._warm_since = self._told = time.monotonic()
        super().__init__(_bar() if on_terminal(terminal) else None)
        if self._bar is not None:
            self._task = self._bar.add_task("", total=total_rounds, completed=done, left="measuring", figure="")

    def on_warm_start(self, step: int, steps: int) -> None:
        now = time.monotonic()
        if step == 1:  # it began with the sites' moments, which take another time
            self._warm_since = now
            return
        left = f"{duration((now - self._warm_since) / (step - 1) * (steps - step))} left of it"
        if self._bar is not None:
            self._bar.update(self._task, left=left, figure=f"warm start {step}/{steps}")
        elif now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            say(f"warm start {step}/{steps}, {left}")

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        first, self.done = self.seconds is None, server_round
        taken, self._since = now - self._since, now
        # The first round opens the data and the engine; it says nothing about the others.
        if first:
            self.seconds = 0.0
        else:
            self.seconds = taken if not self.seconds else MEMORY * self.seconds + (1 - MEMORY) * taken
        left = f"{duration(self.seconds * (self.total - server_round))} left" if self.seconds else "measuring"
        accuracy = figures.get("fakes_accuracy")
        figure = f"fakes told {accuracy:.2f}" if accuracy is not None else "warm start"
        if self._bar is not None:
            self._bar.update(self._task, completed=server_round, left=left, figure=figure)
        elif first or now - self._told >= SECONDS_BETWEEN_LINES or server_round == self.total:
            self._told = now
            say(f"round {server_round}/{self.total}, {figure}, {left}")

    def on_sample(self, server_round: int, path: Path) -> None:
        self.on_message(f"samples after round {server_round}: {path}")

    def on_message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 10 s`, `2 h 05 min`: as exact as an estimate deserves."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("round"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[figure]}"),
        TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=Console(stderr=True), expand=True,
    )  # fmt: skip
