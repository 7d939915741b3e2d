"""The parts of a public set: disjoint, the same whatever the order, and never with one picture in two of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data import SUBJECT_ID, ImageCaptionDataset
from shared.errors import DataError
from shared.metrics.public_sets import Part, PublicSets, divide


def pictures(numbers: list[int], *, subjects: list[str] | None = None, name: str = "mine") -> ImageCaptionDataset:
    """Each number is a picture of its own."""
    images = np.zeros((len(numbers), 8, 8, 1), np.uint8)
    images[:, 0, :4, 0] = np.array(numbers, "<u4").reshape(-1, 1).view(np.uint8)
    attributes = {} if subjects is None else {SUBJECT_ID: subjects}
    return ImageCaptionDataset(images=images, captions=[(f"c{n}",) for n in numbers], attributes=attributes, name=name)


def numbers(part: Part) -> list[int]:
    return np.ascontiguousarray(part.images[:, 0, :4, 0]).view("<u4").reshape(-1).tolist()


def parts(public: PublicSets) -> dict[str, list[int]]:
    return {name: numbers(getattr(public, name)) for name in ("fit", "reference", "floor", "test")}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=40, max_size=200), st.integers(2, 60), st.integers(2, 80),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_no_picture_is_in_two_parts_and_the_order_of_the_set_does_not_matter(
    drawn: list[int], n: int, most: int, seed: int
) -> None:
    try:
        found = parts(divide(pictures(drawn), n=n, most_fit=most, most_test=most))
    except DataError:
        return  # too many of them are equal
    seen = [set(part) for part in found.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert len(found["fit"]) <= most
    assert len(found["reference"]) <= n
    shuffled = np.random.default_rng(seed).permutation(drawn).tolist()
    again = parts(divide(pictures(shuffled), n=n, most_fit=most, most_test=most))
    assert {name: sorted(part) for name, part in again.items()} == {name: sorted(p) for name, p in found.items()}


def test_shares_are_what_the_module_says_and_what_one_part_does_not_need_goes_to_others() -> None:
    public = divide(pictures(list(range(1000))), n=10_000)
    assert {name: len(part) for name, part in parts(public).items()} == {
        "test": 200, "fit": 400, "reference": 200, "floor": 200,
    }  # fmt: skip
    public = divide(pictures(list(range(1000))), n=50, most_test=10)
    assert {name: len(part) for name, part in parts(public).items()} == {
        "test": 10, "fit": 890, "reference": 50, "floor": 50,
    }  # fmt: skip


def test_a_test_set_is_used_whole_and_its_pictures_are_in_no_other_part() -> None:
    tested = pictures(list(range(30)), name="tests")
    public = divide(pictures(list(range(20, 400))), n=500, test=tested)
    found = parts(public)
    assert sorted(found["test"]) == list(range(30))
    rest = found["fit"] + found["reference"] + found["floor"]
    assert sorted(rest) == list(range(30, 400))
    assert public.test.name == "tests, test"


def test_all_pictures_of_a_subject_are_in_one_part() -> None:
    subjects = [f"p{n // 5}" for n in range(500)]
    found = parts(divide(pictures(list(range(500)), subjects=subjects), n=500))
    of_parts = [{subjects[n] for n in part} for part in found.values()]
    assert sum(map(len, of_parts)) == len(set().union(*of_parts)) == 100


def test_a_row_without_a_subject_leaves_the_subjects_of_the_others_whole() -> None:
    subjects = [f"p{n // 5}" if n else "" for n in range(500)]
    found = parts(divide(pictures(list(range(500)), subjects=subjects), n=500))
    of_parts = [{subjects[n] for n in part} - {""} for part in found.values()]
    assert sum(map(len, of_parts)) == len(set().union(*of_parts)) == 100


def test_a_test_set_without_subjects_takes_its_pictures_and_their_subjects_out_of_the_other_parts() -> None:
    subjects = [f"p{n // 5}" for n in range(500)]
    tested = pictures([0, 7, 300], name="tests")
    found = parts(divide(pictures(list(range(500)), subjects=subjects), n=500, test=tested))
    rest = found["fit"] + found["reference"] + found["floor"]
    assert not {subjects[n] for n in rest} & {"p0", "p1", "p60"}
    assert len(rest) == 485


@pytest.mark.parametrize("count", [1, 2, 5])
def test_too_few_pictures_are_refused_with_what_is_missing(count: int) -> None:
    with pytest.raises(DataError, match=f"mine has {count} pictures, too few for its parts"):
        divide(pictures(list(range(count))), n=10)


def test_a_test_set_of_another_size_or_colour_is_refused() -> None:
    colour = ImageCaptionDataset(images=np.zeros((50, 8, 8, 3), np.uint8), captions=[("x",)] * 50, name="colour")
    with pytest.raises(DataError, match=r"colour has pictures of 8 x 8 px, colour, the reference .* 8 x 8 px, grey"):
        divide(pictures(list(range(50))), n=10, test=colour)


def test_the_digest_tells_pixels_captions_and_the_number_of_pictures() -> None:
    known = divide(pictures(list(range(100))), n=20).digest
    assert divide(pictures(list(range(100))), n=20).digest == known
    assert divide(pictures(list(range(100))), n=19).digest != known
    assert divide(pictures(list(range(1, 101))), n=20).digest != known
    other = pictures(list(range(100)))
    other.captions[3] = ("another",)
    assert divide(other, n=20).digest != known
