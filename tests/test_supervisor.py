"""Programs are kept up, told apart by their logs, and gone when their supervisor is, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import supervisor
from shared.errors import FederationError
from shared.supervisor import Program, is_held, status, stop, supervise

ROOT = Path(__file__).resolve().parents[1]
SLEEPER = "import os, sys, time; print('hello', sys.argv[1], os.environ.get('COLOUR'), flush=True); time.sleep(600)"


def sleeper(name: str, **more: Any) -> Program:
    return Program(name, [sys.executable, "-c", SLEEPER, name], **more)


def eventually(true: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Kept:
    """A supervisor in a thread."""

    def __init__(self, folder: Path, *programs: Program) -> None:
        self.folder, self._stopped = folder, threading.Event()
        self.thread = threading.Thread(target=supervise, args=(folder, programs), kwargs={"stopped": self._stopped})
        self.thread.start()
        eventually(lambda: self.pids)

    @property
    def about(self) -> dict[str, Any]:
        return (status(self.folder) or {}).get("programs", {})

    @property
    def pids(self) -> dict[str, int]:
        return {name: one["pid"] for name, one in self.about.items() if one["pid"]}

    def end(self) -> None:
        self._stopped.set()
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, sleeper("a", environment={"COLOUR": "red"}), sleeper("b"))
    yield made
    made.end()


def test_each_program_has_its_own_log_and_environment(kept: Kept) -> None:
    eventually(lambda: "hello a red" in (kept.folder / "logs/a.log").read_text())
    eventually(lambda: "hello b None" in (kept.folder / "logs/b.log").read_text())


def test_a_program_that_was_killed_is_started_again_and_the_other_left_alone(kept: Kept) -> None:
    before = kept.pids
    os.kill(before["a"], signal.SIGKILL)
    eventually(lambda: kept.pids.get("a") not in (None, before["a"]))
    assert kept.pids["b"] == before["b"]
    assert kept.about["a"]["starts"] == 2
    assert "signal 9" in kept.about["a"]["ended"]
    assert "signal 9" in (kept.folder / "logs/a.log").read_text()


def test_a_second_supervisor_of_a_folder_is_refused(kept: Kept) -> None:
    assert is_held(kept.folder)
    with pytest.raises(FederationError, match="started already"):
        supervise(kept.folder, [], stopped=threading.Event())


def test_stopping_ends_every_process_and_leaves_no_status(tmp_path: Path) -> None:
    made = Kept(tmp_path, sleeper("a"), sleeper("b"))
    pids = made.pids
    made.end()
    assert not any(alive(pid) for pid in pids.values())
    assert status(tmp_path) is None
    assert not stop(tmp_path)  # nothing is there to be stopped


def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "END_SECONDS", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True);"
        "time.sleep(600)"
    )
    made = Kept(tmp_path, Program("deaf", [sys.executable, "-c", deaf]))
    eventually(lambda: "deaf" in (tmp_path / "logs/deaf.log").read_text())
    pids = made.pids
    made.end()
    assert not alive(pids["deaf"])


def test_one_that_ends_at_once_is_tried_again_ever_more_rarely(tmp_path: Path) -> None:
    made = Kept(tmp_path, sleeper("other"), Program("quick", ["false"], restart_seconds=0.1))
    eventually(lambda: made.about["quick"]["starts"] >= 4)
    log = (tmp_path / "logs/quick.log").read_text()
    made.end()
    assert "code 1" in log
    waits = [int(line.split(" again in ")[1].split()[0]) for line in log.splitlines() if " again in " in line]
    assert waits == sorted(waits)
    assert made.about == {}


def test_a_program_that_is_not_there_is_said_and_tried_again(tmp_path: Path) -> None:
    made = Kept(tmp_path, sleeper("other"), Program("absent", ["/no/such/program"], restart_seconds=0.1))
    eventually(lambda: "cannot be started: No such file" in made.about.get("absent", {}).get("ended", ""))
    made.end()


def test_when_the_supervisor_is_killed_its_programs_end_and_the_folder_can_be_started_again(tmp_path: Path) -> None:
    script = (
        "import sys, threading; from pathlib import Path; from shared.supervisor import Program, supervise;"
        f"supervise(Path({str(tmp_path)!r}), [Program('a', [sys.executable, '-c', {SLEEPER!r}, 'a'])],"
        " stopped=threading.Event())"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    eventually(lambda: (status(tmp_path) or {}).get("programs"))
    pid = json.loads((tmp_path / "run/status.json").read_text())["programs"]["a"]["pid"]
    process.kill()
    process.wait()
    eventually(lambda: not alive(pid))
    assert status(tmp_path) is None
    Kept(tmp_path, sleeper("b")).end()
