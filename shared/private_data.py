"""Questions about private data: whose data a path holds, and one noised, charged figure about a site's records.

A path that is named as public reference data may be a site's own: `site_that_holds` tells, and `ask_site` then gives
one answer in place of free measurement. Both run in this process, on the machine of the site, for a person there; no
message of a federation leads here. The site's code (`client.ownership`, `client.query`) is loaded at the first call.
Not here: who confirms that the epsilon may be spent. That is the command's, before it calls `ask_site`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import DataError
from shared.registry import Registry

if TYPE_CHECKING:
    import numpy as np


# By name, since neither `shared` nor `server` may import `client` (tests/test_layers.py).
AT_A_SITE: Registry[Callable[..., Any]] = Registry(
    "question to a site",
    {"holder": "client.ownership:site_that_holds", "quote": "client.query:quote_site", "ask": "client.query:ask_site"},
)


CAPTION = "caption"  # the attribute that is a record's captions: one of them must be what is predicted


@dataclass(frozen=True, eq=False)
class Question:
    """How often is a classifier, trained on generated pictures alone, right about a site's private records?

    Attributes:
        attribute: column of the site's data that is predicted, or `CAPTION`; names of columns are taken for public.
        predict: `(1, H, W, C)` uint8 to a list with its one predicted value. It sees every record alone, so it must
            not remember what it saw: a network in evaluation mode.
        predictor_digest, model_digest: name the classifier and the released model, 64 hex digits each. With the other
            fields they name the question; the same question gets the same answer again, uncharged.
        epsilon: what the answer may cost each unit.
        delta: of (epsilon, delta); `None` takes the same share of the lineage's delta as of its epsilon.
        image_size, channels: of the pictures that `predict` wants.
    """

    attribute: str
    predict: Callable[[np.ndarray], Sequence[str]] = field(repr=False)
    predictor_digest: str
    model_digest: str
    epsilon: float
    delta: float | None = None
    image_size: int = 32
    channels: int = 3


@dataclass(frozen=True)
class Quote:
    """What an answer would cost, before anything is charged or any record is read; all of it public.

    Attributes:
        known: this question was answered before: the same answer comes again, uncharged.
        noise_std: of the noise on each of two numbers, the right ones and the wrong ones.
        fewest: units, noised, below which the answer is only that they are too few.
        epsilon_left, delta_left: of the lineage, before this.
    """

    site_id: str
    lineage: str
    unit: str
    known: bool
    epsilon: float
    delta: float
    noise_multiplier: float
    noise_std: float
    fewest: float
    epsilon_left: float
    delta_left: float
    simulated: bool


@dataclass(frozen=True)
class Answer:
    """One noised figure; every number here is public or comes from noised values alone.

    Attributes:
        value: part of the units that `predict` is right about, 0 to 1 (a subject counts as the mean over its images);
            `None` where the units are too few for this epsilon, as `note` says. That costs the same.
        low, high: at 95 %, for the noise and for the drawing of the units.
        noised_count: of units, with noise; may be below 0.
        epsilon, delta: what it cost each unit (`unit`: "example" or "subject"; added or removed).
        noise_multiplier: noise std over sensitivity.
        charged: false where the same answer was given before.
        note: for a person.
        run: under which the ledger has it.
    """

    value: float | None
    low: float | None
    high: float | None
    noised_count: float
    epsilon: float
    delta: float
    noise_multiplier: float
    charged: bool
    note: str
    unit: str
    run: str
    site_id: str
    lineage: str
    simulated: bool


def site_that_holds(path: Path) -> str | None:
    """Whose private data lie at `path`, in words; `None` where no site or lineage of this machine is known to."""
    found: str | None = AT_A_SITE.get("holder")(path)
    return found


def refuse_private(path: Path) -> None:
    """To be called before anything at a path that was named as public is decoded, cached or shown.

    Raises:
        DataError: a site or a lineage of this machine holds what lies there.
    """
    owner = site_that_holds(path)
    if owner is not None:
        raise DataError(
            f"{path} is private: {owner}",
            hint="name public pictures; a private set answers one noised question, charged to its ledger:"
            " fedcanvas evaluate RUN --reference SITE_DIR --charge EPSILON",
        )


def quote_site(site_dir: Path, question: Question) -> Quote:
    """What `ask_site` would charge; it raises what `ask_site` would raise before it looks at a record."""
    quote: Quote = AT_A_SITE.get("quote")(site_dir, question)
    return quote


def ask_site(site_dir: Path, question: Question) -> Answer:
    """The noised answer of the site in `site_dir`, charged to its ledger first. Ask a person before.

    Raises:
        UsageError: epsilon or delta is out of range.
        PrivacyError: the site's policy does not allow it, or `predict` remembers what it saw.
        BudgetExhausted: the lineage's ceiling would be passed; nothing is charged.
        LedgerError: the ledger is damaged, in use, or cannot be written.
        DataError: the records cannot be opened, or have no such column; nothing is charged.
    """
    answer: Answer = AT_A_SITE.get("ask")(site_dir, question)
    return answer
