"""The round loop over Flower's Grid, in order, and the waiting for replies. One loop for every engine.

Every site must answer every round, but for those that refuse: the run goes on without them while
`federation.fewest-sites` answer. Too few answers, a site that fails, or one that is silent past the deadline stop
the run with `FederationError`; what was charged stays charged, and a resume goes on from the last checkpoint.
Not here: what a round learns (`server.training`), and how a run ends on disk (`server.app`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from server.aggregation import combine
from server.training import ServerTraining
from shared.config import RunConfig
from shared.errors import BudgetExhausted, FederationError, ProtocolError, TrustError
from shared.models import flat_parameters, parameter_count
from shared.observer import Observer
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.protection.channel import AggregatorChannel
from shared.protection.sealed import Context
from shared.records import (
    MESSAGE_TYPES,
    NOT_TOLD,
    Refusal,
    RefusalCode,
    RoundInstruction,
    SiteReply,
    attach_signature,
    decode_reply,
    encode_instruction,
    records_digest,
)
from shared.rundir import RunDirectory

WARM_START = 0  # the round of the moment release
REPLY_SECONDS = 3600.0  # a site that is silent for longer has failed
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 15.0  # Ray takes some ten to start

# Flower's own error codes (flwr.common.constant.ErrorCode); the text beside them is not shown: it may quote data.
ENGINE_ERRORS = {
    1: "its client app cannot be loaded",
    2: "its client app raised",
    3: "the message was lost",
    4: "the reply was lost",
    5: "its node is not reachable",
    7: "it does not trust the bundle",
    8: "its client app died",
}
REFUSALS = {
    RefusalCode.MESSAGE: "it could not read the instruction, or not at this point of the run",
    RefusalCode.CONFIG: "the settings are not valid there",
    RefusalCode.PLAN: "its own plan cannot give the privacy that is asked for",
    RefusalCode.POLICY: "its policy does not allow these settings",
    RefusalCode.APPROVAL: "nobody there has approved the run yet (`fedcanvas client runs`), or it was denied",
    RefusalCode.RELEASE: "its code is mixed from two releases, or is not the one that its policy allows",
    RefusalCode.SITE: "its data or its budget does not allow an answer",
}


@dataclass(frozen=True)
class Outcome:
    """Public facts of a run that took all its rounds."""

    rounds: int
    digest: str  # of the final weights
    steps_charged: int  # at every site, repeated attempts included


def run_rounds(
    grid: Grid, *, config: RunConfig, plan: PrivacyPlan, training: ServerTraining, rundir: RunDirectory,
    prompts: PromptPool, observer: Observer, evaluate: Callable[[int], None] | None = None,
    reply_seconds: float = REPLY_SECONDS, channel: AggregatorChannel | None = None,
) -> Outcome:  # fmt: skip
    """All rounds that the run directory does not hold yet, the warm start before them.

    Args:
        training: fresh; the last checkpoint of `rundir` is loaded into it.
        evaluate: called with the round every `evaluation.every` rounds and after the last.
        channel: between institutions: instructions are signed, and only sealed answers count.
    Raises:
        FederationError, ProtocolError: a site refused, failed, or answered what is no answer.
        BudgetExhausted: the slack for repeated rounds is used up.
    """
    rounds, fewest = config.federation.rounds, config.federation.fewest_sites or config.federation.sites
    sites = Sites(grid, config.federation.sites, observer, reply_seconds, fewest=fewest, channel=channel)
    server_round = 0 if config.warm_start.enabled else 1
    if (checkpoint := rundir.load_latest_checkpoint()) is not None:
        training.load_state_dict(checkpoint[1])
        server_round = checkpoint[0] + 1

    while server_round <= rounds:
        started, last = time.monotonic(), server_round == rounds
        torch.set_num_threads(config.compute.server_threads)
        released = rundir.load_release(server_round)  # replayed: it has left the sites already
        if released is None:
            sites.wait()
            # Charged on disk before any instruction leaves: a crash from here on counts as spent.
            attempt = charge(rundir, server_round, config=config, plan=plan)
            instruction = next_instruction(rundir, server_round, attempt, training=training, prompts=prompts)
            length = training.moment_size() if server_round == WARM_START else parameter_count(training.discriminator)
            replies, refusals = sites.ask(instruction)
            combined = combine(replies, run_id=rundir.run_id, server_round=server_round, length=length)
            released = combined.total, combined.replies
            rundir.remember_sites(combined.heads, {r.site_id: r.code.value for r in refusals}, server_round)
            rundir.save_release(server_round, combined.total, replies=combined.replies)
            torch.set_num_threads(config.compute.server_threads)  # sites in this process had their own number
        first = server_round == WARM_START
        if first:
            figures = training.warm_start(*released, on_step=observer.on_warm_start)
        else:
            figures = training.step(*released, server_round)
        rundir.append_event({"server_round": server_round, **figures})
        rundir.append_timing(server_round, time.monotonic() - started)
        observer.on_round(server_round, figures)
        if evaluate is not None and (server_round % config.evaluation.every == 0 or last):
            evaluate(server_round)
        if server_round % config.compute.checkpoint_every == 0 or last:
            rundir.save_checkpoint(server_round, training.state_dict())
        server_round += 1
    return Outcome(rounds, training.digest, rundir.steps_charged())


def charge(rundir: RunDirectory, server_round: int, *, config: RunConfig, plan: PrivacyPlan) -> int:
    """The attempt's number, once it is counted as spent at every site."""
    if server_round > WARM_START:
        return rundir.charge(server_round, steps=config.federation.local_steps, reserved_steps=plan.reserved_steps)
    if rundir.entropy != "seeded" and any(line["server_round"] == WARM_START for line in rundir.charges()):
        # Seeded noise repeats the same bytes; fresh noise would be a second release, which the plan does not cover.
        raise BudgetExhausted(
            "the warm start was released once and its reply did not arrive",
            hint="start a new run: the plan covers one moment release",
        )
    return rundir.charge(server_round, steps=0, reserved_steps=plan.reserved_steps)


