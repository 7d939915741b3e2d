"""Sums the replies of a round in 64-bit integers: pure, and the same for every order of arrival.

Not here: waiting for replies and naming who failed (`server.rounds`), and what the sum is used for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.errors import ProtocolError
from shared.records import MAX_SITES, SiteReply, unpack_lattice


def combine(replies: Sequence[SiteReply], *, run_id: str, server_round: int, length: int) -> tuple[np.ndarray, int]:
    """The sum over sites and how many they were.

    Args:
        replies: one a site, in any order.
        length: entries of a payload, by the public plan.
    Returns:
        `(length,)` int64 in lattice units, and the number of replies; both are public.
    Raises:
        ProtocolError: a reply of another run or round, a second one of a site, another length, a value
            beyond the lattice's limit, or no reply at all.
    """
    if not 1 <= len(replies) <= MAX_SITES:
        raise ProtocolError(f"{len(replies)} replies cannot be summed, allowed is 1 to {MAX_SITES}")
    seen: set[str] = set()
    total = np.zeros(length, dtype=np.int64)
    for reply in replies:
        if reply.run_id != run_id or reply.server_round != server_round:
            raise ProtocolError(
                f"site {reply.site_id} answers round {reply.server_round} of run {reply.run_id},"
                f" asked was round {server_round} of run {run_id}"
            )
        if reply.site_id in seen:
            raise ProtocolError(f"site {reply.site_id} answers twice in round {server_round}")
        seen.add(reply.site_id)
        total += unpack_lattice(reply.envelope, length=length)  # below 2**62: see LATTICE_LIMIT
    return total, len(replies)
