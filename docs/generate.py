"""Writes what would drift if a person wrote it: settings, command line, file map, Flower's table of settings.

    python docs/generate.py            write what changed
    python docs/generate.py --check    write nothing; exit code 1 and the names of stale pages

Texts come from where each thing is declared: field descriptions, `--help`, the first line of a file.
Not here: pages that explain; people write those.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script from a checkout that is not installed

from shared import cli, errors  # noqa: E402
from shared.config import RunConfig, Section  # noqa: E402
from shared.errors import FedCanvasError  # noqa: E402

GENERATED = "<!-- Written by docs/generate.py (`make docs`): change the place where it is declared, not this page. -->"
MAP_START, MAP_END = "<!-- file map: written by docs/generate.py -->", "<!-- end of the file map -->"
MAPPED = ("shared", "client", "server", "simulations", "tests", "benchmarks", "docs")
FLOWER_TABLE = "[tool.flwr.app.config]"
HELP_COLUMNS = 100


def main() -> None:
    check = "--check" in sys.argv
    pages: dict[str, Callable[[str], str]] = {
        "docs/configuration.md": lambda _: configuration_page(),
        "docs/commands.md": lambda _: commands_page(),
        "pyproject.toml": with_flower_table,
        "README.md": with_file_map,  # last: the map names the pages above
    }
    stale = []
    for name, page in pages.items():
        path = ROOT / name
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if (text := page(before)) != before:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(stale)}")
    sys.exit(1 if stale and check else 0)


def configuration_page() -> str:
    lines = [
        "# Settings of a run",
        "",
        GENERATED,
        "",
        "A scenario gives every setting a value; a file given with `--config` replaces some of them, `--set`",
        "replaces single ones, and an option such as `--rounds` is the same as its `--set`. All of them are",
        "public: they travel to every site and stand in the run directory. In a TOML file a section is a table:",
        "",
        "```toml",
        "seed = 3",
        "",
        "[privacy]",
        "target-epsilon = 8.0",
        "```",
        "",
        "There is no setting for the noise: it is derived from the target epsilon, delta, the sampling rate and the",
        "number of steps. What only a site decides is not here either; it stands in the site's own `site.toml`.",
    ]
    alone = {name: field for name, field in RunConfig.model_fields.items() if not _is_section(field.annotation)}
    lines += ["", "## Of the whole run", "", *_table(alone, prefix="")]
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            lines += ["", f"## {_dashed(name)}", ""]
            if kind.__doc__ and kind.__doc__ != Section.__doc__:
                lines += [kind.__doc__.strip(), ""]
            lines += _table(kind.model_fields, prefix=f"{_dashed(name)}.")
    return "\n".join(lines) + "\n"


def _table(fields: dict[str, Any], *, prefix: str) -> list[str]:
    rows = [
        f"| `{prefix}{_dashed(name)}` | {_default(field)} | {_allowed(field)} | {field.description or ''} |"
        for name, field in fields.items()
    ]
    return ["| setting | default | allowed | meaning |", "|---|---|---|---|", *rows]


def _default(field: Any) -> str:
    if field.is_required():
        return "none: write it down"
    return "unset" if field.default is None else f"`{str(field.default).lower()}`"


def _allowed(field: Any) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    bounds = [
        f"{sign} {getattr(bound, name):,}".replace(",", " ")
        for bound in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if hasattr(bound, name)
    ]
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`"}
    return " ".join([names.get(kind, "text"), ", ".join(bounds)]).strip()


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def commands_page() -> str:
    lines = ["# Command line", "", GENERATED, ""]
    lines += ["Results go to standard output, talk and progress to standard error.", "", "## Exit codes", ""]
    lines += ["| code | when |", "|---|---|", "| 0 | success |"]
    lines += ["| 1 | a file that was named cannot be used; with a traceback, a bug |"]
    lines += [*exit_code_rows(), "| 130 | interrupted by Ctrl-C |"]
    os.environ.update(COLUMNS=str(HELP_COLUMNS), TERM="dumb", NO_COLOR="1")
    for command in command_names():
        lines += ["", f"## {f'fedcanvas {command}'.strip()}", "", "```", help_text(command), "```"]
    return "\n".join(lines) + "\n"


def command_names() -> Iterator[str]:
    """Every command as it is typed after `fedcanvas`, and those of a group after it."""
    yield ""
    for name in cli.COMMANDS:
        yield name
        command = cli.ROOT.get_command(click.Context(cli.ROOT), name)
        if isinstance(command, click.Group):
            yield from (f"{name} {inner}" for inner in command.commands)


def exit_code_rows() -> Iterator[str]:
    """Rows from the tree in the docstring of `shared.errors`."""
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"\s+(?:[|`]\W+)?(\w+)\s+(\d+)\s+(.*)", line)
        if found and found[1] != FedCanvasError.__name__:
            yield f"| {found[2]} | {found[3]} (`{found[1]}`) |"


def help_text(command: str) -> str:
    """What `fedcanvas COMMAND --help` prints on a terminal of fixed width without colours."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cli.run([*command.split(), "--help"])
    if code:
        sys.exit(f"fedcanvas {command} --help failed with code {code}")
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines())


def with_flower_table(pyproject: str) -> str:
    """`pyproject.toml` with Flower's table of settings written anew: `flwr run` changes only keys that stand there."""
    start = pyproject.index(FLOWER_TABLE) + len(FLOWER_TABLE)
    end = pyproject.index("\n\n", start)
    values: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        fields = field.annotation.model_fields if _is_section(field.annotation) else {"": field}  # type: ignore[union-attr]
        for inner, detail in fields.items():
            key = f"{_dashed(name)}.{_dashed(inner)}".rstrip(".")
            values[key] = detail.annotation() if detail.is_required() else detail.default
            values[key] = "" if values[key] is None else values[key]
    places = [f'{key} = ""' for key in re.findall(r"^(simulation\.\S+) = ", pyproject[start:end], re.MULTILINE)]
    lines = [*places, *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return pyproject[:start] + "".join(f"\n{line}" for line in lines) + pyproject[end:]


def with_file_map(readme: str) -> str:
    """The README with the file map between its two marks written anew."""
    before, _, rest = readme.partition(MAP_START)
    _, _, after = rest.partition(MAP_END)
    return "\n".join([f"{before}{MAP_START}", "", *file_map(), "", f"{MAP_END}{after}"])


def file_map() -> Iterator[str]:
    for folder in MAPPED:
        paths = [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".md") and p.stat().st_size]
        if not paths:
            continue
        # Tests are many and named after what they test: folded, so that the map stays a map.
        yield f"<details><summary><b>{folder}/</b></summary>" if folder == "tests" else f"**{folder}/**"
        yield ""
        yield "| file | what it is |"
        yield "|---|---|"
        for path in paths:
            if (text := summary(path)) and path.name != "__init__.py":
                name = path.relative_to(ROOT)
                yield f"| [`{name.relative_to(folder)}`]({name}) | {text} |"
        yield ""
        if folder == "tests":
            yield "</details>"
            yield ""


def summary(path: Path) -> str:
    """The first sentence of a Python file's docstring; the title of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text.partition("\n")[0].lstrip("# ")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    first = " ".join(first.split())
    return re.split(r"(?<=\.) ", first)[0].rstrip(".:").replace("|", "\\|")


if __name__ == "__main__":
    main()
