"""Run directories with statements by keys that the test holds, and bundles of them: for tests of what is released.

Charges are written here by hand, with a head that is computed here too: nothing of a ledger is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from released_run import CONFIG, PROMPTS

from server.release import release
from shared.config import RunConfig, Scalar
from shared.models import build_discriminator, build_generator
from shared.privacy.accounting import EpsilonReport
from shared.privacy.plan import make_plan
from shared.protection.federation import Federation, SiteKeys
from shared.protection.keys import SigningKey, VerifyKey, read_node_key, write_node_key
from shared.protection.statements import canonical
from shared.rundir import RunDirectory
from shared.spend import SpendStatement
from shared.text import build_encoder

Charge = tuple[int, int, str, int, str, str]
CODE = "c" * 64
AUTHORITY = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@dataclass(frozen=True)
class SignedRun:
    """A finished run directory and all private keys of whoever signed something about it.

    Attributes:
        releaser: who signs the bundle.
        sites: by name.
        identity: of the federation; `None` where sites are simulated.
    """

    path: Path
    releaser: SigningKey
    sites: dict[str, SigningKey]
    identity: SigningKey | None = None

    @property
    def run(self) -> RunDirectory:
        return RunDirectory.open(self.path)

    def state(self, site: str, charges: Sequence[Charge], **changes: Any) -> str:
        """Writes the site's statement of these charges, signed by its own key; the head after them."""
        run, key = self.run, self.sites[site]
        head = head_after(charges)
        statement = SpendStatement(
            run.config.federation.name, site, run.run_id, self.identity is None, run.config.digest,
            prompts_digest(run.prompts), CODE, make_plan(run.config), tuple(charges), head, True,
            key.public,
        )  # fmt: skip
        content = canonical(replace(statement, **changes).sign(key)) + b"\n"
        (self.path / "statements").mkdir(exist_ok=True)
        (self.path / f"statements/{site}.json").write_bytes(content)
        return head

    def remember(self, heads: dict[str, str]) -> None:
        """As the server keeps them."""
        (self.path / "sites.json").write_text(json.dumps({"heads": heads, "left": {}}))

    def release(self, out: Path) -> Path:
        release(self.path, out, key=self.releaser)
        return out


def charges_of(config: RunConfig, *, rounds: int | None = None) -> list[Charge]:
    """One for each round, and one for the warm start where there is one."""
    local_steps = config.federation.local_steps
    kind = "gradient" if local_steps == 1 else "update"
    made: list[Charge] = [(0, 1, "moments", 0, "a" * 64, "0" * 32)] if config.warm_start.enabled else []
    for server_round in range(1, (rounds or config.federation.rounds) + 1):
        made.append((server_round, 1, kind, local_steps, "a" * 64, f"{server_round:032x}"))
    return made


def head_after(charges: Sequence[Charge]) -> str:
    """As docs/ledger.md says: SHA-256 of a JSON list of the head before and five fields of the charge."""
    head = "0" * 64
    for server_round, attempt, release_kind, _, digest, nonce in charges:
        parts = [head, server_round, attempt, release_kind, digest, nonce]
        head = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return head


def prompts_digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def signed_run(
    path: Path, changes: dict[str, Scalar] | None = None, *, sites: int = 2, rounds: int | None = None,
    prompts: Sequence[str] = PROMPTS, deployed: bool = False,
) -> SignedRun:  # fmt: skip
    """A run directory as training leaves it, its weights those that a model starts with, at two sites by default.

    Args:
        rounds: that were charged; default is all.
        deployed: between institutions: the run lies in the folder of a federation that admitted the sites' keys.
    """
    config = CONFIG.replaced({"federation.sites": sites, **(changes or {})})
    plan, encoder = make_plan(config), build_encoder(config.text)
    keys = {f"site-{place}": SigningKey.generate() for place in range(sites)}
    identity = admit(path.parents[1], config.federation.name, keys) if deployed else None
    spent = EpsilonReport(1.5, 1.4, 1.7, config.privacy.delta, 5, unit="example")
    on_cpu = config.replaced({"compute.device": "cpu"})
    entropy = "system" if deployed else "seeded"
    with RunDirectory.create(path, config=config, prompts=prompts, entropy=entropy) as run, torch.random.fork_rng([]):
        torch.manual_seed(0)
        run.save_model(
            generator=build_generator(on_cpu, embedding_dim=encoder.dim).state_dict(),
            discriminator=build_discriminator(on_cpu, embedding_dim=encoder.dim).state_dict(),
            card={"encoder_fingerprint": encoder.fingerprint, "plan": plan.to_dict(), "spent": spent.to_dict(),
                  "weights_digest": "e" * 64, "entropy": entropy},
        )  # fmt: skip
    made = SignedRun(path, SigningKey.generate(), keys, identity)
    made.remember({site: made.state(site, charges_of(config, rounds=rounds)) for site in keys})
    return made


def admit(folder: Path, name: str, keys: dict[str, SigningKey]) -> SigningKey:
    """The operator's folder of a federation with these sites; its identity."""
    identity = SigningKey.generate()
    federation = Federation(name, "localhost:9092", AUTHORITY, identity.public)
    (folder / "sites").mkdir(parents=True)
    (folder / "federation.json").write_bytes(canonical(federation.statement(identity)))
    for site, key in keys.items():
        (folder / f"sites/{site}.json").write_bytes(canonical(admission(name, site, key.public, identity)))
    return identity


def admission(federation: str, site: str, signing: VerifyKey, identity: SigningKey) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_node_key(Path(folder) / "node.pem")
        node = read_node_key(Path(folder) / "node.pem")
    return SiteKeys(federation, site, signing, node).admission(identity)
