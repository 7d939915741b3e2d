"""Layout "captions folder": images, and one of captions.csv, captions.tsv, captions.jsonl that names them.

`file_name` is a path inside the folder or inside its `images/`; the folder itself is looked at first. Columns besides
`file_name` and `text` become attributes. Rows that name the same image are one record with several captions, whose
attributes are those of its first row; two rows that give one image to two subjects make the data set unusable, since
then neither subject could be added or removed alone.
A name that leads outside the folder, by `..`, from the root or through a link, is not followed; `images` itself
may be a link.
"""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

import numpy as np

from shared.config import DataConfig
from shared.data.captions import clean_caption
from shared.data.captions_table import FILE_NAME, TEXT, read_rows
from shared.data.decoding import MAX_FILE_BYTES, decode_image
from shared.data.source import SUBJECT_ID, Reader, SkippedRow, Source, SourceRecord, Split, UnusableRow
from shared.errors import DataError

CAPTIONS = ("captions.csv", "captions.tsv", "captions.jsonl")
IMAGES = "images"


def recognises(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in CAPTIONS)


def read(path: Path, config: DataConfig, split: Split) -> Source:
    """Lists the records; images are only looked up, not read.

    Raises:
        DataError: two captions files, or one that is wrong as a whole, or an image of two subjects, or a split
            other than "train".
    """
    if split != "train":
        raise DataError(f"{path} is a folder and has no '{split}' split", hint="name the folder that holds it")
    present = [name for name in CAPTIONS if (path / name).is_file()]
    if len(present) > 1:
        raise DataError(f"{path} has both {present[0]} and {present[1]}", hint="keep one of them")
    return _list_records(path, present[0], config)


def _list_records(path: Path, table: str, config: DataConfig) -> Source:
    lookup = _Lookup(path)
    records: dict[str, SourceRecord] = {}  # by the image's real path: one image is one record
    skipped: list[SkippedRow] = []
    for row, cells in read_rows(path / table):
        if isinstance(cells, UnusableRow):
            skipped.append(SkippedRow(table, row, str(cells)))
            continue
        name = cells.pop(FILE_NAME, "").strip()
        try:
            caption = clean_caption(cells.pop(TEXT, ""), max_characters=config.max_caption_characters)
            image = lookup.find(name)
        except UnusableRow as reason:
            skipped.append(SkippedRow(name or table, row, str(reason)))
            continue
        attributes = {column: value.strip() for column, value in cells.items()}
        known = records.get(image)
        if known is None:
            records[image] = SourceRecord(name, (row,), (caption,), attributes)
        elif len({known.attributes.get(SUBJECT_ID), attributes.get(SUBJECT_ID)} - {"", None}) > 1:
            raise DataError(
                f"{path / table}: rows {known.rows[0]} and {row} give one image to two subjects",
                hint="an image belongs to one subject: mend one of the rows, or remove them",
            )
        else:
            records[image] = SourceRecord(known.file, (*known.rows, row), (*known.captions, caption), known.attributes)
    files = tuple(records)
    return Source(
        name=path.name or str(path), home=path, files=files, part="", records=list(records.values()),
        load=lambda place: _load(files[place]), skipped=skipped,
    )  # fmt: skip


def _load(path: str) -> np.ndarray:
    try:
        # The size first: a row must not be able to fill the memory.
        if os.stat(path).st_size > MAX_FILE_BYTES:
            raise UnusableRow(f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnusableRow(f"the file cannot be read: {error.strerror}") from None
    return decode_image(data)


class _Lookup:
    """Where the images of a folder are. Links of folders are resolved once each: they are most of the cost."""

    def __init__(self, folder: Path) -> None:
        self._places = [str(folder), str(folder / IMAGES)]
        self._allowed = [os.path.realpath(place) for place in self._places]
        self._real_folder = cache(os.path.realpath)

    def find(self, file_name: str) -> str:
        """The real path of the image; `UnusableRow` when there is none inside the folder."""
        if not file_name:
            raise UnusableRow("it names no file")
        outside = os.path.isabs(file_name) or os.path.normpath(file_name).split("/")[0] == ".."
        for place in self._places:
            try:
                folder, _, base = os.path.join(place, file_name).rpartition("/")
                real = os.path.join(self._real_folder(folder), base)
                mode = os.lstat(real).st_mode
                if stat.S_ISLNK(mode):
                    real = os.path.realpath(real)
                    mode = os.stat(real).st_mode
            except (OSError, ValueError):
                continue
            if not any(real.startswith(f"{allowed}/") for allowed in self._allowed):
                outside = True
            elif not stat.S_ISREG(mode):
                raise UnusableRow("it names no regular file")
            else:
                return real
        raise UnusableRow("its path leads outside the folder" if outside else "there is no such file")


READER = Reader("a folder with captions.csv, captions.tsv or captions.jsonl", recognises, read)
