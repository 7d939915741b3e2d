"""What a site answers, what it refuses, and that nothing else leaves it."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed_site import instruction
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from toy_federation import COLOURS, make_sites, toy_config

import client.app
import client.site
from client.app import make_app
from client.settings import SiteConfig
from client.site import Site, SiteRefusal, open_site
from shared.errors import ConfigError
from shared.fakes import FakeBank
from shared.moments import MomentFeatures, moment_size
from shared.privacy.entropy import SystemEntropy
from shared.records import (
    HEAD_BYTES,
    Refusal,
    RefusalCode,
    RoundInstruction,
    SiteReply,
    decode_reply,
    encode_instruction,
    unpack_envelope,
)

NOT_PRIVATE = {"privacy.name": "none"}  # plans without calibration: these tests are not about noise


@pytest.fixture(autouse=True)
def flower_process():
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    client.site._SITES.clear()


def set_rows(folder: Path) -> None:
    SiteConfig.read(folder).model_copy(update={"indices": "rows.npy"}).write(folder)


def code_of(site: Site, asked: RoundInstruction) -> RefusalCode:
    with pytest.raises(SiteRefusal) as refusal:
        site.answer(asked)
    return refusal.value.code


def ask(site_dirs: list[Path], records: RecordDict, *, kind: str = "train", place: int = 0) -> SiteReply | Refusal:
    """Through the ClientApp, as Flower calls it."""
    context = Context(1, 5, {"partition-id": place}, RecordDict(), {})
    return decode_reply(make_app(site_dirs)(Message(records, 5, kind), context).content)


# ---- answers


def test_a_site_answers_with_one_value_a_parameter(tmp_path: Path):
    config = toy_config()
    site = Site(make_sites(tmp_path)[0], simulated=True)
    asked = instruction(config)
    reply = site.answer(asked)
    assert (reply.run_id, reply.server_round, reply.site_id) == ("run", 1, "site-0")
    assert len(reply.envelope) == 8 * len(asked.weights) + HEAD_BYTES
    assert unpack_envelope(reply.envelope, length=len(asked.weights))[0].any()


def test_messages_of_two_sites_of_different_size_have_one_schema_and_length(tmp_path: Path):
    asked = encode_instruction(instruction(toy_config(NOT_PRIVATE)))
    sites = make_sites(tmp_path, sizes=(40, 3))
    first, second = (ask(sites, asked, place=place) for place in (0, 1))
    assert isinstance(first, SiteReply)
    assert isinstance(second, SiteReply)
    assert len(first.envelope) == len(second.envelope)
    assert dataclasses.replace(second, site_id=first.site_id, envelope=first.envelope) == first


def test_data_sets_that_differ_in_one_record_differ_only_inside_the_envelope(tmp_path: Path):
    config = toy_config({**NOT_PRIVATE, "privacy.sampling-rate": 1.0})
    replies = []
    for name, size in (("a", 40), ("b", 40)):
        (folder,) = make_sites(tmp_path / name, sizes=(size,))
        if name == "b":
            set_rows(folder)
            np.save(folder / "rows.npy", np.arange(1, 40))
        replies.append(Site(folder, simulated=True).answer(instruction(config)))
    assert replies[0] != replies[1]
    assert dataclasses.replace(replies[0], envelope=b"") == dataclasses.replace(replies[1], envelope=b"")
    assert len(replies[0].envelope) == len(replies[1].envelope)


def test_the_same_instruction_is_answered_with_the_same_bytes_in_a_simulation(tmp_path: Path):
    folders = make_sites(tmp_path)
    asked = instruction(toy_config())
    site, length = Site(folders[0], simulated=True), len(asked.weights)
    first = site.answer(asked)
    assert site.answer(dataclasses.replace(asked, attempt=2)) == first
    # A new process repeats the seeded noise; its ledger counts another release, and the head says so.
    values, head = unpack_envelope(first.envelope, length=length)
    again, other_head = unpack_envelope(Site(folders[0], simulated=True).answer(asked).envelope, length=length)
    assert np.array_equal(again, values)
    assert other_head != head


def test_two_deployed_sites_with_the_same_data_draw_different_noise(tmp_path: Path):
    folders = [make_sites(tmp_path / name, sizes=(40,), seed=None)[0] for name in ("a", "b")]
    asked = instruction(toy_config())
    first, second = (Site(folder, simulated=False).answer(asked) for folder in folders)
    assert first.envelope != second.envelope


def test_simulated_sites_that_share_a_seed_do_not_share_noise(tmp_path: Path):
    asked = instruction(toy_config({"privacy.sampling-rate": 0.25}))
    first, second = (
        unpack_envelope(Site(folder, simulated=True).answer(asked).envelope, length=len(asked.weights))[0]
        for folder in make_sites(tmp_path, sizes=(30, 30))
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5


def test_moments_are_released_for_round_zero(tmp_path: Path):
    config = toy_config({**NOT_PRIVATE, "warm-start.enabled": True})
    site = Site(make_sites(tmp_path)[0], simulated=True)
    reply = site.answer(instruction(config, kind="moments", server_round=0))
    assert len(reply.envelope) == 8 * moment_size(MomentFeatures((8, 8, 3)).size, config.text.dim) + HEAD_BYTES


def test_local_steps_take_the_fakes(tmp_path: Path):
    config = toy_config({**NOT_PRIVATE, "federation.local-steps": 2})
    asked = instruction(config, fakes=FakeBank(np.zeros((8, 8, 8, 3), np.uint8), np.zeros(8, np.int32)))
    reply = ask(make_sites(tmp_path), encode_instruction(asked))
    assert isinstance(reply, SiteReply)
    assert len(reply.envelope) == 8 * len(asked.weights) + HEAD_BYTES


def test_data_are_opened_once_for_all_rounds_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    real = client.site.open_dataset
    monkeypatch.setattr(client.site, "open_dataset", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
    folders, config = make_sites(tmp_path), toy_config(NOT_PRIVATE)
    for server_round in (1, 2, 3):
        ask(folders, encode_instruction(instruction(config, server_round=server_round)))
    assert len(opened) == 1
    other = toy_config({**NOT_PRIVATE, "data.image-size": 28})
    ask(folders, encode_instruction(instruction(other, run_id="other")))
    assert len(opened) == 2


# ---- refusals that follow from the instruction alone


def test_settings_that_are_not_those_of_the_digest_are_refused(tmp_path: Path):
    site, config = Site(make_sites(tmp_path)[0], simulated=True), toy_config(NOT_PRIVATE)
    assert code_of(site, instruction(config, config_digest="0" * 64)) == RefusalCode.CONFIG
    # A weaker clip under the digest that everybody approved.
    other = config.replaced({"privacy.clipping-norm": 400.0})
    assert code_of(site, instruction(config, config_json=other.to_json())) == RefusalCode.CONFIG


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"seed":0,"sigma":0.1}'])
def test_settings_that_do_not_validate_are_refused(text: str, tmp_path: Path):
    site = Site(make_sites(tmp_path)[0], simulated=True)
    assert code_of(site, instruction(toy_config(NOT_PRIVATE), config_json=text)) == RefusalCode.CONFIG


def test_a_plan_that_cannot_be_made_is_refused(tmp_path: Path):
    config = toy_config({"privacy.delta": 0.5})
    assert code_of(Site(make_sites(tmp_path)[0], simulated=True), instruction(config)) == RefusalCode.PLAN


def test_a_deployed_site_does_not_answer_without_privacy(tmp_path: Path):
    site = Site(make_sites(tmp_path, seed=None)[0], simulated=False)
    assert code_of(site, instruction(toy_config(NOT_PRIVATE))) == RefusalCode.POLICY


@pytest.mark.parametrize(
    "changes",
    [
        {"server_round": 0},
        {"server_round": 5},
        {"kind": "moments"},
        {"kind": "moments", "server_round": 0},  # the run has no warm start
        {"weights": np.zeros(3, np.float32)},
        {"fakes": FakeBank(np.zeros((8, 8, 8, 3), np.uint8), np.zeros(8, np.int32))},  # the run has no local steps
    ],
)
def test_an_instruction_out_of_place_is_refused(changes: dict[str, Any], tmp_path: Path):
    site = Site(make_sites(tmp_path)[0], simulated=True)
    assert code_of(site, instruction(toy_config(NOT_PRIVATE), **changes)) == RefusalCode.MESSAGE


@pytest.mark.parametrize("fakes", [None, FakeBank(np.zeros((8, 16, 16, 3), np.uint8), np.zeros(8, np.int32))])
def test_local_steps_without_fitting_fakes_are_refused(fakes: FakeBank | None, tmp_path: Path):
    site = Site(make_sites(tmp_path)[0], simulated=True)
    config = toy_config({**NOT_PRIVATE, "federation.local-steps": 2})
    assert code_of(site, instruction(config, fakes=fakes)) == RefusalCode.MESSAGE


# ---- refusals that could tell of the data share one code


def remove(folder: Path) -> None:
    (folder / "data.npz").unlink()


def damage(folder: Path) -> None:
    (folder / "data.npz").write_bytes(b"a large red circle")


def name_a_row_twice(folder: Path) -> None:
    set_rows(folder)
    np.save(folder / "rows.npy", np.array([1, 2, 2]))


def name_a_row_too_far(folder: Path) -> None:
    set_rows(folder)
    np.save(folder / "rows.npy", np.array([1, 40]))


@pytest.mark.parametrize("harm", [remove, damage, name_a_row_twice, name_a_row_too_far])
def test_everything_that_depends_on_the_data_is_one_code(harm: Callable[[Path], None], tmp_path: Path):
    folders = make_sites(tmp_path)
    harm(folders[0])
    asked = encode_instruction(instruction(toy_config(NOT_PRIVATE)))
    assert ask(folders, asked) == Refusal("site-0", RefusalCode.SITE)


@pytest.mark.parametrize(
    "error", [RuntimeError("a photo of a red"), MemoryError(), ValueError("3 records"), KeyError("x")]
)
def test_an_exception_in_training_leaves_as_a_code_and_its_text_stays(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(client.site, "site_gradient", fail)
    folders = make_sites(tmp_path)
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {})
    message = Message(encode_instruction(instruction(toy_config(NOT_PRIVATE))), 5, "train")
    reply = make_app(folders)(message, context)
    assert not reply.has_error()
    assert decode_reply(reply.content) == Refusal("site-0", RefusalCode.SITE)
    log = (folders[0] / "site.log").read_text()
    assert type(error).__name__ in log
    assert "test_site.py" in log  # the place, and not the text, which may quote a caption
    assert "a photo of a red" not in log
    assert "3 records" not in log


@pytest.mark.parametrize("payload", [np.full(3, np.nan), np.zeros(3, np.int64), None, np.zeros(0)])
def test_what_the_gate_does_not_pass_does_not_leave(payload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client.site, "site_gradient", lambda *_, **__: payload)
    asked = encode_instruction(instruction(toy_config(NOT_PRIVATE)))
    assert ask(make_sites(tmp_path), asked) == Refusal("site-0", RefusalCode.SITE)


# ---- the app


def test_every_kind_of_message_gets_a_reply(tmp_path: Path):
    folders = make_sites(tmp_path)
    asked = encode_instruction(instruction(toy_config(NOT_PRIVATE)))
    for kind in ("evaluate", "query", "train.moments"):
        assert ask(folders, asked, kind=kind) == Refusal("site-0", RefusalCode.MESSAGE)
    assert ask(folders, RecordDict(), kind="train") == Refusal("site-0", RefusalCode.MESSAGE)
    assert ask(folders, asked, place=9) == Refusal("", RefusalCode.SITE)


def test_other_code_in_the_worker_than_where_the_run_started_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    app = make_app(make_sites(tmp_path))  # carries the digest of the code it came from, as Ray pickles it
    monkeypatch.setattr(client.app, "RELEASE", "0" * 64)
    message = Message(encode_instruction(instruction(toy_config(NOT_PRIVATE))), 5, "train")
    reply = app(message, Context(1, 5, {"partition-id": 0}, RecordDict(), {}))
    assert decode_reply(reply.content) == Refusal("", RefusalCode.RELEASE)


def test_no_message_opens_a_deployed_site_as_a_simulated_one(tmp_path: Path):
    (deployed,) = make_sites(tmp_path / "deployed", sizes=(40,), seed=None)
    asked = encode_instruction(instruction(toy_config(NOT_PRIVATE)))
    message, run_config = Message(asked, 5, "train"), {"simulation.sites": str(deployed.parent)}
    reply = make_app()(message, Context(1, 5, {"partition-id": 0}, RecordDict(), run_config))
    assert decode_reply(reply.content) == Refusal("", RefusalCode.SITE)
    # And the node's own setting wins over what the run config says.
    (simulated,) = make_sites(tmp_path / "simulated", sizes=(40,))
    node, run_config = {"site-dir": str(deployed), "partition-id": 0}, {"simulation.sites": str(simulated.parent)}
    reply = make_app()(message, Context(1, 5, node, RecordDict(), run_config))
    # Opened as a deployed site: no privacy, no answer.
    assert decode_reply(reply.content) == Refusal("site-0", RefusalCode.POLICY)


# ---- the site's own settings


@pytest.mark.parametrize(
    "text",
    [
        'data = "x"',
        'site-id = "a"',
        'site-id = "a"\ndata = "x"\nsigma = 1',
        'site-id = "../a"\ndata = "x"',
        'site-id = ""\ndata = "x"',
        'site-id = 7\ndata = "x"',
        'site-id = "a"\ndata = "x"\nsimulated-seed = "7"',
        'site-id = "a"\ndata = "x"\nsimulated-seed = -1',
        "no toml",
    ],
)
def test_settings_of_a_site_are_strict(text: str, tmp_path: Path):
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"site\.toml"):
        SiteConfig.read(tmp_path)


def test_settings_of_a_site_are_read_as_they_were_written(tmp_path: Path):
    config = SiteConfig(
        site_id="klinik-1", data='quoted "name" \\ ü', indices="rows.npy", simulated_seed=0, lineage="scans",
        slot_seconds=2.5,
    )  # fmt: skip
    config.write(tmp_path)
    assert SiteConfig.read(tmp_path) == config


def test_a_deployed_site_is_never_seeded(tmp_path: Path):
    (seeded,), (unseeded,) = make_sites(tmp_path / "a", sizes=(3,)), make_sites(tmp_path / "b", sizes=(3,), seed=None)
    with pytest.raises(ConfigError, match="a simulated site"):
        Site(seeded, simulated=False)
    with pytest.raises(ConfigError, match="a deployed site"):
        Site(unseeded, simulated=True)
    assert isinstance(Site(unseeded, simulated=False).entropy, SystemEntropy)


def test_the_log_is_the_site_s_alone_and_holds_no_caption(tmp_path: Path):
    folders = make_sites(tmp_path)
    site = open_site(folders[0], simulated=True)
    site.answer(instruction(toy_config(NOT_PRIVATE)))
    log = folders[0] / "site.log"
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600
    assert "40 records are ready" in log.read_text()
    assert not re.search(rf"\b({'|'.join(COLOURS)})\b", log.read_text())
