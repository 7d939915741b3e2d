"""What a reader hands over: which records a data set holds, and how to get at the picture of each.

A record is an image with all its captions. Rows that name one image are one record. Where the privacy unit is the
subject, the column `subject_id` says whose image it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from shared.config import DataConfig

Split = Literal["train", "test"]

SUBJECT_ID = "subject_id"  # the column, or array, that names the subject of a record


class SkippedRow(NamedTuple):
    """A row that is not used. It stays at the site: file names can be private. `reason` never quotes a caption.

    Attributes:
        file: name of the image as the row has it, or of the captions file where the row names none.
        row: line in the captions file, from 1 and with the header; for arrays the index, from 0.
    """

    file: str
    row: int
    reason: str


class UnusableRow(Exception):
    """The reason why one row cannot be used, in words that quote nothing of the data."""


@dataclass(frozen=True, repr=False)
class SourceRecord:
    """One image: the rows that name it, their captions (cleaned, never empty), and its further columns."""

    file: str
    rows: tuple[int, ...]
    captions: tuple[str, ...]
    attributes: dict[str, str]


@dataclass(frozen=True, repr=False)
class Source:
    """A data set that was listed, not yet decoded.

    Attributes:
        name: of the folder or file.
        home: folder beside which a cache may lie when no other place is given.
        files: paths of everything that pixels are read from, in the order of the records.
        part: what else decides the pixels, for example the split.
        load: place of a record to its picture as stored, `(h, w)` grey or `(h, w, 3)` RGB, uint8;
            raises `UnusableRow`.
    """

    name: str
    home: Path
    files: tuple[str, ...]
    part: str
    records: list[SourceRecord]
    load: Callable[[int], np.ndarray]
    skipped: list[SkippedRow] = field(default_factory=list)


@dataclass(frozen=True)
class Reader:
    """One layout on disk.

    Attributes:
        layout: what it looks like, in words, for the message when no layout fits.
        recognises: whether the path has this layout; looks at names only.
        read: lists the records; `DataError` when the whole data set is wrong.
    """

    layout: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, DataConfig, Split], Source]
