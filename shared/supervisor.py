"""Programs that must stay up on this machine: started together, started again when they end, stopped together.

    FOLDER/run/lock             held while the supervisor lives; the kernel frees it however that ends
    FOLDER/run/status.json      its process, and for each program process, starts, since when, how it ended last;
                                beside a process's number what tells whether it still means that process, and here
    FOLDER/logs/NAME.log        what a program says, a line with its time, as text or JSON; turned over at 10 MB
    FOLDER/logs/supervisor.log  what a supervisor that was detached says itself; .1 is that of the start before

A program that ends is started again after `restart_seconds`, longer after each quick end (doubling up to
`most_seconds`), for as long as it takes: Flower refuses a node for a minute after it was killed. Programs are ended in
the opposite order of their start, and are killed when they do not end. When the supervisor itself is killed, the kernel
ends its programs. What they say may come from a network: no control character of it reaches a log, nor an endless line.
Linux only. Not here: what is run (`client.deployment`, `server.deployment`), and a machine that starts again (systemd).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any, Literal

from shared.cli import printable
from shared.disk import take_lock, write_whole
from shared.errors import FederationError, RunDirectoryError

RUN, LOGS = "run", "logs"
LOCK, STATUS, OWN_LOG = "lock", "status.json", "supervisor.log"
LOG_BYTES, LOG_FILES = 10_000_000, 5
LINE_BYTES = 2**14  # of what a program says; more of it is another line
READ_BYTES = 2**20  # of the end of a log that is read again
QUICK_SECONDS = 30.0  # a program that ran for less ended quickly
END_SECONDS = 20.0  # before a program is killed
STOP_SECONDS = 180.0
POLL_SECONDS = 0.1
LOCK_SECONDS = 1.0  # of trying: whoever looks whether the lock is held holds it for a moment
SETTLE_SECONDS = 2.0  # that a status may be one of before: its supervisor writes another once it has the lock
STARTED, STARTED_AGAIN, NOTE = "--- started", "--- started again", "--- "  # lines of our own in a program's log
LogFormat = Literal["text", "json"]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded before any fork
_ELSEWHERE = "it runs in another container or under another kernel's numbering: stop it where it runs"


@dataclass(frozen=True)
class Program:
    """One process.

    Attributes:
        name: of its log, and in the status.
        environment: beside this process's own.
        restart_seconds: before it is started again, the first time.
        most_seconds: before it is started again, ever.
        end_seconds: that it has to end when it is told to.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    restart_seconds: float = 1.0
    most_seconds: float = 60.0
    end_seconds: float | None = None  # END_SECONDS

    @property
    def seconds_to_end(self) -> float:
        return END_SECONDS if self.end_seconds is None else self.end_seconds


@dataclass(frozen=True)
class LogLine:
    """
    Attributes:
        time: when the supervisor read it; ISO 8601, UTC.
    """

    time: str
    text: str


class _Lines(logging.Formatter):
    def __init__(self, program: str, form: LogFormat, *, named: bool = False) -> None:
        super().__init__()
        self._program, self._form, self._name = program, form, f"{program}: " if named else ""

    def format(self, record: logging.LogRecord) -> str:
        time, text = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="seconds"), record.getMessage()
        if self._form == "json":
            return json.dumps({"time": time, "program": self._program, "text": text}, ensure_ascii=False)
        return f"{time} {self._name}{text}"


