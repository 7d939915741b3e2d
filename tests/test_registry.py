"""Registry: entries are imported when asked for, and an unknown name is answered with the known ones."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest

from shared.errors import ConfigError
from shared.registry import Registry, nearest_name_hint

ROOTS: Registry[Callable[[float], float]] = Registry("root", {"square": "math:sqrt", "cube": "math:cbrt"})


def test_an_entry_is_the_attribute_it_names() -> None:
    assert ROOTS.get("square") is math.sqrt
    assert ROOTS.get("cube") is math.cbrt


def test_names_are_sorted_and_known() -> None:
    assert ROOTS.names() == ["cube", "square"]
    assert "cube" in ROOTS
    assert "cuve" not in ROOTS


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known_names() -> None:
    with pytest.raises(ConfigError, match=r"^unknown root 'squaer'$") as caught:
        ROOTS.get("squaer")
    assert caught.value.hint == "did you mean 'square'? known: cube, square"


def test_a_far_name_is_answered_with_the_known_names_only() -> None:
    assert nearest_name_hint("zzz", ["front", "toy"]) == "known: front, toy"


def test_a_module_is_imported_at_the_first_get_and_not_before() -> None:
    code = (
        "import sys; from shared.registry import Registry\n"
        "entries = Registry('colour space', {'hls': 'colorsys:rgb_to_hls'})\n"
        "before = 'colorsys' in sys.modules; entries.get('hls')\n"
        "print(before, 'colorsys' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["False", "True"]


def test_a_table_that_is_changed_afterwards_changes_no_registry() -> None:
    table = {"square": "math:sqrt"}
    registry: Registry[Callable[[float], float]] = Registry("root", table)
    table["cube"] = "math:cbrt"
    assert registry.names() == ["square"]
