"""A charged question about private records: what it costs, what it may reveal, and that it is never under-counted.

Oracles: the Gaussian mechanism's delta, written here from Balle & Wang's formula; Google's accountant, fed from the
lines of the ledger alone; the lines themselves, read with `json` and `hashlib` (`check_chain`); and plain counting.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq
from scipy.stats import norm
from test_ledger_faults import Step, Steps, check_chain
from toy_federation import COLOURS, make_site, make_sites, toy_policy

from client.account import SiteAccount
from client.enrolment import add_records, declare_overlaps, record_digests
from client.gate import QueryRelease, build
from client.ownership import site_that_holds as held_by
from client.query import accuracy_interval, answer, digest_of, noise_std, right_and_wrong, share_of_delta
from client.settings import SiteConfig
from client.site import Site
from shared.cli import run as fedcanvas
from shared.config import DataConfig
from shared.data import ImageCaptionDataset, open_dataset
from shared.errors import BudgetExhausted, ConfigError, DataError, PrivacyError, ProtocolError, UsageError
from shared.privacy.budget import Lifetime, Price, query_plan
from shared.privacy.dpsgd import noised_sum
from shared.privacy.entropy import SystemEntropy
from shared.privacy.ledger import Ledger, RunTerms
from shared.private_data import CAPTION, Question, ask_site, quote_site, site_that_holds

ASKABLE = toy_policy(max_query_epsilon=4.0)
LIFETIME = Lifetime(8.0, 1e-3)
SECRET = "a photo of a crimson walrus"


def nearest_colour(images: np.ndarray) -> list[str]:
    """Right about red and green; blue it takes for green."""
    known = {name: rgb for name, rgb in COLOURS.items() if name != "blue"}
    means = images.reshape(len(images), -1, 3).mean(axis=1)
    return [min(known, key=lambda name: np.abs(mean - known[name]).sum()) for mean in means]


QUESTION = Question(
    "class", nearest_colour, predictor_digest="a" * 64, model_digest="b" * 64, epsilon=2.0, image_size=8
)


def ask(**changes: Any) -> Question:
    return dataclasses.replace(QUESTION, **changes)


def opened(site: Path) -> ImageCaptionDataset:
    config = DataConfig.model_validate({"image-size": 8})
    return open_dataset(site / "data.npz", config=config, cache_dir=site / "cache")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed site of 400 records, asked nothing yet; its pictures are decoded already. Tests copy it."""
    (site,) = make_sites(tmp_path_factory.mktemp("query"), sizes=(400,), seed=None, policy=ASKABLE)
    opened(site)
    return site


