"""A trained model on its way back to the sites: kept whole where it is the one, refused where anything is else.

The oracle is the aggregator's own folder, byte for byte, and what the wire carried.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_site import CONFIG, OPEN, round_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from joined_sites import Operator, sent, signed
from test_cohort import ScriptedGrid
from test_cohort import Sites as Scripted
from test_hostile_coordinator import Clock
from test_sealed_rounds import Wire
from toy_federation import PROMPTS, make_sites, toy_config, toy_policy

import client.app
import client.delivery
import client.gate
import client.site
import server.delivery
import shared.records
from client.delivery import received_models
from client.membership import open_channel, question_of, question_of_offer
from client.receipts import receipts_page
from client.settings import RELEASE_CODE, SiteConfig
from client.site import forget_site, open_site
from server.app import serve
from server.cohort import Cohort, opened
from server.delivery import Delivery, SignedOffer
from server.evaluation import pictures
from server.run_queue import QueuedRun, RunQueue
from server.status import run_status
from shared.cli import run as fedcanvas
from shared.config import RunConfig
from shared.errors import ProtocolError, TrustError
from shared.models import build_discriminator, build_generator
from shared.observer import SilentObserver
from shared.privacy.plan import make_plan
from shared.protection.sealed import OVERHEAD, Context
from shared.records import (
    NOT_TOLD,
    OFFER_TYPE,
    RAW,
    ModelOffer,
    Refusal,
    RefusalCode,
    SiteReply,
    attach_signature,
    encode_offer,
    encode_reply,
    records_digest,
)
from shared.rundir import RunDirectory, load_model
from shared.spend import SpendStatement
from shared.text import build_encoder

NAMES = ("generator.safetensors", "discriminator.safetensors", "model.json")
TRAINED = toy_config({"privacy.target-epsilon": 2.0, "privacy.sampling-rate": 1.0, "federation.rounds": 2})


@pytest.fixture(autouse=True)
def sites_of_other_tests_are_forgotten() -> Iterator[None]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # a message asks for them
    yield
    client.site._SITES.clear()


@pytest.fixture
def operator() -> Operator:
    return Operator()


def released(path: Path, config: RunConfig = CONFIG, *, run_id: str = "run", seed: int = 0) -> Path:
    """The folder `model` of a run between institutions, as the aggregator has it."""
    encoder, plan = build_encoder(config.text), make_plan(config)
    with RunDirectory.create(path, config=config, prompts=PROMPTS.texts, entropy="system", run_id=run_id) as rundir:
        return rundir.save_model(
            generator=build_generator(config.replaced({"seed": seed}), embedding_dim=encoder.dim).state_dict(),
            discriminator=build_discriminator(config, embedding_dim=encoder.dim).state_dict(),
            card={"encoder_fingerprint": encoder.fingerprint, "plan": plan.to_dict(), "weights_digest": "e" * 64,
                  "entropy": "system", "spent": plan.spent(plan.reserved_steps, warm_start=False).to_dict()},
        )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released(tmp_path_factory.mktemp("aggregator") / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def took_part(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Operator]:
    """A site that answered the first round of run "run"; tests copy it."""
    (site,), operator = make_sites(
        tmp_path_factory.mktemp("took-part"), sizes=(40,), seed=None, policy=toy_policy(**OPEN)
    ), Operator()  # fmt: skip
    operator.admit([site])
    sent(site, signed(operator.channel, round_of()))
    return site, operator


@pytest.fixture
def site(took_part: tuple[Path, Operator], tmp_path: Path) -> Path:
    return shutil.copytree(took_part[0], tmp_path / "site-0")


@pytest.fixture
def aggregator(took_part: tuple[Path, Operator]) -> Operator:
    return took_part[1]


def log_of(site: Path) -> str:
    return (site / "site.log").read_text()


def said_by(
    reply: SiteReply | Refusal, operator: Operator, records: RecordDict, *, run: str = "run"
) -> tuple[str, bytes]:  # fmt: skip
    """(run that the answer names, code), opened with the aggregator's key alone; the seal is bound to `records`.

    Of a spend statement the code is `received`: it goes with nothing else.
    """
    assert isinstance(reply, SiteReply)
    context = Context(
        operator.name, "" if reply.run_id == NOT_TOLD else run, "site-0", 0,
        instruction_digest=records_digest(records).hex(),
    )  # fmt: skip
    found = operator.channel.open(reply.envelope, context=context)
    assert reply.server_round == 0
    if found.kind == "statement":
        statement = SpendStatement.read(found.content, what="it", key=operator.channel.sites["site-0"])
        assert (statement.federation, statement.site, statement.run) == (operator.name, "site-0", run)
        return reply.run_id, b"received"
    assert found.kind == "code"
    return reply.run_id, found.content


def digest_of(records: RecordDict) -> str:
    """Of what was sent, without its signature, as the aggregator computed it."""
    return records_digest(records).hex()


def offered(
    site: Path, operator: Operator, files: Mapping[str, bytes], *, run: str = "run", kind: str = OFFER_TYPE
) -> bytes:  # fmt: skip
    """The code that the site answers."""
    records = signed(operator.channel, ModelOffer(run, files))
    return said_by(sent(site, records, kind=kind), operator, records, run=run)[1]


def codes_noted(site: Path) -> list[str]:
    lines = (site / "refusals.jsonl").read_text().splitlines() if (site / "refusals.jsonl").exists() else []
    return [json.loads(line)["code"] for line in lines]


def kept(site: Path) -> list[str]:
    return sorted(path.name for path in (site / "models").glob("*"))


# ---- it comes


def test_a_model_is_kept_as_the_aggregator_has_it_and_draws_the_same_pictures(
    site: Path, aggregator: Operator, model: Path
) -> None:
    (ledger,) = site.rglob("ledger.jsonl")
    before = ledger.read_bytes()
    records = signed(aggregator.channel, ModelOffer("run", files_of(model)))
    reply = sent(site, records, kind=OFFER_TYPE)
    assert said_by(reply, aggregator, records) == ("run", b"received")
    assert files_of(site / "models/run") == files_of(model)
    assert kept(site) == ["run"]
    here, there = load_model(site / "models/run"), load_model(model)
    drawn = [pictures(one, ["a photo of a red"] * 3, seed=5, indices=range(3)) for one in (here, there)]
    assert np.array_equal(*drawn)
    added = ledger.read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line)["kind"] for line in added] == ["closed"]  # it costs nothing
    assert codes_noted(site) == ["received"]
    # On the wire it is sealed: its length is that of the statement, a refusal's that of any code.
    assert isinstance(reply, SiteReply)
    refused = sent(site, signed(aggregator.channel, ModelOffer("another", files_of(model))), kind=OFFER_TYPE)
    assert isinstance(refused, SiteReply)
    assert len(refused.envelope) == 1 + 16 + OVERHEAD
    found = aggregator.channel.open(
        reply.envelope, context=Context(aggregator.name, "run", "site-0", 0, instruction_digest=digest_of(records))
    )
    assert len(reply.envelope) == 1 + len(found.content) + OVERHEAD
    assert not any(words in reply.envelope for words in (b"received", b"spend", b"nonce", b"charges"))
    # What it says is what the ledger holds, and its own key signed it.
    statement = SpendStatement.read(found.content, what="it", key=aggregator.channel.sites["site-0"])
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    charges = [line for line in lines if line["kind"] == "charge"]
    names = ("server_round", "attempt", "release", "steps", "instruction_digest", "nonce")
    assert statement.charges == tuple(tuple(line[name] for name in names) for line in charges)
    assert not statement.simulated
    assert statement.closed


def test_a_run_whose_model_came_is_over_at_the_site(site: Path, aggregator: Operator, model: Path) -> None:
    """Nobody gets a statement of a part of a run and goes on with it."""
    (ledger,) = site.rglob("ledger.jsonl")
    assert offered(site, aggregator, files_of(model)) == b"received"
    after = ledger.read_bytes()
    forget_site(site)
    for server_round in (2, 1):  # the next one, and the one that was answered
        asked = round_of(server_round=server_round)
        channel = open_channel(site, "site-0")
        assert channel is not None
        reply = sent(site, signed(aggregator.channel, asked))
        assert isinstance(reply, SiteReply)
        found = aggregator.channel.open(reply.envelope, context=question_of(channel, asked))
        assert (found.kind, found.content) == ("code", b"denied")
    assert offered(site, aggregator, files_of(model)) == b"received"
    assert ledger.read_bytes() == after


def test_a_site_that_takes_no_models_signs_by_hand(
    site: Path, aggregator: Operator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, (ledger,) = tmp_path / "said.json", site.rglob("ledger.jsonl")
    key = aggregator.channel.sites["site-0"]
    assert fedcanvas(["client", "statement", str(site), "run", "--out", str(out)]) == 0
    assert "may be charged again" in capsys.readouterr().out
    first, before = SpendStatement.read(out.read_bytes(), what="it", key=key), ledger.read_bytes()
    assert (first.closed, first.weights, len(first.charges)) == (False, "", 1)
    # A wrong place, or a run that is not here, closes nothing.
    again = ["client", "statement", str(site), "run", "--close", "--json", "--out"]
    assert fedcanvas([*again, str(out)]) == 2
    assert fedcanvas(["client", "statement", str(site), "none", "--close", "--out", str(tmp_path / "none")]) == 2
    assert ledger.read_bytes() == before
    assert not (tmp_path / "none").exists()
    capsys.readouterr()
    for place in ("whole.json", "again.json"):  # what is closed is signed again
        assert fedcanvas([*again, str(tmp_path / place)]) == 0
        assert json.loads(capsys.readouterr().out)["closed"] is True
        whole = SpendStatement.read((tmp_path / place).read_bytes(), what="it", key=key)
        assert (whole.closed, whole.charges, whole.head) == (True, first.charges, first.head)
    added = ledger.read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line)["kind"] for line in added] == ["closed"]


def test_where_the_run_cannot_be_closed_nothing_is_signed_and_the_model_is_there(
    site: Path, aggregator: Operator, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(client.account.Ledger, "close", full)
    records = signed(aggregator.channel, ModelOffer("run", files_of(model)))
    reply = sent(site, records, kind=OFFER_TYPE)
    assert isinstance(reply, SiteReply)
    question = Context(aggregator.name, "run", "site-0", 0, instruction_digest=digest_of(records))
    assert aggregator.channel.open(reply.envelope, context=question).kind == "code"
    assert said_by(reply, aggregator, records) == ("run", b"received")
    assert files_of(site / "models/run") == files_of(model)


def test_the_same_model_again_is_confirmed_again_and_changes_nothing(
    site: Path, aggregator: Operator, model: Path
) -> None:
    assert offered(site, aggregator, files_of(model)) == b"received"
    before = {path: path.stat().st_mtime_ns for path in (site / "models/run").iterdir()}
    forget_site(site)
    assert offered(site, aggregator, files_of(model)) == b"received"
    assert {path: path.stat().st_mtime_ns for path in (site / "models/run").iterdir()} == before
    assert codes_noted(site) == ["received", "received"]


def test_another_model_of_the_same_run_is_refused_and_the_first_stays(
    site: Path, aggregator: Operator, model: Path, tmp_path: Path
) -> None:
    other = released(tmp_path / "other", seed=3)
    assert files_of(other)["generator.safetensors"] != files_of(model)["generator.safetensors"]
    assert offered(site, aggregator, files_of(model)) == b"received"
    assert offered(site, aggregator, files_of(other)) == b"message"
    assert files_of(site / "models/run") == files_of(model)
    (site / "models/run/generator.safetensors").unlink()  # nor is a damaged one mended behind people's backs
    assert offered(site, aggregator, files_of(model)) == b"message"
    assert "holds another model of this run, or a damaged one" in log_of(site)
    shutil.rmtree(site / "models/run")
    assert offered(site, aggregator, files_of(model)) == b"received"


def test_no_record_is_read_for_it(site: Path, aggregator: Operator, model: Path) -> None:
    """PRIVACY rule 15: the answer is the same with the data gone."""
    (site / "data.npz").unlink()
    shutil.rmtree(site / "cache")
    forget_site(site)
    assert offered(site, aggregator, files_of(model)) == b"received"


@pytest.mark.parametrize("accepts", [True, False])
def test_the_answer_leaves_at_the_end_of_a_public_slot(
    accepts: bool, site: Path, aggregator: Operator, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(client.gate, "time", clock)
    SiteConfig.read(site).model_copy(update={"slot_seconds": 7.0}).write(site)
    (site / "policy.toml").write_text(toy_policy(**OPEN, accept_models=accepts).to_toml())
    assert offered(site, aggregator, files_of(model)) == (b"received" if accepts else b"policy")
    assert clock.now - clock.began == pytest.approx(7.0)


# ---- what is refused


def check_nothing_came(site: Path, code: RefusalCode) -> None:
    assert kept(site) == []
    assert codes_noted(site) == [code]


def test_what_the_aggregator_did_not_sign_is_not_even_decoded(
    site: Path, aggregator: Operator, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app, "decode_offer", lambda records: pytest.fail("decoded"))
    thief, offer = Operator(), ModelOffer("run", files_of(model))
    changed = signed(aggregator.channel, offer)
    array = changed["files"]["model.json"]
    byte = array.data.index(b"2")
    array.data = array.data[:byte] + b"3" + array.data[byte + 1 :]
    renamed = signed(aggregator.channel, offer)
    renamed["model"]["run-id"] = "another"
    for records in (encode_offer(offer), signed(thief.channel, offer), changed, renamed):
        bare = RecordDict({name: record for name, record in records.items() if name != "signature"})
        reply = sent(site, records, kind=OFFER_TYPE)
        assert said_by(reply, aggregator, bare) == (NOT_TOLD, b"message")
    assert kept(site) == []
    assert log_of(site).count("is not signed") == 4


def edited(files: Mapping[str, bytes], change: Callable[[dict[str, Any]], Any]) -> dict[str, bytes]:
    card = json.loads(files["model.json"])
    change(card)
    return {**files, "model.json": json.dumps(card).encode()}


def with_weights(files: Mapping[str, bytes], content: bytes) -> dict[str, bytes]:
    """Other weights, under a card that names them."""
    name, digest = "generator.safetensors", hashlib.sha256(content).hexdigest()
    return {**edited(files, lambda card: card["files"].update({name: digest})), name: content}


class Opens:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def not_finite() -> bytes:
    from safetensors.numpy import save

    return bytes(save({"weight": np.array([1.0, np.nan], np.float32)}))


def flipped(files: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    return {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])}


WRONG: dict[str, tuple[Callable[[dict[str, bytes], Path], dict[str, bytes]], RefusalCode]] = {
    "another generator": (lambda files, _: flipped(files, NAMES[0]), RefusalCode.MESSAGE),
    "another discriminator": (lambda files, _: flipped(files, NAMES[1]), RefusalCode.MESSAGE),
    "a pickle": (
        lambda files, evil: with_weights(files, pickle.dumps({"weight": Opens(evil)})), RefusalCode.MESSAGE,
    ),
    "weights that are not finite": (lambda files, _: with_weights(files, not_finite()), RefusalCode.MESSAGE),
    "nothing at all": (lambda files, _: with_weights(files, b""), RefusalCode.MESSAGE),
    "no JSON": (lambda files, _: {**files, "model.json": b"{"}, RefusalCode.MESSAGE),
    "no object": (lambda files, _: {**files, "model.json": b"[]"}, RefusalCode.MESSAGE),
    "no text": (lambda files, _: {**files, "model.json": b"\xff\xfe\xfd"}, RefusalCode.MESSAGE),
    "JSON without a bottom": (lambda files, _: {**files, "model.json": b"[" * 100_000}, RefusalCode.MESSAGE),
    "a file more in the card": (
        lambda files, _: edited(files, lambda card: card["files"].update({"more": "0" * 64})), RefusalCode.MESSAGE,
    ),
    "no word of what was spent": (lambda files, _: edited(files, lambda card: card.pop("spent")), RefusalCode.MESSAGE),
    "less than nothing spent": (
        lambda files, _: edited(files, lambda card: card["spent"].update(epsilon=-1)), RefusalCode.MESSAGE,
    ),
    "more spent than a number holds": (
        lambda files, _: edited(files, lambda card: card["spent"].update(epsilon=10**400)), RefusalCode.MESSAGE,
    ),
    "another run's name": (lambda files, _: edited(files, lambda card: card.update(run_id="two")), RefusalCode.CONFIG),
    "other settings": (
        lambda files, _: edited(files, lambda card: card["config"]["privacy"].update({"clipping-norm": 5.0})),
        RefusalCode.CONFIG,
    ),
    "settings that are none": (lambda files, _: edited(files, lambda card: card.update(config=7)), RefusalCode.CONFIG),
    "a weaker promise": (
        lambda files, _: edited(files, lambda card: card["config"]["privacy"].update({"sigma": 0.1})),
        RefusalCode.CONFIG,
    ),
    "other prompts": (lambda files, _: edited(files, lambda card: card["prompts"].append("b")), RefusalCode.CONFIG),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_is_not_whole_or_not_the_run_s_is_refused_and_nothing_of_it_is_run(
    wrong: str, site: Path, aggregator: Operator, model: Path, tmp_path: Path
) -> None:
    change, code = WRONG[wrong]
    assert offered(site, aggregator, change(files_of(model), tmp_path / "evil")) == code.encode()
    check_nothing_came(site, code)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "name", ["../x", "../../policy.toml", "/tmp/x", "model.json/../x", "sitecustomize.py", "generator.pt", ""]
)
@pytest.mark.parametrize("beside", [True, False])
def test_a_file_of_another_name_is_refused_wherever_it_would_lie(
    name: str, beside: bool, site: Path, aggregator: Operator, model: Path, tmp_path: Path
) -> None:
    files = files_of(model)
    content = files["model.json"] if beside else files.pop("model.json")
    before = sorted(str(path) for path in tmp_path.rglob("*") if "log" not in path.name)
    assert offered(site, aggregator, {**files, name: content}) == b"message"
    check_nothing_came(site, RefusalCode.MESSAGE)
    after = sorted(str(path) for path in tmp_path.rglob("*") if "log" not in path.name)
    assert {*after} - {*before} <= {str(site / "refusals.jsonl")}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_beyond_its_limit_is_refused(
    name: str, site: Path, aggregator: Operator, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(model)
    monkeypatch.setitem(shared.records.MODEL_FILES, name, len(files[name]) - 1)  # type: ignore[misc]
    assert offered(site, aggregator, files) == b"message"
    check_nothing_came(site, RefusalCode.MESSAGE)
    assert "allowed is 0 to" in log_of(site)


def test_the_limits_are_those_that_are_written_down() -> None:
    text = (Path(__file__).parents[1] / "docs/protocol.md").read_text().partition("## Model")[2]
    found = {name: int(power) for name, power in re.findall(r"\| `([a-z.]+)` \| `\\\|u1`, one axis \| 2\^(\d+)", text)}
    assert found == {name: most.bit_length() - 1 for name, most in shared.records.MODEL_FILES.items()}


def raw(content: bytes, **changes: Any) -> Array:
    return Array(**{"dtype": "|u1", "shape": (len(content),), "stype": RAW, "data": content, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1}, {"run-id": "../x"}, {"run-id": ""}, {"run-id": "a" * 65}, {"run-id": 7}, {"more": "x"},
        {"version": True},
    ],
)
def test_an_offer_of_another_form_is_refused(
    changes: dict[str, Any], site: Path, aggregator: Operator, model: Path
) -> None:
    records = encode_offer(ModelOffer("run", files_of(model)))
    records["model"] = ConfigRecord({**dict(records["model"].items()), **changes})
    check_refused_unread(site, aggregator, records)


@pytest.mark.parametrize("of", ["pickled", "numbers", "square", "short", "more records", "an instruction"])
def test_files_of_another_form_are_refused(of: str, site: Path, aggregator: Operator, model: Path) -> None:
    files = files_of(model)
    card = files["model.json"]
    records = encode_offer(ModelOffer("run", files))
    changed = {
        "pickled": raw(card, stype="numpy.ndarray"), "numbers": raw(card[: len(card) // 4 * 4], dtype="<f4"),
        "square": raw(card, shape=(1, len(card))), "short": raw(card, shape=(len(card) + 1,)),
    }  # fmt: skip
    if of in changed:
        arrays = {name: raw(content) for name, content in files.items()}
        records["files"] = ArrayRecord({**arrays, "model.json": changed[of]})
    elif of == "more records":
        records["code"] = ConfigRecord({"run": "import os"})
    else:
        records["instruction"] = ConfigRecord({"version": 2})
    check_refused_unread(site, aggregator, records)


def check_refused_unread(site: Path, operator: Operator, records: RecordDict) -> None:
    channel = operator.channel
    attach_signature(records, keys=channel.statement, signature=channel.sign(records_digest(records)))
    reply = sent(site, records, kind=OFFER_TYPE)
    assert said_by(reply, operator, records) == (NOT_TOLD, b"message")
    check_nothing_came(site, RefusalCode.MESSAGE)


@pytest.mark.parametrize("kind", ["train", "train.moments", "evaluate"])
def test_a_model_under_another_kind_of_message_is_refused(
    kind: str, site: Path, aggregator: Operator, model: Path
) -> None:
    assert offered(site, aggregator, files_of(model), kind=kind) == b"message"
    check_nothing_came(site, RefusalCode.MESSAGE)


def test_an_instruction_in_the_place_of_a_model_is_refused_and_costs_nothing(site: Path, aggregator: Operator) -> None:
    (ledger,) = site.rglob("ledger.jsonl")
    before, records = ledger.read_bytes(), signed(aggregator.channel, round_of(2))
    assert said_by(sent(site, records, kind=OFFER_TYPE), aggregator, records) == (NOT_TOLD, b"message")
    assert ledger.read_bytes() == before


def test_a_run_that_the_site_took_no_part_in_brings_no_model(
    site: Path, aggregator: Operator, tmp_path: Path
) -> None:
    files = files_of(released(tmp_path / "another", run_id="another"))
    assert offered(site, aggregator, files, run="another") == b"message"
    check_nothing_came(site, RefusalCode.MESSAGE)
    assert "run another is none of federation simulation in this site's ledger" in log_of(site)


def test_a_federation_that_was_joined_later_brings_no_model_of_an_earlier_one_s_run(site: Path, model: Path) -> None:
    rival = Operator("rival")
    shutil.rmtree(site / "keys")
    rival.admit([site])
    assert offered(site, rival, files_of(model)) == b"message"
    check_nothing_came(site, RefusalCode.MESSAGE)


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"accept_models": False}, RefusalCode.POLICY), ({"aggregator_keys": ["a1b2"]}, RefusalCode.POLICY),
        ({"code": ["0" * 64]}, RefusalCode.RELEASE),
    ],
)  # fmt: skip
def test_a_policy_may_take_none(
    policy: dict[str, Any], code: RefusalCode, site: Path, aggregator: Operator, model: Path
) -> None:
    (site / "policy.toml").write_text(toy_policy(**OPEN, **policy).to_toml())
    assert offered(site, aggregator, files_of(model)) == code.encode()
    check_nothing_came(site, code)
    (site / "policy.toml").write_text(toy_policy(**OPEN, code=[RELEASE_CODE]).to_toml())
    assert offered(site, aggregator, files_of(model)) == b"received"


def test_a_site_of_no_federation_takes_no_model(model: Path, tmp_path: Path, operator: Operator) -> None:
    offer = ModelOffer("run", files_of(model))
    alone, simulated = (
        make_sites(tmp_path / name, sizes=(40,), seed=seed)[0] for name, seed in (("alone", None), ("simulated", 7))
    )
    for records in (encode_offer(offer), signed(operator.channel, offer)):
        assert sent(alone, records, kind=OFFER_TYPE) == Refusal("site-0", RefusalCode.MESSAGE)
        # A simulated site is found by its partition, and refuses as one.
        app = client.app.make_app([simulated])
        context = client.app.Context(1, 5, {"partition-id": 0}, RecordDict(), {})
        reply = app(Message(records, 5, OFFER_TYPE), context)
        assert dict(reply.content["refusal"].items())["code"] == "message"
    assert kept(alone) == kept(simulated) == []


def test_a_disk_that_refuses_is_no_reason_that_leaves(
    site: Path, aggregator: Operator, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert offered(site, aggregator, files_of(model)) == b"site"
    assert "No space left on device" in log_of(site)
    assert [model.run for model in received_models(site)] == []
    assert offered(site, aggregator, files_of(model)) == b"received"


# ---- cut off


class KilledError(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[list[int]]:
    """Before call number `step` of those that change names or flush, and in the middle of each write."""
    taken = [0]

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            taken[0] += 1
            if taken[0] == step:
                raise KilledError
            return real(*args, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "fsync"):
            patch.setattr(os, name, before(getattr(os, name)))
        yield taken


def test_killed_at_any_step_nothing_half_written_is_taken_for_a_model(
    site: Path, aggregator: Operator, model: Path, tmp_path: Path
) -> None:
    whole, once = files_of(model), shutil.copytree(site, tmp_path / "once/site-0")
    with killed_at(0) as steps:
        offered(once, aggregator, whole)
    assert steps[0] > 10
    for step in range(1, steps[0] + 1):
        here = shutil.copytree(site, tmp_path / f"killed-{step}/site-0")
        records = signed(aggregator.channel, ModelOffer("run", whole))
        with pytest.raises(KilledError), killed_at(step):
            sent(here, records, kind=OFFER_TYPE)
        there = here / "models/run"
        assert not there.exists() or files_of(there) == whole
        assert all(found.whole for found in received_models(here))
        forget_site(here)
        assert offered(here, aggregator, whole) == b"received"
        assert files_of(there) == whole
        assert kept(here) == ["run"]
        assert sorted(os.listdir(there)) == sorted([*NAMES, "received.json"])
        forget_site(here)


def test_what_is_confirmed_is_on_the_disk_with_all_its_names(site: Path, aggregator: Operator, model: Path) -> None:
    done: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
            done.append(f"{name} {os.path.relpath(path, site)}")
            return real(*args, **named)

        return call

    for count in (1, 2):  # the second finds it there, and cannot know how far the first had come
        done.clear()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "fsync"):
                patch.setattr(os, name, noted(name, getattr(os, name)))
            assert offered(site, aggregator, files_of(model)) == b"received"
        at = max(place for place, what in enumerate(done) if what == "fsync models")
        assert done[at + 1] == "fsync ."
        # After it the run is closed, before the answer: the ledger's line first, then the note of where it ends.
        closed = [name for name in done[at + 2 :] if "ledger" in name or "anchor" in name]
        assert [name.rpartition("/")[2] for name in closed][:1] == (["ledger.jsonl"] if count == 1 else [])
        if count == 1:
            there = done.index("rename models/run")
            for file in (*NAMES, "received.json"):
                written = done.index(f"fsync models/.run.partial/{file}.tmp")
                named = done.index(f"rename models/.run.partial/{file}")
                assert written < named < done.index("fsync models/.run.partial", named) < there


# ---- what an answer proves


def test_a_confirmation_is_of_one_model_and_of_nothing_else(
    site: Path, aggregator: Operator, model: Path, tmp_path: Path
) -> None:
    channel = open_site(site, simulated=False).channel
    assert channel is not None
    run = QueuedRun("spring", model.parent, "finished", "", "")
    offer = SignedOffer.of(run, aggregator.channel)
    question = question_of_offer(channel, "run", offer.digest)

    def read(content: SiteReply | Refusal | Error, by: str = "site-0") -> str:
        asked = Message(RecordDict(), 5, OFFER_TYPE)
        asked.metadata.__dict__["_message_id"] = "m"
        reply = Message(content if isinstance(content, Error) else encode_reply(content), reply_to=asked)
        return offer.read(reply, by)[0]

    def sealed(kind: str, content: bytes, context: Context, run_id: str = "run", server_round: int = 0) -> SiteReply:
        return SiteReply(run_id, server_round, "site-0", channel.seal(kind, content, context=context))  # type: ignore[arg-type]

    assert read(sealed("code", b"received", question)) == "received"
    assert read(sealed("code", b"policy", question)) == "policy"
    unread = Context("simulation", "", "site-0", 0, instruction_digest=offer.digest)
    assert read(sealed("code", b"message", unread, NOT_TOLD)) == "message"
    of_another = question_of_offer(channel, "run", "ab" * 32)
    of_a_round = question_of(channel, round_of())
    for wrong, error in (
        (sealed("code", b"received", of_another), TrustError), (sealed("code", b"received", of_a_round), TrustError),
        (sealed("code", b"received", unread, NOT_TOLD), ProtocolError),
        (sealed("code", b"ok", question), ProtocolError), (sealed("reply", b"received", question), ProtocolError),
        (Refusal("site-0", RefusalCode.SITE), ProtocolError),
        (SiteReply("run", 0, "site-0", b"received" * 200), TrustError),
        (SiteReply("run", 0, "site-1", sealed("code", b"received", question).envelope), ProtocolError),
    ):  # fmt: skip
        with pytest.raises(error):
            read(wrong)
    # A statement that does not hold says all the same that the model is there, and is not kept.
    said_of = sealed("statement", b'{"kind": "spend"}', question)
    asked = Message(RecordDict(), 5, OFFER_TYPE)
    asked.metadata.__dict__["_message_id"] = "m"
    assert offer.read(Message(encode_reply(said_of), reply_to=asked), "site-0") == ("received", None)
    # And no instruction is answered by it.
    said = sealed("code", b"received", of_a_round, server_round=1)
    with pytest.raises(ProtocolError, match="unknown code"):
        opened(said, aggregator.channel, round_of())


# ---- the server's part


class Roster:
    """Which of the wire's sites are there."""

    def __init__(self, there: dict[int, str]) -> None:
        self.there = there

    def sites(self) -> set[str]:
        return set(self.there.values())

    def online(self) -> dict[int, str]:
        return self.there

    def outages(self) -> int:
        return 0


