"""The roster's thread goes on whatever happens to it, and one site's trouble is that site's alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flower_processes import eventually

import server.roster
from server.deployment import programs
from server.federation import FederationFolder
from server.roster import LiveRoster, read_seen
from server.status import server_status
from server.superlink import Node
from shared.flower_runtime import Runtime
from shared.protection.federation import SiteKeys
from shared.protection.keys import SigningKey
from shared.supervisor import supervise


def new_site(folder: FederationFolder, name: str) -> SiteKeys:
    """Admits one, with keys that were never seen before."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    node = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    signing = SigningKey.generate()
    asked = SiteKeys(folder.federation.name, name, signing.public, node)
    request = json.dumps(asked.request(signing)).encode()
    folder.admit(folder.read_request(request, what="the request"))
    return asked


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    return FederationFolder.create(tmp_path / "fed", name="toy", address="localhost:9443")


class Answers:
    """In the place of the SuperLink: has no nodes, and fails as it is told."""

    error: Exception | None = None

    def __init__(self, runtime: Runtime) -> None:
        pass

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nodes(self) -> list[Node]:
        if Answers.error is not None:
            raise Answers.error
        return []

    def register(self, key: bytes, *, name: str) -> None:
        pass


@pytest.fixture
def roster(folder: FederationFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRoster]:
    monkeypatch.setattr(server.roster, "SuperLink", Answers)
    monkeypatch.setattr(server.roster, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(Answers, "error", None)
    with LiveRoster(folder, Runtime.prepare(folder.path)) as live:
        eventually(lambda: live.trouble == "", "a first look", 10)
        yield live


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), ValueError("no message of protobuf"), RuntimeError(), OSError(24, "files")]
)
def test_a_superlink_that_answers_anything_ends_no_roster(
    error: Exception, roster: LiveRoster, folder: FederationFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "error", error)
    words = str(error) or "RuntimeError"
    eventually(lambda: read_seen(folder.path)["trouble"] == words, "the trouble in words", 10)
    monkeypatch.setattr(Answers, "error", None)
    eventually(lambda: roster.trouble == "" == read_seen(folder.path)["trouble"], "another look", 10)


def test_a_disk_that_takes_nothing_ends_no_roster(roster: LiveRoster, folder: FederationFolder) -> None:
    seen = folder.path / "run/sites.json"
    in_the_way = seen.with_name("sites.json.tmp")  # a folder: no file can be written there, also not by root

    def stood_in_the_way() -> bool:
        try:
            in_the_way.mkdir(exist_ok=False)
        except FileExistsError:
            return in_the_way.is_dir()
        return True

    eventually(stood_in_the_way, "a folder in the way", 10)
    eventually(lambda: "cannot be written" in roster.trouble, "the trouble in words", 10)
    in_the_way.rmdir()
    eventually(lambda: roster.trouble == "", "another look", 10)


@pytest.fixture
def superlink(folder: FederationFolder) -> Iterator[None]:
    """Flower's own."""
    stopped = threading.Event()
    only = [program for program in programs(folder.path) if program.name == "superlink"]
    thread = threading.Thread(target=supervise, args=(folder.path, only), kwargs={"stopped": stopped})
    thread.start()
    yield
    stopped.set()
    thread.join(timeout=60)


@pytest.mark.slow
@pytest.mark.usefixtures("superlink")
def test_a_key_that_flower_took_off_before_costs_its_own_site_and_no_other(folder: FederationFolder) -> None:
    new_site(folder, "a-first")
    admission = folder.path / "sites/a-first.json"

    def seen(site: str) -> dict[str, Any]:
        return next((one for one in server_status(folder.path)["sites"] if one["site"] == site), {})

    with LiveRoster(folder, Runtime.read(folder.path)) as live:
        eventually(lambda: live.trouble == "" and seen("a-first")["registered"], "a node", 60)
        # Moved away and back, which is no revocation: Flower keeps the key of a node that it took off.
        away = admission.rename(folder.path / "a-first.json")
        eventually(lambda: live.sites() == set(), "an empty roster", 10)
        time.sleep(2)
        away.rename(admission)
        new_site(folder, "b-second")
        eventually(lambda: seen("b-second")["registered"], "the other site's node", 20)
        eventually(lambda: "must join with new keys" in seen("a-first")["trouble"], "words about the first", 20)
        assert (seen("a-first")["registered"], seen("b-second")["trouble"], live.trouble) == (False, "", "")
        # Its next keys are welcome.
        folder.revoke("a-first")
        new_site(folder, "a-first")
        eventually(lambda: seen("a-first")["registered"], "its new node", 20)
        assert seen("a-first")["trouble"] == ""
