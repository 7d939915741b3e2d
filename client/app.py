"""Flower's ClientApp: decode, `Site.answer` or `receive`, encode. No learning here, and no exception leaves.

A handler that returned `None` would hang its node for ever, and Flower sends exception text in clear; so
every path ends in a reply, and one that went wrong in a refusal code. Loads nothing of `server`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.delivery import receive
from client.gate import SealedCode, SealedStatement, Slot, build
from client.membership import open_channel, question_of, question_of_offer, question_unread
from client.settings import (
    RELEASE_CODE,
    SETTINGS,
    SLOT_SECONDS,
    SiteConfig,
    SiteRefusal,
    log,
    log_exception,
    note_code,
)
from client.site import Site, open_site
from client.statement import spend_statement
from shared.errors import ConfigError, FederationError, ProtocolError, TrustError, UsageError
from shared.protection.federation import AggregatorKeys
from shared.protection.sealed import UNKNOWN
from shared.records import (
    GENERATOR_FILE,
    MESSAGE_TYPES,
    NOT_TOLD,
    OFFER_TYPE,
    Confirmation,
    ModelOffer,
    Refusal,
    RefusalCode,
    RoundInstruction,
    SiteReply,
    decode_instruction,
    decode_offer,
    detach_signature,
    encode_reply,
    records_digest,
)
from shared.spend import MOST_BYTES
from shared.tree import check_same_tree

check_same_tree(__file__)
RELEASE = RELEASE_CODE


def make_app(site_dirs: Sequence[Path] | None = None) -> ClientApp:
    """The app.

    Args:
        site_dirs: of a simulation, by partition id. Without them the node's own `site-dir` names the one
            site, or, in Flower's simulation, `simulation.sites` the folder that holds them all.
    """
    folders = None if site_dirs is None else tuple(str(path.resolve()) for path in site_dirs)
    # Ray pickles the app: functions by name, these arguments by value. A worker that finds other code under
    # our names, which Flower would run without a word, sees it by `release`.
    handle = partial(answer, site_dirs=folders, release=RELEASE)
    app = ClientApp()
    app.train()(handle)
    app.train("moments")(handle)
    app.evaluate()(handle)  # refused as out of place; unregistered, it would answer with exception text
    app.query()(handle)  # an offered model
    return app


def answer(message: Message, context: Context, *, site_dirs: tuple[str, ...] | None, release: str) -> Message:
    """Always a reply: the site's, its refusal, or that it received a model."""
    asked = _Asked()
    return _leaving(_answer(message, context, asked, site_dirs=site_dirs, release=release), asked, message)


@dataclass
class _Asked:
    """Who was asked for what, as far as it is known."""

    folder: Path | None = None
    deployed: bool = False
    site: Site | None = None
    instruction: RoundInstruction | None = None
    offer: ModelOffer | None = None
    statement: bytes | None = None  # what goes with the confirmation
    slot: Slot = field(default_factory=Slot)


def _answer(
    message: Message, context: Context, asked: _Asked, *, site_dirs: tuple[str, ...] | None, release: str
) -> SiteReply | Refusal | Confirmation:  # fmt: skip
    try:
        asked.folder, simulated = _find_site(context, site_dirs)
        asked.deployed = not simulated
        if release != RELEASE:
            raise FederationError(f"the run was started by other code than {Path(__file__).parents[1]} holds")
        asked.site = open_site(asked.folder, simulated=simulated)
        keys = _check_signature(message.content, asked.site)
        if message.metadata.message_type == OFFER_TYPE:
            return _receive(message.content, asked, asked.site, keys)
        asked.instruction = decode_instruction(message.content)
        if MESSAGE_TYPES[asked.instruction.kind] != message.metadata.message_type:
            raise ProtocolError(f"an instruction of kind '{asked.instruction.kind}' came as another message type")
        return asked.site.answer(asked.instruction, keys=keys)
    except SiteRefusal as refusal:
        if asked.site:
            asked.site.log(f"refused ({refusal.code}): {refusal.reason}")
        return _refuse(refusal.code, asked)
    except (ProtocolError, TrustError) as error:
        return _refuse(RefusalCode.MESSAGE, asked, error)
    except FederationError as error:
        return _refuse(RefusalCode.RELEASE, asked, error)
    except Exception as error:
        return _refuse(RefusalCode.SITE, asked, error)


def _receive(records: RecordDict, asked: _Asked, site: Site, keys: AggregatorKeys | None) -> Confirmation:
    """Keeps an offered model, whose signature was checked."""
    if site.channel is None or keys is None:
        raise ProtocolError("a model is taken of the federation that a site joined, and this one joined none")
    asked.offer = decode_offer(records)
    receive(
        asked.offer, folder=site.folder, account=site.account, federation=site.channel.federation.name,
        signed_with=keys.fingerprint,
    )  # fmt: skip
    with contextlib.suppress(Exception):
        note_code(site.folder, Confirmation.RECEIVED, asked.offer.run_id, 0)
    try:
        with site.account.locked():
            weights = hashlib.sha256(asked.offer.files[GENERATOR_FILE]).hexdigest()
            # The aggregator says that the run is over: it cannot have a statement of a part of it and go on.
            site.account.close(asked.offer.run_id, "its trained model came")
            found = spend_statement(site.folder, site.account.ledger, asked.offer.run_id, weights=weights)
        if len(found) > MOST_BYTES:
            raise UsageError(f"the statement of run {asked.offer.run_id} is too long to be sent: `client statement`")
        asked.statement = found
    except Exception as error:  # the model is here all the same
        log_exception(site.folder, error)
    with_it = "; what the run spent here goes back, signed" if asked.statement else ""
    site.log(f"the model of run {asked.offer.run_id} is kept{with_it}")
    return Confirmation.RECEIVED


