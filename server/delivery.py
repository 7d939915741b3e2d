"""The released model of a finished run, brought to every site that took part, until each has confirmed it.

Signed as an instruction is, and sent over the same relay, under a Flower run that lasts as long as the offer does. A
site that is not there gets it when it comes; one that refused, failed or was silent is offered it again, later each
time. Which sites have it stands in the run directory (`delivered.json`): a restart forgets nothing but the waiting.

What a site answers is sealed: a refusal's code, or that it has the model and, signed, what the run spent there, which
goes into the run directory (`statements/`). The model itself can be read by who carries it, as instructions can.
Not here: what a site checks before it keeps a model (`client.delivery`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server.cohort import ENGINE_ERRORS, Roster
from server.mailbox import Apart
from server.run_queue import QueuedRun, RunQueue
from shared.errors import FedCanvasError, FederationError, ProtocolError, TrustError
from shared.protection.channel import AggregatorChannel
from shared.protection.sealed import Context
from shared.records import (
    MODEL_FILES,
    NOT_TOLD,
    OFFER_TYPE,
    Confirmation,
    ModelOffer,
    Refusal,
    RefusalCode,
    attach_signature,
    decode_reply,
    encode_offer,
    records_digest,
)
from shared.rundir import STATEMENTS, RunDirectory
from shared.spend import SpendStatement

OFFER_SECONDS, BUSY_SECONDS = 600.0, 60.0  # for an answer; the second while a run waits for its turn
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 60.0, 3600.0  # before a site is offered the same again; doubles
POLL_SECONDS = 0.2
GROUP = "model"  # in the place of a round, for Flower


@dataclass
class _Waits:
    """Of one site for one model: when it may be offered again, on the clock of `time.monotonic`."""

    due: float = 0.0
    wait: float = 0.0

    def again_later(self) -> None:
        self.wait = min(max(2 * self.wait, AGAIN_SECONDS), MOST_AGAIN_SECONDS)
        self.due = time.monotonic() + self.wait


class Delivery:
    """Of all finished runs in the queue."""

    def __init__(
        self, queue: RunQueue, roster: Roster, *, channel: Callable[[], AggregatorChannel],
        grid: Callable[[], AbstractContextManager[Grid]], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            channel: of the keys in force, asked for each offer.
            grid: of a new Flower run, which ends with the block.
            say: lines for the log.
        """
        self._queue, self._roster, self._channel, self._grid, self._say = queue, roster, channel, grid, say
        self._left: dict[str, set[str]] = {}  # run to the sites that have not confirmed; read once from its directory
        self._waits: dict[tuple[str, str], _Waits] = {}

    def deliver(self, *, stopped: Callable[[], bool]) -> bool:
        """Offers the model of one run to those of its sites that are there and due; whether there were any.

        Args:
            stopped: asked all the time while answers are waited for.
        Raises:
            FedCanvasError: the model cannot be read, the keys are not in force, or the engine took no message.
        """
        if (found := self._next()) is None:
            return False
        run, nodes = found
        try:
            self._offer(run, nodes, stopped)
        finally:  # however it went: nothing is tried again without a pause
            for site in nodes.values():
                self._waits[run.name, site].again_later()
        return True

    def _offer(self, run: QueuedRun, nodes: dict[int, str], stopped: Callable[[], bool]) -> None:
        offer = SignedOffer.of(run, self._channel())
        with self._grid() as grid:
            messages = [Message(offer.content, node, OFFER_TYPE, group_id=GROUP, ttl=OFFER_SECONDS) for node in nodes]
            names, since = list(grid.push_messages(messages)), time.monotonic()
            if None in names or len(names) != len(messages):
                raise FederationError(f"the engine did not take the model of run {run.name}")
            pending, mailbox = dict(zip(names, nodes.values(), strict=True)), Apart(grid)
            while pending and not stopped() and time.monotonic() - since < self._patience():
                for name, came in mailbox.arrived(pending):
                    self._take(run, pending.pop(name), offer, came)
                time.sleep(POLL_SECONDS)
        for site in pending.values():
            self._say(f"{run.name}: site {site} has not answered to the model")

    def _next(self) -> tuple[QueuedRun, dict[int, str]] | None:
        """The first finished run with sites that are there and due; node to site."""
        now, online = time.monotonic(), self._roster.online()
        for run in self._queue.finished():
            left = self._left_of(run)
            nodes = {
                node: site for node, site in online.items()
                if site in left and self._waits.setdefault((run.name, site), _Waits()).due <= now
            }  # fmt: skip
            if nodes:
                return run, nodes
        return None

    def _left_of(self, run: QueuedRun) -> set[str]:
        if run.name not in self._left:
            self._left[run.name] = set()  # also where its directory cannot be read: said once
            try:
                opened = RunDirectory.open(run.path)
                has = {site for site, said in opened.deliveries().items() if said["code"] == Confirmation.RECEIVED}
                self._left[run.name] = set(opened.heads()) - has
            except FedCanvasError as error:
                self._say(f"{run.name}: its model is not delivered: {error.message}")
        return self._left[run.name]

    def _patience(self) -> float:
        return OFFER_SECONDS if self._queue.next() is None else BUSY_SECONDS

    def _take(self, run: QueuedRun, site: str, offer: SignedOffer, came: Message | ProtocolError) -> None:
        try:
            if isinstance(came, ProtocolError):
                raise came
            code, statement = offer.read(came, site)
        except FedCanvasError as error:
            self._say(f"{run.name}: site {site} did not confirm the model: {error.message}")
            return
        opened = RunDirectory.open(run.path)
        if statement:  # first: who has confirmed is not asked again
            opened.write_bytes(f"{STATEMENTS}/{site}.json", statement)
        opened.note_delivery(site, code, datetime.now(UTC).isoformat(timespec="seconds"))
        if code == Confirmation.RECEIVED:
            self._left[run.name].discard(site)
            without = "; its statement of what was spent does not hold" if statement is None else ""
            self._say(f"{run.name}: site {site} has the model{without}")
        else:
            self._say(f"{run.name}: site {site} refused the model with code '{code}'; its own log says more")


