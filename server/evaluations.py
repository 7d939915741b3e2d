"""Evaluations in a run directory: which are there, which of them pages show, what of one can be trusted.

    RUN/evaluations/<key>/evaluation.json    written last: without it the evaluation was interrupted
    RUN/evaluations/<key>/*.png              pictures that it names

What is read is checked as far as pages rely on it; a file that was changed by hand can still lie.
Not here: measuring, and how figures are shown (`server.evaluation_page`, `server.compare`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import RunDirectoryError
from shared.metrics.figure import Figure

Kind = tuple[str, int, str]  # digest of the public set, number of pictures, extractor

FORMAT = 1
FOLDER, FILE = "evaluations", "evaluation.json"
REQUIRED = ("key", "model", "reference", "n", "metrics")
PNG = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 32_000_000  # of a picture


def evaluate_hint(run_path: Path) -> str:
    return f"`fedcanvas evaluate {shlex.quote(str(run_path))} --reference DATA`"


def load_evaluation(run_path: Path) -> dict[str, Any]:
    """Of the complete evaluations of the run at `run_path` the one that measured most metrics, then the newest.

    A damaged one is passed over while another can be read; `left_aside` names it.

    Raises:
        RunDirectoryError: there is none, with the command that makes one, or all are damaged.
    """
    return max(_readable(run_path), key=_measured)  # of several the first, which is the newest


def load_comparable(run_paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One evaluation of each run, so that as many as can be are alike.

    Kinds of evaluations (public set, number of pictures, extractor) are ranked by how many of the runs have them,
    then by how much they measured, then by age. Each run gives its first kind, and of that as `load_evaluation`.

    Raises:
        RunDirectoryError: as `load_evaluation` does, for any of them.
    """
    found = [_readable(path) for path in run_paths]
    best = [{kind: max(map(_measured, of)) for kind, of in _by_kind(known).items()} for known in found]
    newest: dict[Kind, int] = {}
    for path, known in zip(run_paths, found, strict=True):
        for evaluation in known:
            kind = _kind(evaluation)
            newest[kind] = max(newest.get(kind, 0), _changed(path, evaluation))

    def rank(kind: Kind) -> tuple[int, int, int, Kind]:
        having = [kinds[kind] for kinds in best if kind in kinds]
        return len(having), sum(having), newest[kind], kind  # the last so that no two kinds are equal

    return [max(known, key=lambda e: (rank(_kind(e)), _measured(e))) for known in found]


def left_aside(run_path: Path, shown: Mapping[str, Any]) -> list[str]:
    """The complete evaluations in the run other than the `shown` one, in words, the newest first."""
    aside = []
    for folder in complete_evaluations(run_path):
        if folder.name == shown["key"]:
            continue
        try:
            aside.append(evaluation_words(read_evaluation(folder)))
        except RunDirectoryError as error:
            aside.append(f"{folder.name}: {error.message}")
    return aside


def evaluation_words(evaluation: Mapping[str, Any]) -> str:
    """Which one it is: its key, how much it measured and against what."""
    count = _measured(evaluation)
    return (
        f"{evaluation['key']}: {count} metric{'' if count == 1 else 's'}, {evaluation['n']:,} pictures, against"
        f" {evaluation['reference'].get('name', '?')}, features by {evaluation.get('extractor') or 'none'}"
    )


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
    if not _count(content["n"]):
        raise _damaged(origin, "n is no number of pictures")
    for name, table in (
        ("privacy", content.get("privacy")), ("versions", content.get("versions")),
        ("parts", content["reference"].get("parts", {})),
    ):  # fmt: skip
        if not isinstance(table, Mapping) and not (table is None and name != "parts"):
            raise _damaged(origin, f"{name} is no table")
    if not all(map(_count, content["reference"].get("parts", {}).values())):
        raise _damaged(origin, "parts are no numbers of pictures")
    if not isinstance(content.get("conversions", []), list):
        raise _damaged(origin, "conversions is no list")
    try:
        for metric, entry in content["metrics"].items():
            for figure in figures_of(content, metric):
                _check_figure(figure)
            if not isinstance(entry.get("notes", []), list):
                raise ValueError(f"notes of {metric} are no list")
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


def gallery_bytes(
    run_path: Path, evaluation: Mapping[str, Any], file: str, folder: Path | None = None
) -> bytes | None:
    """A picture of the evaluation; `None` when it is not there, or is no PNG. Never a file of another folder.

    Args:
        folder: of the evaluation; default is the one of its key in the run.
    """
    key = str(evaluation["key"])
    if not (_plain(key) and _plain(file)):
        return None
    path = (folder or run_path / FOLDER / key) / file
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


def _readable(run_path: Path) -> list[dict[str, Any]]:
    """The complete evaluations that can be read, the newest first; never none."""
    found, errors = [], []
    for folder in complete_evaluations(run_path):
        try:
            found.append(read_evaluation(folder))
        except RunDirectoryError as error:
            errors.append(error)
    if found:
        return found
    if errors:
        raise errors[0]
    cut = ": the one that was begun was interrupted" if interrupted_evaluations(run_path) else ""
    raise RunDirectoryError(f"{run_path} has no complete evaluation{cut}", hint=f"run {evaluate_hint(run_path)}")


def _measured(evaluation: Mapping[str, Any]) -> int:
    """How many metrics have figures."""
    return sum(bool(entry.get("figures")) for entry in evaluation["metrics"].values())


def _kind(evaluation: Mapping[str, Any]) -> Kind:
    return str(evaluation["reference"].get("digest")), evaluation["n"], str(evaluation.get("extractor"))


def _by_kind(evaluations: Sequence[dict[str, Any]]) -> dict[Kind, list[dict[str, Any]]]:
    kinds: dict[Kind, list[dict[str, Any]]] = {}
    for evaluation in evaluations:
        kinds.setdefault(_kind(evaluation), []).append(evaluation)
    return kinds


def _changed(run_path: Path, evaluation: Mapping[str, Any]) -> int:
    return (run_path / FOLDER / str(evaluation["key"]) / FILE).stat().st_mtime_ns


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_figure(figure: Figure) -> None:
    """`Figure` holds what a file said; this raises `ValueError` where a page could not show it."""
    if figure.better not in ("lower", "higher", "neither"):
        raise ValueError(f"{figure.name} is better {figure.better!r}")
    counts = (figure.n, figure.reference_n, *(() if figure.floor_n is None else (figure.floor_n,)))
    if not all(map(_count, counts)):
        raise ValueError(f"{figure.name} has a number of pictures that is none")
    if not isinstance(figure.name, str) or not all(isinstance(seeds, list) for seeds in figure.seeds.values()):
        raise ValueError(f"{figure.name} has no name, or seeds that are no lists")


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name and not name.startswith(".") and "\\" not in name and "\0" not in name


def _damaged(file: Path, why: str) -> RunDirectoryError:
    inside = file.name == FILE and len(file.parents) > 2  # or it was given, and is no file of a run
    hint = f"delete its folder and run {evaluate_hint(file.parents[2])}" if inside else "evaluate the run again"
    return RunDirectoryError(f"{file} is damaged: {why}", hint=hint)
