"""Sums the replies of a round in 64-bit integers, one by one as they come: the same for every order of arrival.

Not here: waiting for replies and naming who failed (`server.cohort`), and what the sum is used for.
"""

from __future__ import annotations

import math

import numpy as np

from shared.config import RunConfig
from shared.errors import ProtocolError
from shared.privacy.plan import PrivacyPlan
from shared.records import MAX_SITES, Kind, SiteReply, unpack_envelope

NOISE_TAIL = 12.0  # standard deviations
DRAW_TAIL = 50.0  # a larger draw has a probability of at most e**-50 = 2e-22


def largest_value(config: RunConfig, plan: PrivacyPlan, kind: Kind, *, length: int) -> float | None:
    """How far from zero an entry of an honest gradient may be, in lattice units; `None`: nothing so clear is known.

    By public figures. Before noise a gradient is a sum over the records that were drawn, each clipped, so an entry is
    at most draws x C; with the slack of its arithmetic that is draws x the sensitivity, which also holds the rounding.
    Draws: Bernstein's inequality, for a site that holds all records that the sites publish together; t beyond the
    expectation B has a probability of at most exp(-t^2 / (2 B + 2 t / 3)), and t below makes that e**-DRAW_TAIL.
    Noise: |N(0, 1)| > 12 has probability 3.6e-33, 2.4e-25 for any of `MAX_PARAMETERS` entries. So an honest payload is
    refused with a probability below 1e-20; not counted is a site that holds more than all sites publish.

    `None` for moments, whose sum has no draw and knows no public number of records; and for updates of several steps,
    which an optimiser scales as the settings say: neither is a sum of clipped records.

    Args:
        length: entries of a payload.
    """
    if kind != "train" or config.federation.local_steps > 1:
        return None
    expected = plan.expected_batch_size
    draws = expected + DRAW_TAIL / 3 + math.sqrt((DRAW_TAIL / 3) ** 2 + 2 * DRAW_TAIL * expected)
    sensitivity = plan.sensitivity(length)  # noise is drawn at this scale
    most = math.ceil(draws) + NOISE_TAIL * plan.noise_multiplier
    return most * sensitivity / plan.lattice + 1  # the noise is rounded too


class RoundSum:
    """The sum over sites, all of it public; one payload's memory, however many sites answer.

    Attributes:
        total: `(length,)` int64 in lattice units.
        heads: site id to the head of the run in its ledger; remembered, and shown back with the next instruction.
    """

    def __init__(self, *, run_id: str, server_round: int, length: int, most: float | None = None) -> None:
        """
        Args:
            length: entries of a payload, by the public plan.
            most: how far from zero an entry may be, in lattice units (`largest_value`); default the lattice's limit.
        """
        self.run_id, self.server_round, self.most = run_id, server_round, most
        self.total: np.ndarray = np.zeros(length, dtype=np.int64)
        self.heads: dict[str, str] = {}

    @property
    def replies(self) -> int:
        """How many sites it holds."""
        return len(self.heads)

    def add(self, reply: SiteReply) -> None:
        """Raises `ProtocolError`, and the sum is as before: a reply of another run or round, a second one of a site,
        another length, a value beyond the limit, or more sites than can be summed.
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
        if self.most is not None and len(values) and (found := max(-int(values.min()), int(values.max()))) > self.most:
            raise ProtocolError(
                f"site {reply.site_id} sends a value of {found:.1e} lattice units in round {self.server_round}, an"
                f" honest one is at most {self.most:.1e}"
            )
        self.total += values  # below 2**62: see LATTICE_LIMIT
        self.heads[reply.site_id] = head
