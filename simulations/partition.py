"""Which records a simulated site holds: indices only, disjoint, together all of them, at least one a site.

    iid            equal shares of a shuffled deck
    dirichlet      for each value of an attribute, shares drawn from Dirichlet(alpha): small alpha, unequal sites
    by-attribute   whole values of an attribute, so that no value is at two sites

Where records are grouped, by subject, whole groups are divided in these ways, since sites are disjoint in units.
This looks at records, so it is for simulations: a deployed site brings its own data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from shared.data import SUBJECT_ID, ImageCaptionDataset
from shared.errors import ConfigError, DataError
from shared.registry import nearest_name_hint

Scheme = Literal["iid", "dirichlet", "by-attribute"]


def partition_indices(
    dataset: ImageCaptionDataset, *, sites: int, scheme: Scheme = "iid", attribute: str | None = None,
    alpha: float = 0.5, seed: int = 0, groups: Sequence[str] | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """The records of each site, int64, ascending.

    Args:
        attribute: for "dirichlet" and "by-attribute": a further column of the data set, or "text" for the first
            caption. May be left out where the data set has one further column or none, subject_id aside: then
            that, or "text".
        alpha: of the Dirichlet distribution, > 0.
        groups: a name for each record. Records of one name stay at one site and count as one, with the value that
            most of them have; those whose name is "" are at no site.
    Raises:
        ConfigError: an unknown scheme, or no site or alpha that there can be.
        DataError: too few records, groups or values, or no such attribute.
    Source: Hsu et al. 2019, https://arxiv.org/abs/1909.06335, for shares by Dirichlet.
    """
    if scheme not in get_args(Scheme):
        raise ConfigError(f"unknown partition '{scheme}'", hint=nearest_name_hint(scheme, sorted(get_args(Scheme))))
    if sites < 1:
        raise ConfigError(f"{sites} sites cannot be")
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha must be above 0, got {alpha}")
    members = None if groups is None else [rows for rows in _by_label(groups) if groups[rows[0]]]
    count = len(dataset) if members is None else len(members)
    if count < sites:
        raise DataError(
            f"{dataset.name} has {count} {'records' if members is None else 'groups of records'} for {sites} sites",
            hint="take fewer sites, or more data",
        )
    labels: Sequence[str] = []
    if scheme != "iid":
        labels = _labels(dataset, attribute)
        if members is not None:
            labels = [Counter(labels[row] for row in rows).most_common(1)[0][0] for rows in members]
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        shares = np.array_split(rng.permutation(count), sites)
    elif scheme == "dirichlet":
        shares = _dirichlet(labels, sites, alpha, rng)
    else:
        shares = _by_value(labels, sites, rng, dataset.name)
    if members is not None:
        shares = [np.concatenate([members[group] for group in share]) for share in shares]
    return [np.sort(share).astype(np.int64) for share in shares]


def _labels(dataset: ImageCaptionDataset, attribute: str | None) -> Sequence[str]:
    columns = dataset.attributes
    usual = [name for name in columns if name != SUBJECT_ID]
    if attribute is None and len(usual) > 1:
        raise DataError(
            f"{dataset.name} has several attributes and the partition names none",
            hint=f"name one of: {', '.join(sorted(columns))}, text",
        )
    name = attribute or next(iter(usual), "text")
    if name in columns:
        return columns[name]
    if name == "text":
        return [captions[0] for captions in dataset.captions]
    raise DataError(
        f"{dataset.name} has no attribute '{name}'", hint=nearest_name_hint(name, [*sorted(columns), "text"])
    )


def _by_label(labels: Sequence[str]) -> list[np.ndarray]:
    """The records of each value, values in alphabetical order."""
    _, places = np.unique(np.array(labels, dtype=np.str_), return_inverse=True)
    order = np.argsort(places, kind="stable")
    return np.split(order, np.cumsum(np.bincount(places))[:-1])


def _dirichlet(labels: Sequence[str], sites: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    shares: list[list[int]] = [[] for _ in range(sites)]
    for records in _by_label(labels):
        cuts = np.cumsum(rng.dirichlet(np.full(sites, alpha)))[:-1] * len(records)
        for share, part in zip(shares, np.split(rng.permutation(records), np.rint(cuts).astype(int)), strict=True):
            share += part.tolist()
    for share in shares:
        if not share:  # a site without records is no site: the largest one gives one up
            share.append(max(shares, key=len).pop())
    return [np.array(share) for share in shares]


def _by_value(labels: Sequence[str], sites: int, rng: np.random.Generator, name: str) -> list[np.ndarray]:
    values = _by_label(labels)
    if len(values) < sites:
        raise DataError(
            f"the attribute has {len(values)} values in {name}, too few for {sites} sites",
            hint=f"take at most {len(values)} sites, another attribute, or the partition 'dirichlet'",
        )
    rng.shuffle(values)  # who gets which of equally frequent values
    shares: list[list[np.ndarray]] = [[] for _ in range(sites)]
    for records in sorted(values, key=len, reverse=True):
        min(shares, key=lambda share: sum(map(len, share))).append(records)
    return [np.concatenate(share) for share in shares]
