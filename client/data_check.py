"""A site's data as training would open them, in figures for the person at the site; nothing of it leaves.

Counts, lines and lengths, and never a caption, a pixel or the name of a file. Nothing is changed: what is wrong with
a row, and whether pictures are twice there, is for the owner to mend before a lineage is made (PRIVACY rule 17).
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.policy import Unit
from shared.config import DataConfig
from shared.data import SUBJECT_ID, ImageCaptionDataset, open_dataset
from shared.data.source import Split
from shared.errors import DataError

LINES_SHOWN = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spread:
    smallest: int
    median: float
    largest: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))

    def of_each(self, what: str) -> str:
        if self.smallest == self.largest:
            return f"each {what} {self.smallest:,}"
        return f"each {what} {self.smallest:,} to {self.largest:,}, half of them at most {self.median:g}"


@dataclass(frozen=True)
class DataFigures:
    """What is known of a data set after it was opened.

    Attributes:
        same_pixels: records whose prepared picture an earlier record has too.
        longest_allowed: captions are cut there; `at_the_limit` have that length and were cut, or just fit.
        skipped: for each reason the number of rows and the first few lines.
        subjects: those that have a name; `None` where the data have no `subject_id`, as with what follows.
        without_subject: records that name none: they belong to no unit, and are not used where the unit is the subject.
    """

    name: str
    records: int
    captions: int
    captions_per_record: Spread
    caption_characters: Spread
    longest_allowed: int
    at_the_limit: int
    image_size: int
    channels: int
    same_pixels: int
    skipped: dict[str, tuple[int, list[int]]]
    attributes: dict[str, int]
    subjects: int | None
    images_per_subject: Spread | None
    without_subject: int | None

    def units(self, unit: Unit) -> int:
        return self.records if unit == "example" else self.subjects or 0

    def to_dict(self) -> dict[str, Any]:
        skipped = {reason: {"rows": count, "first_lines": lines} for reason, (count, lines) in self.skipped.items()}
        return {**asdict(self), "skipped": skipped}


def open_as_training(
    path: Path, *, cache_dir: Path, image_size: int = 32, channels: int = 3, progress: Progress | None = None,
    split: Split = "train",
) -> ImageCaptionDataset:  # fmt: skip
    """The data set with the preprocessing of a run; the site's cache is filled on the way."""
    config = DataConfig.model_validate({"image-size": image_size, "channels": channels})
    return open_dataset(path, config=config, cache_dir=cache_dir, progress=progress, split=split)


def data_figures(dataset: ImageCaptionDataset) -> DataFigures:
    skipped: dict[str, tuple[int, list[int]]] = {}
    for reason in dataset.skipped_by_reason():
        lines = [row.row for row in dataset.skipped if row.reason == reason]
        skipped[reason] = (len(lines), lines[:LINES_SHOWN])
    lengths = [len(caption) for captions in dataset.captions for caption in captions]
    limit = DataConfig().max_caption_characters
    named, per_subject = subject_counts(dataset)
    columns = dataset.attributes
    return DataFigures(
        name=dataset.name,
        records=len(dataset),
        captions=len(lengths),
        captions_per_record=Spread.of([len(captions) for captions in dataset.captions]),
        caption_characters=Spread.of(lengths),
        longest_allowed=limit,
        at_the_limit=sum(length >= limit for length in lengths),
        image_size=dataset.images.shape[1],
        channels=dataset.images.shape[3],
        same_pixels=len(dataset) - len({hashlib.sha256(image.tobytes()).digest() for image in dataset.images}),
        skipped=skipped,
        attributes={name: len(set(values) - {""}) for name, values in columns.items()},
        subjects=len(per_subject) if named is not None else None,
        images_per_subject=Spread.of(per_subject) if per_subject else None,
        without_subject=len(dataset) - named if named is not None else None,
    )


def subject_counts(dataset: ImageCaptionDataset) -> tuple[int | None, list[int]]:
    """(records that name a subject, or `None` without such a column; images of each subject)."""
    if SUBJECT_ID not in dataset.attributes:
        return None, []
    counts = Counter(name for name in dataset.attributes[SUBJECT_ID] if name)
    return sum(counts.values()), list(counts.values())


def choose_unit(figures: DataFigures, wanted: Unit | None) -> tuple[Unit, str]:
    """(unit, why), in words.

    Raises:
        DataError: the subject was wanted, and no row names one.
    """
    if wanted == "subject" and not figures.subjects:
        raise DataError(
            f"the unit 'subject' was asked for, and no row of {figures.name} names one",
            hint=f"add a column '{SUBJECT_ID}', one name or number for each person; or --unit example",
        )
    if wanted == "example" and figures.subjects:
        return "example", (
            f"as asked for: one image with its captions is protected, though the data say by '{SUBJECT_ID}' whose an"
            " image is; a person with several images is protected less"
        )
    if wanted is not None:
        return wanted, "as asked for"
    if figures.subjects:
        return "subject", f"the data say by '{SUBJECT_ID}' whose an image is: all images of one are protected together"
    if figures.subjects == 0:
        return "example", f"there is a column '{SUBJECT_ID}', but it is empty in every row"
    return "example", f"the data have no column '{SUBJECT_ID}': one image with all its captions is protected"


def rounded_up(units: int) -> int:
    """To two digits: 1,234 becomes 1,300."""
    step = int(10 ** max(0, len(str(units)) - 2))
    return -(-units // step) * step


def advice(
    figures: DataFigures, *, unit: Unit, delta: float | None, published_records: int | None = None
) -> list[str]:  # fmt: skip
    """What is worth a second look, one sentence each; nothing here changes anything."""
    units, word, found = figures.units(unit), "subjects" if unit == "subject" else "records", []
    if figures.same_pixels:
        found.append(
            f"{figures.same_pixels:,} records have the same pixels as another one: a picture that is twice there is"
            " protected half. Remove doubles before a lineage is made; inside a lineage nothing is removed"
        )
    if figures.skipped:
        count = sum(rows for rows, _ in figures.skipped.values())
        found.append(f"{count:,} rows cannot be used; `fedcanvas client check-data` says which and why")
    if figures.at_the_limit:
        found.append(f"{figures.at_the_limit:,} captions reach {figures.longest_allowed} characters and are cut there")
    if figures.without_subject and unit == "subject":
        found.append(f"{figures.without_subject:,} records name no subject, belong to no one, and are never used")
    if figures.subjects and unit == "example":
        found.append("the data name subjects: `client init --unit subject` protects all images of one together")
    if delta is not None and delta * units >= 1:
        found.append(
            f"delta {delta:.0e} is not below 1 / {units:,} {word}: at such a delta a mechanism may publish one record"
            " whole and still be called private. Use more data or another lineage"
        )
    elif delta is not None and delta * units >= 0.1:
        found.append(f"delta {delta:.0e} is below 1 / {units:,} {word}, but not by much: a tenth of it is usual")
    if published_records is not None and units > published_records:
        found.append(
            f"the site publishes {published_records:,} {word} and has {units:,}: the work of a step is padded for the"
            " smaller figure. Raise published-records in site.toml before the next round"
        )
    if units < 500:
        found.append(f"{units:,} {word} are few: under noise little will be learned from this site alone")
    return found
