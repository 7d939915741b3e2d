"""The round loop, in order, over a cohort of sites. One loop for every engine.

What was charged stays charged, and a resume goes on from the last checkpoint.
Not here: who is asked and waited for (`server.cohort`), what a round learns (`server.training`), and how a run ends on
disk (`server.app`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from server.aggregation import RoundSum, largest_value
from server.cohort import Cohort
from server.training import ServerTraining
from shared.config import RunConfig
from shared.errors import BudgetExhausted
from shared.models import flat_parameters, parameter_count
from shared.observer import Observer
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.records import HEAD_BYTES, RoundInstruction, SiteReply, unpack_envelope
from shared.rundir import RunDirectory

WARM_START = 0  # the round of the moment release


@dataclass(frozen=True)
class Outcome:
    """Public facts of a run that took all its rounds."""

    rounds: int
    digest: str  # of the final weights
    steps_charged: int  # at every site, repeated attempts included


def run_rounds(
    cohort: Cohort, *, config: RunConfig, plan: PrivacyPlan, training: ServerTraining, rundir: RunDirectory,
    prompts: PromptPool, observer: Observer, evaluate: Callable[[int], None] | None = None,
) -> Outcome:  # fmt: skip
    """All rounds that the run directory does not hold yet, the warm start before them.

    Args:
        training: fresh; the last checkpoint of `rundir` is loaded into it.
        evaluate: called with the round every `evaluation.every` rounds and after the last.
    Raises:
        FederationError, ProtocolError: too few sites can answer; the last reason is told.
        BudgetExhausted: the slack for repeated rounds is used up.
        RunStopped: somebody stopped it.
    """
    rounds = config.federation.rounds
    server_round = 0 if config.warm_start.enabled else 1
    if (checkpoint := rundir.load_latest_checkpoint()) is not None:
        training.load_state_dict(checkpoint[1])
        server_round = checkpoint[0] + 1

    while server_round <= rounds:
        started, last = time.monotonic(), server_round == rounds
        torch.set_num_threads(config.compute.server_threads)
        released = rundir.load_release(server_round)  # replayed: it has left the sites already
        traffic = (0, 0)
        if released is None:
            cohort.wait()
            instruction = next_instruction(rundir, server_round, training=training, prompts=prompts)
            # Charged on disk before any instruction leaves: a crash from here on counts as spent.
            instruction = replace(instruction, attempt=charge(rundir, instruction, config=config, plan=plan))
            length = training.moment_size() if server_round == WARM_START else parameter_count(training.discriminator)
            most = largest_value(config, plan, instruction.kind, length=length)
            summed = RoundSum(run_id=rundir.run_id, server_round=server_round, length=length, most=most)
            # A ledger that is set back right after it answered is noticed by the head of that very answer.
            asked = cohort.ask(instruction, summed.add, lambda reply: remember_head(rundir, reply))
            released = summed.total, summed.replies
            if asked.refusals:
                rundir.remember_sites({}, {r.site_id: r.code.value for r in asked.refusals}, server_round)
            rundir.save_release(server_round, summed.total, replies=summed.replies)
            traffic = asked.bytes_down, asked.bytes_up
            torch.set_num_threads(config.compute.server_threads)  # sites in this process had their own number
        first = server_round == WARM_START
        if first:
            figures = training.warm_start(*released, on_step=observer.on_warm_start)
        else:
            figures = training.step(*released, server_round)
        rundir.append_event({"server_round": server_round, **figures})
        rundir.append_timing(server_round, time.monotonic() - started, traffic=traffic)
        observer.on_round(server_round, figures)
        if evaluate is not None and (server_round % config.evaluation.every == 0 or last):
            evaluate(server_round)
        if server_round % config.compute.checkpoint_every == 0 or last:
            rundir.save_checkpoint(server_round, training.state_dict())
        server_round += 1
    return Outcome(rounds, training.digest, rundir.steps_charged())


def remember_head(rundir: RunDirectory, reply: SiteReply) -> None:
    """Raises `ProtocolError` where the envelope is none."""
    length = max(0, len(reply.envelope) - HEAD_BYTES) // 8
    _, head = unpack_envelope(reply.envelope, length=length)
    rundir.remember_sites({reply.site_id: head}, {}, reply.server_round)


def charge(rundir: RunDirectory, instruction: RoundInstruction, *, config: RunConfig, plan: PrivacyPlan) -> int:
    """The attempt's number, once it is counted as spent at every site.

    Sites between institutions answer the very same question with the same bytes, uncharged: asking it again, when the
    server was killed while it waited, is no further attempt.
    """
    server_round, warm = instruction.server_round, instruction.server_round == WARM_START
    last = next((line for line in reversed(rundir.charges()) if line["server_round"] == server_round), None)
    if last is not None and rundir.entropy == "system":
        if last.get("instruction") == instruction.digest:
            return int(last["attempt"])
        if warm:
            # Fresh noise would be a second release, which the plan does not cover.
            raise BudgetExhausted(
                "the warm start was asked for once in other words, and its reply did not arrive",
                hint="start a new run: the plan covers one moment release",
            )
    steps = 0 if warm else config.federation.local_steps
    return rundir.charge(
        server_round, steps=steps, reserved_steps=plan.reserved_steps, instruction=instruction.digest
    )


def next_instruction(
    rundir: RunDirectory, server_round: int, *, training: ServerTraining, prompts: PromptPool
) -> RoundInstruction:
    """Of the first attempt."""
    local = server_round != WARM_START and rundir.config.federation.local_steps > 1
    return RoundInstruction(
        run_id=rundir.run_id,
        kind="moments" if server_round == WARM_START else "train",
        server_round=server_round,
        attempt=1,
        config_json=rundir.config.to_json(),
        config_digest=rundir.config.digest,
        prompts=prompts.texts,
        weights=flat_parameters(training.discriminator),
        fakes=training.fake_bank(server_round) if local else None,
        heads=rundir.heads(),
    )
