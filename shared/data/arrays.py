"""Layout "arrays": one `.npz` with `x_train`, `y_train` and `class_names` (and `x_test`, `y_test` for that split).

The caption is the template below with the class name, the attribute `class` is the name alone. An array `subject_id`,
one string or whole number for each row of the split "train", becomes the attribute of that name. Rows are counted
from 0, as indices are. Nothing pickled is loaded.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from shared.config import DataConfig
from shared.data.captions import clean_caption
from shared.data.source import SUBJECT_ID, Reader, SkippedRow, Source, SourceRecord, Split, UnusableRow
from shared.errors import DataError

TEMPLATE = "a photo of a {name}"
ATTRIBUTE = "class"
CLASS_NAMES = "class_names"


def recognises(path: Path) -> bool:
    return path.suffix == ".npz" and path.is_file()


def read(path: Path, config: DataConfig, split: Split) -> Source:
    """Lists the records by their labels; pixels are read when the first is asked for.

    Raises:
        DataError: no `.npz`, an array is missing, pickled, or of the wrong shape or type.
    """
    labels = _array(path, f"y_{split}")
    names = _array(path, CLASS_NAMES)
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"{path}: {CLASS_NAMES} is not a list of strings")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: y_{split} is not one whole number a row")
    captions = [_caption(str(name), config) for name in names]
    subjects = _subjects(path, len(labels)) if split == "train" else None
    records: list[SourceRecord] = []
    skipped: list[SkippedRow] = []
    for row, label in enumerate(labels.tolist()):
        caption = captions[label] if 0 <= label < len(names) else None
        if caption is None:
            skipped.append(SkippedRow(path.name, row, "its label has no class name"))
        else:
            attributes = {ATTRIBUTE: str(names[label])}
            if subjects is not None:
                attributes[SUBJECT_ID] = subjects[row]
            records.append(SourceRecord(path.name, (row,), (caption,), attributes))

    @cache
    def pictures() -> np.ndarray:
        images = _array(path, f"x_{split}")
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
            raise DataError(
                f"{path}: x_{split} is {images.dtype} of shape {images.shape}",
                hint="it must be uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), from 0 to 255",
            )
        if len(images) != len(labels) or 0 in images.shape[1:]:
            raise DataError(f"{path}: x_{split} of shape {images.shape} does not go with {len(labels)} labels")
        return images[..., 0] if images.shape[3:] == (1,) else images

    return Source(
        name=path.name, home=path.parent, files=(os.path.realpath(path),), part=split, records=records,
        load=lambda place: pictures()[records[place].rows[0]], skipped=skipped,
    )  # fmt: skip


def _subjects(path: Path, count: int) -> list[str] | None:
    """The subject of each row, "" for none; `None` where the file names no subjects at all."""
    with np.load(path, allow_pickle=False) as archive:
        if SUBJECT_ID not in archive.files:
            return None
    subjects = _array(path, SUBJECT_ID)
    if subjects.shape != (count,) or subjects.dtype.kind not in "Uiu":
        raise DataError(
            f"{path}: {SUBJECT_ID} is {subjects.dtype} of shape {subjects.shape}",
            hint=f"it must be one string or whole number for each of the {count} rows",
        )
    return [str(subject).strip() for subject in subjects]


def _caption(name: str, config: DataConfig) -> str | None:
    try:
        name = clean_caption(name, max_characters=config.max_caption_characters)
        return clean_caption(TEMPLATE.format(name=name), max_characters=config.max_caption_characters)
    except UnusableRow:
        return None


def _array(path: Path, key: str) -> np.ndarray:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is no .npz file, or a truncated one", hint="write it with numpy.savez_compressed")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if key not in archive.files:
                raise DataError(f"{path} has no array '{key}'", hint=f"it holds: {', '.join(sorted(archive.files))}")
            return np.asarray(archive[key])
    except ValueError:
        raise DataError(
            f"{path}: '{key}' cannot be read as a plain array",
            hint="save it with a number or string type, not as objects",
        ) from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read as .npz: {type(error).__name__}") from None


READER = Reader("an .npz file with x_train, y_train and class_names", recognises, read)
