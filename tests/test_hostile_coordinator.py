"""What a malicious coordinator would send to a deployed site: refused or harmless, and the ledger right afterwards.

Everything goes through the client app as Flower calls it, with the policy that a site has by default but for what the
toy run needs. Refused means: a code of the list and nothing else, no record read, no line added to the ledger.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import pickle
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deployed_site import CHEAP, CONFIG, OPEN, instruction, round_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from test_ledger_faults import check_chain
from torch import Tensor, nn
from toy_federation import PROMPTS, make_sites, toy_config, toy_policy

import client.gate
import client.site
from client.account import SiteAccount
from client.app import make_app
from client.enrolment import create_site
from client.policy import SitePolicy
from client.settings import SiteConfig
from client.site import MOST_PENDING, Site, SiteRefusal, forget_site, padded_rows
from shared.config import RunConfig, Scalar
from shared.data import open_dataset
from shared.fakes import FakeBank
from shared.models import DISCRIMINATORS, build_discriminator, flat_parameters, parameter_count
from shared.models.toy_discriminator import ToyDiscriminator
from shared.moments import CLIPPING_NORM as MOMENT_NORM
from shared.moments import MomentFeatures, moment_size
from shared.privacy.budget import Lifetime
from shared.privacy.entropy import SystemEntropy
from shared.privacy.ledger import Lineage
from shared.privacy.plan import make_plan
from shared.records import (
    HEAD_BYTES,
    PROTOCOL_VERSION,
    RAW,
    Refusal,
    RefusalCode,
    RoundInstruction,
    SiteReply,
    decode_reply,
    encode_instruction,
    unpack_envelope,
)

MODEL = build_discriminator(CONFIG, embedding_dim=CONFIG.text.dim)
SIZE = parameter_count(MODEL)
FAKES = FakeBank(np.zeros((8, 8, 8, 3), np.uint8), np.zeros(8, np.int32))
LEDGER = "lineages/of-site-0/ledger.jsonl"


@pytest.fixture(autouse=True)
def flower_process() -> Any:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    client.site._SITES.clear()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (site,) = make_sites(tmp_path_factory.mktemp("hostile"), sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    open_dataset(site / "data.npz", config=CONFIG.data, cache_dir=site / "cache")
    return site


@pytest.fixture
def site(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "site-0")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every time that records are opened."""
    seen: list[Any] = []
    real = client.site.open_dataset
    monkeypatch.setattr(client.site, "open_dataset", lambda *a, **k: (seen.append(a), real(*a, **k))[1])
    return seen


def sent(site: Path, asked: RoundInstruction | RecordDict, *, kind: str = "train") -> RecordDict:
    """What leaves, as Flower gets it."""
    records = asked if isinstance(asked, RecordDict) else encode_instruction(asked)
    context = Context(1, 5, {"site-dir": str(site), "partition-id": 0}, RecordDict(), {})
    message = make_app()(Message(records, 5, kind), context)
    assert not message.has_error()
    return message.content


def ask(site: Path, asked: RoundInstruction | RecordDict, **more: Any) -> SiteReply | Refusal:
    return decode_reply(sent(site, asked, **more))


def reply_of(site: Path, asked: RoundInstruction | RecordDict, **more: Any) -> SiteReply:
    reply = ask(site, asked, **more)
    assert isinstance(reply, SiteReply), (reply, (site / "site.log").read_text())
    return reply


def code_of(site: Path, asked: RoundInstruction | RecordDict, **more: Any) -> RefusalCode:
    reply = ask(site, asked, **more)
    assert isinstance(reply, Refusal)
    return reply.code


def entries(site: Path, kind: str | None = None, run: str | None = None) -> list[dict[str, Any]]:
    found = check_chain(site / LEDGER)
    return [e for e in found if kind in (None, e["kind"]) and run in (None, e.get("run"))]


def wire(records: RecordDict) -> bytes:
    return b"".join(part.deflate() for _, part in sorted(get_all_nested_objects(records).items()))


def set_policy(site: Path, **changes: Any) -> None:
    (site / "policy.toml").write_text(toy_policy(**{**OPEN, **changes}).to_toml())


# ---- settings


def of_table(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """An instruction's config that no `RunConfig` can be made of, under its own digest."""
    table = json.loads(CONFIG.to_json())
    change(table)
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return {"config_json": text, "config_digest": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("privacy", {"noise-multiplier": 0.01}), ("privacy", {"sigma": 0.01}), ("privacy", {"sensitivity": 1e-9}),
        ("privacy", {"clipping-norm": 1e9}), ("privacy", {"clipping-norm": 0.0}), ("privacy", {"clipping-norm": -4.0}),
        ("privacy", {"clipping-norm": math.inf}), ("privacy", {"clipping-norm": math.nan}),
        ("privacy", {"sampling-rate": 1.5}), ("privacy", {"target-epsilon": 1e9}), ("privacy", {"delta": 1.0}),
        ("privacy", {"retry-slack": -4}), ("privacy", {"noise": "distributed"}), ("privacy", {"noise": "none"}),
        ("privacy", {"unit": "pixel"}), ("privacy", {"reserved-steps": 1}), ("privacy", {"delta": "1e-5"}),
        ("federation", {"local-steps": 0}), ("federation", {"rounds": 0}), ("federation", {"expected-batch-size": 1e9}),
        ("federation", {"sites": True}), ("discriminator", {"loss": "memorise"}), ("discriminator", {"gain": 1e9}),
        ("discriminator-optimizer", {"name": "exfiltrate"}), ("compute", {"code": "import os"}),
        ("data", {"path": "/etc"}), ("plan", {"noise-multiplier": 0.01}), ("site", {"slot-seconds": 0}),
    ],
)  # fmt: skip
def test_settings_that_no_run_may_have_are_refused(
    section: str, values: dict[str, Any], site: Path, opened: list[Any]
) -> None:
    asked = round_of(**of_table(lambda table: table.setdefault(section, {}).update(values)))
    assert code_of(site, asked) == RefusalCode.CONFIG
    assert not opened
    assert [entry["kind"] for entry in entries(site)] == ["opened"]


