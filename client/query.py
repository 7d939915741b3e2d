"""One question about a site's private records, answered once: with noise, charged before a record is judged.

The question is `shared.private_data.Question`: how often is a classifier, trained on generated pictures alone, right?
Each unit adds the vector (right, wrong) to a sum: (1, 0) or (0, 1) for a record, and for a subject the mean over its
images. Its L2 norm is at most 1, so one unit moves the sum by at most 1. The sum leaves like a gradient: on the public
lattice, with Gaussian noise, unsampled (q = 1). Everything else (the part that is right, its interval, whether there
are enough units to say) is computed from the two noised numbers.

    admit      policy, place in the ledger, price, ceiling; no record is read before this
    open       records and the predictor, which is tried on pictures of noise; if that fails, nothing is charged
    reserve    admitted again, with the ledgers locked; the answer is a run of its own, `query-<16 digits of the
    charge     question's digest>`, in every ledger of the records, on disk, before a record is judged
    judge      without the lock: a round of a federation need not wait for a time that depends on the records
    commit     the reply is kept, noted in the ledger, and only then handed over

Which records count is decided row by row: one without a value in the column adds nothing, and so does one on which the
predictor fails; a value that the predictor never gives is wrong. A question that was cut off after its charge is
another release when it is asked again, and charged again. No message leads here: `client.app` does not load it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context
from pathlib import Path

import numpy as np
import torch

from client.account import KeptReply, SiteAccount
from client.data_check import open_as_training
from client.gate import QUERY_LENGTH, QueryRelease, build
from client.policy import FILE as POLICY
from client.policy import SitePolicy
from client.settings import RELEASE_CODE, SiteConfig
from client.site import Site
from client.training import rows_by_subject
from shared.data import ImageCaptionDataset
from shared.errors import BudgetExhausted, DataError, PrivacyError, UsageError
from shared.privacy.accounting import analytic_gaussian_noise_multiplier
from shared.privacy.budget import Lifetime, Price, fits, price_run, query_plan, what_is_left
from shared.privacy.dpsgd import noised_sum
from shared.privacy.ledger import RunAccount, RunTerms
from shared.privacy.plan import PrivacyPlan
from shared.private_data import CAPTION, Answer, Question, Quote
from shared.records import HEAD_BYTES, SiteReply, unpack_envelope
from shared.registry import nearest_name_hint

FORMAT = "query 1"  # of the digest: what is asked, and how it is answered
RUN_DIGITS = 16
LARGEST_VECTOR = 1.0  # |(right, wrong)| of one unit: right + wrong = 1, both at least 0
CLEARLY = 5.0  # standard deviations of its noise that the noised number of units must reach
PRICE_ROUNDING = 1e-3  # by which a price may lie above the epsilon that was asked for, at the same delta
NORMAL_QUANTILE = 1.959964  # of the standard normal distribution, at 0.975


@dataclass(frozen=True)
class AskedHere:
    """A question as ledger and kept replies know it.

    Attributes:
        digest: of what is asked, 64 hex digits, whatever the records are.
        attempt: from 1; a question that was cut off after its charge is asked again under the next one.
    """

    digest: str
    attempt: int
    server_round: int = 0

    @property
    def run_id(self) -> str:
        return f"query-{self.digest[:RUN_DIGITS]}" + (f"-{self.attempt}" if self.attempt > 1 else "")


@dataclass(frozen=True)
class Admitted:
    """A question that policy and ceiling allow.

    Attributes:
        envelope: the kept reply, where it was answered before.
        prices, lifetimes: of each of the account's ledgers; a lifetime is the lower one of ledger and policy.
    """

    asked: AskedHere
    terms: RunTerms
    envelope: bytes | None
    prices: list[Price]
    lifetimes: list[Lifetime]


def quote_site(site_dir: Path, question: Question) -> Quote:
    """What the answer would cost: no record is read and nothing is written."""
    site = open_for_questions(site_dir)
    admitted = _admit(site, question)
    price, plan = admitted.prices[0], admitted.terms.plan
    left, std = what_is_left(site.account.ledger.reserved, admitted.lifetimes[0]), noise_std(plan)
    return Quote(
        site.site_id, site.account.lineage, plan.unit, admitted.envelope is not None, price.epsilon, price.delta,
        plan.noise_multiplier, std, fewest_units(std), left.epsilon, left.delta, site.entropy.simulated,
    )  # fmt: skip


def ask_site(site_dir: Path, question: Question) -> Answer:
    return answer(open_for_questions(site_dir), question)


def open_for_questions(site_dir: Path) -> Site:
    """The site as its settings say it is: a deployed one draws from the operating system, a simulated one is seeded."""
    return Site(site_dir, simulated=SiteConfig.read(site_dir).simulated_seed is not None)


def answer(site: Site, question: Question) -> Answer:
    """See `shared.private_data.ask_site`."""
    account, opened = site.account, None
    account.ledger.refresh()
    if _admit(site, question).envelope is None:
        _check_predictor(question)  # trains it: minutes, perhaps
        opened = _open_units(site, question)
    with account.locked():
        admitted = _admit(site, question)
        asked, plan = admitted.asked, admitted.terms.plan
        if admitted.envelope is not None:
            return _the_same_again(site, asked, admitted.envelope)
        dataset, units = opened or _open_units(site, question)
        run = account.reserve(admitted.terms, admitted.prices, admitted.lifetimes)
        charge = account.charge(
            run.terms, asked, release="query", steps=0,
            nonce=site.entropy.rng("head", asked.run_id, run.charges).bytes(16), again=site.entropy.simulated,
        )  # fmt: skip
    total = right_and_wrong(dataset, units, question)
    # Seeded noise is that of the question: asked again, a simulated site answers with the same bytes.
    payload = noised_sum(torch.from_numpy(total), plan=plan, entropy=site.entropy, labels=("query", asked.digest))
    reply = _leave(site, QueryRelease(asked.run_id, payload, charge.head))
    with account.locked():
        if (closed := account.ledger.runs[asked.run_id].closed) is not None:
            raise BudgetExhausted(
                f"run {asked.run_id} was closed here while it was answered: {closed}",
                hint="its epsilon is spent and nothing left the site",
            )
        account.store_reply(asked, KeptReply(reply.envelope, charge.head))
        account.ledger.commit(
            charge, size=len(reply.envelope), sha256=_sha256(reply.envelope),
            fields=[["payload", "int64", [QUERY_LENGTH]], ["head", "uint8", [HEAD_BYTES]]],
        )  # fmt: skip
    site.log(f"run {asked.run_id}: a question about the records is answered, epsilon {run.price.epsilon:.4g}")
    return _read(site, run, reply, charged=True)


def _the_same_again(site: Site, asked: AskedHere, envelope: bytes) -> Answer:
    """The kept reply, once more; the ledger is locked."""
    ledger = site.account.ledger
    payload, head = unpack_envelope(envelope, length=QUERY_LENGTH)
    reply = _leave(site, QueryRelease(asked.run_id, payload, head))
    ledger.resend(asked.run_id, server_round=0, size=len(reply.envelope), sha256=_sha256(reply.envelope))
    site.log(f"run {asked.run_id}: the same question again, the same answer, uncharged")
    return _read(site, ledger.runs[asked.run_id], reply, charged=False)


# ---- whether


def _admit(site: Site, question: Question) -> Admitted:
    """By policy, ledger and the question alone.

    Raises:
        UsageError, PrivacyError, BudgetExhausted: as `shared.private_data.ask_site` says.
    """
    account, policy = site.account, SitePolicy.read(site.folder)
    if not 0 < question.epsilon < math.inf:
        raise UsageError(f"epsilon {question.epsilon:g} is no finite number above 0", hint="0.5 is a careful choice")
    if question.delta is not None and not 0 < question.delta < 1:
        raise UsageError(f"delta {question.delta:g} is not between 0 and 1", hint="leave it out: a share is taken")
    assert question.predictor_digest, "a predictor without a name would get another one's answer"
    assert question.model_digest, "a model without a name would get another one's answer"
    if policy.code and RELEASE_CODE not in policy.code:
        raise PrivacyError(
            f"the policy of site {site.site_id} does not allow the installed code {RELEASE_CODE[:12]}",
            hint=f"when you trust this release, put its digest into `code` of {site.folder / POLICY}",
        )
    _check_allowed(question.epsilon, site, policy)
    unit = account.ledger.lineage.unit
    lifetimes = [policy.ceiling(ledger.lineage.lifetime) for ledger in account.ledgers]
    asked, known, envelope = _place(site, question)
    if known is not None:
        plan = known.terms.plan  # it was reserved, and its noise is that of the reservation
    else:
        delta = question.delta if question.delta is not None else share_of_delta(question.epsilon, lifetimes[0])
        plan = query_plan(
            noise_multiplier=analytic_gaussian_noise_multiplier(question.epsilon, delta),
            sensitivity=LARGEST_VECTOR, delta=delta, unit=unit,
        )  # fmt: skip
    terms = RunTerms(asked.run_id, "", asked.digest, "", RELEASE_CODE, plan)
    prices = [
        account_of.runs[asked.run_id].price if asked.run_id in account_of.runs
        else price_run(plan, lifetime, at_delta=plan.delta)
        for account_of, lifetime in zip(account.ledgers, lifetimes, strict=True)
    ]  # fmt: skip
    if envelope is None:
        # A Renyi filter prices at the lineage's delta, whatever delta was asked for: there it may cost more.
        _check_allowed(prices[0].epsilon, site, policy, priced_at=prices[0].delta)
        account.check_fits(terms, prices, lifetimes)
        _check_reserved(account, asked, lifetimes[0])
    return Admitted(asked, terms, envelope, prices, lifetimes)


def _check_allowed(epsilon: float, site: Site, policy: SitePolicy, priced_at: float | None = None) -> None:
    if epsilon <= policy.max_query_epsilon * (1 + PRICE_ROUNDING):
        return
    here = f" at this lineage's delta of {priced_at:.1e}" if priced_at is not None else ""
    raise PrivacyError(
        f"a question of epsilon {epsilon:.4g}{here} is more than the policy of site {site.site_id} allows:"
        f" {policy.max_query_epsilon:g}",
        hint=f"whoever answers for the records sets max-query-epsilon in {site.folder / POLICY}",
    )


def _place(site: Site, question: Question) -> tuple[AskedHere, RunAccount | None, bytes | None]:
    """Where the question stands: (its attempt, that run where it is reserved, the kept reply where there is one)."""
    account, digest = site.account, digest_of(question)
    for attempt in itertools.count(1):
        asked = AskedHere(digest, attempt)
        known = [ledger.runs[asked.run_id] for ledger in account.ledgers if asked.run_id in ledger.runs]
        own = account.ledger.runs.get(asked.run_id)
        if any(run.terms.config_digest != digest for run in known):
            continue  # a federation's run has this name
        if own is not None and account.ledger.entries[own.seq]["through"]:
            continue  # asked of another lineage that shares records, whose site has the reply
        if own is not None and own.closed is not None:
            raise BudgetExhausted(
                f"run {asked.run_id}, the same question, was closed here: {own.closed}",
                hint="a closed run stays closed; another epsilon makes another question",
            )
        if own is not None:
            kept = account.stored_reply(asked)
            if kept is not None and kept.head in own.heads:  # else it is not of this ledger
                return asked, own, kept.leaves
        if site.entropy.simulated or not any(run.charges for run in known):
            return asked, known[0] if known else None, None
    raise AssertionError("attempts are not counted to an end")


def _check_reserved(account: SiteAccount, asked: AskedHere, lifetime: Lifetime) -> None:
    """A run that was reserved before a crash, under a ceiling that may have been lowered since."""
    run = account.ledger.runs.get(asked.run_id)
    if run is None:
        return
    before = [other.price for other in account.ledger.runs.values() if other.seq < run.seq]
    if not fits(run.price, before, lifetime):
        raise BudgetExhausted(
            f"run {asked.run_id} is reserved, and passes the lifetime that this site's policy sets",
            hint="the ceiling was lowered since",
        )


def digest_of(question: Question) -> str:
    """Names what is asked, by public things alone."""
    parts = [
        FORMAT, question.attribute, question.predictor_digest, question.model_digest, float(question.epsilon),
        question.delta, question.image_size, question.channels,
    ]  # fmt: skip
    return _sha256(json.dumps(parts).encode())


def share_of_delta(epsilon: float, lifetime: Lifetime) -> float:
    """The same share of a lifetime's delta as of its epsilon, three digits, rounded down so that ten tenths fit.

    A Renyi filter converts once, at the end, with its whole delta; without a ceiling there is nothing to share.
    """
    if lifetime.order is not None or math.isinf(lifetime.max_epsilon):
        return lifetime.delta
    share = lifetime.delta * min(1.0, epsilon / lifetime.max_epsilon)
    return float(Context(prec=3, rounding=ROUND_DOWN).create_decimal(repr(share)))


# ---- of what


def _check_predictor(question: Question) -> None:
    """Tries it on pictures of noise, before anything is charged: its errors show here, and may say what they want.

    Raises:
        PrivacyError: what it says of a picture depends on what it saw before.
    """
    rng = np.random.default_rng(0)
    shape = (1, question.image_size, question.image_size, question.channels)
    first, second = (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(2))
    before = list(question.predict(first.copy()))
    assert len(before) == 1, "one picture has one predicted value"
    assert isinstance(before[0], str), "a predicted value is a text, as it stands in the column"
    question.predict(second)
    if list(question.predict(first)) != before:
        raise PrivacyError(
            "the predictor says something else of a picture when it has seen another one: one record could then change"
            " what counts for the others",
            hint="a network must be in evaluation mode",
        )


def _open_units(site: Site, question: Question) -> tuple[ImageCaptionDataset, Sequence[np.ndarray]]:
    """The records, and for each unit its rows.

    Raises:
        DataError: they cannot be opened, have no such column, or name no subject where that is the unit.
    """
    dataset = open_as_training(
        site.folder / site.config.data, cache_dir=site.folder / site.config.cache_dir,
        image_size=question.image_size, channels=question.channels,
    )  # fmt: skip
    if question.attribute != CAPTION and question.attribute not in dataset.attributes:
        columns = sorted(dataset.attributes)
        raise DataError(
            f"the records of site {site.site_id} have no column '{question.attribute}'",
            hint=nearest_name_hint(question.attribute, columns) if columns else "they have no columns but captions",
        )
    rows = site.own_rows(len(dataset))
    if site.account.ledger.lineage.unit == "example":
        return dataset, list(rows[:, None])
    named, places = rows_by_subject(dataset, rows)
    return dataset, [named[of_subject] for of_subject in places]


def right_and_wrong(
    dataset: ImageCaptionDataset, units: Sequence[np.ndarray], question: Question
) -> np.ndarray:  # fmt: skip
    """`(2,)` float64, not noised: how many units the predictor is right about, and wrong about.

    Args:
        units: for each unit its rows; a row is in one unit.
    """
    column, total = dataset.attributes.get(question.attribute, []), np.zeros(2)
    texts = dataset.captions if question.attribute == CAPTION else [(value,) if value else () for value in column]
    for rows in units:
        judged = [_is_right(question, dataset.images[row], texts[row]) for row in rows]
        scores = [score for score in judged if score is not None]
        if scores:
            right = sum(scores) / len(scores)
            total += (right, 1 - right)
    return total


def _is_right(question: Question, image: np.ndarray, texts: Sequence[str]) -> bool | None:
    """`None` where the record does not count: nothing is raised, since its text could quote the record."""
    if not texts:
        return None
    try:
        # Alone: in a batch, what is said of one record could depend on which others are there.
        (predicted,) = question.predict(np.array(image)[None])
    except Exception:
        return None
    return predicted in texts


# ---- what it says


def noise_std(plan: PrivacyPlan) -> float:
    """Of the noise on each of the two numbers."""
    return plan.noise_multiplier * plan.sensitivity(QUERY_LENGTH)


def fewest_units(std: float) -> float:
    """The noised number of units below which no part of them is told; `std` of each of the two noised numbers."""
    return CLEARLY * math.sqrt(2) * std


def accuracy_interval(right: float, wrong: float, *, std: float) -> tuple[float, float, float]:
    """(part that is right, low, high) at 95 %, from two noised numbers and nothing else.

    All p for which |right - p (right + wrong)| is within 1.96 standard deviations of what noise and the drawing of the
    units make of it: std^2 ((1 - p)^2 + p^2) + n p (1 - p). That is Fieller's interval of a ratio, and Wilson's of a
    share when there is no noise. n is the noised number of units, whose own error is at most a fifth of it
    (`fewest_units`). For subjects, whose parts lie between 0 and 1, n p (1 - p) is an upper bound.
    Source: Fieller 1954, https://www.jstor.org/stable/2984043; Wilson 1927, doi 10.1080/01621459.1927.10502953.
    """
    right, wrong = max(right, 0.0), max(wrong, 0.0)  # noise can take a number below 0, where no count is
    n, z2 = right + wrong, NORMAL_QUANTILE**2
    # (right - p n)^2 <= z2 (std^2 (1 - 2 p + 2 p^2) + n (p - p^2)): a p^2 + b p + c <= 0, met by right / n.
    a = n**2 - 2 * z2 * std**2 + z2 * n
    b = -2 * right * n + 2 * z2 * std**2 - z2 * n
    c = right**2 - z2 * std**2
    root = math.sqrt(max(b**2 - 4 * a * c, 0.0))
    value = right / n
    low, high = (-b - root) / (2 * a), (-b + root) / (2 * a)
    return value, min(max(low, 0.0), value), max(min(high, 1.0), value)


def _read(site: Site, run: RunAccount, reply: SiteReply, *, charged: bool) -> Answer:
    """What the noised numbers say; the records are not looked at any more."""
    plan, price = run.terms.plan, run.price
    payload, _ = unpack_envelope(reply.envelope, length=QUERY_LENGTH)
    right, wrong = (float(number) * plan.lattice for number in payload)
    std = noise_std(plan)
    value = low = high = None
    if right + wrong >= fewest_units(std):
        value, low, high = accuracy_interval(right, wrong, std=std)
        note = "95 % interval: for the noise on both numbers, and for the drawing of the units"
    else:
        note = (
            f"too few records for this epsilon: the noised number of them, {right + wrong:.0f}, is below"
            f" {fewest_units(std):.0f}, {CLEARLY:g} standard deviations of its noise"
        )
        note += "; the epsilon is spent all the same" if charged else ""
    if not charged:
        note += f"; asked before, on {run.time[:10]}: the same answer, uncharged"
    return Answer(
        value, low, high, right + wrong, price.epsilon, price.delta, plan.noise_multiplier, charged, note, plan.unit,
        run.terms.run, site.site_id, site.account.lineage, site.entropy.simulated,
    )  # fmt: skip


def _leave(site: Site, release: QueryRelease) -> SiteReply:
    reply = build(release, site_id=site.site_id)
    assert isinstance(reply, SiteReply)
    return reply


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
