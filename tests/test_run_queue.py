"""The queue of a federation's runs: what stands beside a run, what is damaged, and who may say what when."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from toy_federation import PROMPTS, toy_config

from server import worker
from server.run_queue import QueuedRun, RunQueue
from server.superlink import EngineLost
from shared.errors import UsageError


@pytest.fixture
def queue(tmp_path: Path) -> RunQueue:
    return RunQueue(tmp_path)


def asked(queue: RunQueue, *names: str) -> None:
    for name in names:
        queue.add(name, config=toy_config(), prompts=PROMPTS.texts, sites=["site-0"])


def named(runs: list[QueuedRun]) -> list[str]:
    return [run.name for run in runs]


def test_what_no_run_can_be_called_is_no_run(queue: RunQueue) -> None:
    asked(queue, "retina")
    for name in ("retina.bak", ".retina-2.creating", "-x"):
        shutil.copytree(queue.folder / "retina", queue.folder / name)
    assert named(queue.all()) == ["retina"]
    for name in ("retina.bak", ".retina-2.creating", "absent", "../runs/retina"):
        with pytest.raises(UsageError, match="there is no run") as found:
            queue[name]
        assert found.value.hint == "there are: retina"


DAMAGED = (
    b"", b"junk", b"\xff\xfe", b"[]", b"7", b"[" * 100_000, b'{"state": "done"}', b'{"wanted": 1}', b'{"resumed": "2"}',
    b'{"since": null}', b'{"resumed": true}',
)  # fmt: skip


@pytest.mark.parametrize("file", ["wanted", "state"])
def test_a_damaged_file_is_its_own_run_s_trouble(file: str, queue: RunQueue) -> None:
    asked(queue, "first", "second")
    for content in DAMAGED:
        (queue.folder / f"first.{file}.json").write_bytes(content)
        damaged, second = sorted(queue.all(), key=lambda run: run.name)
        assert (damaged.state, second.state) == ("unreadable", "waiting")
        assert f"first.{file}.json is damaged: remove it" in damaged.reason
        assert named(queue.turns()) == ["second"]
        assert queue.next() == second
    for change in (queue.cancel, queue.resume):
        with pytest.raises(UsageError, match="run 'first' is unreadable"):
            change("first")
    # What the worker asks and says meanwhile does not fail, and the advice helps.
    assert queue.is_cancelled("first") is False
    queue.note("first", "running")
    (queue.folder / f"first.{file}.json").unlink(missing_ok=True)
    assert queue["first"].state in ("waiting", "running")


def test_the_command_line_never_writes_the_state(queue: RunQueue) -> None:
    asked(queue, "spring")
    state = queue.folder / "spring.state.json"
    for reason in ("too few sites", "too few sites again"):
        queue.note("spring", "failed", reason)
        before = state.read_bytes()
        assert queue["spring"].reason == reason
        assert queue.next() is None
        assert (queue.resume("spring").state, state.read_bytes()) == ("waiting", before)
        assert queue.next() == queue["spring"]
        assert queue["spring"].reason == ""
        with pytest.raises(UsageError, match="run 'spring' is waiting"):
            queue.resume("spring")
        queue.note("spring", "running")
        assert queue["spring"].state == "running"
    queue.note("spring", "finished")
    with pytest.raises(UsageError, match="run 'spring' is finished"):
        queue.resume("spring")


def test_a_run_that_is_cancelled_before_its_turn_waits_again_once_it_is_resumed(queue: RunQueue) -> None:
    asked(queue, "first", "second")
    assert queue.cancel("first").state == "cancelled"
    assert named(queue.turns()) == ["second"]
    assert queue.resume("first").state == "waiting"
    assert named(queue.turns()) == ["first", "second"]


def test_a_cancellation_that_nobody_has_seen_is_shown_and_can_be_taken_back(queue: RunQueue) -> None:
    asked(queue, "first", "second")
    queue.note("second", "running")
    about = queue.cancel("second")
    assert (about.state, about.cancelling) == ("running", True)
    assert queue.is_cancelled("second")
    about = queue.resume("second")
    assert (about.state, about.cancelling, queue.is_cancelled("second")) == ("running", False, False)
    assert named(queue.turns()) == ["second", "first"]  # still the one that was begun
    # The worker stopped a moment before it was taken back, and says so a moment after: the run goes on.
    queue.note("second", "cancelled")
    assert queue["second"].state == "running"
    queue.cancel("second")
    queue.note("second", "cancelled")
    assert (queue["second"].state, queue["second"].cancelling) == ("cancelled", False)


def test_a_cancellation_and_the_worker_s_word_never_lose_each_other(queue: RunQueue) -> None:
    """Whatever came first: a run that nobody wants cancelled any more is never left cancelled."""
    asked(queue, "spring")
    queue.note("spring", "running")

    def worker() -> None:
        for _ in range(40):
            if queue.is_cancelled("spring"):
                queue.note("spring", "cancelled")
            if queue["spring"].state == "waiting":
                queue.note("spring", "running")

    thread = threading.Thread(target=worker)
    thread.start()
    while thread.is_alive():
        if queue["spring"].state == "running":
            queue.cancel("spring")
            queue.resume("spring")
            assert queue["spring"].state in ("running", "waiting")
    thread.join()


def test_files_of_a_run_that_was_removed_say_nothing_about_the_next_of_its_name(queue: RunQueue) -> None:
    asked(queue, "spring")
    queue.note("spring", "finished")
    shutil.rmtree(queue.folder / "spring")
    for name in ("wanted", "state"):
        with pytest.raises(UsageError, match=rf"spring\.{name}\.json is left of an earlier run"):
            asked(queue, "spring")
        (queue.folder / f"spring.{name}.json").unlink()
    asked(queue, "spring")
    assert queue["spring"].state == "waiting"


def test_files_of_the_release_before_are_read(queue: RunQueue) -> None:
    asked(queue, "spring")
    about = {"state": "failed", "reason": "too few sites", "since": "2026-11-26T12:00:00+00:00"}
    (queue.folder / "spring.state.json").write_text(json.dumps(about))
    (queue.folder / "spring.wanted.json").write_text(json.dumps({"wanted": "run", "since": "", "asked": "1"}))
    assert (queue["spring"].state, queue["spring"].since) == ("failed", about["since"])
    assert queue.resume("spring").state == "waiting"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (httpx.ConnectError("refused"), "waiting"), (EngineLost("the run is over"), "waiting"),
        # What Flower says of a SuperLink that was killed while a question was pushed, and came back.
        (ObjectPushError("91a1", 7, "a session"), "waiting"), (ValueError("a bug"), "failed"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Exception) else given,
)  # fmt: skip
def test_a_run_goes_on_after_the_engine_was_lost_and_fails_of_a_bug(
    error: Exception, state: str, queue: RunQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(queue, "spring")
    ending, tries = threading.Event(), list[str]()

    def do(queued: QueuedRun, *_: object, **__: object) -> None:
        tries.append(queued.name)
        if len(tries) == 2:
            ending.set()
            return
        raise error

    monkeypatch.setattr(worker, "_do", do)
    monkeypatch.setattr(worker, "ENGINE_SECONDS", 0.0)
    monkeypatch.setattr(worker, "IDLE_SECONDS", 0.0)
    for outside in ("FederationFolder", "Runtime", "SuperLink"):
        monkeypatch.setattr(worker, outside, MagicMock())
    monkeypatch.setattr(worker, "LiveRoster", lambda *_: nullcontext(SimpleNamespace(trouble="")))
    delivery = SimpleNamespace(deliver=lambda stopped: ending.set() if queue["spring"].state == "failed" else None)
    monkeypatch.setattr(worker, "Delivery", lambda *_, **__: delivery)
    worker.work(queue.folder.parent, ending=ending)
    assert (queue["spring"].state, len(tries)) == (state, 1 if state == "failed" else 2)