@pytest.mark.parametrize(
    ("changes", "policy", "code"),
    [
        ({"privacy.sampling-rate": 0.26}, {"max_sampling_rate": 0.25}, RefusalCode.POLICY),
        ({"privacy.target-epsilon": 7.0}, {"min_noise_multiplier": 50.0}, RefusalCode.POLICY),
        ({"privacy.name": "none"}, {}, RefusalCode.POLICY),
        ({"privacy.kernel": "opacus"}, {}, RefusalCode.POLICY),
        ({"privacy.unit": "subject"}, {}, RefusalCode.POLICY),
        ({"federation.rounds": 2001}, {}, RefusalCode.POLICY),
        ({"federation.local-steps": 33}, {}, RefusalCode.POLICY),
        ({"federation.name": "another"}, {}, RefusalCode.POLICY),
        ({"federation.sites": 100}, {"min_expected_batch": 16.0}, RefusalCode.POLICY),
        ({"discriminator.name": "conv"}, {}, RefusalCode.POLICY),
        ({"discriminator.name": "os:system"}, {}, RefusalCode.POLICY),
        ({"discriminator.hidden": 2048, "discriminator.width": 512, "discriminator.pooled-side": 4}, {},
         RefusalCode.POLICY),
        ({"text.encoder": "transformers", "text.path": "/etc"}, {}, RefusalCode.POLICY),
        ({"text.encoder": "transformers", "text.path": "evil/model"}, {}, RefusalCode.POLICY),
        ({"text.path": "/etc/passwd"}, {}, RefusalCode.POLICY),
        ({"text.encoder": "transformers:/models/ours"}, {"text_encoders": ["transformers:/models/ours"]},
         RefusalCode.CONFIG),
        ({"discriminator.name": "os:system"}, {"models": ["*"]}, RefusalCode.CONFIG),
        ({"privacy.delta": 0.04}, {}, RefusalCode.PLAN),
        ({"privacy.target-epsilon": 1.9}, {"max_run_epsilon": 1.5}, RefusalCode.POLICY),
        ({"privacy.target-epsilon": 900.0}, {}, RefusalCode.SITE),  # beyond the lifetime: as all that budgets decide
        ({}, {"code": ["0" * 64]}, RefusalCode.RELEASE),
        ({}, {"aggregator_keys": ["a1b2"]}, RefusalCode.POLICY),
    ],
)  # fmt: skip
def test_a_run_that_the_policy_forbids_is_refused_before_a_record_is_read(
    changes: dict[str, Scalar], policy: dict[str, Any], code: RefusalCode, site: Path, opened: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reached: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *a: reached.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: reached.append(a))
    load = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *a: reached.append(name) if name == "transformers" else load(name, *a)
    )
    set_policy(site, **policy)
    config = CONFIG.replaced(changes)
    fakes = FAKES if config.federation.local_steps > 1 else None
    asked = instruction(CONFIG, config_json=config.to_json(), config_digest=config.digest, fakes=fakes)
    if code == RefusalCode.POLICY and "discriminator.hidden" in changes:
        model = build_discriminator(config, embedding_dim=config.text.dim)
        asked = instruction(config, weights=flat_parameters(model))
    assert code_of(site, asked) == code
    assert not opened
    assert not reached
    assert [entry["kind"] for entry in entries(site)] == ["opened"]