@dataclass(frozen=True, eq=False)
class SignedOffer:
    """One model, signed.

    Attributes:
        content: records, the signature among them.
        digest: of the records, 64 hex digits: what an answer is bound to.
    """

    run_id: str
    content: RecordDict
    digest: str
    channel: AggregatorChannel

    @classmethod
    def of(cls, run: QueuedRun, channel: AggregatorChannel) -> Self:
        """Raises `FederationError` where a file of the model is gone."""
        run_id = RunDirectory.open(run.path).run_id
        try:
            files = {name: (run.path / "model" / name).read_bytes() for name in MODEL_FILES}
        except OSError as error:
            raise FederationError(f"the model of run {run.name} cannot be read: {error.strerror or error}") from None
        content = encode_offer(ModelOffer(run_id, files))
        digest = records_digest(content)
        attach_signature(content, keys=channel.statement, signature=channel.sign(digest))
        return cls(run_id, content, digest.hex(), channel)

    def read(self, message: Message, site: str) -> tuple[Confirmation | RefusalCode, bytes | None]:
        """What the site said to this model, and to no other; its spend statement, "" for none, `None` for a false one.

        Raises:
            FederationError: the engine answers in its place.
            ProtocolError, TrustError: it is no answer.
        """
        if message.has_error():
            raise FederationError(ENGINE_ERRORS.get(message.error.code, "the engine gives no reason"))
        reply = decode_reply(message.content)
        if isinstance(reply, Refusal):
            raise ProtocolError("a refusal came in clear, between institutions it is sealed")
        if reply.site_id != site:
            raise ProtocolError(f"it answers as site {reply.site_id}")
        # A site that could not read what came refuses that, and can say nothing else there.
        unread = (reply.run_id, reply.server_round) == (NOT_TOLD, 0)
        run_id = "" if unread else self.run_id
        context = Context(self.channel.federation, run_id, site, 0, instruction_digest=self.digest)
        found = self.channel.open(reply.envelope, context=context)
        said = found.content.decode("ascii", "replace")
        if found.kind == "code" and said in set(RefusalCode):
            return RefusalCode(said), b""
        if found.kind == "code" and said in set(Confirmation) and not unread:
            return Confirmation(said), b""
        if found.kind == "statement" and not unread:
            what = f"the spend statement of site {site}"
            # One that does not hold is worth nothing; that the model arrived is said all the same.
            with suppress(TrustError):
                said_of = SpendStatement.read(found.content, what=what, key=self.channel.sites[site])
                if (said_of.federation, said_of.site, said_of.run) == (self.channel.federation, site, self.run_id):
                    return Confirmation.RECEIVED, found.content
            return Confirmation.RECEIVED, None
        raise ProtocolError("what is sealed is no answer to a model")
