"""Errors: stable exit codes, and facts and hints that survive the way through another process."""

from __future__ import annotations

import pickle  # the oracle here is pickle itself: Ray and multiprocessing send errors with it

import pytest

from shared import errors
from shared.errors import FedCanvasError

# Written by hand: scripts rely on these numbers, so changing one is a change of the interface.
EXIT_CODES = {
    "FedCanvasError": 1,
    "UsageError": 2,
    "ConfigError": 3,
    "DataError": 4,
    "PrivacyError": 5,
    "BudgetExhausted": 5, "LedgerError": 5,
    "ProtocolError": 6,
    "FederationError": 7,
    "RunDirectoryError": 8,
    "PromptError": 9,
    "TrustError": 10, "BundleError": 10,
}


def kinds() -> list[type[FedCanvasError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedCanvasError)]
    return sorted(found, key=lambda kind: kind.__name__)


def test_exit_codes_are_the_promised_ones() -> None:
    assert {kind.__name__: kind.exit_code for kind in kinds()} == EXIT_CODES


def test_the_drawn_tree_names_every_error_with_its_code() -> None:
    drawn = [line.split() for line in (errors.__doc__ or "").splitlines()]
    for name, code in EXIT_CODES.items():
        assert any(name in words and str(code) in words for words in drawn), name


@pytest.mark.parametrize("kind", kinds())
def test_an_error_keeps_its_kind_fact_and_hint_through_pickle(kind: type[FedCanvasError]) -> None:
    error = pickle.loads(pickle.dumps(kind("12 records are too few", hint="lower privacy.sampling-rate")))
    assert type(error) is kind
    assert (str(error), error.message, error.hint) == (
        "12 records are too few", "12 records are too few", "lower privacy.sampling-rate",
    )  # fmt: skip


def test_an_exhausted_budget_is_a_privacy_error() -> None:
    with pytest.raises(errors.PrivacyError):
        raise errors.BudgetExhausted("round 7 needs epsilon 0.2, site a has 0.1 left")
