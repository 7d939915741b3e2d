"""`fedcanvas server status` and `runs`: what is damaged is shown, and what was left by an earlier start is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flower_processes import ROOT, eventually
from toy_federation import PROMPTS, toy_config

from client.settings import RELEASE_CODE
from server.federation import FederationFolder
from server.run_queue import RunQueue
from server.status import readiness
from shared.cli import run
from shared.supervisor import supervise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return FederationFolder.create(tmp_path / "fed", name="toy", address="localhost:9443").path


@pytest.fixture
def queue(folder: Path) -> RunQueue:
    made = RunQueue(folder)
    for name in ("first", "second", "third"):
        made.add(name, config=toy_config(), prompts=PROMPTS.texts, sites=["site-0"])
    return made


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)  # the help promises one JSON object
    return found


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    return capsys.readouterr().out


def removed(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        removed("config.toml"), removed("prompts.txt"), written("config.toml", "[["), written("prompts.txt", "other\n"),
        written("run.json", "junk"), written("events.jsonl", "junk\n"), written("events.jsonl", "{}\n"),
        written("timings.jsonl", '{"bytes_down": []}\n'), written("events.jsonl", '{"server_round": null}\n'),
    ],
)  # fmt: skip
def test_a_damaged_run_is_shown_and_hides_no_other(
    damage: Callable[[Path], object], queue: RunQueue, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(queue["second"].path)
    for command in ("runs", "status"):
        first, second, third = printed(capsys, "server", command, str(folder))["runs"]
        assert (first["state"], second["state"], third["state"]) == ("waiting", "unreadable", "waiting")
        assert second["reason"]
        (line,) = [line for line in told(capsys, "server", command, str(folder)).splitlines() if "second  " in line]
        assert "unreadable; " in line


def test_a_copy_beside_the_runs_is_none_of_them(
    queue: RunQueue, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(queue["first"].path, queue.folder / "first.bak")
    found = printed(capsys, "server", "runs", str(folder))["runs"]
    assert [one["run"] for one in found] == ["first", "second", "third"]


def test_a_waiting_run_says_which_one_it_waits_for(
    queue: RunQueue, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def behind() -> dict[str, str]:
        return {one["run"]: one["behind"] for one in printed(capsys, "server", "runs", str(folder))["runs"]}

    assert behind() == {"first": "", "second": "first", "third": "second"}
    queue.note("third", "running")
    assert behind() == {"first": "third", "second": "first", "third": ""}
    queue.cancel("first")
    assert behind() == {"first": "", "second": "third", "third": ""}
    queue.cancel("third")
    lines = told(capsys, "server", "runs", str(folder)).splitlines()
    assert [line.split(maxsplit=1)[1].split(", round")[0] for line in lines] == [
        "cancelled", "waiting behind third", "running, being cancelled"
    ]  # fmt: skip


def test_status_names_the_release_by_the_digest_that_sites_compare(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Sorted as paths are, part by part.
    names = sorted(path.relative_to(ROOT) for part in ("client", "shared") for path in (ROOT / part).rglob("*.py"))
    files = [(name, (ROOT / name).read_bytes()) for name in names]
    digest = hashlib.sha256(b"".join(f"{name} {len(code)}\n".encode() + code for name, code in files)).hexdigest()
    assert printed(capsys, "server", "status", str(folder))["release"] == digest == RELEASE_CODE
    assert f"  release      {digest}" in told(capsys, "server", "status", str(folder)).splitlines()


@pytest.fixture
def started(folder: Path) -> Iterator[None]:
    """A supervisor without programs, so that a test writes what the worker would."""
    stopped = threading.Event()
    thread = threading.Thread(target=supervise, args=(folder, []), kwargs={"stopped": stopped})
    thread.start()
    eventually((folder / "run/status.json").exists, "a supervisor", 10)
    yield
    stopped.set()
    thread.join(timeout=10)


def seen(folder: Path, seconds: float, trouble: str = "") -> None:
    """Written that many seconds after the supervisor began."""
    began = datetime.fromisoformat(json.loads((folder / "run/status.json").read_text())["since"])
    about = {"time": (began + timedelta(seconds=seconds)).isoformat(), "trouble": trouble, "sites": {}}
    (folder / "run/sites.json").write_text(json.dumps(about))


@pytest.mark.usefixtures("started")
def test_what_an_earlier_worker_wrote_makes_nothing_ready(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not readiness(folder).ready
    for seconds, trouble in ((-5, ""), (-5, "connection refused"), (0, "")):
        seen(folder, seconds, trouble)
        about = printed(capsys, "server", "status", str(folder))
        assert (about["ready"], about["trouble"], about["started"]) == (False, "", True)
    seen(folder, 1)
    assert printed(capsys, "server", "status", str(folder))["ready"]
    seen(folder, 1, "connection refused")
    about = printed(capsys, "server", "status", str(folder))
    assert (about["ready"], about["trouble"]) == (False, "connection refused")


def test_a_server_that_is_not_started_is_not_ready(folder: Path) -> None:
    (folder / "run").mkdir(exist_ok=True)
    about = {"time": datetime.now(UTC).isoformat(), "trouble": "", "sites": {}}
    (folder / "run/sites.json").write_text(json.dumps(about))
    assert not readiness(folder).ready


@pytest.mark.usefixtures("started")
def test_readiness_asks_for_no_run(queue: RunQueue, folder: Path) -> None:
    seen(folder, 1)
    shutil.rmtree(queue.folder)
    queue.folder.write_text("no folder at all")
    assert readiness(folder).ready
