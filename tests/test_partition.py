"""Partitions of one data set over simulated sites: every record once, every site some, shares as the scheme says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data import ImageCaptionDataset
from shared.errors import ConfigError, DataError
from simulations.partition import Scheme, partition_indices


def dataset(labels: Sequence[str], **others: Sequence[str]) -> ImageCaptionDataset:
    return ImageCaptionDataset(
        images=np.zeros((len(labels), 8, 8, 1), np.uint8),
        captions=[(f"a {label}", "another caption") for label in labels],
        attributes={"kind": list(labels), **{name: list(values) for name, values in others.items()}},
        name="toys",
    )


@given(
    labels=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60),
    sites=st.integers(1, 8),
    scheme=st.sampled_from(["iid", "dirichlet", "by-attribute"]),
    alpha=st.sampled_from([1e-6, 0.01, 0.5, 1.0, 1e4]),
    seed=st.integers(0, 5),
)
def test_every_record_is_at_exactly_one_site_and_every_site_has_one(
    labels: list[str], sites: int, scheme: Scheme, alpha: float, seed: int
) -> None:
    needed = len(set(labels)) if scheme == "by-attribute" else len(labels)
    if needed < sites:
        with pytest.raises(DataError) as caught:
            partition_indices(dataset(labels), sites=sites, scheme=scheme, alpha=alpha, seed=seed)
        assert caught.value.hint
        return
    shares = partition_indices(dataset(labels), sites=sites, scheme=scheme, alpha=alpha, seed=seed)
    assert len(shares) == sites
    assert all(len(share) > 0 and share.dtype == np.int64 and (np.diff(share) > 0).all() for share in shares)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))


def test_iid_shares_are_of_equal_size_and_mixed() -> None:
    shares = partition_indices(dataset(["a"] * 500 + ["b"] * 501), sites=4)
    assert sorted(map(len, shares)) == [250, 250, 250, 251]
    # Hypergeometric, mean 125, variance 250 / 4 * 3 / 4 = 47: five standard deviations are 34, false alarm < 3e-6.
    assert all(abs(int((share < 500).sum()) - 125) < 35 for share in shares)


def test_the_seed_decides_and_nothing_else() -> None:
    data = dataset([f"{i % 7}" for i in range(200)])
    for scheme in ("iid", "dirichlet", "by-attribute"):
        first, again, other = (
            [share.tolist() for share in partition_indices(data, sites=3, scheme=scheme, seed=seed)]  # type: ignore[arg-type]
            for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other


def test_dirichlet_shares_are_even_for_a_large_alpha_and_lopsided_for_a_small_one() -> None:
    data = dataset([f"{i % 4}" for i in range(4000)])

    def largest_share(alpha: float) -> float:
        shares = partition_indices(data, sites=4, scheme="dirichlet", alpha=alpha, seed=3)
        counts = np.array([[(share % 4 == value).sum() for value in range(4)] for share in shares])
        return float((counts.max(axis=0) / 1000).mean())

    assert largest_share(1e6) < 0.26
    assert largest_share(0.01) > 0.9


def test_by_attribute_keeps_every_value_at_one_site_and_the_sites_balanced() -> None:
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 20 + ["d"] * 4
    shares = partition_indices(dataset(labels), sites=2, scheme="by-attribute")
    values = [{labels[i] for i in share} for share in shares]
    assert not values[0] & values[1]
    assert sorted(map(len, shares)) == [50, 54]


def test_the_attribute_is_named_or_the_only_one_or_the_caption() -> None:
    two = dataset(["a", "b"] * 4, other=["x"] * 4 + ["y"] * 4)
    named = partition_indices(two, sites=2, scheme="by-attribute", attribute="other")
    assert sorted(share.tolist() for share in named) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    by_text = partition_indices(two, sites=2, scheme="by-attribute", attribute="text")
    assert sorted(share.tolist() for share in by_text) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(DataError, match="several attributes") as caught:
        partition_indices(two, sites=2, scheme="by-attribute")
    assert "kind, other, text" in str(caught.value.hint)
    with pytest.raises(DataError, match="no attribute 'othr'") as caught:
        partition_indices(two, sites=2, scheme="by-attribute", attribute="othr")
    assert "did you mean 'other'" in str(caught.value.hint)
    plain = ImageCaptionDataset(images=two.images, captions=two.captions)
    assert len(partition_indices(plain, sites=2, scheme="by-attribute")) == 2


@given(
    people=st.lists(st.sampled_from(["", *"pqrstuvw"]), min_size=1, max_size=60),
    sites=st.integers(1, 4),
    scheme=st.sampled_from(["iid", "dirichlet", "by-attribute"]),
    seed=st.integers(0, 3),
)
def test_all_records_of_a_group_are_at_one_site_and_those_of_no_group_at_none(
    people: list[str], sites: int, scheme: Scheme, seed: int
) -> None:
    data = dataset([f"{row % 5}" for row in range(len(people))], subject_id=people)
    most = {  # by hand: the value that most of a person's records have, the first of them where several do
        person: max(own := [row % 5 for row, other in enumerate(people) if other == person], key=own.count)
        for person in set(people) - {""}
    }
    if len(set(most.values()) if scheme == "by-attribute" else most) < sites:
        with pytest.raises(DataError):
            partition_indices(data, sites=sites, scheme=scheme, seed=seed, groups=people)
        return
    shares = partition_indices(data, sites=sites, scheme=scheme, seed=seed, groups=people)
    at = [{people[row] for row in share} for share in shares]
    assert sum(map(len, at)) == len(most)  # nobody is at two sites
    assert sorted(np.concatenate(shares).tolist()) == [row for row, person in enumerate(people) if person]
    if scheme == "iid":
        assert max(map(len, at)) - min(map(len, at)) <= 1  # counted in people, not in records
    if scheme == "by-attribute":
        values = [{most[person] for person in of_site} for of_site in at]
        assert sum(map(len, values)) == len(set(most.values()))


def test_the_subject_is_no_attribute_that_is_divided_by_unless_it_is_named() -> None:
    data = dataset(["a", "b"] * 4, subject_id=["x"] * 4 + ["y"] * 4)
    by_kind = partition_indices(data, sites=2, scheme="by-attribute")
    assert sorted(share.tolist() for share in by_kind) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    by_subject = partition_indices(data, sites=2, scheme="by-attribute", attribute="subject_id")
    assert sorted(share.tolist() for share in by_subject) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_what_cannot_be_is_an_error_without_captions_in_it() -> None:
    data = dataset(["secret"] * 3)
    with pytest.raises(DataError, match="3 records for 4 sites"):
        partition_indices(data, sites=4)
    with pytest.raises(DataError, match="1 values in toys, too few for 2 sites") as caught:
        partition_indices(data, sites=2, scheme="by-attribute", attribute="text")
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"
    with pytest.raises(ConfigError, match="unknown partition 'idd'"):
        partition_indices(data, sites=2, scheme="idd")  # type: ignore[arg-type]
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="alpha"):
            partition_indices(data, sites=2, scheme="dirichlet", alpha=alpha)
    with pytest.raises(ConfigError, match="0 sites"):
        partition_indices(data, sites=0)
