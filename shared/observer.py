"""What a run tells whoever watches it: public figures only, as they appear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    """Called from the thread that runs the rounds; a call must return soon and must not raise."""

    def on_warm_start(self, step: int, steps: int) -> None:
        """After each of the generator's steps on the released moments."""

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        """After each round (0: the warm start) with the figures that stand in events.jsonl."""

    def on_sample(self, server_round: int, path: Path) -> None:
        """A sheet of samples was written."""

    def on_message(self, text: str) -> None:
        """One line for people."""


class SilentObserver:
    """Watches and says nothing."""

    def on_warm_start(self, step: int, steps: int) -> None:
        pass

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        pass

    def on_sample(self, server_round: int, path: Path) -> None:
        pass

    def on_message(self, text: str) -> None:
        pass
