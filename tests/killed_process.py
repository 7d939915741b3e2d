"""A process that dies at a call of its choice: what changes the disk counts, and from one call on nothing happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    pass


class KillAtCall:
    """Call `number` of the functions that are watched does not happen, nor does anything after it.

    Attributes:
        calls: so far.
    """

    def __init__(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.calls, self._monkeypatch = number, 0, monkeypatch

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls >= self.number:
                raise Killed
            return function(*args, **options)

        return call

    def watch(self, *, of_os: Sequence[str], of_path: Sequence[str]) -> None:
        for owner, names in ((os, of_os), (Path, of_path)):
            for name in names:
                self._monkeypatch.setattr(owner, name, self.guarded(getattr(owner, name)))
