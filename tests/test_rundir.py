"""A run on disk survives death at every single system call, never under-counts, and refuses to mix runs.

The oracle is the folder of an undisturbed run, compared byte by byte.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_process import KillAtCall, Killed

from shared.config import RunConfig
from shared.disk import write_whole
from shared.errors import BudgetExhausted, FedCanvasError, RunDirectoryError
from shared.rundir import RunDirectory, load_model, to_json

ROUNDS = 5
CONFIG = RunConfig.from_table(
    {
        "data": {"image-size": 8},
        "privacy": {"delta": 1e-4, "sampling-rate": 0.2},
        "federation": {"published-records": 400, "rounds": ROUNDS, "sites": 2},
        "discriminator": {"name": "toy"},
    }
)
PROMPTS = ("a red circle", "ein grüner Kreis", "一个红色的圆")
SLACK = 5


def play(run: RunDirectory, *, pause: float = 0.0) -> None:
    """A run whose state is a running product of its rounds, so that a lost or doubled round shows."""
    done = 0
    state: dict[str, Any] = {"weights": torch.ones(3), "history": []}
    restored = run.load_latest_checkpoint()
    if restored is not None:
        done, state = restored
    for server_round in range(done + 1, ROUNDS + 1):
        release = run.load_release(server_round)
        if release is None:
            run.charge(server_round, steps=1, reserved_steps=ROUNDS + SLACK)
            time.sleep(pause)
            total = np.arange(3, dtype=np.int64) + server_round
            run.save_release(server_round, total, replies=2)
            release = total, 2
        total, replies = release
        state = {
            "weights": state["weights"] * torch.from_numpy(total).float() / replies,
            "history": [*state["history"], server_round],
        }
        run.append_event({"event": "round", "server_round": server_round, "sum": float(state["weights"].sum())})
        run.append_timing(server_round, time.monotonic())
        if server_round % 2 == 0:
            run.write_bytes(run.sample_name(server_round), state["weights"].numpy().tobytes())
        if server_round % 2 == 0 or server_round == ROUNDS:
            run.save_checkpoint(server_round, state)
    run.save_model(
        generator={"w": state["weights"]}, discriminator={"w": state["weights"]}, card={"encoder_fingerprint": "x"}
    )
    run.write_json("result.json", {"history": state["history"], "epsilon": float("inf")})


def start_or_resume(path: Path) -> RunDirectory:
    if RunDirectory.exists(path):
        return RunDirectory.resume(path, config=CONFIG, prompts=PROMPTS)
    return RunDirectory.create(path, config=CONFIG, prompts=PROMPTS)


def contents(path: Path) -> dict[str, str]:
    left_out = {"spent.jsonl", "timings.jsonl"}
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in left_out
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    with RunDirectory.create(path, config=CONFIG, prompts=PROMPTS) as run:
        play(run)
    return path


def kill_at_call(number: int, monkeypatch: pytest.MonkeyPatch) -> KillAtCall:
    """Of everything that changes the disk, opening a file to write included."""
    kill = KillAtCall(number, monkeypatch)
    kill.watch(of_os=("fsync", "truncate"), of_path=("rename", "unlink", "mkdir"))
    plain_open = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return kill.guarded(plain_open)(self, mode, *args, **options) if mode != "r" else plain_open(self, mode)

    monkeypatch.setattr(Path, "open", opened)
    return kill


def test_death_before_any_write_ends_in_the_files_of_an_undisturbed_run(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # each call still counts as one to die at
    expected = contents(undisturbed)
    number, deaths = 1, 0
    while True:
        path = tmp_path / f"run-{number}"
        with pytest.MonkeyPatch.context() as patch:
            kill = kill_at_call(number, patch)
            try:
                run = start_or_resume(path)
                play(run)
            except Killed:
                deaths += 1
            else:
                assert kill.calls < number  # the run has no further call to die at
                break
            finally:
                run_open = locals().get("run")
                if run_open is not None:
                    run_open.close()
        spent_before = len(RunDirectory.open(path).charges()) if RunDirectory.exists(path) else 0
        with start_or_resume(path) as again:
            play(again)
            assert again.steps_charged() >= max(ROUNDS, spent_before)
            assert again.steps_charged() <= ROUNDS + 1  # only the round in flight is asked for again
        assert contents(path) == expected, f"died at call {number}"
        number += 1
    assert deaths > 80


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_sigkill_of_the_process_and_resume_end_in_the_files_of_an_undisturbed_run(
    undisturbed: Path, tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.test_rundir import play, start_or_resume\n"
        "run = start_or_resume(Path(sys.argv[1])); print('up', flush=True); play(run, pause=0.02)\n"
    )
    delays = random.Random(seed)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delays.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with start_or_resume(path) as run:
        play(run)
        assert ROUNDS <= run.steps_charged() <= ROUNDS + 2
    assert contents(path) == contents(undisturbed)


def test_a_torn_last_line_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS) as run:
        run.charge(1, steps=1, reserved_steps=9)
        run.charge(2, steps=1, reserved_steps=9)
    spent = tmp_path / "run" / "spent.jsonl"
    whole = spent.read_bytes()
    spent.write_bytes(whole + b'{"server_round": 3, "att')
    with RunDirectory.resume(tmp_path / "run") as run:
        assert run.charge(3, steps=1, reserved_steps=9) == 1
        assert run.steps_charged() == 3
    spent.write_bytes(b"?" + whole)
    with pytest.raises(RunDirectoryError, match="damaged"):
        RunDirectory.open(tmp_path / "run").steps_charged()


def test_attempts_are_numbered_and_stop_at_the_reserved_steps(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS) as run:
        assert run.charge(0, steps=0, reserved_steps=6) == 1  # the warm start takes no steps
        assert [run.charge(1, steps=2, reserved_steps=6) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(BudgetExhausted, match="6 of 6 reserved steps"):
            run.charge(2, steps=2, reserved_steps=6)
        assert run.steps_charged() == 6


def test_a_charge_is_on_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    plain = os.fsync

    def noted(descriptor: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS) as run:
        order.clear()
        run.charge(1, steps=1, reserved_steps=9)
    assert order[0].endswith("spent.jsonl")
    assert order[1] == str((tmp_path / "run").resolve())


def test_between_institutions_a_sum_is_on_disk_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No site answers a round that is over, so what a power cut took could never be had again."""
    synced: list[str] = []
    plain = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), run.path.resolve()))
        plain(descriptor)

    for entropy in ("seeded", "system"):
        with RunDirectory.create(tmp_path / entropy, config=CONFIG, prompts=PROMPTS, entropy=entropy) as run:  # type: ignore[arg-type]
            monkeypatch.setattr(os, "fsync", noted)
            run.remember_sites({"site-0": "ab" * 32}, {}, 1)
            run.save_release(1, np.arange(3), replies=2)
            monkeypatch.undo()
    # The folder's own name is new, and with it all that lies under it could go.
    file = "releases/round-00001.safetensors.tmp"
    assert synced == ["sites.json.tmp", ".", ".", file, "releases"]


