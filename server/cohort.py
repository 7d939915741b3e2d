"""Who is asked in a round, who has answered, and when a round is over. One rule for every engine.

A site that refuses, fails, is silent past the deadline or sends what is no answer costs itself only: the round goes on
while `federation.fewest-sites` can still answer, and stops with the reason when they cannot.

    a round ends   when every site that is there has answered (federation.cohort = "all"), or as soon as enough have
                   ("first"); at federation.deadline-seconds with those that have, if they are enough
    not waited for a site that is not there, once enough have answered; one that still owes an answer to an earlier
                   round is asked nothing before that has come, too late to be summed, or was given up: when the site
                   has been away since, or after another deadline, and twice as long each time
    asked again    the very same instruction (a site answers it with the same bytes, uncharged): a site that was not
                   reachable, one that had not approved the run yet; in later rounds also one that refused otherwise.
                   And one that is silent for much longer than it took before, has been away, or since the engine was
                   lost: Flower hands a message out once, so what breaks while it is handed out is lost

Between institutions nodes come and go, and before anyone has answered there is no deadline: people there have to
approve the run first. In a simulation all nodes are there from the start, and what failed once would fail again.
Not here: what is asked and what becomes of the sum (`server.rounds`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from server.mailbox import Apart, Mailbox, OneByOne
from shared.config import FederationConfig
from shared.errors import FedCanvasError, FederationError, ProtocolError, TrustError
from shared.observer import Observer
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

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 15.0  # Ray takes some ten to start
LOOK_SECONDS = 1.0  # between looks at which nodes are there
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 5.0, 30.0  # before a site is asked the same again; doubles
SILENT_SECONDS, MOST_OF_DEADLINE, MOST_OF_USUAL = 30.0, 0.25, 3.0  # before a silent site is asked the same again
MOST_DOUBLINGS = 10  # of the time after which a late answer is given up
AGAIN_ROUNDS = 10  # before a site that refused for good is asked once more: its people may have mended it
NEVER = 10**9  # as a round
SECONDS_ON_THE_WAY = 86_400.0  # that a message may take

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
    RefusalCode.APPROVAL: "nobody there has approved the run yet (`fedcanvas client runs`)",
    RefusalCode.DENIED: "somebody there has denied the run, or ended it",
    RefusalCode.RELEASE: "its code is mixed from two releases, or is not the one that its policy allows",
    RefusalCode.SITE: "its data or its budget does not allow an answer",
}


class RunStopped(Exception):
    """Somebody stopped the run; it can go on from its last checkpoint."""


class Roster(Protocol):
    """Between institutions: who may take part now, and whose node is whose. Both may change at any time."""

    def sites(self) -> set[str]: ...

    def online(self) -> dict[int, str]:
        """Node id to site."""
        ...

    def outages(self) -> int:
        """How often the engine was lost until now."""
        ...


@dataclass
class _Member:
    """What is known of one node.

    Attributes:
        site: "" until it has said, where no roster says.
        out_until: the round in which it is asked again after it refused.
        late: what it has not answered in time; nothing more is asked until it has.
        missed: questions in a row that it did not answer in time.
        absences: how often its node was there no more.
        took: seconds of its last answer, by the kind of message; longest so far where it was asked repeatedly.
        due: when it may be asked the same once more, on the clock of `time.monotonic`.
        wait: seconds that it was not asked the last time; 0 while it answers.
    """

    node: int
    site: str = ""
    out_until: int = 0
    late: _Question | None = None
    missed: int = 0
    absences: int = 0
    took: dict[str, float] = field(default_factory=dict)
    due: float = 0.0
    wait: float = 0.0

    def again_later(self, now: float) -> None:
        self.wait = min(max(2 * self.wait, AGAIN_SECONDS), MOST_AGAIN_SECONDS)
        self.due = now + self.wait

    @property
    def name(self) -> str:
        return f"site {self.site}" if self.site else f"node {self.node}"


@dataclass
class _Question:
    """What a member was asked and has not answered.

    Attributes:
        names: of the messages that ask it, all the same; any may be answered.
        at, again: when it was asked first, and when it is again, on the clock of `time.monotonic`.
        outages, absences: of the engine, and of its node, when it was asked last.
        repeated: asked again.
        until: when it is given up, once it is late; as `at`.
    """

    member: _Member
    instruction: RoundInstruction
    names: set[str]
    at: float
    again: float
    outages: int
    absences: int
    repeated: bool = False
    until: float = 0.0


@dataclass(frozen=True)
class Asked:
    """How a round went, apart from the replies.

    Attributes:
        refusals: of sites that said who they are.
        bytes_down, bytes_up: of instructions and replies, without what the transport adds.
    """

    refusals: list[Refusal]
    bytes_down: int
    bytes_up: int


class Cohort:
    """The sites of one run."""

    def __init__(
        self, grid: Grid, federation: FederationConfig, observer: Observer, *, roster: Roster | None = None,
        channel: AggregatorChannel | None = None, stopped: Callable[[], bool] = lambda: False,
        tell: Callable[[str, str, int], None] = lambda site, state, server_round: None, begun: bool = False,
    ) -> None:  # fmt: skip
        """
        Args:
            roster: between institutions; without one the grid's nodes are the sites, all of them.
            channel: between institutions: instructions are signed, and only sealed answers count.
            stopped: asked all the time while sites are waited for.
            tell: called with a site, what it does or did, and the round.
            begun: whether somebody has answered a round of this run before.
        """
        self.grid, self.federation, self.observer = grid, federation, observer
        self.roster, self.channel, self.stopped, self.tell = roster, channel, stopped, tell
        self.fewest = federation.fewest_sites or federation.sites
        self.members: dict[int, _Member] = {}
        self.mailbox: Mailbox = OneByOne(grid) if roster is None else Apart(grid)
        self._begun = begun
        self._looked, self._online, self._outages = 0.0, dict[int, str](), 0  # when the roster was asked; what it said

    def wait(self) -> None:
        """Until enough nodes are there, once; without a roster exactly `federation.sites` of them.

        Raises:
            FederationError: they are too many, or too few at the deadline; between institutions there is none before
                the first answer of the run.
            RunStopped: see `stopped`.
        """
        until, told = time.monotonic() + self.federation.deadline_seconds, False
        while True:
            nodes = self._look(now=time.monotonic(), at_once=True)
            if len(nodes) >= self.fewest if self.roster is not None else len(nodes) == self.federation.sites:
                return
            if self.roster is not None:
                self._check_reachable(None)
                if self._begun and time.monotonic() > until:
                    raise FederationError(
                        f"{len(nodes)} sites are there, and a round needs {self.fewest}",
                        hint="see why the others are not, then go on with the run",
                    )
            elif len(nodes) > self.federation.sites or time.monotonic() > until:
                raise FederationError(
                    f"{len(nodes)} sites are there, federation.sites says {self.federation.sites}",
                    hint="start as many sites as the settings say",
                )
            if not told and time.monotonic() > until - self.federation.deadline_seconds + PATIENCE_SECONDS:
                wanted = self.fewest if self.roster is not None else self.federation.sites
                self.observer.on_message(f"waiting for sites: {len(nodes)} of {wanted} are there")
                told = True
            self._pause(LOOK_SECONDS if self.roster is not None else POLL_SECONDS)

    def ask(
        self, instruction: RoundInstruction, add: Callable[[SiteReply], None],
        note: Callable[[SiteReply], None] = lambda reply: None,
    ) -> Asked:  # fmt: skip
        """Asks every site, and hands each answer to `add` as it comes; replies to earlier rounds are not summed.

        Args:
            add: raises `ProtocolError` where the answer is none; that costs only the site.
            note: called with every answer that was opened, also one that comes too late, before anything else.
        Raises:
            FederationError, ProtocolError: why too few sites can answer.
            RunStopped: see `stopped`.
        """
        return _Round(self, instruction, add, note).run()

    # ---- for `_Round`

    def _look(self, *, now: float, at_once: bool = False) -> list[_Member]:
        """Nodes that are there now."""
        if self.roster is None:
            for node in sorted(self.grid.get_node_ids()) if at_once else ():
                self.members.setdefault(node, _Member(node))
            return list(self.members.values())
        if at_once or now - self._looked > LOOK_SECONDS:
            before, self._looked, self._online = self._online, now, self.roster.online()
            outages, self._outages = self._outages, self.roster.outages()
            for node in before.keys() - self._online.keys() if outages == self._outages else ():
                self.members[node].absences += 1  # where the engine was lost nobody knows who was there
            for node, site in self._online.items():
                # A site that was admitted again with other keys has another node: what the old one did is not its.
                self.members.setdefault(node, _Member(node, site))
        return [self.members[node] for node in sorted(self._online)]

    def left(self, gone: Collection[int]) -> int:
        """How many sites could take part, there or not, without these nodes."""
        if self.roster is None:
            return self.federation.sites - len(gone)
        return len(self.roster.sites() - {self.members[node].site for node in gone})

    def _check_reachable(self, failure: FedCanvasError | None, gone: Collection[int] = ()) -> None:
        """Raises `failure`, or another reason, where too few sites are left that could answer.

        Args:
            gone: nodes that cannot answer this round any more.
        """
        left = self.left(gone)
        if left >= self.fewest:
            return
        if failure is not None:
            raise failure
        raise FederationError(
            f"{left} sites can take part, and a round needs {self.fewest}",
            hint="admit sites, or begin a run with another federation.fewest-sites",
        )

    def _pause(self, seconds: float) -> None:
        if self.stopped():
            raise RunStopped
        time.sleep(seconds)

    def read(self, message: Message, member: _Member, instruction: RoundInstruction) -> SiteReply | Refusal:
        """Raises `FederationError` where the engine answers in its place, `ProtocolError` for what is no answer."""
        place = f"round {instruction.server_round}: {member.name}"
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
        except Exception as error:  # Flower's records say what they are only when they are looked at
            raise ProtocolError(f"{place}: it cannot be read ({type(error).__name__})") from None
        if isinstance(reply, Refusal) and not reply.site_id:
            return reply  # a site that could not even read its own settings
        if member.site and member.site != reply.site_id:
            raise ProtocolError(f"{place} answers as site {reply.site_id}")
        others = [other for other in self.members.values() if other is not member and self.roster is None]
        if any(other.site == reply.site_id for other in others):
            raise ProtocolError(f"{place}: two nodes answer as this site", hint="give every site its own site-id")
        member.site = reply.site_id
        return reply


class _Round:
    """One instruction, until enough have answered it."""

    def __init__(
        self, cohort: Cohort, instruction: RoundInstruction, add: Callable[[SiteReply], None],
        note: Callable[[SiteReply], None],
    ) -> None:  # fmt: skip
        self.cohort, self.instruction, self.add, self.note = cohort, instruction, add, note
        self.number = instruction.server_round
        self.content, self.kind = encode_instruction(instruction), MESSAGE_TYPES[instruction.kind]
        if cohort.channel is not None:
            signature = cohort.channel.sign(records_digest(self.content))
            attach_signature(self.content, keys=cohort.channel.statement, signature=signature)
        self.open: dict[int, _Question] = {}  # by node
        self.answered: set[int] = set()
        self.gone: set[int] = set()  # nodes that cannot answer this round any more
        self.refusals: list[Refusal] = []
        self.failure: FedCanvasError | None = None  # the last one
        self.bytes_down = self.bytes_up = 0

    def run(self) -> Asked:
        cohort, deadline = self.cohort, self.cohort.federation.deadline_seconds
        lasts = deadline if cohort._begun or cohort.roster is None else float("inf")
        until = time.monotonic() + lasts
        while not self._is_over():
            now = time.monotonic()
            if until == float("inf") and len(self._answered_sites()) >= cohort.fewest:
                until = now + deadline  # enough are there: the others have as long as in any round
                missing = ", ".join(sorted(cohort.roster.sites() - self._answered_sites())) if cohort.roster else ""
                if missing:
                    cohort.observer.on_message(f"enough sites have answered; {missing} may within {deadline:g} s")
            if now > until:
                self._end_at_deadline()
                break
            self._push(now)
            arrived = self._pull()
            cohort._check_reachable(self.failure, self.gone)
            cohort._pause(0.0 if arrived else POLL_SECONDS)
        cohort._begun = True
        for question in self.open.values():
            question.until = time.monotonic() + deadline * 2 ** min(question.member.missed, MOST_DOUBLINGS)
            question.member.late, question.member.missed = question, question.member.missed + 1
            cohort.tell(question.member.site, "late", self.number)
        return Asked(self.refusals, self.bytes_down, self.bytes_up)

    def _answered_sites(self) -> set[str]:
        return {self.cohort.members[node].site for node in self.answered}

    def _is_over(self) -> bool:
        answered = self._answered_sites()
        if len(answered) < self.cohort.fewest:
            return False
        if self.cohort.federation.cohort == "first":
            return True
        if not self.cohort._begun and self.cohort.roster is not None:
            gone = {self.cohort.members[node].site for node in self.gone}
            return answered | gone >= self.cohort.roster.sites()
        return not self.open

    def _end_at_deadline(self) -> None:
        silent = ", ".join(sorted(question.member.name for question in self.open.values()))
        what = f"round {self.number}: no reply from {silent or 'enough sites'} within"
        what += f" {self.cohort.federation.deadline_seconds:g} s"
        if len(self._answered_sites()) < self.cohort.fewest:
            raise FederationError(what, hint="see the site's own log, then go on with the run")
        self.cohort.observer.on_message(f"{what}; the round goes on with {len(self._answered_sites())} sites")

    def _push(self, now: float) -> None:
        due = [member for member in self.cohort._look(now=now) if self._is_due(member, now)]
        if not due:
            return
        outages = self._outages()  # before: pushing waits for an engine that is lost meanwhile
        # Longer than the deadline: what comes late still comes, and says that the site is not at work on it any more.
        messages = [
            Message(self.content, member.node, self.kind, group_id=str(self.number), ttl=SECONDS_ON_THE_WAY)
            for member in due
        ]
        names = list(self.cohort.grid.push_messages(messages))
        if len(names) != len(due):
            raise FederationError(f"round {self.number}: the engine did not take the instructions")
        # Pushing names the messages; errors that the engine makes itself carry no node id of the site.
        for name, member in zip(names, due, strict=True):
            if not name and (question := self.open.get(member.node)) is not None:
                question.again, question.outages, question.absences = now + AGAIN_SECONDS, outages, member.absences
                continue
            if not name:  # its node went away in between
                lost = f"round {self.number}: {member.name}: the engine did not take the instruction"
                self._failed(member, FederationError(lost))
                continue
            self._note_asked(member, name, now, outages)
            self.bytes_down += size_of(self.instruction)
            self.cohort.tell(member.site, "training", self.number)

    def _outages(self) -> int:
        return self.cohort.roster.outages() if self.cohort.roster is not None else 0

    def _is_due(self, member: _Member, now: float) -> bool:
        question = self.open.get(member.node)
        if question is not None and self.cohort.roster is not None:
            lost = self._outages() > question.outages or member.absences > question.absences
            return lost or now >= question.again
        if question is not None or member.node in self.answered | self.gone or member.due > now:
            return False
        # A site that was admitted anew has another node, and may have answered by the one before.
        has_answered = self.cohort.roster is not None and member.site in self._answered_sites()
        return not has_answered and member.late is None and not self._is_out(member)

    def _note_asked(self, member: _Member, name: str, now: float, outages: int) -> None:
        cohort, question = self.cohort, self.open.get(member.node)
        if question is None:
            usual = MOST_OF_USUAL * member.took.get(self.kind, 0.0)
            usual = usual or MOST_OF_DEADLINE * cohort.federation.deadline_seconds
            again = now + max(SILENT_SECONDS, usual)
            self.open[member.node] = _Question(
                member, self.instruction, {name}, now, again, outages, member.absences
            )
            return
        silent = now - question.at
        cohort.observer.on_message(
            f"round {self.number}: {member.name} is silent for {silent:.0f} s: it is asked the same again"
        )
        question.names.add(name)
        question.repeated = True
        # Twice as long as until now: it may only be slow.
        question.again = max(question.again, now + 2 * silent)
        question.outages, question.absences = outages, member.absences

    def _is_out(self, member: _Member) -> bool:
        if member.out_until <= self.number:
            return False
        self.gone.add(member.node)
        return True

    def _pull(self) -> bool:
        """Whether anything came."""
        late = self._late(time.monotonic())
        waiting = {name: question for question in (*self.open.values(), *late) for name in question.names}
        arrived = self.cohort.mailbox.arrived(waiting)
        for name, came in arrived:
            question = waiting[name]
            if name not in question.names:
                continue  # a second answer
            question.names.discard(name)
            if question.names and isinstance(came, Message) and came.has_error():
                continue  # the same was asked by another message, which may be answered
            question.names.clear()
            if question.member.late is question:
                self._take_late(came, question)
            else:
                self._take(came, self.open.pop(question.member.node))
        return bool(arrived)

    def _late(self, now: float) -> list[_Question]:
        """What sites that are there owe from earlier rounds."""
        found, roster = [], self.cohort.roster
        for member in self.cohort.members.values():
            question = member.late
            if question is None or (roster is not None and member.node not in self.cohort._online):
                continue
            if roster is not None and (member.absences > question.absences or now > question.until):
                member.late = None
                number = question.instruction.server_round
                self.cohort.observer.on_message(f"round {number}: {member.name}: its answer is given up")
                continue
            found.append(question)
        return found

    def _take_late(self, came: Message | ProtocolError, question: _Question) -> None:
        """What it says of the site's ledger is kept; it is not summed."""
        member, instruction = question.member, question.instruction
        member.late = None
        if isinstance(came, ProtocolError) or not came.has_error():
            member.missed = 0  # else it is the engine's word, not the site's
        said = f"{member.name} answered round {instruction.server_round} too late: ignored"
        try:
            answer = self._read(came, member, instruction)
            if isinstance(answer, SiteReply):
                self.note(answer)
        except (FederationError, ProtocolError) as error:
            said = error.message
        self.cohort.observer.on_message(said)

    def _read(
        self, came: Message | ProtocolError, member: _Member, instruction: RoundInstruction
    ) -> SiteReply | Refusal:
        if isinstance(came, ProtocolError):
            raise ProtocolError(f"round {instruction.server_round}: {member.name}: {came.message}")
        return self.cohort.read(came, member, instruction)

    def _take(self, came: Message | ProtocolError, question: _Question) -> None:
        member = question.member
        try:
            answer = self._read(came, member, self.instruction)
            if isinstance(answer, SiteReply):
                self.note(answer)
                self.add(answer)
                self.bytes_up += len(answer.envelope)
                self.answered.add(member.node)
                member.wait, member.missed = 0.0, 0
                seconds = time.monotonic() - question.at
                # Which of several was answered is not known: at most this long ago.
                member.took[self.kind] = max(seconds, member.took.get(self.kind, 0.0)) if question.repeated else seconds
                self.cohort.tell(member.site, "answered", self.number)
                return
        except FederationError as error:
            self._failed(member, error)
            return
        except ProtocolError as error:
            # Every further question would cost the site's budget and might bring the same.
            self._out(member, error, "sent what is no answer")
            return
        named = f"site {answer.site_id}" if answer.site_id else member.name
        reason = f"round {self.number}: {named} refused with code '{answer.code}': {REFUSALS[answer.code]}"
        failure = FederationError(reason, hint="the site's own log says more")
        if answer.code is RefusalCode.APPROVAL and self.cohort.roster is not None:
            self._failed(member, failure, "waits for approval")
            return
        self.refusals.append(answer)
        self._out(member, failure, f"refused: {answer.code}")

    def _failed(self, member: _Member, failure: FedCanvasError, state: str = "failed") -> None:
        """May answer yet, where nodes come and go."""
        if self.cohort.roster is not None:
            self.failure = failure
            self.cohort.tell(member.site, state, self.number)
            member.again_later(time.monotonic())
        else:
            self._out(member, failure, state, until=self.number + 1)

    def _out(self, member: _Member, failure: FedCanvasError, state: str, *, until: int | None = None) -> None:
        """Is asked no more in this round, and not before round `until`."""
        if until is None:
            # Moments that were begun and lost are never given again; the rounds after them may well be answered.
            again = self.number + (AGAIN_ROUNDS if self.number else 1)
            until = again if self.cohort.roster is not None else NEVER
        self.failure, member.out_until = failure, until
        self.gone.add(member.node)
        self.cohort.tell(member.site, state, self.number)
        left = self.cohort.left(self.gone)
        if left >= self.cohort.fewest:
            self.cohort.observer.on_message(f"{failure.message}; the round goes on with {left} sites")


def size_of(instruction: RoundInstruction) -> int:
    """Bytes of what is large in an instruction."""
    fakes = 0 if instruction.fakes is None else instruction.fakes.images.nbytes
    return int(instruction.weights.nbytes) + fakes + sum(len(prompt.encode()) for prompt in instruction.prompts)


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
    if found.kind == "code":
        code = found.content.decode("ascii", "replace")
        if code not in set(RefusalCode):
            raise ProtocolError("the refusal has an unknown code")
        return Refusal(reply.site_id, RefusalCode(code))
    if found.kind != "reply" or not context.run:
        raise ProtocolError("what is sealed answers no instruction")
    return replace(reply, envelope=found.content)
