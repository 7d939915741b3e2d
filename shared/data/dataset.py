"""A site's captioned images, opened: uint8 squares on a memory map, captions, and what had to be skipped.

Whether a record is usable is decided row by row; rows that are not are named and counted, and nothing is
de-duplicated, filtered or fitted: that is the owner's preparation, before training. The order is that of the rows.
Not here: augmentation, tensors, and which of the records a simulated site gets.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.config import DataConfig
from shared.data.cache import prepared_pixels
from shared.data.source import SUBJECT_ID, Reader, SkippedRow, SourceRecord, Split
from shared.errors import DataError
from shared.registry import Registry

READERS: Registry[Reader] = Registry(
    "data layout",
    {
        "captions-folder": "shared.data.folder:READER",
        "arrays": "shared.data.arrays:READER",
    },
)


@dataclass(frozen=True, eq=False, repr=False)
class ImageCaptionDataset:
    """N records: images, each with all its captions. Private; its `repr` shows neither.

    Attributes:
        images: `(N, H, W, C)` uint8, read-only, RGB or grey, H = W = `image_size`.
        captions: for each record one or more captions, cut to `max_caption_characters`, never empty.
        attributes: further columns, each of N strings; "" where a row has none.
        skipped: rows that are not used, by line.
        name: of the folder or file.
        cache_entry: the folder on disk that `images` is mapped from; `None` when they are in memory.
    """

    images: np.ndarray
    captions: list[tuple[str, ...]]
    attributes: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)
    name: str = "data"
    cache_entry: Path | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def __repr__(self) -> str:
        return f"ImageCaptionDataset({self.name!r}, {len(self)} records, {len(self.skipped)} rows skipped)"

    def subjects(self) -> list[str]:
        """The subject of each record; "" where its row names none: such a record belongs to no one.

        Raises:
            DataError: the data set does not say whose the images are.
        """
        if SUBJECT_ID not in self.attributes:
            raise DataError(
                f"{self.name} has no column '{SUBJECT_ID}', and the privacy unit is the subject",
                hint="add it, one name or number for each person, or set privacy.unit = 'example'",
            )
        return self.attributes[SUBJECT_ID]

    def skipped_by_reason(self) -> dict[str, int]:
        """Number of skipped rows for each reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.skipped).most_common())


def open_dataset(
    path: Path, *, config: DataConfig, cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None, split: Split = "train",
) -> ImageCaptionDataset:  # fmt: skip
    """The data set at `path`, whatever its layout.

    Args:
        cache_dir: where prepared pixels are kept; beside the data by default, in memory where that is read-only.
        progress: told (images done, images in all) while images are decoded; not when they come from the cache.
        split: "train" or "test" of arrays that hold both; a folder is one split.
    Raises:
        DataError: nothing at `path`, no known layout, wrong as a whole, or no row that can be used.
    """
    source = _reader_of(path).read(path, config, split)
    if not source.records:
        raise _nothing_usable(path, source.skipped)
    pixels = prepared_pixels(source, config=config, cache_dir=cache_dir, progress=progress)
    skipped = list(source.skipped)
    for place, reason in pixels.unusable.items():
        record = source.records[place]
        skipped += [SkippedRow(record.file, row, reason) for row in record.rows]
    skipped.sort(key=lambda row: row.row)
    usable = [record for place, record in enumerate(source.records) if place not in pixels.unusable]
    if not usable:
        raise _nothing_usable(path, skipped)
    assert len(usable) == len(pixels.images)
    return ImageCaptionDataset(
        images=pixels.images, captions=[record.captions for record in usable], attributes=_columns(usable),
        skipped=skipped, name=source.name, cache_entry=pixels.entry,
    )  # fmt: skip


def unseen_split(path: Path) -> Split:
    """The split that nothing is trained on: "test" of an `.npz` that has one, else "train", the only one."""
    try:
        with zipfile.ZipFile(path) as arrays:
            return "test" if "x_test.npy" in arrays.namelist() else "train"
    except (OSError, zipfile.BadZipFile):
        return "train"


def _reader_of(path: Path) -> Reader:
    if not path.exists():
        raise DataError(f"there is no data at {path}", hint="check the path")
    readers = [READERS.get(name) for name in READERS.names()]
    for reader in readers:
        if reader.recognises(path):
            return reader
    raise DataError(
        f"{path} holds no captioned images of a known layout",
        hint="looked for " + ", and for ".join(reader.layout for reader in readers),
    )


def _columns(records: list[SourceRecord]) -> dict[str, list[str]]:
    names = dict.fromkeys(name for record in records for name in record.attributes)
    return {name: [record.attributes.get(name, "") for record in records] for name in names}


def _nothing_usable(path: Path, skipped: list[SkippedRow]) -> DataError:
    if not skipped:
        return DataError(f"{path} has no rows", hint="every row names an image and its caption")
    first = skipped[0]
    counts = Counter(row.reason for row in skipped).most_common(3)
    return DataError(
        f"none of the {len(skipped)} rows of {path} can be used; row {first.row}: {first.reason}",
        hint="mend the rows: " + "; ".join(f"{count} x {reason}" for reason, count in counts),
    )
