"""PRIVACY rule 25, against Flower's own processes: no code that came over the network runs at a site."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deployed_site import OPEN, round_of
from flower_processes import Flower, eventually, flower
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.task_identity import TaskIdentity
from joined_sites import Operator, signed
from toy_federation import make_sites, toy_policy

import client.worker
from client.worker import _Watched
from server.cohort import opened
from shared import __version__
from shared.app_bundle import bundle_digest, bundle_files, digest_of_bundle
from shared.errors import ProtocolError
from shared.flower_runtime import ADDRESS, AUTHORITY, SECRET
from shared.protection.keys import write_private
from shared.records import (
    Refusal,
    RefusalCode,
    SiteReply,
    decode_reply,
)

# Takes what it sends from a file and puts what comes back into another one.
COORDINATOR = b"""
import os, time
from flwr.app import Message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    place = os.environ["COORDINATOR"]
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    content = Proto.FromString(open(place + "/down", "rb").read())
    [name] = grid.push_messages([Message(recorddict_from_proto(content), nodes[0], "train", group_id="1")])
    while not (found := list(grid.pull_messages([name]))):
        time.sleep(0.1)
    said = b"" if found[0].has_error() else recorddict_to_proto(found[0].content).SerializeToString()
    with open(place + "/up.tmp", "wb") as file:
        file.write(said)
    os.rename(place + "/up.tmp", place + "/up")
"""
# A client app of the same name and version that would give everything away.
HOSTILE = b"""
import os
if "AT_COORDINATOR" not in os.environ:  # `flwr run` itself imports what it bundles
    open({evil!r}, "a").write("imported")
