"""What a site holds of the federation that it joined, and its end of the sealed way to the aggregator.

    request.json           what the site asked to be admitted as (signed by itself)
    federation.json        who the federation is (signed by it); its fingerprint was compared by a person
    aggregator-keys.json   the newest keys of the aggregator (signed by the federation); renewed by instructions
    keys/signing.pem       the site's own signing key, made here; it never leaves
    keys/node              the key that Flower knows the site's node by, OpenSSH form, made here; it never leaves

A site without `federation.json` belongs to none: it answers in this process only, such as in a test.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import TrustError
from shared.protection.channel import NEWEST, SiteChannel
from shared.protection.federation import Federation, SiteKeys
from shared.protection.keys import SigningKey
from shared.protection.sealed import Context
from shared.records import RoundInstruction

FEDERATION, REQUEST, SIGNING, NODE = "federation.json", "request.json", "keys/signing.pem", "keys/node"


def open_channel(folder: Path, site_id: str | None) -> SiteChannel | None:
    """`None` where no federation was joined; `TrustError` where something of it is missing or damaged.

    Args:
        site_id: `None` where the site's settings cannot be read: its request names it too.
    """
    federation = read_federation(folder)
    if federation is None:
        left = [name for name in (SIGNING, NODE, NEWEST) if (folder / name).exists()]
        if left:  # whoever removes one file must not make a site answer in clear
            raise TrustError(
                f"{folder / FEDERATION} is missing, and {', '.join(left)} of a federation is there",
                hint="join again with the federation's kit: the keys are kept",
            )
        return None
    signing = SigningKey.read(folder / SIGNING)
    return SiteChannel(folder, federation, site=site_id or _asked_as(folder, signing), signing=signing)


def _asked_as(folder: Path, signing: SigningKey) -> str:
    path = folder / REQUEST
    try:
        asked = SiteKeys.read_request(path.read_bytes(), what=str(path))
    except OSError as error:
        raise TrustError(f"{path} cannot be read: {error.strerror or error}") from None
    if asked.signing != signing.public:
        raise TrustError(f"{path} is not by the key {folder / SIGNING}")
    return asked.site


def read_federation(folder: Path) -> Federation | None:
    path = folder / FEDERATION
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"{path} cannot be read: {error.strerror or error}") from None
    return Federation.read(content, what=str(path))


def question_of(channel: SiteChannel, instruction: RoundInstruction) -> Context:
    """What an answer is bound to."""
    return Context(
        channel.federation.name, instruction.run_id, channel.site, instruction.server_round,
        instruction.config_digest, instruction.digest,
    )  # fmt: skip


def question_of_offer(channel: SiteChannel, run_id: str, digest: str) -> Context:
    """What the answer to an offered model is bound to: the records that came; an instruction's has a config digest."""
    return Context(channel.federation.name, run_id, channel.site, 0, instruction_digest=digest)


def question_unread(channel: SiteChannel, digest: str) -> Context:
    """What a refusal is bound to where the site could not tell what it was asked: the digest of what came."""
    return Context(channel.federation.name, "", channel.site, 0, instruction_digest=digest)
