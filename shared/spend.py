"""What a site says, and signs, that one run spent there: the charges of its ledger, and the head that chains them.

A spend statement (`shared.protection.statements`, kind `spend`) holds the run's terms and every charge in order.
Whoever reads it computes the head of the charges and the epsilon from them again, and believes no figure: a charge that
is left out, doubled or altered gives another head than the one that the server remembers from the site's last reply.
Nothing in it depends on records: rounds, digests, random nonces, and the public plan.

What it cannot show: that the site's code charged all that it released. Format: docs/bundle.md.
Not here: whose key the site's is (`shared.bundle`), and the ledger itself (`shared.privacy.ledger`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

from shared.errors import TrustError
from shared.privacy.accounting import ADJACENCY, EpsilonReport
from shared.privacy.ledger import BEFORE_THE_FIRST, UNSAMPLED, Ledger, run_head
from shared.privacy.plan import PrivacyPlan
from shared.protection.keys import SigningKey, VerifyKey
from shared.protection.statements import canonical, read_statement, sign_statement

KIND = "spend"
MOST_BYTES, MOST_CHARGES = 2**24, 100_000
DIGEST, NONCE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")
RELEASES = ("gradient", "update", "moments")
_TYPES = {
    "federation": str, "site": str, "run": str, "simulated": bool, "adjacency": str, "config-digest": str,
    "prompts-digest": str, "code-digest": str, "plan": str, "charges": list, "head": str, "closed": bool,
    "weights": str, "signing-key": str,
}  # fmt: skip
_CHARGE = ("server_round", "attempt", "release", "steps", "instruction_digest", "nonce")


@dataclass(frozen=True)
class SpendStatement:
    """Of one site about one run.

    Attributes:
        simulated: of a site that was simulated: its key and its ledger were made by whoever simulated it.
        charges: the fields `_CHARGE` of each, in the order of the ledger.
        head: of the run after the last charge, 64 hex digits.
        closed: the site's ledger takes no further charge of the run, so these are all.
        signing: whose signature was checked.
        weights: SHA-256 of the generator's file that the site received; "" where it has none of this run.
    """

    federation: str
    site: str
    run: str
    simulated: bool
    config_digest: str
    prompts_digest: str
    code_digest: str
    plan: PrivacyPlan
    charges: tuple[tuple[int, int, str, int, str, str], ...]
    head: str
    closed: bool
    signing: VerifyKey
    weights: str = ""

    @classmethod
    def of(cls, ledger: Ledger, run: str, *, site: str, key: SigningKey, weights: str = "") -> Self:
        """Raises `KeyError` where the ledger has no such run."""
        account = ledger.runs[run]
        terms = account.terms
        charges = tuple(
            tuple(entry[name] for name in _CHARGE)
            for entry in ledger.entries if entry["kind"] == "charge" and entry["run"] == run
        )  # fmt: skip
        return cls(
            terms.federation, site, run, ledger.lineage.simulated, terms.config_digest, terms.prompts_digest,
            terms.code_digest, terms.plan, charges, account.head, account.closed is not None, key.public, weights,
        )  # fmt: skip

    def sign(self, key: SigningKey) -> dict[str, Any]:
        assert key.public == self.signing
        fields = {
            "federation": self.federation, "site": self.site, "run": self.run, "simulated": self.simulated,
            "adjacency": ADJACENCY, "config-digest": self.config_digest, "prompts-digest": self.prompts_digest,
            # Statements hold no numbers with a point, of which readers might make others.
            "code-digest": self.code_digest, "plan": canonical(self.plan.to_dict()).decode(),
            "charges": [list(charge) for charge in self.charges], "head": self.head, "closed": self.closed,
            "weights": self.weights, "signing-key": self.signing.text,
        }  # fmt: skip
        return sign_statement(KIND, fields, key)

    @classmethod
    def read(cls, content: bytes | Mapping[str, Any], *, what: str, key: VerifyKey | None = None) -> Self:
        """
        Args:
            key: the site's; `None` for the one that the statement names itself.
        Raises:
            TrustError: the signature is not by that key, the charges do not make the head, or a field cannot be.
        """
        found = read_statement(content, KIND, _TYPES, key, what=what, most_bytes=MOST_BYTES)
        named = VerifyKey.from_text(found["signing-key"])
        if key is not None and named != key:
            raise TrustError(f"{what} names another key than the one that signed it")
        if found["adjacency"] != ADJACENCY:
            raise TrustError(f"{what} has adjacency '{found['adjacency']}', this release computes '{ADJACENCY}'")
        for name in ("config-digest", "prompts-digest", "code-digest", "head"):
            if not DIGEST.fullmatch(found[name]):
                raise TrustError(f"{what}: '{name}' is no SHA-256 in 64 hex digits")
        if found["weights"] and not DIGEST.fullmatch(found["weights"]):
            raise TrustError(f"{what}: 'weights' is no SHA-256 in 64 hex digits")
        charges = _charges(found["charges"], what)
        head = [BEFORE_THE_FIRST, *_heads(charges)][-1]
        if head != found["head"]:
            raise TrustError(
                f"{what}: its charges do not make its head", hint="a charge was left out, added or altered"
            )
        return cls(
            found["federation"], found["site"], found["run"], found["simulated"], found["config-digest"],
            found["prompts-digest"], found["code-digest"], _plan(found["plan"], what), charges, head,
            found["closed"], named, found["weights"],
        )  # fmt: skip

    @property
    def heads(self) -> set[str]:
        """After each charge."""
        return set(_heads(self.charges))

    @property
    def steps(self) -> int:
        """Subsampled steps that were charged."""
        return sum(charge[3] for charge in self.charges if charge[2] not in UNSAMPLED)

    @property
    def unsampled(self) -> int:
        """Releases about all records at once that were charged."""
        return sum(charge[2] in UNSAMPLED for charge in self.charges)

    def epsilon(self) -> EpsilonReport:
        """Of all charges together, at the plan's delta; a second or two where the plan is new to this process.

        Raises:
            TrustError: they are more than the plan reserves, which no ledger of ours allows.
        """
        plan, unsampled = self.plan, self.unsampled
        if self.simulated:
            unsampled = min(unsampled, 1)  # seeded noise repeats the release bit for bit where a run was interrupted
        most = 0 if plan.warm_start_noise_multiplier is None else 1
        if plan.private and (self.steps > plan.reserved_steps or unsampled > most):
            raise TrustError(f"site {self.site} charged more than the plan of run {self.run} reserves")
        return _spent(plan, self.steps, unsampled > 0 and plan.private)


@lru_cache(maxsize=64)
def _spent(plan: PrivacyPlan, steps: int, warm_start: bool) -> EpsilonReport:
    """Sites of one run mostly have the same plan and number of steps."""
    return plan.spent(steps, warm_start=warm_start, exact=True)


def _heads(charges: Sequence[tuple[int, int, str, int, str, str]]) -> list[str]:
    """Of the run, after each charge."""
    found, head = [], BEFORE_THE_FIRST
    for charge in charges:
        head = run_head(head, dict(zip(_CHARGE, charge, strict=True)))
        found.append(head)
    return found


def _charges(listed: list[Any], what: str) -> tuple[tuple[int, int, str, int, str, str], ...]:
    if len(listed) > MOST_CHARGES:
        raise TrustError(f"{what} has more than {MOST_CHARGES} charges")
    found = []
    for place, charge in enumerate(listed, 1):
        wrong = TrustError(f"{what}: charge {place} is none")
        if type(charge) is not list or [type(part) for part in charge] != [int, int, str, int, str, str]:
            raise wrong
        server_round, attempt, release, steps, digest, nonce = charge
        if min(server_round, steps) < 0 or attempt < 1 or release not in RELEASES:
            raise wrong
        if (steps == 0) != (release in UNSAMPLED) or not DIGEST.fullmatch(digest) or not NONCE.fullmatch(nonce):
            raise wrong
        found.append((server_round, attempt, release, steps, digest, nonce))
    return tuple(found)


def _plan(text: str, what: str) -> PrivacyPlan:
    try:
        plan = PrivacyPlan.from_dict(json.loads(text))
        if canonical(plan.to_dict()).decode() != text:
            raise ValueError("it is not in its one form")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise TrustError(f"{what}: its plan cannot be read: {type(error).__name__}") from None
    return plan