def test_no_plan_is_computed_of_a_run_that_the_policy_forbids(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a million rounds the accountants work for hours, and nobody at the site approved anything yet."""
    computed: list[RunConfig] = []
    monkeypatch.setattr(client.site, "make_plan", lambda config: (computed.append(config), make_plan(config))[1])
    long = toy_config({"federation.rounds": 1_000_000})
    assert code_of(site, instruction(long)) == RefusalCode.POLICY
    assert not computed
    reply_of(site, round_of(1))
    assert computed == [CONFIG]


def another(value: Scalar) -> Scalar:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 0.5 + 0.01 if isinstance(value, float) else f"{value}x"


def test_no_setting_may_change_while_a_run_lasts(site: Path, opened: list[Any]) -> None:
    reply_of(site, round_of(1))
    before, flat = (site / LEDGER).read_bytes(), CONFIG.to_flat()
    assert len(flat) > 60
    for name, value in flat.items():
        try:
            config = CONFIG.replaced({name: another(value)})
        except Exception:  # that no run may have: refused as well
            config = None
        if config is None:
            *path, key = name.split(".")

            def change(table: dict[str, Any], path: list[str] = path, key: str = key, value: Scalar = value) -> None:
                (table[path[0]] if path else table)[key] = another(value)

            asked = round_of(2, **of_table(change))
        else:
            fakes = FAKES if config.federation.local_steps > 1 else None
            asked = round_of(2, config_json=config.to_json(), config_digest=config.digest, fakes=fakes)
        expected = RefusalCode.MESSAGE if name == "data.image-size" and asked.fakes else RefusalCode.CONFIG
        assert code_of(site, asked) == expected, name
    for prompts in (PROMPTS.texts[:2], PROMPTS.texts[::-1], (*PROMPTS.texts, "another")):
        assert code_of(site, round_of(2, prompts=prompts)) == RefusalCode.CONFIG
    # The approved text under the digest of another, and the other way round.
    weaker = CONFIG.replaced({"privacy.clipping-norm": 400.0})
    assert code_of(site, round_of(2, config_json=weaker.to_json())) == RefusalCode.CONFIG
    assert code_of(site, round_of(2, config_digest=weaker.digest)) == RefusalCode.CONFIG
    assert (site / LEDGER).read_bytes() == before
    assert len(opened) == 1
    reply_of(site, round_of(2))


def test_a_run_under_the_name_of_another_is_refused(site: Path) -> None:
    reply_of(site, round_of(1))
    set_policy(site, federations=["simulation", "rival"])
    rival = CONFIG.replaced({"federation.name": "rival"})
    assert code_of(site, instruction(rival)) == RefusalCode.CONFIG
    assert len(entries(site, "run")) == 1


# ---- models


class WithStatistics(ToyDiscriminator):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.norm = nn.BatchNorm1d(4, affine=False)


class WithoutRunningStatistics(ToyDiscriminator):
    """Batch normalisation that keeps nothing: only what it does gives it away."""

    def forward(self, features: Tensor, conditioning: Tensor) -> Tensor:
        logits = super().forward(features, conditioning)
        return logits - logits.mean(dim=0)


class WithAMinibatchFeature(ToyDiscriminator):
    def forward(self, features: Tensor, conditioning: Tensor) -> Tensor:
        return super().forward(features, conditioning) + features.std(dim=0).mean()


class WithABuffer(ToyDiscriminator):
    """Remembers records, and the next release tells."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("seen", torch.zeros(1))


class WithAnotherLayer(ToyDiscriminator):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scale = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        (WithStatistics, "keeps batch statistics"), (WithoutRunningStatistics, "changes the logits of others"),
        (WithAMinibatchFeature, "changes the logits of others"), (WithABuffer, "is not a declared public constant"),
        (WithAnotherLayer, "parameters outside nn.Linear"),
    ],
)  # fmt: skip
def test_a_model_that_mixes_or_keeps_records_is_refused_before_one_is_read(
    planted: type, reason: str, site: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = round_of(1)
    monkeypatch.setitem(DISCRIMINATORS._entries, "toy", f"{__name__}:{planted.__name__}")
    assert code_of(site, asked) == RefusalCode.CONFIG
    assert reason in (site / "site.log").read_text()
    assert not opened
    assert [entry["kind"] for entry in entries(site)] == ["opened"]


# ---- weights


class Quiet(SystemEntropy):
    """The noise taken away and the rest made to repeat, to look at what the noise would have to hide."""

    def gaussian(self, size: int, std: float, *labels: int | str) -> np.ndarray:
        return np.zeros(size)

    def rng(self, *labels: int | str) -> np.random.Generator:
        return np.random.default_rng(0)


def crafted_weights() -> Mapping[str, np.ndarray]:
    rng, usual = np.random.default_rng(3), flat_parameters(MODEL)
    signs = rng.choice(np.array([-1, 1], np.float32), SIZE)
    largest = np.float32(3.4e38)
    return {
        "zero": np.zeros(SIZE, np.float32),
        "huge": np.full(SIZE, largest),
        "huge, of both signs": signs * largest,
        "square overflows": signs * np.float32(1e20),
        "large": usual * np.float32(1e6),
        "vanishing": signs * np.float32(1e-30),
        "subnormal": signs * np.float32(1e-44),
        "one": np.eye(1, SIZE, SIZE // 2, dtype=np.float32)[0] * largest,
    }


@pytest.mark.parametrize("name", crafted_weights())
def test_crafted_weights_are_answered_with_a_bounded_sum_under_the_whole_noise(name: str, site: Path) -> None:
    weights, plan = crafted_weights()[name], make_plan(CONFIG)
    with_noise = reply_of(site, round_of(1, weights=weights)).envelope
    noised = unpack_envelope(with_noise, length=SIZE)[0].astype(np.float64) * plan.lattice
    forget_site(site)
    quiet = Site(site, simulated=False, entropy=Quiet()).answer(round_of(2, weights=weights)).envelope
    clean = unpack_envelope(quiet, length=SIZE)[0].astype(np.float64) * plan.lattice
    assert np.isfinite(clean).all()
    assert np.linalg.norm(clean) <= 40 * plan.sensitivity(SIZE)  # of 40 records
    # What was added is the plan's noise and no less, however small or large the gradients were. Both answers drew the
    # same records (q = 1) and only prompts may differ, which moves the sum by 2 C a record at the very most.
    std = plan.noise_multiplier * plan.sensitivity(SIZE)
    noise = noised - clean
    z = (np.sum((noise / std) ** 2) - SIZE) / math.sqrt(2 * SIZE)
    assert z > -5.0  # false alarm 3e-7; noise of 4/5 of the size gives less than -6
    assert [entry["noise_multiplier"] for entry in entries(site, "charge")] == [plan.noise_multiplier] * 2


def neighbours(tmp_path: Path) -> tuple[Path, Path]:
    """Two deployed sites whose data differ by one outlier, the last record of the first."""
    folders = []
    for name in ("with", "without"):
        (site,) = make_sites(tmp_path / name, sizes=(40,), seed=None, policy=toy_policy(**OPEN))
        with np.load(site / "data.npz") as data:
            arrays = dict(data)
        arrays["x_train"][-1] = np.tile(np.array([255, 0], np.uint8), (8, 8 * 3 // 2)).reshape(8, 8, 3)
        np.savez(site / "data.npz", **arrays)
        if name == "without":
            np.save(site / "rows.npy", np.arange(39))
            SiteConfig.read(site).model_copy(update={"indices": "rows.npy"}).write(site)
        folders.append(site)
    return folders[0], folders[1]


def aimed_weights(target: np.ndarray) -> Mapping[str, np.ndarray]:
    """Weights whose first layer answers to the target's picture, as large as they can be made."""
    found = {name: weights for name, weights in crafted_weights().items() if name not in ("zero", "one")}
    for scale in (1.0, 30.0, 1e3, 1e6, 1e12):
        model = build_discriminator(CONFIG, embedding_dim=CONFIG.text.dim)
        with torch.no_grad():
            first = model.convolutions[0]
            patch = torch.from_numpy(target[2:6, 2:6].astype(np.float32) / 127.5 - 1)
            row = patch.reshape(-1) if first.weight.shape[1] == patch.numel() else torch.ones(first.weight.shape[1])
            first.weight.copy_(scale * row.expand_as(first.weight))
            first.bias.fill_(-scale * float(row.abs().sum()) / 4)
            model.output.weight.mul_(-scale)
        found[f"aimed at {scale:g}"] = flat_parameters(model)
    return found


def test_no_weights_make_one_record_move_the_answer_beyond_the_sensitivity(tmp_path: Path) -> None:
    """Noise off, in float64: the whole path from the message to the integers that leave."""
    config = toy_config({**CHEAP, "federation.rounds": 40})
    plan, folders = make_plan(config), neighbours(tmp_path)
    with np.load(folders[0] / "data.npz") as data:
        target = data["x_train"][-1]
    sites = [Site(folder, simulated=False, entropy=Quiet()) for folder in folders]
    moved, everything = {}, aimed_weights(target)
    for server_round, (name, weights) in enumerate(everything.items(), 1):
        asked = instruction(config, server_round=server_round, weights=weights, prompts=("a photo of a dog",))
        payloads = [unpack_envelope(one.answer(asked).envelope, length=SIZE)[0] for one in sites]
        difference = (payloads[0].astype(np.float64) - payloads[1].astype(np.float64)) * plan.lattice
        moved[name] = float(np.linalg.norm(difference))
        assert moved[name] <= plan.sensitivity(SIZE), name
    # And the attack is one: with some of them the record is clipped and all of C is in the answer.
    assert max(moved.values()) > 0.99 * plan.clipping_norm, moved


@pytest.mark.parametrize("random", [0, 100])
def test_one_record_moves_the_moments_by_no_more_than_they_are_charged_for(tmp_path: Path, random: int) -> None:
    config = toy_config({**CHEAP, "warm-start.enabled": True, "warm-start.random-features": random})
    asked = instruction(config, kind="moments", server_round=0)
    length = moment_size(MomentFeatures((8, 8, 3), random).size, config.text.dim)
    payloads = [
        unpack_envelope(Site(folder, simulated=False, entropy=Quiet()).answer(asked).envelope, length=length)[0]
        for folder in neighbours(tmp_path)
    ]
    lattice = 2.0**-24  # of a norm of 1
    difference = np.linalg.norm((payloads[0] - payloads[1]).astype(np.float64)) * lattice
    assert 0.1 < difference <= MOMENT_NORM * (1 + 1e-6) + math.sqrt(length) * lattice


# ---- messages


def with_weights(array: Array | None = None, **parts: Any) -> RecordDict:
    records = encode_instruction(round_of(1))
    if array is not None:
        records["weights"] = ArrayRecord({"values": array})
    for name, part in parts.items():
        records[name] = part
    return records


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


FLOATS = np.zeros(SIZE, "<f4").tobytes()


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="<f4", shape=(SIZE - 1,), stype=RAW, data=FLOATS),
        Array(dtype="<f4", shape=(1, SIZE), stype=RAW, data=FLOATS),
        Array(dtype="<f4", shape=(), stype=RAW, data=FLOATS),
        Array(dtype="<f4", shape=(-SIZE,), stype=RAW, data=FLOATS),
        Array(dtype="<f4", shape=(2**62, 4), stype=RAW, data=b""),
        Array(dtype="<f4", shape=(2**40,), stype=RAW, data=FLOATS),
        Array(dtype="<f4", shape=(0,), stype=RAW, data=b""),
        Array(dtype="<f8", shape=(SIZE,), stype=RAW, data=FLOATS * 2),
        Array(dtype="|O", shape=(SIZE,), stype=RAW, data=FLOATS),
        Array(dtype="<f4", shape=(SIZE,), stype="numpy.ndarray", data=FLOATS),
        Array(dtype="<f4", shape=(SIZE,), stype=RAW, data=np.full(SIZE, np.nan, "<f4").tobytes()),
        Array(dtype="<f4", shape=(SIZE,), stype=RAW, data=np.full(SIZE, np.inf, "<f4").tobytes()),
        Array(dtype="<f4", shape=(SIZE,), stype=RAW, data=FLOATS[:-4] + np.float32(-np.inf).tobytes()),
        Array(np.zeros(SIZE, np.float32)),  # Flower's own form, with numpy's header
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}-{array.stype}",
)
def test_weights_of_another_form_are_refused(array: Array, site: Path, opened: list[Any]) -> None:
    assert code_of(site, with_weights(array)) == RefusalCode.MESSAGE
    assert not opened
    assert not entries(site, "charge")


def test_a_pickle_is_never_opened(site: Path, tmp_path: Path) -> None:
    data = pickle.dumps(Opens(str(tmp_path / "opened")))
    for dtype, stype in (("|O", "numpy.ndarray"), ("<f4", RAW), ("|u1", "pickle"), ("|O", RAW)):
        array = Array(dtype=dtype, shape=(len(data) // 4,), stype=stype, data=data)
        assert code_of(site, with_weights(array)) == RefusalCode.MESSAGE
    assert not (tmp_path / "opened").exists()
    pickle.loads(data).close()
    assert (tmp_path / "opened").exists()  # it would have


@pytest.mark.parametrize(
    "parts",
    [
        {"extra": ConfigRecord({"epsilon": 8.0})}, {"extra": MetricRecord({"loss": 1.0})},
        {"reply": ConfigRecord({"version": PROTOCOL_VERSION})}, {"weights": ConfigRecord({"values": 1.0})},
        {"weights": ArrayRecord({})}, {"instruction": ConfigRecord({})}, {"instruction": MetricRecord({"version": 2})},
        {"fakes": ArrayRecord({"images": Array(np.zeros(3))})},
    ],
)  # fmt: skip
def test_records_that_do_not_belong_are_refused(parts: dict[str, Any], site: Path) -> None:
    assert code_of(site, with_weights(**parts)) == RefusalCode.MESSAGE
    assert [entry["kind"] for entry in entries(site)] == ["opened"]


def changed(**values: Any) -> RecordDict:
    records = encode_instruction(round_of(1))
    table = dict(records["instruction"].items())
    table.update({name.replace("_", "-"): value for name, value in values.items()})
    records["instruction"] = ConfigRecord({name: value for name, value in table.items() if value is not None})
    return records


@pytest.mark.parametrize(
    "values",
    [
        {"version": PROTOCOL_VERSION - 1}, {"version": PROTOCOL_VERSION + 1}, {"version": str(PROTOCOL_VERSION)},
        {"version": float(PROTOCOL_VERSION)}, {"version": True}, {"version": None}, {"kind": "evaluate"},
        {"kind": None}, {"run_id": "../../etc/cron.d/x"}, {"run_id": "a/b"}, {"run_id": ""}, {"run_id": "a" * 65},
        {"run_id": "a\n"}, {"server_round": -1}, {"server_round": 2**40}, {"server_round": 1.0}, {"attempt": 0},
        {"heads": ["site-0=" + "0" * 63]}, {"heads": ["site-0=" + "0" * 64] * 2}, {"heads": [1]}, {"prompts": []},
        {"prompts": [1, 2]}, {"prompts": ["a"] * (2**16 + 1)}, {"prompts": ["a" * 8193]},
        {"prompts": ["a" * 8000] * 2100}, {"prompts": [b"a"]}, {"config_json": "a" * (2**16 + 1)},
        {"config_digest": "A" * 64}, {"noise_multiplier": 0.1},
    ],
    ids=lambda values: "{}={:.20}".format(*next(iter((k, str(v)) for k, v in values.items()))),
)  # fmt: skip
def test_an_instruction_of_another_form_is_refused(values: dict[str, Any], site: Path) -> None:
    began = time.monotonic()
    assert code_of(site, changed(**values)) == RefusalCode.MESSAGE
    assert time.monotonic() - began < 5
    assert [entry["kind"] for entry in entries(site)] == ["opened"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60_000, '{"a":' * 10_000 + "1" + "}" * 10_000, '{"seed":' + "9" * 60_000 + "}", "1" * 60_000, '"\\ud800"',
        '{"privacy":' * 5_000, "NaN", "[1e999]", '{"seed":' + "9" * 4_000 + "}", "\0" * 1000,
    ],
    ids=lambda text: f"{text[:12]!r}",
)  # fmt: skip
def test_settings_that_would_exhaust_a_parser_are_refused_at_once(text: str, site: Path) -> None:
    began = time.monotonic()
    assert code_of(site, round_of(config_json=text)) == RefusalCode.CONFIG
    assert time.monotonic() - began < 5


def test_a_figure_that_no_float_holds_is_a_refusal_and_no_crash(site: Path) -> None:
    asked = round_of(**of_table(lambda table: table["federation"].update({"published-records": 10**400})))
    assert code_of(site, asked) in (RefusalCode.CONFIG, RefusalCode.SITE)
    assert [entry["kind"] for entry in entries(site)] == ["opened"]


@pytest.mark.parametrize("prompts", [("a\nb",), ("",), (" a",), ("a", "a"), ("\ud800",), ("a\0b",), ("a" * 513,)])
def test_prompts_that_are_none_are_refused(prompts: tuple[str, ...], site: Path, opened: list[Any]) -> None:
    assert code_of(site, round_of(prompts=prompts)) == RefusalCode.MESSAGE
    assert not opened
    assert not entries(site, "run")


# ---- again and again


def test_an_instruction_that_is_sent_again_gets_the_same_bytes_and_is_charged_once(site: Path) -> None:
    first = reply_of(site, round_of(1))
    head = {"site-0": first.envelope[-HEAD_BYTES:].hex()}
    for attempt in range(2, 102):
        assert reply_of(site, round_of(1, attempt=attempt, heads=head if attempt % 2 else {})) == first
    forget_site(site)
    assert reply_of(site, round_of(1)) == first
    assert len(entries(site, "charge")) == len(entries(site, "commit")) == 1
    assert len(entries(site, "resent")) == 101


def test_rounds_left_out_and_again_are_each_charged_until_nothing_is_reserved(site: Path) -> None:
    rng = np.random.default_rng(0)
    rounds = (1, 1, 3, 3, 3, 4, 4)
    asked = [round_of(server_round, weights=rng.standard_normal(SIZE).astype(np.float32)) for server_round in rounds]
    envelopes = [reply_of(site, each).envelope for each in asked]
    assert len(set(envelopes)) == 7
    assert [entry["server_round"] for entry in entries(site, "charge")] == list(rounds)
    for each in (asked[-2], round_of(4), round_of(4, attempt=2)):  # only the very last reply is kept
        assert code_of(site, each) == RefusalCode.SITE
    for each in (*asked[:-2], round_of(1), round_of(2), round_of(3, attempt=9)):
        assert code_of(site, each) == RefusalCode.MESSAGE
    assert reply_of(site, asked[-1]).envelope == envelopes[-1]
    assert sum(entry["steps"] for entry in entries(site, "charge")) == 7
    (run,) = entries(site, "run")
    assert run["plan"]["reserved_steps"] == 7


def test_moments_are_released_once_whatever_is_changed_in_the_question(site: Path) -> None:
    config = toy_config({**CHEAP, "warm-start.enabled": True})
    asked = instruction(config, kind="moments", server_round=0)
    first = reply_of(site, asked, kind="train.moments")
    assert reply_of(site, asked, kind="train.moments") == first
    other = instruction(config, kind="moments", server_round=0, weights=np.ones(SIZE, np.float32))
    assert code_of(site, other, kind="train.moments") == RefusalCode.SITE
    reply_of(site, instruction(config))
    assert code_of(site, asked, kind="train.moments") == RefusalCode.MESSAGE  # no longer kept, nor in place
    assert [entry["release"] for entry in entries(site, "charge")] == ["moments", "gradient"]


def test_new_names_of_one_run_are_priced_anew_until_the_lifetime_is_used_up(site: Path) -> None:
    codes = [ask(site, round_of(run_id=f"run-{place}")) for place in range(12)]
    answered = [isinstance(reply, SiteReply) for reply in codes]
    assert answered == [True] * sum(answered) + [False] * (12 - sum(answered))
    assert {reply.code for reply in codes if isinstance(reply, Refusal)} == {RefusalCode.SITE}
    runs = entries(site, "run")
    assert len(runs) == sum(answered) == 3  # of epsilon 2.3 each, within 8; and of 2.8e-4 each, within 1e-3
    assert sum(run["epsilon"] for run in runs) <= 8.0
    assert sum(run["delta"] for run in runs) <= 1e-3
    before = (site / LEDGER).read_bytes()
    for place in range(50):
        assert code_of(site, round_of(run_id=f"more-{place}")) == RefusalCode.SITE
    assert (site / LEDGER).read_bytes() == before


def test_recorded_instructions_that_come_again_by_turns_use_nothing_up(site: Path) -> None:
    """A relay holds whatever the server signed; the site keeps only its last reply."""
    recorded = [round_of(1), round_of(2), round_of(2, attempt=2, weights=2 * flat_parameters(MODEL))]
    for asked in recorded:
        last = wire(sent(site, asked))
    for _ in range(3):
        assert [code_of(site, asked) for asked in recorded[:2]] == [RefusalCode.MESSAGE] * 2
        assert wire(sent(site, recorded[2])) == last
    forget_site(site)  # also after a restart
    assert code_of(site, recorded[1]) == RefusalCode.MESSAGE
    assert [(e["server_round"], e["attempt"]) for e in entries(site, "charge")] == [(1, 1), (2, 1), (2, 2)]
    # The very instruction that was answered last is answered as it was, whatever its attempt says.
    assert wire(sent(site, replace(recorded[2], attempt=1))) == last
    reply_of(site, round_of(3))
    assert len(entries(site, "charge")) == 4


# ---- approval


def test_before_a_person_approves_nothing_is_read_and_nothing_reserved(site: Path, opened: list[Any]) -> None:
    set_policy(site, approve_each_run=True)
    for _ in range(3):
        assert code_of(site, round_of(1)) == RefusalCode.APPROVAL
    assert not opened
    assert [entry["kind"] for entry in entries(site)] == ["opened"]
    account = SiteAccount(site, store=site / "lineages", lineage="of-site-0")
    account.decide("run", "approved")
    # Approved is one question, not a name.
    for other in (
        CONFIG.replaced({"federation.rounds": 3}), CONFIG.replaced({"privacy.target-epsilon": 7.0}),
    ):  # fmt: skip
        assert code_of(site, instruction(other)) == RefusalCode.APPROVAL
    assert code_of(site, round_of(1)) == RefusalCode.APPROVAL  # the name stands for another question now
    account.decide("run", "approved")
    reply_of(site, round_of(1))
    account.decide("run", "denied")  # and a person may change her mind
    assert code_of(site, round_of(2)) == RefusalCode.DENIED
    assert code_of(site, round_of(1)) == RefusalCode.DENIED
    assert len(entries(site, "charge")) == 1


@pytest.mark.slow
def test_new_names_do_not_pile_up_until_somebody_decides(site: Path) -> None:
    set_policy(site, approve_each_run=True)
    assert code_of(site, round_of(run_id="first")) == RefusalCode.APPROVAL
    for place in range(MOST_PENDING + 30):
        assert code_of(site, round_of(run_id=f"run-{place}")) == RefusalCode.APPROVAL
    assert len(list((site / "runs").iterdir())) == MOST_PENDING
    assert "is not noted: 100 proposed runs wait" in (site / "site.log").read_text()
    account = SiteAccount(site, store=site / "lineages", lineage="of-site-0")
    account.decide("first", "approved")  # which the others did not push out, and which makes room for one
    reply_of(site, round_of(run_id="first"))
    assert code_of(site, round_of(run_id="late")) == RefusalCode.APPROVAL
    assert account.proposed("late") is not None
    assert code_of(site, round_of(run_id="later")) == RefusalCode.APPROVAL
    assert account.proposed("later") is None


def two_of_one_lineage(tmp_path: Path, **policy: Any) -> tuple[Path, Path]:
    """Two sites whose records are one lineage; the second has a policy of its own."""
    store = str(tmp_path / "store")
    (first,) = make_sites(tmp_path, sizes=(40,), seed=None, policy=toy_policy(**OPEN), store=store)
    second = tmp_path / "copy/site-1"
    settings = SiteConfig.read(first).model_copy(update={"site_id": "site-1"})
    client.site.forget_site(first)
    create_site(
        second, settings, toy_policy(**{**OPEN, **policy}), Lineage("of-site-0", "example", Lifetime(8.0, 1e-3))
    )  # fmt: skip
    shutil.copy(first / "data.npz", second / "data.npz")
    return first, second


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"approve_each_run": True}, RefusalCode.APPROVAL), ({"max_run_epsilon": 1.0}, RefusalCode.POLICY),
        ({"max_epsilon": 1.0}, RefusalCode.SITE), ({"delta": 1e-6}, RefusalCode.SITE),
    ],
)  # fmt: skip
def test_a_run_that_another_site_of_the_lineage_admitted_is_not_admitted_here_by_that(
    policy: dict[str, Any], code: RefusalCode, tmp_path: Path, opened: list[Any]
) -> None:
    first, second = two_of_one_lineage(tmp_path, **policy)
    reply_of(first, round_of(1))
    opened.clear()
    assert code_of(second, round_of(1)) == code
    assert not opened
    kinds = [entry["kind"] for entry in check_chain(tmp_path / "store/of-site-0/ledger.jsonl")]
    assert kinds == ["opened", "run", "charge", "commit"]
    reply_of(first, round_of(2))