def queued(folder: Path, name: str = "spring", *, sites: tuple[str, ...] = ("site-0", "site-1")) -> QueuedRun:
    return RunQueue(folder).add(name, config=TRAINED, prompts=PROMPTS.texts, sites=list(sites))


def test_a_trained_model_comes_to_every_site_that_took_part_when_it_is_there_and_once(
    operator: Operator, tmp_path: Path
) -> None:
    sites = make_sites(tmp_path / "sites", sizes=(40, 24, 24), seed=None, policy=toy_policy(**OPEN))
    operator.admit(sites)
    run, queue, said = queued(tmp_path), RunQueue(tmp_path), list[str]()
    with Wire(sites[:2]) as wire, RunDirectory.resume(run.path) as rundir:  # the third has no part in it
        observer = SilentObserver()
        serve(Cohort(wire, rundir.config.federation, observer, channel=operator.channel), rundir, observer)
        run_id = rundir.run_id
    queue.note("spring", "finished")
    assert sorted(rundir.heads()) == ["site-0", "site-1"]
    nodes, there = [1001, 1002, 1003], Roster({1001: "site-0", 1003: "site-2"})

    def delivery(wire: Wire) -> Delivery:
        return Delivery(
            queue, there, channel=lambda: operator.channel, grid=lambda: contextlib.nullcontext(wire), say=said.append
        )

    with Wire(sites) as wire:
        first = delivery(wire)
        assert first.deliver(stopped=lambda: False)
        assert not first.deliver(stopped=lambda: False)
        assert files_of(sites[0] / "models" / run_id) == files_of(run.path / "model")
        assert [kept(site) for site in sites] == [[run_id], [], []]
        status = run_status(queue["spring"], queue)
        assert (status["delivered"], status["undelivered"]) == (["site-0"], {"site-1": ""})
        # Up came the sealed code and the names of run and site, whatever the model is: no byte of it, and no word.
        assert b"received" not in b"".join(wire.up)
        assert max(map(len, wire.up)) < 3000 < min(map(len, files_of(run.path / "model").values()))
        there.there = dict(zip(nodes, ("site-0", "site-1", "site-2"), strict=True))
        pushed = len(wire.down)
        again = delivery(wire)  # by a worker that was started anew
        assert again.deliver(stopped=lambda: False)
        assert not again.deliver(stopped=lambda: False)
    assert files_of(sites[1] / "models" / run_id) == files_of(run.path / "model")
    assert kept(sites[2]) == []
    assert codes_noted(sites[0]) == codes_noted(sites[1]) == ["received"]
    assert len(wire.down) == 2 * pushed  # one message each time
    status = run_status(queue["spring"], queue)
    assert (status["delivered"], status["undelivered"]) == (["site-0", "site-1"], {})
    written = json.loads((run.path / "delivered.json").read_text())
    assert {site: answer["code"] for site, answer in written.items()} == dict.fromkeys(("site-0", "site-1"), "received")
    assert sorted(said) == ["spring: site site-0 has the model", "spring: site site-1 has the model"]


