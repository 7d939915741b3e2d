"""Sums the replies of a round in 64-bit integers, one by one as they come: the same for every order of arrival.

Not here: waiting for replies and naming who failed (`server.cohort`), and what the sum is used for.
"""

from __future__ import annotations

import numpy as np

from shared.errors import ProtocolError
from shared.records import MAX_SITES, SiteReply, unpack_envelope


class RoundSum:
    """The sum over sites, all of it public; one payload's memory, however many sites answer.

    Attributes:
        total: `(length,)` int64 in lattice units.
        heads: site id to the head of the run in its ledger; remembered, and shown back with the next instruction.
    """

    def __init__(self, *, run_id: str, server_round: int, length: int) -> None:
        """`length`: entries of a payload, by the public plan."""
        self.run_id, self.server_round = run_id, server_round
        self.total: np.ndarray = np.zeros(length, dtype=np.int64)
        self.heads: dict[str, str] = {}

    @property
    def replies(self) -> int:
        """How many sites it holds."""
        return len(self.heads)

    def add(self, reply: SiteReply) -> None:
        """Raises `ProtocolError`, and the sum is as before: a reply of another run or round, a second one of a site,
        another length, a value beyond the lattice's limit, or more sites than can be summed.
        """
        if reply.run_id != self.run_id or reply.server_round != self.server_round:
            raise ProtocolError(
                f"site {reply.site_id} answers round {reply.server_round} of run {reply.run_id},"
                f" asked was round {self.server_round} of run {self.run_id}"
            )
        if reply.site_id in self.heads:
            raise ProtocolError(f"site {reply.site_id} answers twice in round {self.server_round}")
        if self.replies >= MAX_SITES:
            raise ProtocolError(f"more than {MAX_SITES} replies cannot be summed")
        values, head = unpack_envelope(reply.envelope, length=len(self.total))
        self.total += values  # below 2**62: see LATTICE_LIMIT
        self.heads[reply.site_id] = head