class _Quiet(logging.Handler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A log that cannot be written ends nothing, and is no reason to write about it."""


class _File(_Quiet, RotatingFileHandler):
    """A program's log."""


class _Aloud(_Quiet, logging.StreamHandler):  # type: ignore[type-arg]
    """Standard output."""


class _Running:
    """A program and its process."""

    def __init__(self, program: Program, logs: Path, *, form: LogFormat, aloud: bool) -> None:
        self.program, self.starts, self.ended = program, 0, ""
        self.process: subprocess.Popen[bytes] | None = None
        self.began, self.since, self.due = "", 0.0, 0.0
        self.start_ticks: int | None = None
        self._wait = program.restart_seconds
        self.log = logging.getLogger(f"fedcanvas.{logs}.{program.name}")
        self.log.propagate = False
        self.log.setLevel(logging.INFO)
        log = logs / f"{program.name}.log"
        self.handlers: list[logging.Handler] = [
            _File(log, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8")
        ]
        self.handlers[0].setFormatter(_Lines(program.name, form))
        if aloud:
            self.handlers.append(_Aloud(sys.stdout))
            self.handlers[1].setFormatter(_Lines(program.name, form, named=True))
        for handler in self.handlers:
            self.log.addHandler(handler)

    def start(self) -> None:
        self.starts += 1
        self.began, self.since = _now(), time.monotonic()
        self.log.info(STARTED if self.starts == 1 else STARTED_AGAIN)
        try:
            self.process = subprocess.Popen(
                list(self.program.command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, **self.program.environment}, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        except OSError as error:
            self._note_end(f"cannot be started: {error.strerror or error}")
            return
        self.start_ticks = _start_ticks(self.process.pid)
        assert self.process.stdout is not None
        threading.Thread(target=self._copy, args=(self.process.stdout,), daemon=True).start()

    def look(self, now: float) -> bool:
        """Whether anything changed."""
        if self.process is None:
            if now < self.due:
                return False
            self.start()
            return True
        code = self.process.poll()
        if code is None:
            return False
        self._note_end(f"signal {-code}" if code < 0 else f"code {code}")
        return True

    def _note_end(self, how: str) -> None:
        ran = time.monotonic() - self.since
        self.process, self.ended = None, f"{_now()}: {how}, after {ran:.0f} s"
        if ran >= QUICK_SECONDS:
            self._wait = self.program.restart_seconds
        self.due = time.monotonic() + self._wait
        self.log.info("%s%s; it is started again in %.0f s", NOTE, self.ended, self._wait)
        self._wait = min(2 * self._wait, self.program.most_seconds)

    def stop(self) -> None:
        if self.process is None:
            return
        for ending, seconds in ((signal.SIGTERM, self.program.seconds_to_end), (signal.SIGKILL, END_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=seconds)
                break
        self.process = None

    def close(self) -> None:
        for handler in self.handlers:
            self.log.removeHandler(handler)
            handler.close()

    def _copy(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(LINE_BYTES):
                text = _COLOUR.sub("", line.decode("utf-8", "replace").rstrip("\r\n").replace("\t", "    "))
                self.log.info("%s", printable(text))

    def to_dict(self) -> dict[str, Any]:
        return {
            "pid": self.process.pid if self.process else None,
            "start_ticks": self.start_ticks if self.process else None, "starts": self.starts,
            "since": self.began if self.process else "", "ended": self.ended,
        }  # fmt: skip


def supervise(
    folder: Path, programs: Sequence[Program], *, stopped: threading.Event, form: LogFormat = "text",
    aloud: bool = False,
) -> None:  # fmt: skip
    """Keeps the programs running until `stopped` is set, then ends them.

    Args:
        form: of the lines of the logs.
        aloud: whether lines go to standard output as well, for what collects that of a service or container.
    Raises:
        FederationError: another supervisor keeps this folder.
    """
    with _held(folder):
        (folder / RUN / STATUS).unlink(missing_ok=True)  # of one that was killed
        logs, began = folder / LOGS, _now()
        logs.mkdir(parents=True, exist_ok=True)
        running = [_Running(program, logs, form=form, aloud=aloud) for program in programs]
        try:
            for one in running:
                one.start()
            _write_status(folder, running, began)
            while not stopped.wait(POLL_SECONDS):
                if any([one.look(time.monotonic()) for one in running]):
                    _write_status(folder, running, began)
        finally:
            for one in reversed(running):
                one.stop()
                one.close()
            (folder / RUN / STATUS).unlink(missing_ok=True)


def status(folder: Path) -> dict[str, Any] | None:
    """What the supervisor of `folder` last wrote; `None` when none lives."""
    if not is_held(folder):
        return None
    try:
        found: dict[str, Any] = json.loads((folder / RUN / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"pid": None, "programs": {}}  # it is just starting, or ending
    return found


def stop(folder: Path, *, seconds: float = STOP_SECONDS) -> bool:
    """Ends the supervisor of `folder` and its programs; false when none lived.

    Raises:
        FederationError: it does not end, is another user's, or runs where its number means nothing here.
    """
    began, told, lock = time.monotonic(), False, folder / RUN / LOCK
    while is_held(folder):
        about = status(folder) or {}
        meant, pid = _is_meant(about, about), about.get("pid")
        if meant and not told:
            try:
                os.kill(about["pid"], signal.SIGTERM)
                told = True
            except ProcessLookupError:
                pass  # it ended in between
            except PermissionError:
                raise FederationError(
                    f"the supervisor of {folder} is process {pid} of another user", hint="stop it as that user"
                ) from None
        waited = time.monotonic() - began
        if pid is not None and not meant and not told and waited > SETTLE_SECONDS:
            raise FederationError(f"the supervisor of {folder} cannot be told to end from here", hint=_ELSEWHERE)
        if waited > seconds:
            hint = f"kill -9 {pid}" if meant else f"`fuser {lock}` names the process that holds it"
            raise FederationError(f"the supervisor of {folder} does not end", hint=hint)
        time.sleep(POLL_SECONDS)
    return told


def restart(folder: Path, programs: Collection[str]) -> None:
    """Ends these programs of `folder`, which its supervisor starts again; nothing where none lives.

    Raises:
        FederationError: they go on as they were: another user's, or where their numbers mean nothing here.
    """
    about = status(folder)
    if about is None:
        return
    if about.get("pid") is not None and not _is_meant(about, about) and is_held(folder):
        raise FederationError(
            f"{', '.join(sorted(programs))} of {folder} were not started again: they go on as they were",
            hint=_ELSEWHERE,
        )
    for name, one in about.get("programs", {}).items():
        if name in programs and _is_meant(about, one):  # or it ended since, and is started again anyway
            try:
                os.kill(one["pid"], signal.SIGTERM)
            except ProcessLookupError:
                pass
            except PermissionError:
                raise FederationError(
                    f"{name} of {folder} was not started again: process {one['pid']} is another user's, and goes on as"
                    " it was",
                    hint="stop and start it as that user",
                ) from None


def is_held(folder: Path) -> bool:
    """Whether a supervisor lives; `FederationError` where another user's lock cannot be read."""
    path = folder / RUN / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        raise FederationError(
            f"{path} is another user's: whether it is started cannot be seen", hint="ask as that user"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # two that look see nothing of each other
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def log_lines(folder: Path, name: str) -> list[LogLine]:
    """The last lines of a program's log, in order, of either form: at most a megabyte; none where there is no log."""
    content = b""
    for path in (folder / LOGS / f"{name}.log", folder / LOGS / f"{name}.log.1"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (READ_BYTES - len(content))))
            content = file.read(READ_BYTES) + content
        if len(content) >= READ_BYTES:
            break
    return [line for text in content.decode("utf-8", "replace").splitlines() if (line := _parsed(text)) is not None]


@dataclass
class Detached:
    """A process that goes on when this one and its terminal are gone.

    Attributes:
        log: what it says.
        ended: its exit code, once that was seen.
    """

    pid: int
    log: Path
    ended: int | None = None

    def wait_until(self, true: Callable[[], bool], *, seconds: float) -> bool:
        """Whether it came true in time.

        Raises:
            FederationError: the process ended before, with the last that it said.
        """
        until = time.monotonic() + seconds
        while not true():
            if self._look() is not None:
                said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
                words = next((line for line in said if line.startswith("error: ")), said[-1] if said else "")
                raise FederationError(
                    f"it ended with code {self.ended}: {printable(words.removeprefix('error: ')) or 'without a word'}",
                    hint=f"{self.log} has what it said",
                )
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def end(self) -> None:
        """Tells it to end, and waits; another supervisor of its folder is left alone."""
        until = time.monotonic() + STOP_SECONDS
        if self._look() is None:  # a child that was not waited for keeps its number: nobody else has it
            os.kill(self.pid, signal.SIGTERM)
        while self._look() is None and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def _look(self) -> int | None:
        if self.ended is None:
            pid, how = os.waitpid(self.pid, os.WNOHANG)
            self.ended = os.waitstatus_to_exitcode(how) if pid else None
        return self.ended


def detach(command: Sequence[str], folder: Path) -> Detached:
    """Starts what supervises `folder` apart from this process: a session of its own, no standard input, its own log.

    Args:
        command: a program's path and its arguments, such as this command line with `--foreground`.
    """
    log = folder / LOGS / OWN_LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(f"{OWN_LOG}.1"))
    # Not `subprocess`: nobody will wait for it. Python's other descriptors are closed in it.
    pid = os.posix_spawn(
        command[0], list(command), os.environ, setsid=True, file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )  # fmt: skip
    return Detached(pid, log)


def until_told(run: Callable[[threading.Event], None]) -> None:
    """`run` with an event that SIGTERM and Ctrl-C set: for a supervisor in the foreground."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    (folder / RUN).mkdir(mode=0o700, parents=True, exist_ok=True)
    busy = FederationError(f"{folder} is started already", hint="stop it first, or ask for its status")
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            descriptor = take_lock(folder / RUN / LOCK, busy)
            break
        except FederationError:
            if time.monotonic() > until:
                raise
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        os.close(descriptor)


def _write_status(folder: Path, running: Sequence[_Running], began: str) -> None:
    about = {
        "pid": os.getpid(), "start_ticks": _start_ticks(os.getpid()), "pid_namespace": _pid_namespace(), "since": began,
        "programs": {one.program.name: one.to_dict() for one in running},
    }  # fmt: skip
    with contextlib.suppress(RunDirectoryError):  # a full disk ends no program
        write_whole(folder / RUN / STATUS, json.dumps(about, indent=2).encode() + b"\n", durable=False)


def _is_meant(about: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    """Whether the number that a status gives for `one` is that process here and now: nobody else may get its signals.

    Who holds a lock may be in a container, whose processes are counted anew, or on another machine; and a number is
    given away again once its process is gone.
    """
    pid, ticks = one.get("pid"), one.get("start_ticks")
    if type(pid) is not int or pid <= 0 or ticks is None:
        return False
    return about.get("pid_namespace") == _pid_namespace() and ticks == _start_ticks(pid)


def _start_ticks(pid: int) -> int | None:
    """When it was started, in ticks since the machine was: field 22 of proc_pid_stat(5). `None`: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # after its name, which may hold anything, comes field 3


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _parsed(line: str) -> LogLine | None:
    if line.startswith("{"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            about = json.loads(line)
            return LogLine(str(about["time"]), str(about["text"]))
        return None
    time, _, text = line.partition(" ")
    try:
        datetime.fromisoformat(time)
    except ValueError:
        return None  # the rest of a line whose beginning was not read
    return LogLine(time, text)


def _end_with_parent() -> None:
    """In the child, before it runs: the kernel ends it when the thread that started it is gone, however that went."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
