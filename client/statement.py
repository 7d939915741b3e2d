"""What a site signs about a run that is over: a spend statement, made of its own ledger (`shared.spend`).

A deployed site signs with the key of the federation that it joined, and the statement leaves, sealed, with the answer
to the released model, or as a file that a person here writes (`fedcanvas client statement`). A simulated site makes a
key for it, which proves nothing but that the files fit together.
"""

from __future__ import annotations

from pathlib import Path

from client.membership import SIGNING
from client.settings import SiteConfig
from shared.errors import UsageError
from shared.privacy.ledger import Ledger
from shared.protection.keys import SigningKey
from shared.protection.statements import canonical
from shared.spend import SpendStatement

SIMULATED_KEY = "keys/simulated.pem"


def spend_statement(folder: Path, ledger: Ledger, run: str, *, weights: str = "") -> bytes:
    """One line of JSON.

    Args:
        folder: of the site.
        ledger: locked, so that nothing is charged beside it.
        weights: SHA-256 of the generator's file that it is about, as the site has it.
    Raises:
        UsageError: the ledger has no such run.
        TrustError: the site's key cannot be read.
    """
    if run not in ledger.runs:
        raise UsageError(f"no run {run} in {ledger.path}", hint="`fedcanvas client runs` lists them")
    site = SiteConfig.read(folder).site_id
    if ledger.lineage.simulated:
        if not (folder / SIMULATED_KEY).exists():
            SigningKey.generate().write(folder / SIMULATED_KEY)
        key = SigningKey.read(folder / SIMULATED_KEY)
    else:
        key = SigningKey.read(folder / SIGNING)
    return canonical(SpendStatement.of(ledger, run, site=site, key=key, weights=weights).sign(key)) + b"\n"