def next_instruction(
    rundir: RunDirectory, server_round: int, attempt: int, *, training: ServerTraining, prompts: PromptPool
) -> RoundInstruction:
    local = server_round != WARM_START and rundir.config.federation.local_steps > 1
    return RoundInstruction(
        run_id=rundir.run_id,
        kind="moments" if server_round == WARM_START else "train",
        server_round=server_round,
        attempt=attempt,
        config_json=rundir.config.to_json(),
        config_digest=rundir.config.digest,
        prompts=prompts.texts,
        weights=flat_parameters(training.discriminator),
        fakes=training.fake_bank(server_round) if local else None,
        heads=rundir.heads(),
    )


class Sites:
    """The nodes of a federation, each held to the site id of its first reply; one that refused is not asked again."""

    def __init__(
        self, grid: Grid, count: int, observer: Observer, reply_seconds: float, *, fewest: int,
        channel: AggregatorChannel | None = None,
    ) -> None:  # fmt: skip
        self.channel = channel
        self.grid, self.count, self.observer, self.reply_seconds = grid, count, observer, reply_seconds
        self.fewest = fewest
        self.names: dict[int, str] = {}
        self.node_ids: list[int] = []

    def wait(self) -> None:
        """Until the nodes are there, once; `FederationError` when they are too many, or too few at the deadline."""
        until, told = time.monotonic() + self.reply_seconds, False
        while not self.node_ids:
            nodes = sorted(self.grid.get_node_ids())
            if len(nodes) == self.count:
                self.node_ids = nodes
            elif len(nodes) > self.count or time.monotonic() > until:
                raise FederationError(
                    f"{len(nodes)} sites are there, federation.sites says {self.count}",
                    hint="start the missing sites, or set federation.sites: it is part of the privacy plan",
                )
            elif not told and time.monotonic() > until - self.reply_seconds + PATIENCE_SECONDS:
                self.observer.on_message(f"waiting for sites: {len(nodes)} of {self.count} are there")
                told = True
            else:
                time.sleep(POLL_SECONDS)

    def ask(self, instruction: RoundInstruction) -> tuple[list[SiteReply], list[Refusal]]:
        """One reply or refusal from every site; replies to earlier rounds and second ones are ignored.

        Raises:
            FederationError: too many sites refused, one failed, or the deadline passed.
            ProtocolError: a reply that cannot be read, or one under another site's id.
        """
        content, kind = encode_instruction(instruction), MESSAGE_TYPES[instruction.kind]
        if self.channel is not None:
            signature = self.channel.sign(records_digest(content))
            attach_signature(content, keys=self.channel.statement, signature=signature)
        group = str(instruction.server_round)
        messages = [
            Message(content, node, kind, group_id=group, ttl=self.reply_seconds) for node in self.node_ids
        ]
        if None in (pushed := list(self.grid.push_messages(messages))) or len(pushed) != len(messages):
            raise FederationError(f"round {group}: the engine did not take the instructions")
        # Pushing names the messages; errors that the engine makes itself carry no node id of the site.
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        replies: list[SiteReply] = []
        refusals: list[Refusal] = []
        for message in stream_replies(self.grid, set(nodes), seconds=self.reply_seconds):
            node = nodes.pop(message.metadata.reply_to_message_id)
            answer = self._read(message, node, instruction)
            if isinstance(answer, SiteReply):
                replies.append(answer)
                continue
            named = f"site {answer.site_id}" if answer.site_id else self._name(node)
            reason = f"round {group}: {named} refused with code '{answer.code}': {REFUSALS[answer.code]}"
            self.node_ids.remove(node)
            refusals.append(answer)
            if len(self.node_ids) < self.fewest:
                raise FederationError(reason, hint="the site's own log says more")
            self.observer.on_message(f"{reason}; the run goes on with {len(self.node_ids)} sites")
        if nodes:
            silent = ", ".join(sorted(map(self._name, nodes.values())))
            raise FederationError(
                f"round {group}: no reply from {silent} within {self.reply_seconds:.0f} s",
                hint="see the site's own log, then continue with --resume",
            )
        return replies, refusals

    def _read(self, message: Message, node: int, instruction: RoundInstruction) -> SiteReply | Refusal:
        place = f"round {instruction.server_round}: {self._name(node)}"
        if message.has_error():
            reason = ENGINE_ERRORS.get(message.error.code, "the engine gives no reason")
            raise FederationError(
                f"{place} did not answer: {reason} (code {message.error.code})", hint="the site's own log says more"
            )
        try:
            reply = decode_reply(message.content)
            if self.channel is not None:
                reply = opened(reply, self.channel, instruction)
        except (ProtocolError, TrustError) as error:
            raise ProtocolError(f"{place}: {error.message}", hint=error.hint) from None
        if isinstance(reply, Refusal) and not reply.site_id:
            return reply  # a site that could not even read its own settings
        if self.names.setdefault(node, reply.site_id) != reply.site_id:
            raise ProtocolError(f"{place} answers as site {reply.site_id}")
        if list(self.names.values()).count(reply.site_id) > 1:
            raise ProtocolError(f"{place}: two nodes answer as this site", hint="give every site its own site-id")
        return reply

    def _name(self, node: int) -> str:
        return f"site {self.names[node]}" if node in self.names else f"node {node}"


