"""The ledger as a file: what an entry says, that the chain holds, and that others can account from it alone.

What crashes, full disks and forged lines do to it is in test_ledger_faults.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from shared.errors import BudgetExhausted, LedgerError
from shared.privacy.accounting import Spent, composed_epsilon
from shared.privacy.budget import Lifetime, Price, as_spent, price_run, query_plan
from shared.privacy.ledger import Ledger, Lineage, RunTerms
from shared.privacy.plan import PrivacyPlan

LIFETIME = Lifetime(8.0, 1e-5)


def plan_of(*, q: float = 0.1, sigma: float = 3.0, steps: int = 40, moments: float | None = None) -> PrivacyPlan:
    return PrivacyPlan(
        private=True, noise_multiplier=sigma, sampling_rate=q, clipping_norm=2.0, expected_batch_size=100.0,
        steps=steps, reserved_steps=steps + 5, delta=1e-6, warm_start_noise_multiplier=moments, unit="example", sites=2,
    )  # fmt: skip


def terms_of(run: str, plan: PrivacyPlan | None = None) -> RunTerms:
    return RunTerms(run, "retina", "c" * 64, "d" * 64, "e" * 64, plan or plan_of())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "scans", Lineage("scans", "example", LIFETIME), anchor=tmp_path / "anchor.json")


def spend(ledger: Ledger, run: str, *, rounds: int, steps: int = 1, first: int = 1) -> None:
    for server_round in range(first, first + rounds):
        charge = ledger.charge(
            run, server_round=server_round, attempt=1, release="gradient", steps=steps, instruction_digest="a" * 64,
            nonce=os.urandom(16),
        )  # fmt: skip
        ledger.commit(charge, size=100, sha256="b" * 64, fields=[["payload", "int64", [10]]])


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (path / "ledger.jsonl").read_text().splitlines()]


@contextmanager
def priced(ledger: Ledger, run: str, price: Price | None = None) -> Iterator[None]:
    with ledger.locked():
        ledger.reserve(terms_of(run), price or Price(1.0, 1e-6, None, ((0, 0.0, 0.0, 0.0), (45, 1.0, 1.0, 1.0))))
        yield


# ---- what an entry says


def test_a_charge_names_everything_that_its_cost_depends_on(ledger: Ledger) -> None:
    with priced(ledger, "a"):
        spend(ledger, "a", rounds=1)
    opened, run, charge, commit = lines(ledger.folder)
    assert {"kind": "opened", "lineage": "scans", "unit": "example", "max_epsilon": 8.0}.items() <= opened.items()
    assert (run["kind"], run["epsilon"], run["delta"]) == ("run", 1.0, 1e-6)
    expected = {
        "kind": "charge", "mechanism": "poisson-subsampled gaussian", "sampling_rate": 0.1, "noise_multiplier": 3.0,
        "clipping_norm": 2.0, "steps": 1, "unit": "example", "adjacency": "add/remove", "run": "a", "server_round": 1,
        "code_digest": "e" * 64, "config_digest": "c" * 64, "instruction_digest": "a" * 64, "attempt": 1,
    }  # fmt: skip
    assert expected.items() <= charge.items()
    assert (commit["kind"], commit["of"], commit["sha256"], commit["bytes"]) == ("commit", 2, "b" * 64, 100)


def test_the_chain_is_what_its_page_says_and_anybody_can_check_it(ledger: Ledger) -> None:
    with priced(ledger, "a"):
        spend(ledger, "a", rounds=3)
    previous = "0" * 64
    for line in (ledger.folder / "ledger.jsonl").read_bytes().splitlines():
        digest = hashlib.sha256(line.split(b",", 1)[1]).hexdigest()
        entry = json.loads(line)
        assert (entry["hash"], entry["previous"]) == (digest, previous)
        previous = digest
    assert previous == ledger.head
    anchor = json.loads((ledger.folder.parent / "anchor.json").read_text())
    assert anchor == {"lineage": "scans", "seq": 7, "hash": previous}


def test_a_committed_time_tells_nothing_of_how_long_training_took(ledger: Ledger) -> None:
    with priced(ledger, "a"):
        spend(ledger, "a", rounds=3)
    entries = lines(ledger.folder)
    for charge, commit in zip(entries[2::2], entries[3::2], strict=True):
        assert commit["time"] == charge["time"]


def test_only_its_owner_can_read_it(ledger: Ledger) -> None:
    assert stat.S_IMODE(os.stat(ledger.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(ledger.folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(ledger.folder.parent / "anchor.json").st_mode) == 0o600


def test_a_ledger_read_again_is_the_one_that_was_written(ledger: Ledger) -> None:
    with priced(ledger, "a"):
        spend(ledger, "a", rounds=7, steps=2)
    again = Ledger(ledger.folder, anchor=ledger.anchor)
    assert again.runs == ledger.runs
    assert (again.head, again.lineage, again.left) == (ledger.head, ledger.lineage, ledger.left)
    assert (again.runs["a"].steps, again.runs["a"].commits) == (14, 7)


def test_two_open_ledgers_see_each_others_entries(ledger: Ledger) -> None:
    other = Ledger(ledger.folder, anchor=ledger.anchor)
    with priced(ledger, "a"):
        spend(ledger, "a", rounds=1)
    with other.locked():
        spend(other, "a", rounds=1, first=2)
    with ledger.locked():
        assert ledger.runs["a"].steps == 2


# ---- what it admits


def test_a_run_is_reserved_whole_and_nothing_comes_back(ledger: Ledger) -> None:
    with priced(ledger, "a", Price(5.0, 1e-6, None)):
        spend(ledger, "a", rounds=1)
        ledger.close("a", "the site left")
        with pytest.raises(BudgetExhausted, match=r"run b costs epsilon 3\.5 .* has epsilon 3 ") as caught:
            ledger.reserve(terms_of("b"), Price(3.5, 1e-6, None))
    assert "a run of epsilon 3 at delta 9.0e-06 would still fit" in str(caught.value.hint)
    assert [entry["kind"] for entry in lines(ledger.folder)].count("run") == 1


def test_a_release_beyond_the_reservation_is_refused_and_not_written(ledger: Ledger) -> None:
    with priced(ledger, "a"):
        spend(ledger, "a", rounds=45)
        before = (ledger.folder / "ledger.jsonl").read_bytes()
        with pytest.raises(BudgetExhausted, match="45 of 45 reserved steps are spent"):
            spend(ledger, "a", rounds=1, first=46)
    assert (ledger.folder / "ledger.jsonl").read_bytes() == before


def test_a_closed_run_stays_closed(ledger: Ledger) -> None:
    with priced(ledger, "a"):
        ledger.close("a", "denied")
        with pytest.raises(BudgetExhausted, match="closed here: denied"):
            spend(ledger, "a", rounds=1)
    with Ledger(ledger.folder).locked(), pytest.raises(LedgerError, match="no run b"):
        ledger.close("b", "denied")


def test_an_unsampled_release_is_made_once(ledger: Ledger) -> None:
    def moments(again: bool = False) -> None:
        ledger.charge(
            "a", server_round=0, attempt=1, release="moments", steps=0, instruction_digest="a" * 64, nonce=bytes(16),
            again=again,
        )  # fmt: skip

    with ledger.locked():
        ledger.reserve(terms_of("a", plan_of(moments=8.0)), Price(1.0, 1e-6, None))
        ledger.reserve(terms_of("b"), Price(1.0, 1e-6, None))
        moments()
        assert lines(ledger.folder)[-1]["mechanism"] == "gaussian"
        with pytest.raises(BudgetExhausted, match="begun once"):
            moments()
        moments(again=True)  # seeded noise: the same bytes
        with pytest.raises(BudgetExhausted, match="no unsampled release"):
            ledger.charge(
                "b", server_round=0, attempt=1, release="moments", steps=0, instruction_digest="a" * 64, nonce=bytes(16)
            )


def test_a_charged_evaluation_is_a_run_of_one_unsampled_release(ledger: Ledger) -> None:
    plan = query_plan(noise_multiplier=9.0, sensitivity=0.5, delta=1e-6, unit="example")
    with ledger.locked():
        account = ledger.reserve(terms_of("accuracy", plan), price_run(plan, LIFETIME))
        ledger.charge(
            "accuracy", server_round=0, attempt=1, release="query", steps=0, instruction_digest="a" * 64,
            nonce=bytes(16),
        )  # fmt: skip
        with pytest.raises(BudgetExhausted, match="begun once"):
            ledger.charge(
                "accuracy", server_round=0, attempt=2, release="query", steps=0, instruction_digest="a" * 64,
                nonce=bytes(16),
            )  # fmt: skip
    pld = PLDAccountant()
    pld.compose(GaussianDpEvent(9.0))
    assert account.epsilon_spent == pytest.approx(pld.get_epsilon(account.price.delta), abs=2e-3)
    charge = lines(ledger.folder)[-1]
    assert (charge["mechanism"], charge["noise_multiplier"], charge["clipping_norm"]) == ("gaussian", 9.0, 0.5)


def test_the_lineage_s_ceiling_is_moved_by_an_entry_that_says_why(ledger: Ledger) -> None:
    with priced(ledger, "a", Price(7.0, 1e-6, None)):
        price = Price(2.0, 1e-6, None)
        with pytest.raises(BudgetExhausted):
            ledger.check_fits(terms_of("b"), price)
        ledger.note("ceiling", max_epsilon=10.0, delta=1e-5, filter="sum", order=None, reason="board, 2026-11-25")
        ledger.check_fits(terms_of("b"), price)
        # A lower one, of the site's policy, counts as well.
        with pytest.raises(BudgetExhausted):
            ledger.check_fits(terms_of("b"), price, lifetime=Lifetime(8.0, 1e-5))
    assert Ledger(ledger.folder).lineage.lifetime.max_epsilon == 10.0


def test_no_second_ledger_and_none_without_a_ceiling(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="a ledger of lineage 'scans' already"):
        Ledger.create(ledger.folder, ledger.lineage)
    with pytest.raises(LedgerError, match="without a ceiling"):
        Ledger.create(tmp_path / "other", Lineage("other", "example", Lifetime(math.inf, 1e-5)))
    assert not (tmp_path / "other").exists()


# ---- accounting by others


def test_a_history_of_three_runs_is_recomputed_from_the_file_alone(ledger: Ledger) -> None:
    plans = {"a": plan_of(sigma=4.0, moments=15.0), "b": plan_of(q=0.05, sigma=2.5), "c": plan_of(q=0.2, sigma=6.0)}
    with ledger.locked():
        for run, plan in plans.items():
            ledger.reserve(terms_of(run, plan), price_run(plan, LIFETIME))
            if plan.warm_start_noise_multiplier:
                ledger.charge(
                    run, server_round=0, attempt=1, release="moments", steps=0, instruction_digest="a" * 64,
                    nonce=bytes(16),
                )  # fmt: skip
            spend(ledger, run, rounds=30)

    # Ten lines, and nothing of ours but the file.
    whole, by_run, counts = PLDAccountant(), {}, Counter()
    for entry in map(json.loads, (ledger.folder / "ledger.jsonl").read_text().splitlines()):
        if entry["kind"] == "charge":
            counts[entry["run"], entry["sampling_rate"], entry["noise_multiplier"]] += max(1, entry["steps"])
    for (run, rate, noise), count in counts.items():
        event = GaussianDpEvent(noise) if rate == 1 else PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
        for accountant in (whole, by_run.setdefault(run, PLDAccountant())):
            accountant.compose(event, count)
    history = [as_spent(account.terms.plan, account.steps) for account in ledger.runs.values()]
    assert composed_epsilon(history, delta=1e-5).epsilon == pytest.approx(whole.get_epsilon(1e-5), abs=2e-3)
    for run, account in ledger.runs.items():
        spent = by_run[run].get_epsilon(account.price.delta)
        assert spent <= account.epsilon_spent <= account.price.epsilon
    # The filter adds up: more than the composed curve, never less.
    assert sum(account.price.epsilon for account in ledger.runs.values()) > whole.get_epsilon(1e-5)


def test_composition_falls_back_to_renyi_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> float:
        raise MemoryError

    history = [Spent(0.1, 2.0, 100), Spent(1.0, 20.0, 1, 30.0)]
    exact = composed_epsilon(history, delta=1e-5)
    monkeypatch.setattr("shared.privacy.accounting._composed_pld", broken)
    loose = composed_epsilon(history, delta=1e-5)
    assert loose.epsilon == loose.rdp > exact.epsilon
    assert "RDP stands in" in loose.fallback
    assert math.isinf(composed_epsilon([Spent(0.1, 0.0, 5)], delta=1e-5).epsilon)
    assert composed_epsilon([], delta=1e-5).epsilon == 0