@pytest.fixture
def site(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "site-0")


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two deployed sites whose lineages share records; the store lies beside them."""
    folder = tmp_path_factory.mktemp("overlap")
    sites = make_sites(folder, sizes=(400, 40), seed=None, policy=ASKABLE, store="../store")
    here, there = (Ledger(folder / f"store/of-site-{place}", anchor=sites[place] / "anchor.json") for place in (0, 1))
    declare_overlaps(here, [there])
    opened(sites[0])
    return folder


def entries(site: Path, lineage: str = "of-site-0") -> list[dict[str, Any]]:
    return check_chain(site / SiteConfig.read(site).store / lineage / "ledger.jsonl")


def kinds(site: Path, lineage: str = "of-site-0") -> list[str]:
    return [entry["kind"] for entry in entries(site, lineage)]


class ScriptedEntropy(SystemEntropy):
    """Of a test: the noise is what it is told, in standard deviations, and it remembers what was asked for."""

    def __init__(self, *deviations: float) -> None:
        self.deviations, self.asked = deviations, list[tuple[int, float]]()

    def gaussian(self, size: int, std: float, *labels: int | str) -> np.ndarray:
        self.asked.append((size, std))
        return std * np.array(self.deviations)


def noise_multiplier_of(epsilon: float, delta: float) -> float:
    """The analytic Gaussian mechanism, Balle & Wang 2018, theorem 8; sensitivity 1."""

    def excess(sigma: float) -> float:
        at, below = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return float(norm.cdf(at) - math.exp(epsilon) * norm.cdf(below) - delta)

    return float(brentq(excess, 1e-2, 1e4, xtol=1e-12))


# ---- what it says


def test_an_answer_is_the_part_that_is_right_within_its_noise(site: Path) -> None:
    labels = np.array(opened(site).attributes["class"])
    found = ask_site(site, QUESTION)
    truth, std = (labels != "blue").mean(), found.noise_multiplier * 1.001
    assert found.value is not None
    # |error| < 6 std of the ratio's noise, sqrt(2) std / 400 at most: false alarm < 1e-8.
    assert abs(found.value - truth) < 6 * math.sqrt(2) * std / 400
    assert abs(found.noised_count - 400) < 6 * math.sqrt(2) * std
    assert found.low is not None and found.high is not None  # noqa: PT018
    assert 0 <= found.low < found.value < found.high <= 1
    assert found.charged
    assert (found.epsilon, found.delta) == (pytest.approx(2.0, abs=1e-6), 2.5e-4)
    assert (found.unit, found.site_id, found.lineage) == ("example", "site-0", "of-site-0")


def test_without_noise_the_answer_is_plain_counting(site: Path) -> None:
    labels = np.array(opened(site).attributes["class"])
    found = answer(Site(site, simulated=False, entropy=ScriptedEntropy(0.0, 0.0)), QUESTION)
    assert found.value == pytest.approx((labels != "blue").mean(), abs=1e-9)
    assert found.noised_count == 400


def test_subjects_count_once_each_with_the_mean_over_their_usable_images() -> None:
    values = ["red", "red", "blue", "", "red", "green"]
    data = ImageCaptionDataset(
        np.zeros((6, 8, 8, 3), np.uint8), [("x",)] * 6, {"class": values, "subject_id": list("aabbcd")}
    )
    question = ask(predict=lambda images: ["red"])
    groups = [np.array(rows) for rows in ([0, 1], [2, 3], [4], [5])]
    assert right_and_wrong(data, groups, question).tolist() == [2.0, 2.0]
    groups = [np.array([0, 1, 2, 3])]  # one subject: right about two of three, and the fourth does not count
    assert right_and_wrong(data, groups, question) == pytest.approx([2 / 3, 1 / 3])


def test_a_caption_that_is_asked_for_may_be_any_of_the_records_own() -> None:
    data = ImageCaptionDataset(np.zeros((3, 8, 8, 3), np.uint8), [("a cat", "a grey cat"), ("a dog",), ("a cat",)])
    question = ask(attribute=CAPTION, predict=lambda images: ["a grey cat"])
    units = [np.array([row]) for row in range(3)]
    assert right_and_wrong(data, units, question).tolist() == [1.0, 2.0]


def test_the_unit_of_the_lineage_decides_what_counts_as_one(tmp_path: Path) -> None:
    policy = toy_policy(max_query_epsilon=4.0, unit="subject")
    (site,) = make_sites(tmp_path, sizes=(300,), seed=None, policy=policy)
    with np.load(site / "data.npz") as arrays:
        data = dict(arrays)
    people = np.array([f"p{place % 90}" if place < 200 else "" for place in range(300)])
    np.savez(site / "data.npz", **data, subject_id=people)
    found = answer(Site(site, simulated=False, entropy=ScriptedEntropy(0.0, 0.0)), ask(epsilon=4.0))
    assert found.noised_count == 90  # the records without a subject are nobody's
    assert found.unit == "subject"
    right = {name: [] for name in people if name}
    for name, label in zip(people, opened(site).attributes["class"], strict=True):
        if name:
            right[name].append(label != "blue")
    assert found.value == pytest.approx(np.mean([np.mean(of_one) for of_one in right.values()]), abs=1e-9)


def test_a_record_without_a_value_or_on_which_the_predictor_fails_adds_nothing_and_an_unknown_value_is_wrong() -> None:
    images = np.zeros((5, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = range(5)
    data = ImageCaptionDataset(images, [("x",)] * 5, {"class": ["red", "", "red", "no such colour", "red"]})

    def predict(images: np.ndarray) -> list[str]:
        (place,) = images[:, 0, 0, 0]
        if place == 2:
            raise ValueError(SECRET)
        return ["red"] if place < 4 else ["red", "red"]  # two values for one picture: it failed too

    units = [np.array([row]) for row in range(5)]
    assert right_and_wrong(data, units, ask(predict=predict)).tolist() == [1.0, 1.0]


def test_intervals_hold_the_truth_in_95_of_100_cases_for_noise_and_drawing_together() -> None:
    rng, cases = np.random.default_rng(5), 4000
    for n, p, std in ((60, 0.9, 5.0), (400, 0.5, 5.0), (2000, 0.99, 5.0), (50, 1.0, 6.0), (400, 0.7, 0.01)):
        held = told = 0
        for _ in range(cases):
            right = rng.binomial(n, p)
            noised = np.array([right, n - right]) + std * rng.standard_normal(2)
            if noised.sum() < 5 * math.sqrt(2) * std:
                continue
            value, low, high = accuracy_interval(*noised, std=std)
            assert 0 <= low <= value <= high <= 1
            told += 1
            held += low <= p <= high
        # Below 95 % by 4.5 standard deviations of the count: false alarm 4e-6 a case.
        assert held / told > 0.95 - 4.5 * math.sqrt(0.95 * 0.05 / told), (n, p, std)
        assert told > cases / 2


def test_too_few_records_is_told_by_noised_values_alone_and_charged_all_the_same(site: Path, tmp_path: Path) -> None:
    # 400 records and noise that says none; and 400 fewer with noise that says 400: what is told follows the noise.
    entropy = ScriptedEntropy(-200.0, -200.0)
    few = answer(Site(site, simulated=False, entropy=entropy), QUESTION)
    assert (few.value, few.low, few.high) == (None, None, None)
    assert few.note.startswith("too few records for this epsilon")
    assert "spent all the same" in few.note
    assert few.noised_count < 0
    assert kinds(site)[-3:] == ["run", "charge", "commit"]
    (small,) = make_sites(tmp_path / "small", sizes=(4,), seed=None, policy=ASKABLE)
    many = answer(Site(small, simulated=False, entropy=ScriptedEntropy(200.0, 0.0)), QUESTION)
    assert many.value == pytest.approx(1.0, abs=0.02)


# ---- what it costs


def test_the_noise_is_that_of_the_analytic_gaussian_for_the_epsilon_that_was_asked(site: Path) -> None:
    entropy = ScriptedEntropy(0.0, 0.0)
    found = answer(Site(site, simulated=False, entropy=entropy), ask(epsilon=0.7, delta=2e-5))
    sigma = noise_multiplier_of(0.7, 2e-5)
    assert found.noise_multiplier == pytest.approx(sigma, rel=1e-6)
    ((size, std),) = entropy.asked  # one draw, of two numbers, in units of the lattice 2^-24
    assert size == 2
    assert sigma < std * 2.0**-24 < sigma * 1.001  # the rounding of sums and of the lattice is charged on top


def test_noise_has_the_standard_deviation_that_is_charged() -> None:
    plan = query_plan(noise_multiplier=noise_multiplier_of(1.0, 1e-6), sensitivity=1.0, delta=1e-6, unit="example")
    total, draws = torch.tensor([300.0, 100.0], dtype=torch.float64), 10_000
    payloads = np.array(
        [noised_sum(total, plan=plan, entropy=SystemEntropy(), labels=("query",)) for _ in range(draws)]
    )
    noise = (payloads * 2.0**-24 - total.numpy()) / noise_std(plan)
    assert noise_std(plan) == pytest.approx(plan.noise_multiplier, rel=1e-3)
    for column in (noise[:, 0], noise[:, 1], (noise[:, 0] + noise[:, 1]) / math.sqrt(2)):
        z = ((column**2).sum() - draws) / math.sqrt(2 * draws)  # ~ N(0, 1)
        assert abs(z) < 5.0  # false alarm < 6e-7 each; a sigma that is 4 % wrong gives 5.7
        assert abs(column.sum()) / math.sqrt(draws) < 5.0


def test_one_unit_moves_the_sum_by_at_most_one() -> None:
    rng = np.random.default_rng(3)
    names = [*COLOURS, "", "no such colour"]
    for unit in ("example", "subject"):
        for _ in range(200):
            n = int(rng.integers(1, 30))
            values = [names[place] for place in rng.integers(len(names), size=n)]
            images = rng.integers(256, size=(n, 8, 8, 3), dtype=np.uint8)
            owners = np.arange(n) if unit == "example" else rng.integers(max(1, n // 3), size=n)
            units = [np.flatnonzero(owners == one) for one in np.unique(owners)]
            data = ImageCaptionDataset(images, [("x",)] * n, {"class": values})
            whole = right_and_wrong(data, units, QUESTION)
            gone = int(rng.integers(len(units)))
            without = right_and_wrong(data, units[:gone] + units[gone + 1 :], QUESTION)
            assert np.linalg.norm(whole - without) <= 1 + 1e-12


def test_the_ledger_s_epsilon_is_recomputed_from_its_file_alone(site: Path) -> None:
    ask_site(site, ask(epsilon=1.3))
    run, charge = entries(site)[-3:-1]
    assert (charge["kind"], charge["release"], charge["sampling_rate"], charge["steps"]) == ("charge", "query", 1.0, 0)
    assert (charge["mechanism"], charge["clipping_norm"], charge["unit"]) == ("gaussian", 1.0, "example")
    assert noise_multiplier_of(run["epsilon"], run["delta"]) == pytest.approx(charge["noise_multiplier"], rel=1e-6)
    assert run["epsilon"] == pytest.approx(1.3, abs=1e-6)
    assert run["epsilon"] <= 1.3
    assert run["delta"] == pytest.approx(1e-3 * 1.3 / 8, rel=0.01)
    pld = PLDAccountant()
    pld.compose(GaussianDpEvent(charge["noise_multiplier"]))
    assert run["epsilon"] == pytest.approx(pld.get_epsilon(run["delta"]), abs=2e-3)


@pytest.mark.parametrize("parts", [3, 6, 7, 10])
def test_even_parts_of_a_lifetime_fit_into_it(parts: int) -> None:
    shares = [Fraction(repr(share_of_delta(8 / parts, LIFETIME)))] * parts  # as they are written, as the ledger sums
    assert 0.98 < sum(shares) / Fraction(repr(LIFETIME.delta)) <= 1
    order = Lifetime(8.0, 1e-5, "renyi", 4.0)
    assert share_of_delta(1.0, order) == 1e-5  # converted once, at the end
    assert share_of_delta(1.0, Lifetime(math.inf, 0.5)) == 0.5


def test_a_renyi_lineage_is_charged_the_divergence_of_its_order(tmp_path: Path) -> None:
    (site,) = make_sites(
        tmp_path, sizes=(200,), seed=None, policy=ASKABLE, lifetime=Lifetime(8.0, 1e-3, "renyi", 3.0)
    )
    found = ask_site(site, QUESTION)
    run = entries(site)[-3]
    assert run["renyi"] == pytest.approx(3.0 / (2 * found.noise_multiplier**2))  # Mironov 2017, proposition 7
    assert (run["epsilon"], run["delta"]) == (pytest.approx(2.0, abs=1e-6), 1e-3)


def test_a_delta_above_a_renyi_lineage_s_own_does_not_get_more_than_the_policy_allows(tmp_path: Path) -> None:
    (site,) = make_sites(
        tmp_path, sizes=(200,), seed=None, policy=ASKABLE, lifetime=Lifetime(8.0, 1e-3, "renyi", 3.0)
    )
    with pytest.raises(PrivacyError, match=r"at this lineage's delta of 1\.0e-03 is more than the policy .* allows: 4"):
        ask_site(site, ask(epsilon=4.0, delta=0.5))
    assert kinds(site) == ["opened"]


def test_beyond_the_ceiling_nothing_is_charged_and_the_hint_says_what_would_fit(site: Path) -> None:
    ask_site(site, ask(epsilon=4.0))
    ask_site(site, ask(epsilon=3.5))
    before = (site / "lineages/of-site-0/ledger.jsonl").read_bytes()
    for ask_it in (ask_site, quote_site):
        with pytest.raises(BudgetExhausted, match=r"costs epsilon 1 at delta .* has epsilon 0\.5 ") as refused:
            ask_it(site, ask(epsilon=1.0))
        assert "epsilon 0.5" in str(refused.value.hint)
    assert (site / "lineages/of-site-0/ledger.jsonl").read_bytes() == before
    assert ask_site(site, ask(epsilon=0.5)).charged  # exactly what is left


@pytest.mark.parametrize(
    ("policy", "changes", "error", "word"),
    [
        (toy_policy(), {}, PrivacyError, "more than the policy of site site-0 allows: 0"),
        (toy_policy(max_query_epsilon=1.0), {}, PrivacyError, "allows: 1"),
        (toy_policy(max_query_epsilon=4.0, code=["0" * 64]), {}, PrivacyError, "installed code"),
        (toy_policy(max_query_epsilon=4.0, max_epsilon=1.0), {}, BudgetExhausted, "of 1 at"),
        (ASKABLE, {"epsilon": 0.0}, UsageError, "no finite number"),
        (ASKABLE, {"epsilon": math.inf}, UsageError, "no finite number"),
        (ASKABLE, {"delta": 1.0}, UsageError, "not between 0 and 1"),
        (ASKABLE, {"delta": 2e-3}, BudgetExhausted, "costs epsilon"),
        (ASKABLE, {"attribute": "clas"}, DataError, "no column 'clas'"),
    ],
)
def test_what_is_refused_costs_nothing_and_says_the_next_step(
    policy: Any, changes: dict[str, Any], error: type[Exception], word: str, site: Path
) -> None:
    (site / "policy.toml").write_text(policy.to_toml())
    with pytest.raises(error, match=word) as refused:
        ask_site(site, ask(**changes))
    assert refused.value.hint  # type: ignore[attr-defined]
    assert kinds(site) == ["opened"]


def test_a_quote_names_the_price_before_a_record_is_read_or_a_line_written(site: Path) -> None:
    (site / "data.npz").unlink()
    shutil.rmtree(site / "cache")
    quote = quote_site(site, QUESTION)
    assert (quote.epsilon, quote.delta, quote.known) == (pytest.approx(2.0, abs=1e-6), 2.5e-4, False)
    assert (quote.epsilon_left, quote.delta_left) == (8.0, 1e-3)
    assert quote.fewest == pytest.approx(5 * math.sqrt(2) * noise_multiplier_of(2.0, 2.5e-4), rel=1e-3)
    assert kinds(site) == ["opened"]
    with pytest.raises(DataError):
        ask_site(site, QUESTION)
    assert kinds(site) == ["opened"]


# ---- the same question


def test_the_same_question_gets_the_same_answer_uncharged_and_another_one_is_charged(site: Path) -> None:
    first = ask_site(site, QUESTION)
    again = ask_site(site, QUESTION)
    assert (again.value, again.noised_count, again.run) == (first.value, first.noised_count, first.run)
    assert (first.charged, again.charged) == (True, False)
    assert "uncharged" in again.note
    assert quote_site(site, QUESTION).known
    assert kinds(site) == ["opened", "run", "charge", "commit", "resent"]
    # A ceiling that has moved since moves the share of delta, not the answer that was given.
    (site / "policy.toml").write_text(toy_policy(max_query_epsilon=4.0, delta=5e-4).to_toml())
    assert not ask_site(site, QUESTION).charged
    for changes in (
        {"epsilon": 0.2}, {"delta": 1e-6, "epsilon": 0.1}, {"model_digest": "c" * 64, "epsilon": 0.1},
        {"predictor_digest": "c" * 64, "epsilon": 0.3},
    ):  # fmt: skip
        assert ask_site(site, ask(**changes)).charged
    assert kinds(site).count("charge") == 5


def test_a_question_is_named_by_public_things_alone() -> None:
    assert digest_of(ask(predict=lambda images: ["blue"])) == digest_of(QUESTION)
    others = [
        ask(**change) for change in (
            {"attribute": "shape"}, {"epsilon": 1.0}, {"delta": 1e-6}, {"image_size": 32}, {"channels": 1},
            {"predictor_digest": "c" * 64}, {"model_digest": "c" * 64},
        )
    ]  # fmt: skip
    assert len({digest_of(question) for question in [QUESTION, *others]}) == len(others) + 1


def test_a_federation_s_run_that_took_the_name_first_is_not_taken_for_the_question(site: Path) -> None:
    name = f"query-{digest_of(QUESTION)[:16]}"
    ledger = Ledger(site / "lineages/of-site-0", anchor=site / "anchor.json")
    plan = query_plan(noise_multiplier=0.2, sensitivity=1.0, delta=1e-5, unit="example")
    with ledger.locked():
        ledger.reserve(RunTerms(name, "hostile", "0" * 64, "0" * 64, "0" * 64, plan), Price(1.0, 1e-5, None))
    found = ask_site(site, QUESTION)
    assert found.run == f"{name}-2"
    assert found.noise_multiplier == pytest.approx(noise_multiplier_of(2.0, 2.5e-4), rel=1e-6)


def test_a_question_that_a_person_closed_stays_closed(site: Path) -> None:
    found = ask_site(site, QUESTION)
    assert fedcanvas(["client", "deny", str(site), found.run]) == 0
    with pytest.raises(BudgetExhausted, match="was closed here"):
        ask_site(site, QUESTION)


def test_a_simulated_site_answers_with_its_seeded_noise_and_says_so(tmp_path: Path) -> None:
    answers = []
    for copy in ("one", "two"):
        (site,) = make_sites(tmp_path / copy, sizes=(400,), seed=7)
        answers += [ask_site(site, ask(epsilon=0.5, delta=1e-5)) for _ in range(2)]
        assert kinds(site).count("run") == 1
    assert {(found.value, found.noised_count, found.simulated) for found in answers} == {
        (answers[0].value, answers[0].noised_count, True)
    }
    assert ask_site(site, ask(epsilon=0.6, delta=1e-5)).noised_count != answers[0].noised_count


# ---- cut off


class Killed(BaseException):
    """Nothing of the process happens after it: each further step on the disk raises it again."""


def cut_at(number: int, site: Path, *, half: bool) -> Any:
    """The answer, or `None` where the process was gone at step `number`, before it or in the middle of its write."""

    def at(step: Step) -> Any:
        if step.number == number and half:
            step.write_a_part()
        if step.number >= number:
            raise Killed
        return step.make()

    try:
        with Steps(at).watched():
            return ask_site(site, QUESTION)
    except Killed:
        return None


def steps_of(site: Path) -> list[str]:
    """Of a question that nothing disturbs."""
    seen: list[str] = []

    def at(step: Step) -> Any:
        seen.append(step.name)
        return step.make()

    with Steps(at).watched():
        ask_site(site, QUESTION)
    return seen


def charges(site: Path, lineage: str) -> int:
    path = site / SiteConfig.read(site).store / lineage / "ledger.jsonl"
    return sum(b'"kind":"charge"' in line for line in path.read_bytes().rpartition(b"\n")[0].split(b"\n"))


def test_a_question_that_is_cut_off_at_any_step_is_never_under_counted_in_any_ledger(
    overlapping: Path, tmp_path: Path
) -> None:
    names = steps_of(shutil.copytree(overlapping, tmp_path / "whole") / "site-0")
    cases = [(number, half) for number, name in enumerate(names, 1) for half in (False, True)[: 1 + (name == "write")]]
    lineages, seen = ("of-site-0", "of-site-1"), set()
    for number, half in [*cases, (len(names) + 1, False)]:
        folder = shutil.copytree(overlapping, tmp_path / "cut")
        site = folder / "site-0"
        found = cut_at(number, site, half=half)
        assert (found is not None) == (number > len(names))
        before = [charges(site, name) for name in lineages]
        kept = (site / "replies").is_dir() and any((site / "replies").glob("*.reply"))
        if found is not None or kept:
            assert before == [1, 1], "an answer was made that is not charged everywhere"
        again = ask_site(site, QUESTION)
        # Kept is answered; all else is another release: what was charged for the lost one stays charged beside it.
        assert again.charged == (not kept)
        after = [charges(site, name) for name in lineages]
        assert after == [count + again.charged for count in before]
        assert again.run.endswith("-2") == (any(before) and not kept)
        for name, charged in zip(lineages, after, strict=True):
            assert sum(entry["kind"] == "run" for entry in entries(site, name)) >= charged
        if found is not None:
            assert again.value == found.value
        seen.add((kept, *before))
        assert not ask_site(site, QUESTION).charged
        shutil.rmtree(folder)
    assert seen == {(False, 0, 0), (False, 0, 1), (False, 1, 1), (True, 1, 1)}


def test_the_charge_is_on_disk_before_a_record_is_judged(site: Path) -> None:
    counts: list[int] = []

    def predict(images: np.ndarray) -> Sequence[str]:
        counts.append(charges(site, "of-site-0"))
        return ["red"]

    ask_site(site, ask(predict=predict))
    assert counts == [0] * 3 + [1] * 400  # three pictures of noise, then the records


def test_a_round_of_a_federation_need_not_wait_while_records_are_judged(overlapping: Path, tmp_path: Path) -> None:
    site = shutil.copytree(overlapping, tmp_path / "both") / "site-0"
    taken: list[bool] = []

    def predict(images: np.ndarray) -> Sequence[str]:
        with SiteAccount(site, store=site / "../store", lineage="of-site-0").locked(wait_seconds=0.0):
            taken.append(True)
        return ["red"]

    assert ask_site(site, ask(predict=predict)).charged
    assert len(taken) == 403  # three pictures of noise, then the records


def test_a_question_that_is_closed_while_it_is_answered_says_nothing_and_stays_spent(site: Path) -> None:
    def predict(images: np.ndarray) -> Sequence[str]:
        ledger = Ledger(site / "lineages/of-site-0", anchor=site / "anchor.json")
        for run, account in ledger.runs.items():
            if account.closed is None:
                with ledger.locked():
                    ledger.close(run, "on second thought")
        return ["red"]

    with pytest.raises(BudgetExhausted, match="closed here while it was answered: on second thought"):
        ask_site(site, ask(predict=predict))
    assert kinds(site) == ["opened", "run", "charge", "closed"]


# ---- shared records


def test_a_lineage_that_shares_records_is_charged_too_and_its_ceiling_counts(overlapping: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(overlapping, tmp_path / "both")
    here, there = folder / "site-0", folder / "site-1"
    found = ask_site(here, QUESTION)
    (run,) = (entry for entry in entries(there, "of-site-1") if entry["kind"] == "run")
    assert (run["through"], run["epsilon"], run["run"]) == ("of-site-0", pytest.approx(2.0, abs=1e-6), found.run)
    assert charges(there, "of-site-1") == 1
    # The other site asks the same question: of its own records, under its own noise, charged in both.
    other = ask_site(there, QUESTION)
    assert other.charged
    assert (charges(here, "of-site-0"), charges(here, "of-site-1")) == (2, 2)
    assert not ask_site(here, QUESTION).charged
    ask_site(there, ask(epsilon=3.0))
    before = [entries(here, name) for name in ("of-site-0", "of-site-1")]
    with pytest.raises(BudgetExhausted):
        ask_site(here, ask(epsilon=1.5))
    assert [entries(here, name) for name in ("of-site-0", "of-site-1")] == before


def test_an_overlap_that_is_declared_later_carries_the_question_over(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, sizes=(200, 40), seed=None, policy=ASKABLE, store="../store")
    ask_site(sites[0], QUESTION)
    ledgers = [SiteAccount(site, store=tmp_path / "store", lineage=f"of-{site.name}").ledger for site in sites]
    declare_overlaps(ledgers[1], [ledgers[0]])
    assert [entry["release"] for entry in entries(sites[1], "of-site-1") if entry["kind"] == "charge"] == ["query"]
    assert ledgers[1].runs[next(iter(ledgers[1].runs))].epsilon_spent == pytest.approx(2.0, abs=0.05)


# ---- what stays


def test_nothing_of_a_record_is_in_logs_ledgers_or_errors(site: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []

    def predict(images: np.ndarray) -> list[str]:
        assert images.shape == (1, 8, 8, 3), "each picture is judged alone"
        seen.append(images)
        if len(seen) > 3:
            raise RuntimeError(SECRET)
        return ["red"]

    found = ask_site(site, ask(predict=predict))
    assert found.value is None  # no record counted
    assert len(seen) == 403
    written = b"".join(path.read_bytes() for path in site.rglob("*") if path.is_file() and "cache" not in path.parts
                       and path.name != "data.npz")  # fmt: skip
    out = capfd.readouterr()
    for text in (SECRET, "a photo of", "RuntimeError"):
        assert text.encode() not in written
        assert text not in out.out + out.err
    (line,) = (site / "site.log").read_text().splitlines()
    assert line.split(" ", 1)[1] == f"run {found.run}: a question about the records is answered, epsilon 2"


def test_a_predictor_that_remembers_what_it_saw_or_fails_at_once_costs_nothing(site: Path) -> None:
    def last_one(images: np.ndarray) -> Sequence[str]:
        calls.append(1)
        return [list(COLOURS)[len(calls) % 3]]

    calls: list[int] = []
    with pytest.raises(PrivacyError, match="when it has seen another one") as refused:
        ask_site(site, ask(predict=last_one))
    assert "evaluation mode" in str(refused.value.hint)

    def broken(images: np.ndarray) -> Sequence[str]:
        raise RuntimeError("it wants 32 px")

    with pytest.raises(RuntimeError, match="32 px"):  # of pictures of noise: it may be told
        ask_site(site, ask(predict=broken))
    assert kinds(site) == ["opened"]


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (np.zeros(2), "64-bit integers"), (np.zeros(3, np.int64), "2 entries"), ([1, 2], "64-bit integers"),
        (np.array([0, 2**60]), "beyond the lattice"),
    ],
)  # fmt: skip
def test_the_gate_lets_two_integers_of_a_question_through_and_nothing_else(payload: Any, word: str) -> None:
    with pytest.raises(ProtocolError, match=word):
        build(QueryRelease("query-1", payload, "0" * 64), site_id="site-0")
    with pytest.raises(ProtocolError):
        build(QueryRelease("no name", np.zeros(2, np.int64), "0" * 64), site_id="site-0")
    assert build(QueryRelease("query-1", np.zeros(2, np.int64), "0" * 64), site_id="site-0")


def test_ledger_runs_receipts_and_their_page_show_a_question(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask_site(site, QUESTION)
    for command in (["ledger"], ["runs"], ["receipts"], ["ledger", "--verify"]):
        assert fedcanvas(["client", command[0], str(site), *command[1:]]) == 0
        out = capsys.readouterr().out
        if command != ["ledger", "--verify"]:
            assert found.run in out
            assert "none: asked here" in out
        else:
            assert "the SHA-256 that the ledger notes for them: 1" in out
    page = site.parent / "page.html"
    assert fedcanvas(["client", "receipts", str(site), "--html", str(page)]) == 0
    text = page.read_text()
    assert "which a person at the site asked about its records" in text
    assert f"Question {found.run}, asked here: 1 message" in text
    capsys.readouterr()
    assert fedcanvas(["client", "receipts", str(site), "--json"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)["receipts"]
    assert (receipt["kind"], receipt["steps"], receipt["charge"]) == ("query", 0, pytest.approx(2.0, abs=1e-6))
    assert fedcanvas(["client", "policy", str(site)]) == 0
    assert "epsilon 4, out of the same lifetime" in capsys.readouterr().out


# ---- whose data


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's store, empty; whatever this machine holds otherwise is out of sight."""
    monkeypatch.setenv("FEDCANVAS_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_site_s_folder_and_all_that_lies_in_it_is_recognised(machine: Path, site: Path) -> None:
    for place in (site, site / "data.npz", site / "cache"):
        assert site_that_holds(place) == f"site site-0 ({site})"
    link = site.parent / "link.npz"
    link.symlink_to(site / "data.npz")
    assert site_that_holds(link) == f"site site-0 ({site})"
    (site / "site.toml").write_text("no settings")
    assert "cannot be read" in str(site_that_holds(site / "data.npz"))


@pytest.mark.parametrize("where", ["run-sites/site-3", "site-3", "sites/site-3"])
def test_data_that_a_site_nearby_names_as_its_own_are_recognised(where: str, machine: Path, tmp_path: Path) -> None:
    data = tmp_path / "work/data/scans"
    data.mkdir(parents=True)
    (data / "captions.csv").touch()
    folder = make_site(tmp_path / "work" / where, seed=None, policy=ASKABLE)
    settings = SiteConfig.read(folder).model_copy(update={"data": str(data)})
    (folder / "site.toml").unlink()
    settings.write(folder)
    for place in (data, data / "captions.csv", tmp_path / "work/data"):
        assert site_that_holds(place) == f"site site-3 ({folder})"
    assert site_that_holds(tmp_path / "work/elsewhere") is None  # not there
    (tmp_path / "work/public").mkdir()
    assert site_that_holds(tmp_path / "work/public") is None


def test_records_that_a_lineage_of_this_machine_holds_are_recognised_wherever_a_copy_lies(
    machine: Path, tmp_path: Path
) -> None:
    (site,) = make_sites(tmp_path / "far/away/from/here", sizes=(30,), seed=None, policy=ASKABLE, store=str(machine))
    config = DataConfig.model_validate({})
    dataset = open_dataset(site / "data.npz", config=config, cache_dir=site / "cache")
    add_records(Ledger(machine / "of-site-0"), record_digests(dataset, machine))
    copy = tmp_path / "public/other-name.npz"
    copy.parent.mkdir()
    with np.load(site / "data.npz") as arrays:
        some = {**arrays, "x_train": arrays["x_train"][10:13], "y_train": arrays["y_train"][10:13]}
    np.savez(copy, **some)  # three of its records, in a new file
    expected = f"lineage 'of-site-0' in {machine}"
    assert site_that_holds(copy) == expected
    mixed = tmp_path / "public/as-test.npz"  # in the split that is not trained on
    others = {"x_train": 255 - some["x_train"], "y_train": some["y_train"]}
    np.savez(mixed, **{**some, **others, "x_test": some["x_train"], "y_test": some["y_train"]})
    assert site_that_holds(mixed) == expected
    some["x_train"] = 255 - some["x_train"]
    np.savez(copy, **some)
    assert site_that_holds(copy) is None
    # A ledger that cannot be read makes nothing public.
    np.savez(copy, **{**some, "x_train": 255 - some["x_train"]})
    (machine / "of-site-0/ledger.jsonl").write_text("damaged\n")
    assert site_that_holds(copy) == expected


def test_public_data_and_those_of_simulated_sites_are_public(machine: Path, tmp_path: Path) -> None:
    data = tmp_path / "shapes.npz"
    folders = make_sites(tmp_path / "run-sites", sizes=(20, 20), seed=7)
    shutil.copy(folders[0] / "data.npz", data)
    for folder in folders:
        settings = SiteConfig.read(folder).model_copy(update={"data": str(data)})
        (folder / "site.toml").unlink()
        settings.write(folder)
    assert site_that_holds(data) is None
    assert site_that_holds(folders[0]) is None
    assert held_by(tmp_path / "not-there.npz") is None
    assert not machine.exists()  # nothing was written by looking


def test_a_folder_that_is_no_site_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no site"):
        ask_site(tmp_path, QUESTION)
