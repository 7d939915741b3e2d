"""Programs are kept up, told apart by their logs, and gone when their supervisor is, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shared import supervisor
from shared.errors import FederationError
from shared.supervisor import Program, detach, is_held, log_lines, restart, status, stop, supervise

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

    def __init__(self, folder: Path, *programs: Program, **more: Any) -> None:
        self.folder, self._stopped = folder, threading.Event()
        more["stopped"] = self._stopped
        self.thread = threading.Thread(target=supervise, args=(folder, programs), kwargs=more)
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


@pytest.mark.slow
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


def saying(*lines: str) -> Program:
    return Program("talker", [sys.executable, "-c", f"import time; print({chr(10).join(lines)!r}, flush=True);"
                              "time.sleep(600)"])  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_is_read_again_with_its_time_in_either_form(tmp_path: Path, form: str) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    made = Kept(tmp_path, saying('{"a": 1}', "b  c"), form=form)
    eventually(lambda: len(log_lines(tmp_path, "talker")) == 3)
    made.end()
    assert [line.text for line in log_lines(tmp_path, "talker")] == ["--- started", '{"a": 1}', "b  c"]
    for line, raw in zip(
        log_lines(tmp_path, "talker"), (tmp_path / "logs/talker.log").read_text().splitlines(), strict=True
    ):
        assert before <= datetime.fromisoformat(line.time) <= datetime.now(UTC)
        if form == "json":
            assert json.loads(raw) == {"time": line.time, "program": "talker", "text": line.text}
        else:
            assert raw == f"{line.time} {line.text}"


def test_nothing_that_moves_a_cursor_and_no_endless_line_reaches_a_log(tmp_path: Path) -> None:
    made = Kept(tmp_path, saying("\x1b[92mINFO \x1b[0m: \x1b[2J\tend\x07", "x" * 100_000))
    eventually(lambda: sum(len(line.text) for line in log_lines(tmp_path, "talker")) > 100_000)
    made.end()
    _, first, *rest = (line.text for line in log_lines(tmp_path, "talker"))
    assert first == "INFO : \N{REPLACEMENT CHARACTER}[2J    end\N{REPLACEMENT CHARACTER}"
    assert "".join(rest) == "x" * 100_000
    assert max(map(len, rest)) <= supervisor.LINE_BYTES


def test_a_log_is_turned_over_and_read_across_the_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 20_000)
    lines = [f"line {number}" for number in range(1500)]
    made = Kept(tmp_path, saying(*lines))
    eventually(lambda: "line 1499" in (tmp_path / "logs/talker.log").read_text())
    made.end()
    kept = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert kept == ["talker.log", "talker.log.1", "talker.log.2"]
    assert all(path.stat().st_size <= 20_000 for path in (tmp_path / "logs").iterdir())
    found = [line.text for line in log_lines(tmp_path, "talker")]
    assert found == lines[-len(found) :]
    assert len(found) > (tmp_path / "logs/talker.log").read_text().count("\n")


def test_in_the_foreground_lines_are_repeated_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Kept(tmp_path, saying("hello"), aloud=True)
    eventually(lambda: len(log_lines(tmp_path, "talker")) == 2)
    made.end()
    repeated = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[2] for line in repeated] == ["talker: --- started", "talker: hello"]


def test_the_status_says_since_when(kept: Kept) -> None:
    before = datetime.fromisoformat(kept.about["a"]["since"])
    started = datetime.fromtimestamp(Path(f"/proc/{kept.pids['a']}").stat().st_mtime, UTC)  # the kernel's word
    assert abs((started - before).total_seconds()) < 5
    found = status(kept.folder)
    assert found is not None
    assert abs((datetime.fromisoformat(found["since"]) - before).total_seconds()) < 5


def test_looking_whether_it_is_started_neither_keeps_it_from_starting_nor_misleads_who_looks_too(
    tmp_path: Path,
) -> None:
    told = threading.Event()
    told.set()
    supervise(tmp_path, [], stopped=told)
    with (tmp_path / "run/lock").open("r+") as looking:  # for longer than any look lasts
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not is_held(tmp_path)
        threading.Timer(0.3, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        supervise(tmp_path, [], stopped=told)
    made = Kept(tmp_path, sleeper("a"))
    with (tmp_path / "run/lock").open("r+") as tried, pytest.raises(BlockingIOError):
        fcntl.flock(tried, fcntl.LOCK_SH | fcntl.LOCK_NB)  # what a look is
    made.end()


SUPERVISOR = f"""
import sys, threading
from pathlib import Path
from shared.supervisor import Program, supervise, until_told
program = Program('a', [sys.executable, '-c', {SLEEPER!r}, 'a'])
until_told(lambda stopped: supervise(Path(sys.argv[1]), [program], stopped=stopped))
"""


def test_a_detached_supervisor_outlives_who_started_it_and_has_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    starter = (
        "import sys; from pathlib import Path; from shared.supervisor import detach, status;"
        f"made = detach([sys.executable, '-c', {SUPERVISOR!r}, sys.argv[1]], Path(sys.argv[1]));"
        "came = made.wait_until(lambda: bool((status(Path(sys.argv[1])) or {}).get('programs')), seconds=30);"
        "print(came, made.pid)"
    )
    said = subprocess.run(
        [sys.executable, "-c", starter, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    pid = int(said[1])
    try:
        assert said[0] == "True"
        assert alive(pid)
        assert os.getsid(pid) == pid != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
        for descriptor in (1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{descriptor}") == str(tmp_path / "logs/supervisor.log")
    finally:
        assert stop(tmp_path)
    eventually(lambda: not alive(pid))
    assert (tmp_path / "logs/supervisor.log").read_text() == ""


def test_what_a_detached_process_said_before_it_ended_is_told(tmp_path: Path) -> None:
    code = "import sys; print('error: no key here', file=sys.stderr); print('hint: ...', file=sys.stderr); sys.exit(3)"
    for _ in range(2):
        made = detach([sys.executable, "-c", code], tmp_path)
        with pytest.raises(FederationError, match=r"^it ended with code 3: no key here$"):
            made.wait_until(lambda: False, seconds=30)
    assert "no key here" in (tmp_path / "logs/supervisor.log.1").read_text()  # of the start before


def test_what_does_not_come_about_in_time_is_no_error(tmp_path: Path) -> None:
    made = detach([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path)
    assert not made.wait_until(lambda: False, seconds=0.3)
    os.kill(made.pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(made.pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
def test_a_detached_process_is_ended_by_who_started_it_and_no_other_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    first = detach([sys.executable, "-c", SUPERVISOR, str(tmp_path)], tmp_path)
    assert first.wait_until(lambda: bool((status(tmp_path) or {}).get("programs")), seconds=30)
    second = detach([sys.executable, "-c", SUPERVISOR, str(tmp_path)], tmp_path)
    with pytest.raises(FederationError, match="started already"):
        second.wait_until(lambda: False, seconds=30)
    second.end()
    assert is_held(tmp_path)
    first.end()
    assert first.ended == 0
    assert not is_held(tmp_path)
    assert not alive(first.pid)


def test_a_supervisor_that_is_told_to_end_ends_with_code_0(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path)], cwd=ROOT)
        eventually(lambda: (status(tmp_path) or {}).get("programs"))
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert status(tmp_path) is None


HOLDER = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def fields(pid: int) -> int:
    """Start time by awk, of a process whose name holds no space."""
    return int(subprocess.run(["awk", "{print $22}", f"/proc/{pid}/stat"], capture_output=True, check=True).stdout)


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a number which a status gives, while somebody else holds the lock."""
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run/lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    process = subprocess.Popen(["sleep", "600"])
    yield process
    for one in (process, holder):
        one.kill()
        one.wait()
    holder.stdout.close()