def test_with_its_newest_checkpoint_damaged_a_run_asks_for_no_round_again(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with start_or_resume(path) as run:
        play(run)
    (path / f"checkpoints/round-{ROUNDS:05d}.safetensors").write_bytes(b"damaged")
    with start_or_resume(path) as again:
        restored = again.load_latest_checkpoint()
        assert restored is not None
        assert restored[0] == ROUNDS - 1
        play(again)
        assert again.steps_charged() == ROUNDS
    assert contents(path) == contents(undisturbed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": CONFIG.replaced({"privacy.clipping-norm": 5.0})}, r"privacy\.clipping-norm 12\.0 -> 5\.0"),
        ({"config": CONFIG.replaced({"seed": 3})}, "seed 0 -> 3"),
        ({"prompts": [*PROMPTS, "another"]}, "other prompts"),
    ],
)
def test_resume_refuses_what_differs_and_names_it(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS).close()
    with pytest.raises(RunDirectoryError, match=named):
        RunDirectory.resume(tmp_path / "run", **change)
    RunDirectory.resume(tmp_path / "run", config=CONFIG, prompts=PROMPTS).close()  # and lets go of the lock


def test_resume_refuses_other_versions_and_names_them(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS).close()
    versions = tmp_path / "run" / "versions.json"
    versions.write_bytes(to_json({**json.loads(versions.read_text()), "torch": "1.0"}))
    with pytest.raises(RunDirectoryError, match=r"torch 1\.0 -> "):
        RunDirectory.resume(tmp_path / "run")


