"""The one function that builds what leaves a site. It fails closed: what is not on the list does not pass.

The list has six entries: a vector of lattice integers whose length is fixed by public settings alone, with the
run's head in the site's ledger behind it; the two lattice integers that answer a charged question, with the same; a
refusal, a code of a fixed list and never a text; the first of these sealed, whose length follows; a code sealed: a
refusal's, or the one that says that an offered model was received, all of one length; and, with that model's receipt,
what the site signed about its own spending in that run, which is of its ledger and of no record, sealed.
`Slot` keeps when it leaves apart from how long the work took. Not here: clipping, noise and the charge; the
vector that comes in has them behind it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from shared.errors import ProtocolError
from shared.protection.channel import CODE_BYTES
from shared.protection.sealed import MAGIC, OVERHEAD
from shared.records import (
    DIGEST,
    HEAD_BYTES,
    LATTICE_LIMIT,
    MESSAGE_TYPES,
    NAME,
    Refusal,
    RefusalCode,
    RoundInstruction,
    SiteReply,
    pack_envelope,
)
from shared.spend import MOST_BYTES

QUERY_LENGTH = 2  # numbers of one answer: the right ones and the wrong ones


@dataclass(frozen=True, eq=False)
class Release:
    """What a site would answer to `instruction`.

    Attributes:
        payload: `(length,)` int64, already noised, in units of the plan's lattice.
        head: of the run in the site's ledger, 64 hex digits.
        length: by the public plan; never taken from the payload.
    """

    instruction: RoundInstruction
    payload: np.ndarray
    head: str
    length: int


@dataclass(frozen=True, eq=False)
class SealedRelease:
    """What a site that joined a federation would answer: a `Release` that passed, sealed to the aggregator.

    Attributes:
        length: entries of the payload inside, by the public plan.
    """

    instruction: RoundInstruction
    sealed: bytes
    length: int


@dataclass(frozen=True, eq=False)
class SealedCode:
    """A code, sealed: a refusal's, or that a model was received; every code makes the same number of bytes.

    Attributes:
        run_id: `NOT_TOLD` where the site could not read which run it was asked about; the round is 0 then, and where
            a model was offered.
    """

    run_id: str
    server_round: int
    sealed: bytes


@dataclass(frozen=True, eq=False)
class SealedStatement:
    """What the site signed about its own spending in a run, sealed; nothing in it depends on records.

    Attributes:
        length: bytes of the statement.
    """

    run_id: str
    sealed: bytes
    length: int


@dataclass(frozen=True, eq=False)
class QueryRelease:
    """What a site would answer to a question that a person there asked (`client.query`).

    Attributes:
        payload: `(2,)` int64, already noised, in units of the plan's lattice.
        head: of the run in the site's ledger, 64 hex digits.
    """

    run_id: str
    payload: np.ndarray
    head: str


def build(
    content: Release | QueryRelease | RefusalCode | SealedRelease | SealedCode | SealedStatement, *, site_id: str
) -> SiteReply | Refusal:
    """What leaves the site `site_id`.

    Raises:
        ProtocolError: the content is of another kind, type, shape or size. The text has no value of it.
    """
    if site_id and not NAME.fullmatch(site_id):
        raise ProtocolError("a site id is not 1 to 64 letters, digits, dots, dashes or underscores")
    if isinstance(content, RefusalCode):
        return Refusal(site_id, content)
    if type(content) not in (Release, QueryRelease, SealedRelease, SealedCode, SealedStatement) or not site_id:
        raise ProtocolError("neither a release nor a refusal code")
    if isinstance(content, SealedRelease | SealedCode | SealedStatement):
        return _sealed(content, site_id)
    payload = content.payload
    if isinstance(content, QueryRelease):
        run_id, server_round, length = content.run_id, 0, QUERY_LENGTH
        if not NAME.fullmatch(run_id):
            raise ProtocolError("a run id is not 1 to 64 letters, digits, dots, dashes or underscores")
    else:
        instruction, length = content.instruction, content.length
        run_id, server_round = instruction.run_id, instruction.server_round
        if instruction.kind not in MESSAGE_TYPES:
            raise ProtocolError(f"nothing of kind '{instruction.kind}' may leave a site")
    if type(payload) is not np.ndarray or payload.dtype != np.int64:
        raise ProtocolError("a payload is not an array of 64-bit integers")
    if payload.shape != (length,):
        raise ProtocolError(f"a payload has not the {length} entries of the public plan")
    # Integers are finite by themselves; the limit keeps the sum over all sites from wrapping around.
    if length and (payload.min() < -LATTICE_LIMIT or payload.max() > LATTICE_LIMIT):
        raise ProtocolError("a payload holds a value beyond the lattice's limit")
    if not DIGEST.fullmatch(content.head):
        raise ProtocolError("the head of the run is not 64 hex digits")
    return SiteReply(
        run_id=run_id,
        server_round=server_round,
        site_id=site_id,
        envelope=pack_envelope(payload, content.head),
    )


def _sealed(content: SealedRelease | SealedCode | SealedStatement, site_id: str) -> SiteReply:
    if isinstance(content, SealedCode | SealedStatement):
        if isinstance(content, SealedCode):
            run_id, server_round, size = content.run_id, content.server_round, CODE_BYTES
        else:
            run_id, server_round, size = content.run_id, 0, content.length
            if not 0 < size <= MOST_BYTES:
                raise ProtocolError("a spend statement is longer than any")
        if not NAME.fullmatch(run_id):
            raise ProtocolError("a run id is not 1 to 64 letters, digits, dots, dashes or underscores")
    else:
        instruction, size = content.instruction, 8 * content.length + HEAD_BYTES
        run_id, server_round = instruction.run_id, instruction.server_round
        if instruction.kind not in MESSAGE_TYPES:
            raise ProtocolError(f"nothing of kind '{instruction.kind}' may leave a site")
    if type(content.sealed) is not bytes or content.sealed[: len(MAGIC)] != MAGIC:
        raise ProtocolError("what should be sealed is not")
    if len(content.sealed) != 1 + size + OVERHEAD:
        raise ProtocolError(f"what is sealed has not the {1 + size + OVERHEAD} bytes that the public plan says")
    return SiteReply(run_id, server_round, site_id, content.sealed)


class Slot:
    """When an answer leaves: a whole number of public slots after the instruction came (PRIVACY rule 15)."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def wait(self, seconds: float) -> int:
        """Waits for the end of the slot and returns its number; more than 1 means that slots were missed."""
        if seconds <= 0:
            return 1
        used = int((time.monotonic() - self._began) // seconds) + 1
        time.sleep(max(0.0, self._began + used * seconds - time.monotonic()))
        return used
