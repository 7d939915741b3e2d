"""A `fedcanvas ...` line held against the command that it names: options, arguments and types, without running it."""

from __future__ import annotations

from collections.abc import Sequence

import click

from shared import cli


def check(words: Sequence[str]) -> None:
    """Raises click's complaint, or `AssertionError`, where the command line `words`, after `fedcanvas`, cannot be."""
    root = click.Context(cli.ROOT)
    name, *rest = words
    command = cli.ROOT.get_command(root, name)
    assert command is not None, f"there is no command {name}"
    if isinstance(command, click.Group):
        assert rest, f"{name} names no command"
        name, *rest = rest
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(name, rest, parent=root)