# ---- what the noise and the padded work are of


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the training of each round was given."""
    seen: list[Any] = []
    real = client.site.site_gradient
    monkeypatch.setattr(client.site, "site_gradient", lambda *a, **k: (seen.append(k), real(*a, **k))[1])
    return seen


def test_the_noise_is_that_of_the_plan_that_was_reserved_not_of_another_run_with_the_same_settings(
    site: Path, trained: list[Any]
) -> None:
    reply_of(site, round_of(1))
    account = SiteAccount(site, store=site / "lineages", lineage="of-site-0")
    terms, price = account.ledger.runs["run"].terms, account.ledger.runs["run"].price
    louder = replace(terms, run="louder", plan=replace(terms.plan, noise_multiplier=9.0))
    with account.locked():
        account.ledger.reserve(louder, price)
    reply_of(site, round_of(1, run_id="louder"))
    reply_of(site, round_of(2))
    assert [given["plan"].noise_multiplier for given in trained] == [terms.plan.noise_multiplier, 9.0,
                                                                    terms.plan.noise_multiplier]  # fmt: skip


def test_the_work_is_padded_by_what_the_site_publishes_now(site: Path, trained: list[Any]) -> None:
    """A cap of fewer units would cut draws that the run's delta does not pay for."""
    reply_of(site, round_of(1))
    forget_site(site)
    SiteConfig.read(site).model_copy(update={"published_records": 400}).write(site)
    reply_of(site, round_of(2))
    (run,) = entries(site, "run")
    assert [given["rows_cap"] for given in trained] == [run["rows_cap"], 400] == [40, 400]
    price = SiteAccount(site, store=site / "lineages", lineage="of-site-0").ledger.runs["run"].price
    assert padded_rows(make_plan(CONFIG), price, 400) == 400


