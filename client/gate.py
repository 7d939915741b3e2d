"""The one function that builds what leaves a site. It fails closed: what is not on the list does not pass.

The list has one entry: a vector of lattice integers whose length is fixed by public settings alone.
Not here: clipping, noise and the charge; the vector that comes in has them behind it.
"""

from __future__ import annotations

import numpy as np

from shared.errors import ProtocolError
from shared.records import LATTICE_LIMIT, MESSAGE_TYPES, RoundInstruction, SiteReply, pack_lattice


def build_reply(payload: np.ndarray, *, instruction: RoundInstruction, site_id: str, length: int) -> SiteReply:
    """The reply to `instruction`.

    Args:
        payload: `(length,)` int64, already noised, in units of the plan's lattice.
        length: by the public plan; never taken from the payload.
    Raises:
        ProtocolError: the payload is of another kind, type, shape or size. The text has no value of it.
    """
    if instruction.kind not in MESSAGE_TYPES:
        raise ProtocolError(f"nothing of kind '{instruction.kind}' may leave a site")
    if type(payload) is not np.ndarray or payload.dtype != np.int64:
        raise ProtocolError("a payload is not an array of 64-bit integers")
    if payload.shape != (length,):
        raise ProtocolError(f"a payload has not the {length} entries of the public plan")
    # Integers are finite by themselves; the limit keeps the sum over all sites from wrapping around.
    if length and (payload.min() < -LATTICE_LIMIT or payload.max() > LATTICE_LIMIT):
        raise ProtocolError("a payload holds a value beyond the lattice's limit")
    return SiteReply(
        run_id=instruction.run_id,
        server_round=instruction.server_round,
        site_id=site_id,
        envelope=pack_lattice(payload),
    )