def opened(
    reply: SiteReply | Refusal, channel: AggregatorChannel, instruction: RoundInstruction
) -> SiteReply | Refusal:
    """What is inside a sealed answer to `instruction`; `TrustError` or `ProtocolError` where it is none.

    A site that could not read the instruction refuses what came, as it came, and can say nothing else there.
    """
    if isinstance(reply, Refusal):
        raise ProtocolError("a refusal came in clear, between institutions it is sealed")
    if (reply.run_id, reply.server_round) == (NOT_TOLD, 0):
        digest = records_digest(encode_instruction(instruction)).hex()
        context = Context(channel.federation, "", reply.site_id, 0, instruction_digest=digest)
    else:
        context = Context(
            channel.federation, instruction.run_id, reply.site_id, instruction.server_round,
            instruction.config_digest, instruction.digest,
        )  # fmt: skip
    found = channel.open(reply.envelope, context=context)
    if found.kind == "refusal":
        code = found.content.decode("ascii", "replace")
        if code not in set(RefusalCode):
            raise ProtocolError("the refusal has an unknown code")
        return Refusal(reply.site_id, RefusalCode(code))
    if not context.run:
        raise ProtocolError("a reply answers no instruction")
    return replace(reply, envelope=found.content)


def stream_replies(grid: Grid, message_ids: set[str], *, seconds: float) -> Iterator[Message]:
    """The first reply to each message as it arrives, until all are there or `seconds` are over."""
    pending, until = set(message_ids), time.monotonic() + seconds
    while pending and time.monotonic() < until:
        arrived = list(grid.pull_messages(pending))
        for message in arrived:
            if message.metadata.reply_to_message_id in pending:
                pending.discard(message.metadata.reply_to_message_id)
                yield message
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