# ---- prompts


def test_prompts_that_are_captions_get_the_same_answer_as_any(tmp_path: Path) -> None:
    """A record whose caption the coordinator guessed has other wrong prompts, inside its one clip and nowhere else."""
    plan, folders = make_plan(CONFIG), neighbours(tmp_path)
    sites = [Site(folder, simulated=False, entropy=Quiet()) for folder in folders]
    dataset = open_dataset(folders[0] / "data.npz", config=CONFIG.data, cache_dir=folders[0] / "cache")
    captions = sorted({caption for texts in dataset.captions for caption in texts})
    for place, prompts in enumerate([tuple(captions), (captions[0],), (captions[1],)]):
        asked = instruction(CONFIG, run_id=f"run-{place}", prompts=prompts)
        replies = [one.answer(asked) for one in sites]
        assert len({len(reply.envelope) for reply in replies}) == 1
        if len(prompts) == 1:  # with one prompt nobody draws, and neighbours stay neighbours
            payloads = [unpack_envelope(reply.envelope, length=SIZE)[0] for reply in replies]
            moved = np.linalg.norm((payloads[0] - payloads[1]).astype(np.float64)) * plan.lattice
            assert 0 < moved <= plan.sensitivity(SIZE)


def test_very_many_prompts_are_taken_in_bounded_time(site: Path) -> None:
    began = time.monotonic()
    reply_of(site, round_of(prompts=tuple(f"a photo of {place}" for place in range(2**13))))
    assert time.monotonic() - began < 20