@pytest.mark.parametrize("name", ["config.toml", "prompts.txt"])
def test_inputs_changed_by_hand_are_noticed(tmp_path: Path, name: str) -> None:
    RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS).close()
    file = tmp_path / "run" / name
    file.write_text(file.read_text().replace("12.0", "5.0").replace("red", "blue"))
    with pytest.raises(RunDirectoryError, match=f"{name} was changed"):
        RunDirectory.open(tmp_path / "run")


def test_a_folder_with_anything_in_it_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory.create(tmp_path, config=CONFIG, prompts=PROMPTS)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory.create(tmp_path / "notes.txt", config=CONFIG, prompts=PROMPTS)
    RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS).close()
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS)
    assert "--resume" in (caught.value.hint or "")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, config=CONFIG, prompts=PROMPTS).close()
    assert RunDirectory.open(tmp_path).prompts == PROMPTS
    assert RunDirectory.open(tmp_path).config == CONFIG


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS):
        with pytest.raises(RunDirectoryError, match="in use by another process"):
            RunDirectory.resume(tmp_path / "run")
        assert RunDirectory.open(tmp_path / "run").steps_charged() == 0  # reading is allowed meanwhile
    RunDirectory.resume(tmp_path / "run").close()


def test_a_checkpoint_returns_every_kind_of_state_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "weights": torch.tensor([1.5, float("nan"), -0.0]),
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "adam": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"betas": (0.5, 0.99), "params": [0, 1]}]},
        "array": np.arange(4, dtype=np.int64).reshape(2, 2),
        "empty": torch.zeros(0, 3),
        "scalars": [1, 2**70, 0.1, "größe", True, None, float("inf")],
    }
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS) as run:
        run.save_checkpoint(4, state)
    with RunDirectory.resume(tmp_path / "run") as run:
        restored = run.load_latest_checkpoint()
    assert restored is not None
    server_round, got = restored
    assert server_round == 4
    assert got["adam"]["state"][0]["step"].item() == 3.0
    assert got["adam"]["groups"] == state["adam"]["groups"]  # type: ignore[index]
    assert got["scalars"] == state["scalars"]
    assert got["half"].dtype == torch.bfloat16
    assert got["empty"].shape == (0, 3)
    assert got["weights"].numpy().tobytes() == state["weights"].numpy().tobytes()  # type: ignore[attr-defined]
    assert isinstance(got["array"], np.ndarray)
    assert got["array"].tolist() == [[0, 1], [2, 3]]


def test_two_checkpoints_are_kept_and_a_damaged_one_falls_back_to_the_other(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS) as run:
        for server_round in (5, 10, 15):
            run.append_event({"event": "round", "server_round": server_round})
            run.save_checkpoint(server_round, {"value": server_round})
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["round-00010.safetensors", "round-00015.safetensors"]
    kept[-1].write_bytes(kept[-1].read_bytes()[:-3])
    with RunDirectory.resume(tmp_path / "run") as run:
        assert run.load_latest_checkpoint() == (10, {"value": 10})
        assert [event["server_round"] for event in run.events()] == [5, 10]


def test_a_torn_release_counts_as_absent(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", config=CONFIG, prompts=PROMPTS) as run:
        run.save_release(3, np.array([1, -2, 2**62]), replies=4)
        restored = run.load_release(3)
        assert restored is not None
        assert (restored[0].tolist(), restored[1]) == ([1, -2, 2**62], 4)
        assert run.load_release(4) is None
        (file,) = (tmp_path / "run" / "releases").iterdir()
        content = file.read_bytes()
        for torn in (content[:-8], content[:-8] + bytes(8), b""):
            file.write_bytes(torn)
            assert run.load_release(3) is None


def test_no_file_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        write_whole(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"


def test_reading_checkpoints_and_models_unpickles_nothing() -> None:
    source = Path("shared/rundir.py").read_text()
    assert "pickle" not in source
    assert "torch.load" not in source


@pytest.mark.parametrize("place", ["nowhere", "empty", "unfinished"])
def test_a_folder_that_is_no_model_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "unfinished", config=CONFIG, prompts=PROMPTS).close()
    with pytest.raises(FedCanvasError) as caught:
        load_model(tmp_path / place)
    assert isinstance(caught.value, RunDirectoryError)
    assert ("--resume" in (caught.value.hint or "")) == (place == "unfinished")


def test_infinite_epsilon_is_json_that_strict_readers_take() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(to_json({"epsilon": float("inf")}), parse_constant=refuse) == {"epsilon": "inf"}
    assert builtins.float("inf") == float(json.loads(to_json({"epsilon": float("inf")}))["epsilon"])