class Scene:
    """A finished run, and sites that say what a test wants: a code, an engine's error, or nothing."""

    def __init__(self, folder: Path, model: Path, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.says: dict[int, bytes | Error | None] = {1: b"received", 2: b"received"}
        self.folder, self.operator, self.said = folder, operator, list[str]()
        self.queue, self.now = RunQueue(folder), 0.0
        monkeypatch.setattr(server.delivery, "time", self)
        (folder / "keys").mkdir(parents=True)
        sites = [folder / "keys" / f"site-{node}" for node in self.says]
        for site in sites:
            site.mkdir()
        operator.admit(sites)
        self.finish("spring", model)
        self.scripted = Scripted({}, set(self.says))
        self.scripted.answers = dict.fromkeys(self.says, lambda times: None)
        self.scripted.admitted = {"site-1", "site-2"}
        self.grids: list[ScriptedGrid] = []
        self.delivery = Delivery(
            self.queue, self.scripted, channel=lambda: operator.channel, grid=self._grid, say=self.said.append
        )

    def finish(self, name: str, model: Path) -> None:
        with RunDirectory.resume(queued(self.folder, name).path) as rundir:
            shutil.copytree(model, rundir.path / "model")
            rundir.remember_sites({"site-1": "a" * 64, "site-2": "b" * 64}, {}, 1)
        self.queue.note(name, "finished")

    @contextlib.contextmanager
    def _grid(self) -> Iterator[ScriptedGrid]:
        self.grids.append(grid := ScriptedGrid(self.scripted))
        real = grid.push_messages

        def push(messages: Any) -> list[str]:
            names = list(real(messages))
            for name, message in list(grid.silent.items()):
                if (said := self.says[message.metadata.dst_node_id]) is not None:
                    grid._waiting[name] = self._reply(grid.silent.pop(name), said)
            return names

        grid.push_messages = push  # type: ignore[method-assign, assignment]
        yield grid

    def _reply(self, message: Message, said: bytes | Error) -> Message:
        if isinstance(said, Error):
            return Message(said, reply_to=message)
        site, run_id = f"site-{message.metadata.dst_node_id}", message.content["model"]["run-id"]
        channel = open_channel(self.folder / "keys" / site, site)
        assert channel is not None
        question = question_of_offer(channel, run_id, records_digest(message.content).hex())
        reply = SiteReply(run_id, 0, site, channel.seal("code", said, context=question))
        return Message(encode_reply(reply), reply_to=message)

    # what `time` is for the module
    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def deliver(self) -> bool:
        return self.delivery.deliver(stopped=lambda: False)

    @property
    def asked(self) -> list[list[int]]:
        return [[node for node, _ in grid.asked] for grid in self.grids]


@pytest.fixture
def scene(model: Path, operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path / "federation", model, operator, monkeypatch)


@pytest.mark.slow
def test_a_silent_site_holds_nothing_up_for_long_and_is_offered_it_again_later(scene: Scene) -> None:
    scene.says[2] = None
    queued(scene.folder, "next")  # waits for its turn
    assert scene.deliver()
    assert scene.now == pytest.approx(60.0, abs=1.0)
    assert scene.said == ["spring: site site-1 has the model", "spring: site site-2 has not answered to the model"]
    assert not scene.deliver()
    waits = []
    for _ in range(8):
        began = scene.now
        while not scene.deliver():
            scene.now += 1.0
        waits.append(round(scene.now - began - 60.0, -1))  # without the minute that the offer itself took
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600]  # twice as long each time, an hour at most
    assert scene.asked == [[1, 2]] + 8 * [[2]]
    scene.says[2] = b"received"
    scene.now += 3600
    assert scene.deliver()
    scene.now += 10**6
    assert not scene.deliver()