def note(folder: Path, pid: int, **changes: Any) -> None:
    one = {"pid": pid, "start_ticks": fields(pid), **changes}
    namespace = changes.get("pid_namespace", os.readlink("/proc/self/ns/pid"))
    about = {**one, "pid_namespace": namespace, "programs": {"a": one}}
    (folder / "run/status.json").write_text(json.dumps(about))


def test_the_status_notes_when_each_process_was_started_and_where_it_is_counted(kept: Kept) -> None:
    found = status(kept.folder)
    assert found is not None
    assert found["start_ticks"] == fields(os.getpid())
    assert found["pid_namespace"] == os.readlink(f"/proc/{kept.pids['a']}/ns/pid")
    assert {name: one["start_ticks"] for name, one in kept.about.items()} == {
        name: fields(pid) for name, pid in kept.pids.items()
    }


@pytest.mark.parametrize("changes", [{"start_ticks": 1}, {"start_ticks": None}, {"pid_namespace": "pid:[1]"}])
def test_no_process_gets_a_signal_that_was_meant_for_another(
    changes: dict[str, Any], bystander: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "SETTLE_SECONDS", 0.3)
    note(tmp_path, bystander.pid, **changes)
    for tell in (lambda: stop(tmp_path, seconds=5), lambda: restart(tmp_path, ["a"])):
        with pytest.raises(FederationError) as refused:
            tell()
        assert refused.value.hint is not None
        assert "another container or under another kernel's numbering: stop it where it runs" in refused.value.hint
    time.sleep(0.3)
    assert bystander.poll() is None
    # And the oracle of this test: with what is true of it, it is told.
    note(tmp_path, bystander.pid)
    restart(tmp_path, ["a"])
    assert bystander.wait(timeout=10) == -signal.SIGTERM


def test_a_name_with_brackets_and_spaces_hides_no_start_time(tmp_path: Path) -> None:
    (tmp_path / "a) S 1 (b").symlink_to("/bin/sleep")
    before = subprocess.Popen(["sleep", "600"])
    time.sleep(0.05)
    odd = subprocess.Popen([str(tmp_path / "a) S 1 (b"), "600"])
    time.sleep(0.05)
    after = subprocess.Popen(["sleep", "600"])
    try:
        eventually(lambda: Path(f"/proc/{odd.pid}/comm").read_text() == "a) S 1 (b\n")
        ticks = supervisor._start_ticks(odd.pid)
        assert ticks is not None
        assert fields(before.pid) < ticks < fields(after.pid)
    finally:
        for one in (before, odd, after):
            one.kill()
            one.wait()
    assert supervisor._start_ticks(odd.pid) is None


def test_one_that_does_not_end_is_named_only_where_its_number_is_known(
    bystander: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    with pytest.raises(FederationError) as refused:
        stop(tmp_path, seconds=0.3)  # no status was written yet
    assert refused.value.hint == f"`fuser {tmp_path / 'run/lock'}` names the process that holds it"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(9)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        note(tmp_path, process.pid)
        with pytest.raises(FederationError) as refused:
            stop(tmp_path, seconds=0.3)
        process.kill()
    assert refused.value.hint == f"kill -9 {process.pid}"


def test_what_another_user_started_is_said_to_go_on_as_it_was(
    bystander: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    note(tmp_path, bystander.pid)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", kill)
        with pytest.raises(FederationError, match=r"a of .* was not started again: .* is another user's"):
            restart(tmp_path, ["a"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", kill)
        with pytest.raises(FederationError, match="whether it is started cannot be seen"):
            restart(tmp_path, ["a"])
