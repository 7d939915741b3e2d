"""Evaluations in a run directory: which are there, which is the newest complete one, what of one can be trusted.

    RUN/evaluations/<key>/evaluation.json    written last: without it the evaluation was interrupted
    RUN/evaluations/<key>/*.png              pictures that it names

What is read is checked as far as pages rely on it; a file that was changed by hand can still lie.
Not here: measuring, and how figures are shown (`server.evaluation_page`, `server.compare`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import RunDirectoryError
from shared.metrics.figure import Figure

FORMAT = 1
FOLDER, FILE = "evaluations", "evaluation.json"
REQUIRED = ("key", "model", "reference", "n", "metrics")
PNG = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 32_000_000  # of a picture


def evaluate_hint(run_path: Path) -> str:
    return f"`fedcanvas evaluate {shlex.quote(str(run_path))} --reference DATA`"


def load_evaluation(run_path: Path) -> dict[str, Any]:
    """The newest complete evaluation of the run at `run_path`.

    Raises:
        RunDirectoryError: there is none, with the command that makes one, or the newest is damaged.
    """
    found = complete_evaluations(run_path)
    if not found:
        cut = ": the one that was begun was interrupted" if interrupted_evaluations(run_path) else ""
        raise RunDirectoryError(f"{run_path} has no complete evaluation{cut}", hint=f"run {evaluate_hint(run_path)}")
    return read_evaluation(found[0])


def complete_evaluations(run_path: Path) -> list[Path]:
    """Folders with an `evaluation.json`, the newest first."""
    files = [path / FILE for path in _folders(run_path)]
    files = [file for file in files if file.is_file()]
    return [file.parent for file in sorted(files, key=lambda f: (f.stat().st_mtime_ns, f.parent.name), reverse=True)]


def interrupted_evaluations(run_path: Path) -> list[str]:
    """Keys of evaluations that were begun and not finished."""
    return [path.name for path in _folders(run_path) if not (path / FILE).is_file()]


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Raises `RunDirectoryError` when the file is damaged, of another format, or of another folder."""
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, f"{error}") from None
    check_evaluation(content, origin=file)
    if content["key"] != folder.name:
        raise _damaged(file, f"it names itself {content['key']!r}")
    return dict(content)


def check_evaluation(content: Any, *, origin: Path) -> None:
    """Raises `RunDirectoryError` unless pages can be made of `content`."""
    if not isinstance(content, Mapping):
        raise _damaged(origin, "it is no table")
    if content.get("format") != FORMAT:
        raise RunDirectoryError(
            f"{origin} has another format than this release reads", hint="evaluate again with this release"
        )
    missing = [name for name in REQUIRED if name not in content]
    if missing:
        raise _damaged(origin, f"it lacks {', '.join(missing)}")
    for name in ("model", "reference", "metrics"):
        if not isinstance(content[name], Mapping):
            raise _damaged(origin, f"{name} is no table")
    try:
        for metric, entry in content["metrics"].items():
            list(figures_of(content, metric))
            for made in entry.get("tables", []):
                if any(len(row) != len(made["head"]) for row in made["rows"]):
                    raise ValueError(f"a row of {made['title']!r} is longer or shorter than its head")
            for gallery in entry.get("galleries", []):
                str(gallery["file"]), str(gallery["title"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(origin, f"{type(error).__name__} {error}") from None


def figures_of(evaluation: Mapping[str, Any], metric: str) -> Iterator[Figure]:
    """The figures of one metric; none where it was not measured."""
    for figure in evaluation["metrics"].get(metric, {}).get("figures", []):
        yield Figure.from_dict(figure)


def gallery_bytes(run_path: Path, evaluation: Mapping[str, Any], file: str) -> bytes | None:
    """A picture of the evaluation; `None` when it is not there, or is no PNG. Never a file of another folder."""
    key = str(evaluation["key"])
    if not (_plain(key) and _plain(file)):
        return None
    path = run_path / FOLDER / key / file
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return None
    return content if content.startswith(PNG) else None


def _folders(run_path: Path) -> list[Path]:
    folder = run_path / FOLDER
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name and not name.startswith(".") and "\\" not in name and "\0" not in name


def _damaged(file: Path, why: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"{file} is damaged: {why}", hint=f"delete its folder and run {evaluate_hint(file.parents[2])}"
    )
