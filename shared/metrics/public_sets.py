"""A public reference set, cut into parts that never mix: to train measuring models, to compare with, to test on.

    fit        trains the classifier and the local extractor
    reference  what generated pictures are compared with
    floor      real pictures in the place of generated ones
    test       what classifiers that were trained on generated pictures are tested on

Which part a picture falls into is decided by its pixels (by its subject where the set names subjects), so a picture
that stands in the set twice is never in two parts, and the parts are the same whatever the order of the files.
Not covered: pictures that are nearly equal, and a set that is not public.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from shared.data import SUBJECT_ID, ImageCaptionDataset
from shared.errors import DataError

MOST_FIT, MOST_TEST = 12_000, 10_000
SHARES = {"test": 0.2, "fit": 0.4, "reference": 0.2, "floor": 0.2}
FEWEST = 2  # pictures of a part: one has no spread


@dataclass(frozen=True, eq=False)
class Part:
    """Some pictures of a public set, in memory.

    Attributes:
        name: of the set and the part, as figures quote it.
        images: `(N, H, W, C)` uint8.
        captions: of each picture, one or more.
        attributes: column to N values.
        digest: SHA-256 of pixels, captions and attributes, 64 hex digits.
    """

    name: str
    images: np.ndarray
    captions: list[tuple[str, ...]]
    attributes: dict[str, list[str]]
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Part:
        return self if count >= len(self) else _part(self.name, self, np.arange(count))


@dataclass(frozen=True, eq=False)
class PublicSets:
    """The four parts; see the module.

    Attributes:
        left_out: pictures that are in no `test` part since the model was trained on them; so that may be empty.
    """

    fit: Part
    reference: Part
    floor: Part
    test: Part
    left_out: int = 0

    @property
    def name(self) -> str:
        return self.reference.name.partition(",")[0]

    @property
    def digest(self) -> str:
        parts = "".join(part.digest for part in (self.fit, self.reference, self.floor, self.test))
        return hashlib.sha256(parts.encode()).hexdigest()


def divide(
    dataset: ImageCaptionDataset, *, n: int, test: ImageCaptionDataset | None = None,
    trained_on: Collection[str] = (), most_fit: int = MOST_FIT, most_test: int = MOST_TEST,
) -> PublicSets:  # fmt: skip
    """The parts of `dataset`; with `test`, that set is the part to test on and its pictures are in no other.

    Args:
        n: generated pictures that will be measured: reference and floor need no more each.
        trained_on: `pixel_keys` of pictures that the model was trained on: they are left out of the test part.
    Raises:
        DataError: too few pictures for four parts, or another size or number of channels in `test`.
    """
    if test is not None and test.images.shape[1:] != dataset.images.shape[1:]:
        raise DataError(
            f"the test set {test.name} has pictures of {_size(test)}, the reference set {dataset.name} of"
            f" {_size(dataset)}",
            hint="name two sets of one kind",
        )
    keys = _keys(dataset)
    order = sorted(range(len(keys)), key=lambda row: (keys[row], row))
    if test is not None:
        # A subject of the test set with all its pictures, and a picture of it whoever it is said to be of.
        seen, pixels = {*_keys(test), *pixel_keys(test)}, pixel_keys(dataset)
        tested = {keys[row] for row in order if keys[row] in seen or pixels[row] in seen}
        order = [row for row in order if keys[row] not in tested]
    shares = SHARES if test is None else {name: share for name, share in SHARES.items() if name != "test"}
    groups = _by_share([keys[row] for row in order], shares)
    rows = {name: [order[place] for place in places] for name, places in groups.items()}
    # What a part does not need the others may have: more to train on is better than more to throw away.
    spare: list[int] = []
    for name, most in (("test", most_test), ("reference", n), ("floor", n), ("fit", most_fit)):
        rows[name], left = _cut(rows.get(name, []), most, keys)
        spare += left
    for name, most in (("fit", most_fit), ("reference", n), ("floor", n)):
        more, spare = _cut(spare, max(0, most - len(rows[name])), keys)
        rows[name] += more
    parts = {name: _part(f"{dataset.name}, {name}", dataset, np.array(of, np.int64)) for name, of in rows.items()}
    if test is not None:
        parts["test"] = _part(f"{test.name}, test", test, np.arange(len(test)))
    short = [name for name, part in parts.items() if len(part) < FEWEST]
    if short:
        raise DataError(
            f"the reference set {dataset.name} has {len(dataset)} pictures, too few for its parts (to train the"
            f" measuring models, to compare with, to test on): {', '.join(short)} would have fewer than {FEWEST}",
            hint="name a larger public set; a hundred pictures are the least that says anything",
        )
    whole = parts["test"]
    fresh = [row for row, key in enumerate(_pixel_keys(whole.images)) if key not in trained_on]
    if len(fresh) < len(whole):
        parts["test"] = _part(whole.name, whole, np.array(fresh, np.int64))
    return PublicSets(**parts, left_out=len(whole) - len(fresh))


def _by_share(keys: list[str], shares: dict[str, float]) -> dict[str, list[int]]:
    """Places cut by the shares, and never between two equal keys."""
    total, places, start = sum(shares.values()), {}, 0
    done = 0.0
    for name, share in shares.items():
        done += share
        end = round(len(keys) * done / total)
        while 0 < end < len(keys) and keys[end] == keys[end - 1]:
            end += 1
        places[name] = list(range(start, max(start, end)))
        start = max(start, end)
    return places


def _cut(rows: list[int], count: int, keys: list[str]) -> tuple[list[int], list[int]]:
    """The first `count` rows and the others; fewer where the cut would divide equal keys."""
    while 0 < count < len(rows) and keys[rows[count]] == keys[rows[count - 1]]:
        count -= 1
    return rows[:count], rows[count:]


def _keys(dataset: ImageCaptionDataset) -> list[str]:
    """Of each picture its subject, where its row names one, else its pixels."""
    subjects = dataset.attributes.get(SUBJECT_ID) or [""] * len(dataset)
    return [
        hashlib.sha256(f"subject {subject}".encode()).hexdigest() if subject else pixels
        for subject, pixels in zip(subjects, pixel_keys(dataset), strict=True)
    ]


def pixel_keys(dataset: ImageCaptionDataset) -> list[str]:
    """Of each picture the SHA-256 of its pixels as they are prepared, 64 hex digits."""
    return _pixel_keys(dataset.images)


def _pixel_keys(images: np.ndarray) -> list[str]:
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in images]


def _part(name: str, source: ImageCaptionDataset | Part, rows: np.ndarray) -> Part:
    images = np.ascontiguousarray(source.images[np.sort(rows)][np.argsort(np.argsort(rows))])
    captions = [source.captions[row] for row in rows]
    attributes = {key: [column[row] for row in rows] for key, column in source.attributes.items() if key != SUBJECT_ID}
    digest = hashlib.sha256(str(images.shape).encode() + images.tobytes())
    digest.update(repr((captions, sorted(attributes.items()))).encode())
    return Part(name, images, captions, attributes, digest.hexdigest())


def _size(dataset: ImageCaptionDataset) -> str:
    _, height, width, channels = dataset.images.shape
    return f"{height} x {width} px, {'grey' if channels == 1 else 'colour'}"
