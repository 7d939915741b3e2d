"""Rounds between institutions: signed on the way down, sealed on the way up, in the same loop and at the same sites."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from deployed_site import CONFIG, OPEN, round_of
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from joined_sites import Operator, sent, signed
from test_hostile_coordinator import Clock
from toy_federation import PROMPTS, make_run, make_sites, toy_config, toy_policy

import client.app
import client.gate
import client.site
import server.rounds
from client.app import make_app, refuse_bundle
from client.settings import SiteConfig
from client.site import forget_site, open_site
from server.aggregation import RoundSum
from server.cohort import Cohort, opened
from server.rounds import Outcome, run_rounds
from server.training import ServerTraining
from shared.config import RunConfig
from shared.errors import FederationError, ProtocolError, TrustError
from shared.observer import SilentObserver
from shared.privacy.plan import make_plan
from shared.protection.channel import SiteChannel
from shared.protection.federation import AggregatorKeys
from shared.protection.sealed import OVERHEAD
from shared.records import (
    NOT_TOLD,
    Refusal,
    RefusalCode,
    SiteReply,
    decode_reply,
    detach_signature,
    encode_instruction,
    records_digest,
)
from shared.rundir import RunDirectory
from shared.text import build_encoder
from simulations.engines import LocalGrid

RUN_CONFIG = toy_config({"privacy.target-epsilon": 2.0, "privacy.sampling-rate": 1.0, "federation.rounds": 2})


@pytest.fixture(autouse=True)
def sites_of_other_tests_are_forgotten() -> Iterator[None]:
    yield
    client.site._SITES.clear()


@pytest.fixture
def operator() -> Operator:
    return Operator()


@pytest.fixture
def sites(operator: Operator, tmp_path: Path) -> list[Path]:
    made = make_sites(tmp_path / "sites", seed=None, policy=toy_policy(**OPEN))
    operator.admit(made)
    return made


def log_of(site: Path) -> str:
    return (site / "site.log").read_text()


def charged(site: Path) -> int:
    (ledger,) = site.rglob("ledger.jsonl")
    return sum(json.loads(line)["kind"] == "charge" for line in ledger.read_text().splitlines())


class Wire(LocalGrid):
    """A relay that keeps everything that passes it, and may change what comes up."""

    def __init__(self, sites: list[Path]) -> None:
        super().__init__(make_app(), sites=len(sites), parallel_sites=1)
        for context, site in zip(self._contexts.values(), sites, strict=True):
            context.node_config["site-dir"] = str(site)
        self.down, self.up = list[bytes](), list[bytes]()

    def _at_site(self, name: str, objects: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
        self.down += objects.values()
        reply, answer = super()._at_site(name, objects)
        self.up += answer.values()
        return reply, answer


def run(path: Path, config: RunConfig, operator: Operator, grid: LocalGrid) -> Outcome:
    with grid, make_run(path, config) as rundir:
        plan, encoder = make_plan(config), build_encoder(config.text)
        training = ServerTraining(config, plan, PROMPTS, encoder)
        observer = SilentObserver()
        cohort = Cohort(grid, config.federation, observer, channel=operator.channel)
        return run_rounds(
            cohort, config=config, plan=plan, training=training, rundir=rundir, prompts=PROMPTS,
            observer=observer,
        )  # fmt: skip


def test_a_run_between_institutions_ends_as_any_other_and_the_relay_reads_nothing_of_it(
    operator: Operator, sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear: list[bytes] = []
    real = SiteChannel.seal

    def watched(self: SiteChannel, kind: Literal["reply", "code"], content: bytes, **named: Any) -> bytes:
        clear.append(content)
        return real(self, kind, content, **named)

    monkeypatch.setattr(SiteChannel, "seal", watched)
    sums: list[RoundSum] = []
    monkeypatch.setattr(server.rounds, "RoundSum", lambda **of: (sums.append(summed := RoundSum(**of)), summed)[1])
    wire = Wire(sites)
    assert run(tmp_path / "run", RUN_CONFIG, operator, wire).rounds == 2
    # The sums are exactly those of what the sites sealed.
    values = [np.frombuffer(envelope[:-32], "<i8") for envelope in clear]
    for place, summed in enumerate(sums):
        assert summed.replies == 2
        assert np.array_equal(summed.total, values[2 * place] + values[2 * place + 1])
    passed = b"".join(wire.up)
    assert len(clear) == 4
    for envelope in clear:
        assert len(envelope) > 1000
        for start in range(0, len(envelope) - 16, 997):
            assert envelope[start : start + 16] not in passed
        assert envelope[-32:] not in passed  # nor the head of the ledger
    assert [charged(site) for site in sites] == [2, 2]


STEPS: dict[str, tuple[Any, str]] = {
    "the charge is not yet on disk": (RunDirectory, "charge"),
    "the instructions have not left": (LocalGrid, "push_messages"),
    "an answer came and is not summed": (RoundSum, "add"),
    "all answered and no sum is on disk": (RunDirectory, "save_release"),
    "the sum is on disk and nothing was learned": (ServerTraining, "step"),
    "it was learned and no event is on disk": (RunDirectory, "append_event"),
    "the checkpoint is not on disk": (RunDirectory, "save_checkpoint"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", [True, False])
def test_an_aggregator_that_ends_at_any_step_of_a_round_costs_no_site_anything(
    step: str, before: bool, operator: Operator, sites: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after each step of the second round, and resumed as another process would."""
    owner, name = STEPS[step]
    real, calls = getattr(owner, name), 0

    def killed(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != {"add": 3, "save_checkpoint": 1}.get(name, 2):  # two answers a round, a checkpoint every other
            return real(self, *arguments, **named)
        if not before:
            real(self, *arguments, **named)
        raise KeyboardInterrupt

    def go(rundir: RunDirectory) -> Outcome:
        with rundir, Wire(sites) as grid:
            plan, encoder = make_plan(RUN_CONFIG), build_encoder(RUN_CONFIG.text)
            observer = SilentObserver()
            return run_rounds(
                Cohort(grid, RUN_CONFIG.federation, observer, channel=operator.channel), config=RUN_CONFIG, plan=plan,
                training=ServerTraining(RUN_CONFIG, plan, PROMPTS, encoder), rundir=rundir, prompts=PROMPTS,
                observer=observer,
            )  # fmt: skip

    made = RunDirectory.create(tmp_path / "run", config=RUN_CONFIG, prompts=PROMPTS.texts, entropy="system")
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            go(made)
    with RunDirectory.resume(tmp_path / "run") as rundir:
        outcome = go(rundir)
        spent = [(line["server_round"], line["attempt"]) for line in rundir.charges()]
        events = [event["server_round"] for event in rundir.events()]
    assert outcome.rounds == RUN_CONFIG.federation.rounds
    assert events == list(range(1, outcome.rounds + 1))
    # The same question gets the same bytes: nobody is charged twice, at either end.
    assert spent == [(server_round, 1) for server_round in range(1, outcome.rounds + 1)]
    assert [charged(site) for site in sites] == [outcome.rounds] * len(sites)


def test_an_instruction_that_nobody_signed_is_not_even_decoded_and_refused_in_secret(
    operator: Operator, sites: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app, "decode_instruction", lambda records: pytest.fail("decoded"))
    asked, thief = round_of(), Operator()
    wrong = {
        "is not signed": encode_instruction(asked),
        "is not signed by the key": signed(thief.channel, asked),
    }
    changed = signed(operator.channel, asked)
    changed["instruction"]["attempt"] = 2
    wrong["the instruction is not signed by the key"] = changed
    for reason, records in wrong.items():
        reply = sent(sites[0], records)
        assert isinstance(reply, SiteReply)
        assert (reply.run_id, reply.server_round) == (NOT_TOLD, 0)
        assert b"message" not in reply.envelope
        came = dataclasses.replace(asked, attempt=records["instruction"]["attempt"])
        assert opened(reply, operator.channel, came) == Refusal("site-0", RefusalCode.MESSAGE)
        assert reason in log_of(sites[0])
    assert charged(sites[0]) == 0


def test_a_refusal_of_what_could_not_be_read_is_bound_to_what_came(operator: Operator, sites: list[Path]) -> None:
    """Otherwise a relay could show one such refusal against every later instruction, and send a site away."""
    asked = round_of(1)
    old = sent(sites[0], encode_instruction(asked))
    assert isinstance(old, SiteReply)
    assert opened(old, operator.channel, asked) == Refusal("site-0", RefusalCode.MESSAGE)
    for other in (round_of(2), dataclasses.replace(asked, attempt=2), dataclasses.replace(asked, run_id="another")):
        with pytest.raises(TrustError, match="not signed"):
            opened(old, operator.channel, other)
    # What has no digest is nobody's instruction.
    for records in (RecordDict({"x": MetricRecord({"a": 1})}), RecordDict({"x": ConfigRecord({"a": 1.5})})):
        for reply in (sent(sites[0], records), bundle_refusal(sites[0], records)):
            assert isinstance(reply, SiteReply)
            with pytest.raises(TrustError, match="not signed"):
                opened(reply, operator.channel, asked)


def test_a_refusal_is_sealed_and_bound_to_its_round(operator: Operator, sites: list[Path]) -> None:
    asked = round_of()
    (sites[0] / "policy.toml").write_text(toy_policy(models=["front"]).to_toml())
    reply = sent(sites[0], signed(operator.channel, asked))
    assert isinstance(reply, SiteReply)
    assert opened(reply, operator.channel, asked) == Refusal("site-0", RefusalCode.POLICY)
    with pytest.raises(TrustError):
        opened(reply, operator.channel, round_of(2))


def test_the_same_instruction_gets_the_same_sealed_bytes_uncharged_also_after_a_restart(
    operator: Operator, sites: list[Path]
) -> None:
    asked = round_of()
    first = sent(sites[0], signed(operator.channel, asked))
    forget_site(sites[0])
    again = sent(sites[0], signed(operator.channel, dataclasses.replace(asked, attempt=2)))
    assert first == again
    assert isinstance(first, SiteReply)
    assert charged(sites[0]) == 1
    entries = [json.loads(line) for line in next(sites[0].rglob("ledger.jsonl")).read_text().splitlines()]
    assert [entry["kind"] for entry in entries][-3:] == ["charge", "commit", "resent"]
    # What the ledger says that left is what left.
    import hashlib

    assert entries[-2]["sha256"] == entries[-1]["sha256"] == hashlib.sha256(first.envelope).hexdigest()
    found = opened(again, operator.channel, asked)
    assert isinstance(found, SiteReply)
    assert len(found.envelope) + 1 + OVERHEAD == len(first.envelope)


def test_replies_of_other_rounds_runs_and_sites_are_refused(operator: Operator, sites: list[Path]) -> None:
    first, second = round_of(1), round_of(2)
    old = sent(sites[0], signed(operator.channel, first))
    assert isinstance(old, SiteReply)
    for swapped in (
        dataclasses.replace(old, server_round=2), dataclasses.replace(old, run_id="another"),
        dataclasses.replace(old, site_id="site-1"), dataclasses.replace(old, run_id=NOT_TOLD, server_round=0),
    ):  # fmt: skip
        with pytest.raises(TrustError):
            opened(swapped, operator.channel, second)
    with pytest.raises(TrustError, match="no site of"):
        opened(dataclasses.replace(old, site_id="site-9"), operator.channel, first)
    # The same weights and settings, another prompt: another question.
    other = dataclasses.replace(first, prompts=("a photo of a red",))
    with pytest.raises(TrustError):
        opened(old, operator.channel, other)


def test_what_comes_up_in_clear_is_refused(operator: Operator, sites: list[Path]) -> None:
    asked = round_of()
    with pytest.raises(ProtocolError, match="in clear"):
        opened(Refusal("site-0", RefusalCode.SITE), operator.channel, asked)
    with pytest.raises(TrustError, match="no sealed message"):
        opened(SiteReply(asked.run_id, 1, "site-0", b"\0" * 5000), operator.channel, asked)


def test_keys_rotate_between_rounds_without_a_new_kit(operator: Operator, sites: list[Path], tmp_path: Path) -> None:
    before = sent(sites[0], signed(operator.channel, round_of(1)))
    operator.rotate()
    kept = sent(sites[0], signed(operator.channel, round_of(1)))  # sealed to the old key
    for reply in (before, kept):
        assert isinstance(opened(reply, operator.channel, round_of(1)), SiteReply)
    after = sent(sites[0], signed(operator.channel, round_of(2)))
    assert isinstance(after, SiteReply)
    assert after.envelope[5:13] == operator.opening[0].public.id


def fingerprint_of(operator: Operator) -> str:
    return AggregatorKeys.read(operator.statement, operator.federation).fingerprint


def test_a_policy_that_names_keys_answers_to_no_others_whoever_vouches_for_them(
    operator: Operator, sites: list[Path]
) -> None:
    def allow(*fingerprints: str) -> None:
        (sites[0] / "policy.toml").write_text(toy_policy(**OPEN, aggregator_keys=list(fingerprints)).to_toml())

    first = fingerprint_of(operator)
    allow(first)
    answer = opened(sent(sites[0], signed(operator.channel, round_of(1))), operator.channel, round_of(1))
    assert isinstance(answer, SiteReply)
    operator.rotate()
    for server_round in (1, 2):  # nor is what was kept sent to them
        reply = sent(sites[0], signed(operator.channel, round_of(server_round)))
        assert opened(reply, operator.channel, round_of(server_round)) == Refusal("site-0", RefusalCode.POLICY)
    assert f"signed with the keys '{fingerprint_of(operator)}', allowed is '{first}'" in log_of(sites[0])
    assert charged(sites[0]) == 1
    allow(first, fingerprint_of(operator))
    answer = opened(sent(sites[0], signed(operator.channel, round_of(2))), operator.channel, round_of(2))
    assert isinstance(answer, SiteReply)


def test_an_answer_is_sealed_to_the_keys_that_asked_even_when_newer_ones_came_meanwhile(
    operator: Operator, sites: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = operator.channel, client.site.site_gradient
    asked = signed(before, round_of(1))

    def slow(*arguments: Any, **named: Any) -> Any:
        operator.rotate()
        newer = signed(operator.channel, round_of(2))
        channel = open_site(sites[0], simulated=False).channel
        assert channel is not None
        statement, signature = detach_signature(newer)
        channel.check(records_digest(newer), statement=statement, signature=signature)
        return real(*arguments, **named)

    monkeypatch.setattr(client.site, "site_gradient", slow)
    assert isinstance(opened(sent(sites[0], asked), before, round_of(1)), SiteReply)
    kept = (sites[0] / "replies/run.reply").read_bytes().partition(b"\n")
    assert json.loads(kept[0])["serial"] == 1


def test_a_kept_answer_that_nobody_can_open_any_more_is_made_and_charged_anew(
    operator: Operator, sites: list[Path]
) -> None:
    asked = round_of(1)
    first = sent(sites[0], signed(operator.channel, asked))
    assert isinstance(first, SiteReply)
    operator.rotate()
    forget_site(sites[0])
    assert sent(sites[0], signed(operator.channel, asked)) == first
    operator.rotate()
    forget_site(sites[0])
    with pytest.raises(TrustError, match="not in force"):
        opened(first, operator.channel, asked)
    second = sent(sites[0], signed(operator.channel, dataclasses.replace(asked, attempt=2)))
    assert second != first
    assert isinstance(opened(second, operator.channel, asked), SiteReply)
    assert sent(sites[0], signed(operator.channel, dataclasses.replace(asked, attempt=3))) == second
    assert charged(sites[0]) == 2


def test_what_was_answered_in_clear_before_the_site_joined_does_not_leave_again(
    operator: Operator, tmp_path: Path
) -> None:
    (site,) = make_sites(tmp_path / "alone", sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    clear = sent(site, encode_instruction(round_of(1)))
    operator.admit([site])
    reply = sent(site, signed(operator.channel, round_of(1)))
    assert reply != clear
    assert isinstance(opened(reply, operator.channel, round_of(1)), SiteReply)
    assert charged(site) == 2


# ---- refusals of a site that cannot be opened


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(client.gate, "time", made)
    return made


def slot_of(site: Path, seconds: float) -> None:
    SiteConfig.read(site).model_copy(update={"slot_seconds": seconds}).write(site)
    forget_site(site)


def bundle_refusal(site: Path, records: RecordDict) -> SiteReply | Refusal:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = refuse_bundle(Message(records, 5, "train"), site, "ab" * 32)
    assert not message.has_error()
    return decode_reply(message.content)


def damage_settings(site: Path) -> None:
    (site / "site.toml").write_bytes(b"\xff no toml")


def remove_settings(site: Path) -> None:
    (site / "site.toml").unlink()


def remove_ledger(site: Path) -> None:
    shutil.rmtree(site / "lineages")


def remove_key(site: Path) -> None:
    (site / "keys/signing.pem").unlink()


def remove_federation(site: Path) -> None:
    (site / "federation.json").unlink()


def damage_keys_of_aggregator(site: Path) -> None:
    (site / "aggregator-keys.json").write_text("damaged")


@pytest.mark.parametrize(
    ("harm", "seconds"), [(damage_settings, 10.0), (remove_settings, 10.0), (remove_ledger, 7.0)]
)
@pytest.mark.parametrize("came", ["an instruction", "another bundle"])
def test_a_joined_site_that_cannot_be_opened_refuses_in_secret_and_at_the_end_of_a_slot(
    came: str, harm: Callable[[Path], None], seconds: float, operator: Operator, sites: list[Path], clock: Clock
) -> None:
    slot_of(sites[0], 7.0)
    harm(sites[0])
    asked = round_of()
    records = signed(operator.channel, asked)
    code = RefusalCode.SITE if came == "an instruction" else RefusalCode.RELEASE
    reply = sent(sites[0], records) if came == "an instruction" else bundle_refusal(sites[0], records)
    assert isinstance(reply, SiteReply)
    assert opened(reply, operator.channel, asked) == Refusal("site-0", code)
    assert clock.now - clock.began == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (remove_key, RefusalCode.MESSAGE), (remove_federation, RefusalCode.MESSAGE),
        (damage_keys_of_aggregator, RefusalCode.MESSAGE), (shutil.rmtree, RefusalCode.SITE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("came", ["an instruction", "another bundle"])
def test_a_site_that_can_seal_nothing_says_nothing_but_a_code_and_notes_that(
    came: str, harm: Callable[[Path], None], code: RefusalCode, operator: Operator, sites: list[Path], clock: Clock
) -> None:
    slot_of(sites[0], 7.0)
    records = signed(operator.channel, round_of())
    harm(sites[0])
    if came == "an instruction":
        assert sent(sites[0], records) == Refusal("", code)
    else:
        assert bundle_refusal(sites[0], records) == Refusal("", RefusalCode.RELEASE)
    assert clock.now - clock.began == pytest.approx(7.0 if sites[0].exists() else 10.0)
    if sites[0].exists():
        assert "leaves in clear" in log_of(sites[0])
        assert charged(sites[0]) == 0


@pytest.mark.parametrize("place", ["client.app.log_exception", "client.app.note_code", "client.app.SiteConfig.read"])
@pytest.mark.parametrize("came", ["an instruction", "another bundle"])
def test_no_failure_on_the_way_out_keeps_a_refusal_or_leaves_with_it(
    came: str, place: str, operator: Operator, sites: list[Path], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("an unmistakable crimson walrus")

    forget_site(sites[0])
    asked = round_of()
    monkeypatch.setattr(place, fail)
    records = encode_instruction(asked)
    reply = sent(sites[0], records) if came == "an instruction" else bundle_refusal(sites[0], records)
    assert isinstance(reply, SiteReply)
    assert isinstance(opened(reply, operator.channel, asked), Refusal)
    monkeypatch.setattr(SiteChannel, "seal", fail)
    reply = sent(sites[0], records) if came == "an instruction" else bundle_refusal(sites[0], records)
    assert isinstance(reply, Refusal)
    assert reply.site_id == ""


def test_a_run_stops_at_an_answer_that_cannot_be_opened(operator: Operator, sites: list[Path], tmp_path: Path) -> None:
    operator.sites["site-1"] = operator.identity.public  # the roster has another key for it
    with pytest.raises((ProtocolError, FederationError), match="is not signed by the key"):
        run(tmp_path / "run", RUN_CONFIG, operator, Wire(sites))


assert CONFIG.federation.name == Operator.name
