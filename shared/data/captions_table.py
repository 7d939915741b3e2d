"""Rows of a captions file: `.csv`, `.tsv` (both quoted as spreadsheets write them) or `.jsonl`, UTF-8.

A damaged row costs itself, not its neighbours: a quote that never closes, bytes that are not UTF-8, a line that is
no JSON. (A quote left open right before a cell that is quoted and begins with a line break stays unnoticed: that is
well-formed.) Messages name lines and columns that we expect, never what the file holds: a file without a header has a
caption in its first line.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.data.source import UnusableRow
from shared.errors import DataError

FILE_NAME, TEXT = "file_name", "text"
DELIMITERS = {".csv": ",", ".tsv": "\t"}

# Line in the file, from 1, and its cells by column or the reason why there are none.
Row = tuple[int, dict[str, str] | UnusableRow]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path` in order, blank lines left out.

    Raises:
        DataError: the file cannot be read, is not UTF-8 from its first byte, or lacks a column.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16", hint="save it as UTF-8")
    # Bytes that are not UTF-8 survive as lone surrogates, so that only their rows are lost.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    rows = _json_rows(text) if path.suffix == ".jsonl" else _delimited_rows(text, DELIMITERS[path.suffix], path)
    for row, cells in rows:
        broken = isinstance(cells, dict) and not all(map(_is_unicode, cells.values()))
        yield row, UnusableRow("it is not valid UTF-8") if broken else cells


def _delimited_rows(text: str, delimiter: str, path: Path) -> Iterator[Row]:
    records = _split_fields(text, delimiter)
    _, header = next(records, (0, UnusableRow("no header")))
    columns = [] if isinstance(header, UnusableRow) else [name.strip() for name in header]
    for wanted in (FILE_NAME, TEXT):
        if wanted not in columns:
            raise DataError(
                f"{path} has no column '{wanted}' in its first line",
                hint=f"the first line names the columns: {delimiter.join((FILE_NAME, TEXT))!r} and any others",
            )
    if any(count > 1 for name, count in Counter(columns).items() if name):
        raise DataError(f"{path} has two columns of one name", hint="rename or remove one of them in the first line")
    for row, fields in records:
        if isinstance(fields, UnusableRow):
            yield row, fields
        elif len(fields) != len(columns):
            yield row, UnusableRow(f"it has {len(fields)} cells where the header has {len(columns)}")
        else:
            yield row, {name: cell for name, cell in zip(columns, fields, strict=True) if name}


def _split_fields(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | UnusableRow]]:
    """Cells of each record with the line where it begins. After a broken quote it goes on at the next line."""
    lines = list(io.StringIO(text, newline=""))
    start = 0
    while start < len(lines):
        # `strict` makes a broken quote an error, instead of one caption that swallows the rows below it.
        reader = csv.reader((lines[i] for i in range(start, len(lines))), delimiter=delimiter, strict=True)
        row = start
        try:
            for fields in reader:
                if fields:
                    yield row + 1, fields
                row = start + reader.line_num
            return
        except csv.Error:
            yield row + 1, UnusableRow("its quotes do not close, or a cell is too long")
            start = row + 1


def _json_rows(text: str) -> Iterator[Row]:
    for row, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line, object_pairs_hook=_without_duplicates)
        except UnusableRow as reason:
            yield row, reason
            continue
        except (ValueError, RecursionError):
            yield row, UnusableRow("the line is not JSON")
            continue
        if not isinstance(cells, dict):
            yield row, UnusableRow("the line is not a JSON object")
        elif not all(isinstance(cells.get(name, ""), str) for name in (FILE_NAME, TEXT)):
            yield row, UnusableRow(f"its {FILE_NAME} or {TEXT} is not a string")
        else:
            yield row, {str(name): _as_text(value) for name, value in cells.items()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise UnusableRow("it names a key twice")
    return dict(pairs)


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)
