"""Names to implementations, imported only when asked for; an unknown name is answered with the known ones.

Not covered: discovery of entries outside the release. A site runs what it installed, nothing else.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Generic, TypeVar, cast

from shared.errors import ConfigError

T = TypeVar("T")


def nearest_name_hint(name: str, known: list[str]) -> str:
    """`did you mean 'front'? known: conv, front, toy`, or only the known names when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = f"known: {', '.join(known)}"
    return f"did you mean '{near[0]}'? {listed}" if near else listed


class Registry(Generic[T]):
    """Lazy table of `"module:attribute"` entries.

    Args:
        kind: what an entry is, in the singular, for error messages ("discriminator").
        entries: name to `"module:attribute"`; the module is imported at the first `get`.
    """

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> T:
        """The entry called `name`; `ConfigError` with the nearest known name when there is none."""
        if name not in self._entries:
            raise ConfigError(
                f"unknown {self.kind} '{name}'", hint=nearest_name_hint(name, self.names())
            )
        module, _, attribute = self._entries[name].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