def test_with_no_run_waiting_a_site_has_ten_minutes(scene: Scene) -> None:
    scene.says[1] = scene.says[2] = None
    assert scene.deliver()
    assert scene.now == pytest.approx(600.0, abs=1.0)


def test_a_worker_that_is_told_to_end_waits_for_nobody(scene: Scene) -> None:
    scene.says[1] = scene.says[2] = None
    assert scene.delivery.deliver(stopped=lambda: True)
    assert scene.now == 0.0


def test_a_refusal_an_error_and_what_is_no_answer_are_told_and_tried_again(scene: Scene) -> None:
    scene.says.update({1: b"policy", 2: Error(code=5, reason="secret words")})
    assert scene.deliver()
    status = run_status(scene.queue["spring"], scene.queue)
    assert (status["delivered"], status["undelivered"]) == ([], {"site-1": "policy", "site-2": ""})
    assert sorted(scene.said) == [  # either may be the first
        "spring: site site-1 refused the model with code 'policy'; its own log says more",
        "spring: site site-2 did not confirm the model: its node is not reachable",
    ]
    scene.says.update({1: b"received", 2: b"whatever"})
    scene.now += 61
    assert scene.deliver()
    assert any("is no answer to a model" in line for line in scene.said[2:])
    status = run_status(scene.queue["spring"], scene.queue)
    assert (status["delivered"], status["undelivered"]) == (["site-1"], {"site-2": ""})