# ---- what refusals and times tell


def test_a_used_up_budget_looks_like_data_that_cannot_be_read(site: Path, tmp_path: Path, opened: list[Any]) -> None:
    unreadable = shutil.copytree(site, tmp_path / "unreadable/site-0")
    (unreadable / "data.npz").write_bytes(b"a photo of a red")
    shutil.rmtree(unreadable / "cache")
    for place in range(3):
        reply_of(site, round_of(run_id=f"run-{place}"))
    opened.clear()
    exhausted = sent(site, round_of(run_id="one-more"))
    assert not opened, "a record was read for a run that does not fit"
    broken = sent(unreadable, round_of(run_id="one-more"))
    assert opened
    assert wire(exhausted) == wire(broken)
    assert decode_reply(broken) == Refusal("site-0", RefusalCode.SITE)
    # By how much a run does not fit is not told; a run that fits is a run, and stays reserved.
    for epsilon in (1.9, 3.0, 8.0, 900.0):
        config = toy_config({**CHEAP, "privacy.target-epsilon": epsilon})
        assert wire(sent(site, instruction(config, run_id=f"probe-{epsilon}"))) == wire(exhausted)


SECRET = "an unmistakable crimson walrus"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET), MemoryError(SECRET), RecursionError(SECRET), OSError(2, SECRET, SECRET),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), SiteRefusal(RefusalCode.SITE, SECRET),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_no_text_of_a_failure_leaves(error: Exception, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for place in ("site_gradient", "prepare_records"):
        monkeypatch.setattr(client.site, place, fail)
        forget_site(site)
        records = sent(site, round_of(1))
        assert set(records) == {"refusal"}
        assert set(records["refusal"]) == {"version", "site-id", "code"}
        assert decode_reply(records) == Refusal("site-0", RefusalCode.SITE)
        assert b"walrus" not in wire(records)
    assert "walrus" not in (site / "refusals.jsonl").read_text()


def test_replies_of_sites_of_different_size_are_of_one_length(tmp_path: Path) -> None:
    sites = make_sites(tmp_path, sizes=(40, 3), seed=None, policy=toy_policy(**OPEN))
    lengths = set()
    for site in sites:
        records = sent(site, round_of(1))
        lengths.add(len(wire(records)))
        assert len(reply_of(site, round_of(1)).envelope) == 8 * SIZE + HEAD_BYTES
    assert len(lengths) == 1


class Clock:
    """Time that passes only where somebody says so."""

    def __init__(self) -> None:
        self.now, self.began = 1000.0, 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


@pytest.mark.parametrize(("works", "slots"), [(0.0, 1), (0.3, 1), (9.99, 1), (10.01, 2), (47.0, 5)])
@pytest.mark.parametrize("ending", ["a reply", "a failure", "no data"])
def test_an_answer_leaves_at_the_end_of_a_slot_however_long_it_took_and_however_it_ended(
    ending: str, works: float, slots: int, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SiteConfig.read(site).model_copy(update={"slot_seconds": 10.0}).write(site)
    clock, real = Clock(), client.site.site_gradient
    monkeypatch.setattr(client.gate, "time", clock)

    def slow(*arguments: Any, **named: Any) -> Any:
        clock.sleep(works)
        if ending == "a failure":
            raise RuntimeError
        return real(*arguments, **named)

    def slow_to_open(*_: Any, **__: Any) -> Any:
        clock.sleep(works)
        raise OSError

    monkeypatch.setattr(client.site, "site_gradient", slow)
    if ending == "no data":
        monkeypatch.setattr(client.site, "open_dataset", slow_to_open)
    reply = ask(site, round_of(1))
    assert isinstance(reply, SiteReply) == (ending == "a reply")
    assert clock.now - clock.began == pytest.approx(10.0 * slots)
    assert ("incident: the answer missed" in (site / "site.log").read_text()) == (slots > 1)
    began = clock.now
    ask(site, round_of(run_id="another", config_digest="0" * 64))  # what public quantities decide waits as well
    assert clock.now - began == pytest.approx(10.0)


# ---- one record more or less (taint)


def test_of_one_record_nothing_is_seen_but_inside_the_noised_part_of_an_envelope(tmp_path: Path) -> None:
    """Noise off, and a whole conversation: replies, repeats, refusals; then the ledgers, line by line."""
    conversations, ledgers, refusals, logs = [], [], [], []
    for folder in neighbours(tmp_path):
        client.site._SITES[(folder.resolve(), False)] = Site(folder, simulated=False, entropy=Quiet())
        set_policy(folder, max_run_epsilon=3.0)
        asked = [
            round_of(1), round_of(2), round_of(2), round_of(5), round_of(2, config_digest="0" * 64),
            instruction(CONFIG.replaced({"privacy.target-epsilon": 4.0}), run_id="dear"),
            *(round_of(1, run_id=f"run-{place}") for place in range(5)),
        ]  # fmt: skip
        conversations.append([sent(folder, each) for each in asked])
        ledgers.append([json.loads(line) for line in (folder / LEDGER).read_text().splitlines()])
        refusals.append([json.loads(line) for line in (folder / "refusals.jsonl").read_text().splitlines()])
        logs.append(len((folder / "refusals.jsonl").read_bytes()))
    different = 0
    for first, second in zip(*conversations, strict=True):
        assert len(wire(first)) == len(wire(second))
        answers = [decode_reply(records) for records in (first, second)]
        if isinstance(answers[0], Refusal):
            assert wire(first) == wire(second)
            continue
        assert isinstance(answers[1], SiteReply)
        assert answers[0].envelope[-HEAD_BYTES:] == answers[1].envelope[-HEAD_BYTES:]
        different += answers[0].envelope != answers[1].envelope
        for records in (first, second):  # and without the envelope they are the same bytes
            del records["envelope"]
        assert wire(first) == wire(second)
    assert different == 5  # the record does show, where the noise would be: in 3 replies of one run and 2 of others
    about_files = {"hash", "previous", "time", "clock_behind", "sha256", "nonce"}
    plain = [[{k: v for k, v in entry.items() if k not in about_files} for entry in ledger] for ledger in ledgers]
    assert plain[0] == plain[1]
    # Nonces of charges are the same here, since `Quiet` repeats: what differs comes from elsewhere than the records.
    assert [e.get("nonce") for e in ledgers[0][1:]] == [e.get("nonce") for e in ledgers[1][1:]]
    assert [{**line, "time": ""} for line in refusals[0]] == [{**line, "time": ""} for line in refusals[1]]
    assert logs[0] == logs[1]


def test_no_test_here_runs_under_a_policy_that_is_more_open_than_it_says() -> None:
    """What the toy run needs, and no more (PRIVACY rule 24)."""
    policy, default = toy_policy(**OPEN), SitePolicy(max_epsilon=8.0, delta=1e-3)
    differing = {name for name in SitePolicy.model_fields if getattr(policy, name) != getattr(default, name)}
    assert differing == {
        "min_noise_multiplier", "min_expected_batch", "max_sampling_rate", "models", "federations", "approve_each_run",
    }  # fmt: skip
    assert not policy.allow_no_privacy
    assert isinstance(CONFIG, RunConfig)
    assert CONFIG.privacy.name == "dp-sgd"
