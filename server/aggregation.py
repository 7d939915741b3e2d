"""Sums the replies of a round in 64-bit integers: pure, and the same for every order of arrival.

Not here: waiting for replies and naming who failed (`server.rounds`), and what the sum is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import ProtocolError
from shared.records import MAX_SITES, SiteReply, unpack_envelope


@dataclass(frozen=True, eq=False)
class Combined:
    """The sum over sites, all of it public.

    Attributes:
        total: `(length,)` int64 in lattice units.
        replies: how many sites it holds.
        heads: site id to the head of the run in its ledger; remembered, and shown back with the next instruction.
    """

    total: np.ndarray
    replies: int
    heads: dict[str, str]


def combine(replies: Sequence[SiteReply], *, run_id: str, server_round: int, length: int) -> Combined:
    """The sum over sites, how many they were, and what their ledgers say of the run.

    Args:
        replies: one a site, in any order.
        length: entries of a payload, by the public plan.
    Raises:
        ProtocolError: a reply of another run or round, a second one of a site, another length, a value
            beyond the lattice's limit, or no reply at all.
    """
    if not 1 <= len(replies) <= MAX_SITES:
        raise ProtocolError(f"{len(replies)} replies cannot be summed, allowed is 1 to {MAX_SITES}")
    heads: dict[str, str] = {}
    total = np.zeros(length, dtype=np.int64)
    for reply in replies:
        if reply.run_id != run_id or reply.server_round != server_round:
            raise ProtocolError(
                f"site {reply.site_id} answers round {reply.server_round} of run {reply.run_id},"
                f" asked was round {server_round} of run {run_id}"
            )
        if reply.site_id in heads:
            raise ProtocolError(f"site {reply.site_id} answers twice in round {server_round}")
        values, heads[reply.site_id] = unpack_envelope(reply.envelope, length=length)
        total += values  # below 2**62: see LATTICE_LIMIT
    return Combined(total, len(replies), heads)