def _check_signature(records: RecordDict, site: Site) -> AggregatorKeys | None:
    """`TrustError` unless the aggregator of the site's federation signed it: nothing of it was decoded before this."""
    if site.channel is None:
        return None
    digest = records_digest(records)
    statement, signature = detach_signature(records)
    return site.channel.check(digest, statement=statement, signature=signature)


def refuse_bundle(message: Message, folder: Path, digest: str) -> Message:
    """The answer to whatever came with another bundle than this release's; nothing of the message is decoded."""
    asked = _Asked(folder, deployed=True)
    error = FederationError(f"the message came with the bundle {digest}, which the site's policy does not allow")
    return _leaving(_refuse(RefusalCode.RELEASE, asked, error), asked, message)


def _leaving(reply: SiteReply | Refusal | Confirmation, asked: _Asked, message: Message) -> Message:
    """Sealed where a federation was joined, and at a deployed site at the end of a public slot, whatever is broken."""
    seconds = 0.0
    if asked.folder is not None and asked.deployed:
        config = asked.site.config if asked.site is not None else _read_settings(asked.folder)
        seconds = SLOT_SECONDS if config is None else config.slot_seconds
        if not isinstance(reply, SiteReply):  # a reply is sealed before the ledger notes that it leaves
            site_id = None if config is None else config.site_id
            reply = _sealed(reply, asked, message, folder=asked.folder, site_id=site_id)
    assert not isinstance(reply, Confirmation), "only a deployed site takes models"
    if (used := asked.slot.wait(seconds)) > 1 and asked.folder is not None:
        log(asked.folder, f"incident: the answer missed {used - 1} slot(s) of {seconds:g} s")
    return Message(encode_reply(reply), reply_to=message)


def _sealed(
    reply: Refusal | Confirmation, asked: _Asked, message: Message, *, folder: Path, site_id: str | None
) -> SiteReply | Refusal:  # fmt: skip
    """As a reply is; with what it takes gone or damaged, a refusal's code alone, which does not say whose it is."""
    code = reply.code if isinstance(reply, Refusal) else reply
    try:
        channel = asked.site.channel if asked.site is not None else open_channel(folder, site_id)
        if channel is None:
            assert isinstance(reply, Refusal)
            return reply
        if asked.instruction is not None:
            question = question_of(channel, asked.instruction)
        elif asked.offer is not None:
            question = question_of_offer(channel, asked.offer.run_id, _digest_of(message))
        else:
            question = question_unread(channel, _digest_of(message))
        if isinstance(reply, Confirmation) and asked.statement is not None:
            content = channel.seal("statement", asked.statement, context=question)
            return build(SealedStatement(question.run, content, len(asked.statement)), site_id=channel.site)
        content = channel.seal("code", code.encode(), context=question)
        return build(SealedCode(question.run or NOT_TOLD, question.server_round, content), site_id=channel.site)
    except Exception as error:
        code = code if isinstance(code, RefusalCode) else RefusalCode.SITE
        with contextlib.suppress(Exception):
            log(folder, f"incident: the refusal '{code}' leaves in clear, since it cannot be sealed")
            log_exception(folder, error)
        return build(code, site_id="")


def _digest_of(message: Message) -> str:
    try:
        return records_digest(message.content).hex()
    except Exception:
        return UNKNOWN  # it has none, so no aggregator sent it


def _read_settings(folder: Path) -> SiteConfig | None:
    try:
        return SiteConfig.read(folder)
    except Exception:  # a refusal leaves all the same
        return None


def _refuse(code: RefusalCode, asked: _Asked, error: Exception | None = None) -> Refusal:
    if asked.folder is not None:
        known, offer = asked.instruction, asked.offer
        run, server_round = (known.run_id, known.server_round) if known else (offer.run_id, 0) if offer else ("", -1)
        with contextlib.suppress(Exception):  # what is noted must not decide whether a site answers
            if error is not None:
                log_exception(asked.folder, error)
            note_code(asked.folder, code, run, server_round)
    refusal = build(code, site_id=asked.site.site_id if asked.site else "")
    assert isinstance(refusal, Refusal)
    return refusal


def _find_site(context: Context, site_dirs: tuple[str, ...] | None) -> tuple[Path, bool]:
    """(folder, simulated). The node's own setting wins: no message can point a deployed site elsewhere."""
    own = context.node_config.get("site-dir")
    if own is not None:
        return Path(str(own)), False
    place = int(context.node_config["partition-id"])
    if site_dirs is None:
        sites = Path(str(context.run_config.get("simulation.sites") or ""))
        site_dirs = tuple(str(path.parent) for path in sorted(sites.glob(f"*/{SETTINGS}")))
    if place >= len(site_dirs):
        raise ConfigError(f"there is no site for partition {place}")
    return Path(site_dirs[place]), True


app = make_app()