def test_each_run_has_its_turn_and_a_broken_one_is_said_once(scene: Scene, model: Path) -> None:
    scene.finish("summer", model)
    (scene.folder / "runs/spring/config.toml").write_text("damaged")
    assert scene.deliver()
    assert not scene.deliver()
    assert [line for line in scene.said if "spring" in line] == [scene.said[0]]
    assert "its model is not delivered" in scene.said[0]
    assert run_status(scene.queue["summer"], scene.queue)["delivered"] == ["site-1", "site-2"]


def test_an_engine_that_takes_nothing_is_not_tried_without_a_pause(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LostError(Exception):
        pass

    def lost(self: ScriptedGrid, messages: object) -> list[str]:
        raise LostError

    with monkeypatch.context() as patched:
        patched.setattr(ScriptedGrid, "push_messages", lost)
        with pytest.raises(LostError):
            scene.deliver()
        assert not scene.deliver()
    scene.now += 61
    assert scene.deliver()
    assert run_status(scene.queue["spring"], scene.queue)["delivered"] == ["site-1", "site-2"]


def test_a_run_that_is_not_finished_has_no_model_to_bring(operator: Operator, tmp_path: Path) -> None:
    queue, name = RunQueue(tmp_path), queued(tmp_path).name
    for state in ("waiting", "running", "failed", "cancelled"):
        queue.note(name, state)  # type: ignore[arg-type]
        delivery = Delivery(
            queue, Roster({1: "site-0"}), channel=lambda: pytest.fail("signed"), grid=lambda: pytest.fail("sent"),
            say=lambda text: pytest.fail(text),
        )  # fmt: skip
        assert not delivery.deliver(stopped=lambda: False)
        assert run_status(queue[name], queue)["undelivered"] == {}


# ---- for people


def test_a_person_sees_what_came_and_draws_with_it(
    site: Path, aggregator: Operator, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedcanvas(["client", "models", str(site)]) == 0
    assert "no model has come" in capsys.readouterr().out
    offered(site, aggregator, files_of(model))
    card = json.loads((model / "model.json").read_text())
    assert fedcanvas(["client", "models", str(site), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert (found["run"], found["federation"], found["whole"]) == ("run", "simulation", True)
    assert (found["epsilon"], found["delta"], found["unit"]) == (card["spent"]["epsilon"], 1e-3, "example")
    assert found["sha256"] == hashlib.sha256((model / "model.json").read_bytes()).hexdigest()
    assert fedcanvas(["client", "models", str(site)]) == 0
    text = capsys.readouterr().out
    assert f"epsilon {card['spent']['epsilon']:.4g} at delta 1e-03 for one example" in text
    (command,) = (line.split("pictures")[1].strip() for line in text.splitlines() if "pictures" in line)
    typed = shlex.split(command)
    assert typed[0] == "fedcanvas"
    assert fedcanvas([*typed[1:], "--out", str(tmp_path / "here"), "--n", "1"]) == 0
    assert fedcanvas([*typed[1:-1], str(model), "--out", str(tmp_path / "there"), "--n", "1"]) == 0
    drawn = [(tmp_path / place / "a-prompt-000.png").read_bytes() for place in ("here", "there")]
    assert drawn[0] == drawn[1]
    (site / "models/run/generator.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert fedcanvas(["client", "models", str(site)]) == 0
    assert "damaged" in capsys.readouterr().out


def test_a_confirmation_is_on_the_receipts_and_counts_as_no_refusal(
    site: Path, aggregator: Operator, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offered(site, aggregator, files_of(model))
    assert fedcanvas(["client", "receipts", str(site), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert [(line["code"], line["run"]) for line in about["received"]] == [("received", "run")]
    assert (about["refused"], about["refusals"], len(about["receipts"])) == ({}, [], 1)
    assert fedcanvas(["client", "receipts", str(site)]) == 0
    assert "models     1 x received, a code and nothing else; of run" in capsys.readouterr().out
    opened = open_site(site, simulated=False).account.ledger
    page = receipts_page(site, SiteConfig.read(site), opened, opened.lineage.lifetime)
    assert "1 delivery of a run's trained model got the word “received”" in page
    assert "No request was refused" in page


def test_the_policy_says_in_words_whether_models_are_kept() -> None:
    assert toy_policy().accept_models
    for accepts, words in ((True, "is kept in models/"), (False, "are refused (`accept-models`)")):
        assert sum(words in line for line in toy_policy(accept_models=accepts).in_words()) == 1