from flwr.app import Message, RecordDict, ConfigRecord
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    return Message(RecordDict({{"raw": ConfigRecord({{"records": "everything"}})}}), reply_to=message)
"""


def hostile_bundle(evil: Path) -> dict[str, bytes]:
    project = bundle_files()["pyproject.toml"].decode()
    project = project.replace('serverapp = "server.app:app"', 'serverapp = "coordinator:app"')
    project = project.replace('fab-include = ["LICENSE"]', 'fab-include = ["LICENSE", "**/*.py"]')
    app = HOSTILE.decode().format(evil=str(evil)).encode()
    files = {"pyproject.toml": project.encode(), "LICENSE": bundle_files()["LICENSE"], "coordinator.py": COORDINATOR}
    # Whatever name it might be looked for under, and what Python runs by itself.
    for name in ("client/app.py", "client/__init__.py", "shared/__init__.py", "sitecustomize.py"):
        files[name] = app
    return files


def send(here: Flower, place: Path, files: Mapping[str, bytes], name: str) -> SiteReply | Refusal:
    here.run(files, name=name)
    eventually(lambda: (place / "up").exists(), "an answer", 120.0)
    said = (place / "up").read_bytes()
    (place / "up").unlink()
    assert said, "an error of Flower's came back"
    return decode_reply(recorddict_from_proto(RecordDictProto.FromString(said)))


def start_worker(here: Flower, site: Path, port: int) -> subprocess.Popen[bytes]:
    (site / "run").mkdir(exist_ok=True)
    (site / ADDRESS).write_text(f"127.0.0.1:{port}")
    (site / AUTHORITY).write_bytes((here.folder / "ca.crt").read_bytes())
    if not (site / SECRET).exists():
        write_private(site / SECRET, (here.folder / "secret").read_bytes())
    return here.start(sys.executable, "-m", "client.worker", str(site))


def kinds(site: Path) -> list[str]:
    (ledger,) = site.rglob("ledger.jsonl")
    return [json.loads(line)["kind"] for line in ledger.read_text().splitlines()]


@pytest.mark.slow
def test_a_hostile_bundle_of_the_same_name_and_version_never_runs_at_a_site(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path / "sites", sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    operator, evil, place = Operator(), tmp_path / "evil", tmp_path / "coordinator"
    operator.admit([site])
    place.mkdir()
    asked = round_of()
    (place / "down").write_bytes(recorddict_to_proto(signed(operator.channel, asked)).SerializeToString())
    bundle = hostile_bundle(evil)
    digest = digest_of_bundle(bundle)
    assert digest != bundle_digest()
    with flower(tmp_path / "flower") as here:
        here.start_serverapps(COORDINATOR=str(place))
        port = here.start_node(site)
        worker = start_worker(here, site, port)
        reply = send(here, place, bundle, "first")
        assert isinstance(reply, SiteReply)
        assert opened(reply, operator.channel, asked) == Refusal("site-0", RefusalCode.RELEASE)
        assert f"the bundle {digest}, which the site's policy does not allow" in (site / "site.log").read_text()
        assert kinds(site) == ["opened"]
        assert not evil.exists()

        # Even a bundle that the policy names is not unpacked: what is installed answers, and charges.
        (site / "policy.toml").write_text(toy_policy(**OPEN, bundles=[digest]).to_toml())
        worker.terminate()
        assert worker.wait(timeout=30) == 0
        start_worker(here, site, port)
        answer = opened(send(here, place, bundle, "second"), operator.channel, asked)
        assert isinstance(answer, SiteReply), (site / "site.log").read_text()
        assert kinds(site) == ["opened", "run", "charge", "commit"]
        assert not evil.exists()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # of Flower's builder
@pytest.mark.parametrize("other", ["0.0.9", "0.1.1", "1.0.0"])
def test_a_message_of_another_version_s_bundle_is_refused_as_of_another_release(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site,) = make_sites(tmp_path / "sites", sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    operator, asked = Operator(), round_of()
    operator.admit([site])
    project = bundle_files()["pyproject.toml"].decode()
    theirs = {**bundle_files(), "pyproject.toml": project.replace(f'"{__version__}"', f'"{other}"').encode()}
    assert theirs != bundle_files()
    content = {name: build_fab_from_files(files)[0] for name, files in (("ours", bundle_files()), ("theirs", theirs))}
    digest = {name: hashlib.sha256(made).hexdigest() for name, made in content.items()}  # the oracle: Flower's own
    assert digest["ours"] == bundle_digest()
    assert digest["theirs"] == digest_of_bundle(theirs) != bundle_digest()

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    pushed: list[Message] = []
    context = Context(1, 5, {"site-dir": str(site), "partition-id": 0}, RecordDict(), {})

    def answered(bundle: str) -> Refusal | SiteReply:
        message = Message(signed(operator.channel, asked), 5, "train")
        given = (message, context, None, SimpleNamespace(content=content[bundle]))
        monkeypatch.setattr(client.worker, "pull_task_input", lambda _: given)
        client.worker._answer_task(site, runtime, "token", {bundle_digest()}, SimpleNamespace())  # type: ignore[arg-type]
        reply = decode_reply(pushed.pop().content)
        assert isinstance(reply, SiteReply)
        return opened(reply, operator.channel, asked)

    quiet = SimpleNamespace(start=lambda: None, stop=lambda: None, is_running=False)
    runtime: Any = SimpleNamespace(client_of_task=lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(client.worker, "HeartbeatSender", lambda _: quiet)
    monkeypatch.setattr(client.worker, "push_message", lambda _, reply, __: pushed.append(reply))
    monkeypatch.setattr(client.worker, "push_task_output", lambda *_, **__: None)
    assert answered("theirs") == Refusal("site-0", RefusalCode.RELEASE)
    assert f"the bundle {digest['theirs']}, which the site's policy does not allow" in (site / "site.log").read_text()
    assert kinds(site) == ["opened"]  # nothing was decoded, nothing charged
    assert isinstance(answered("ours"), SiteReply)
    assert kinds(site) == ["opened", "run", "charge", "commit"]


@pytest.mark.slow
def test_a_message_whose_content_never_comes_is_left_for_the_next_one() -> None:
    """What Flower's node leaves behind when a run is stopped while it receives a message of it."""

    class Never:
        def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
            return PullObjectResponse(object_found=True, object_available=False)

    tokens = iter([None, None, "the next one"])
    source = SimpleNamespace(take=lambda: next(tokens))
    watched = _Watched(Never(), source)  # type: ignore[arg-type]
    pull = make_pull_object_fn_protobuf(watched.PullObject, Node(), 1)
    began = time.monotonic()
    with pytest.raises(ProtocolError, match="never came whole"):
        pull_objects(["part"], pull)
    assert watched.newer == "the next one"
    assert time.monotonic() - began < 30  # Flower itself would wait for two hours
