"""Both engines give the same bits, whatever runs beside what, and what Flower bundles and runs is this release."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from deployed_site import instruction
from flwr.app import Context, Message, RecordDict
from toy_federation import PROMPTS, make_run, make_sites, toy_config

import client.site
from client.app import make_app
from server.app import OPTIONAL, PLACES, open_run
from server.rounds import Outcome
from shared.config import RunConfig, setting_names
from shared.errors import ConfigError, FederationError
from shared.observer import SilentObserver
from shared.records import decode_instruction, encode_instruction
from shared.rundir import RunDirectory
from simulations import engines
from simulations.engines import LocalGrid, put_together, run_local, run_ray, take_apart

RELEASE = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def sites_of_other_tests_are_forgotten():
    yield
    client.site._SITES.clear()


def run(
    engine: Callable[..., Outcome], path: Path, config: RunConfig, site_dirs: list[Path],
    observer: SilentObserver | None = None,
) -> Outcome:  # fmt: skip
    observer = observer or SilentObserver()
    with make_run(path, config) as rundir:
        return engine(config, site_dirs=site_dirs, rundir=rundir, prompts=PROMPTS, observer=observer)


# ---- in this process


@pytest.mark.parametrize(
    ("kernel", "site_threads"),
    [("fused", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("fused", 1), ("opacus", 2)])],
)
def test_sites_side_by_side_give_the_bits_of_one_after_the_other(kernel: str, site_threads: int, tmp_path: Path):
    # Wide enough on 28 px that torch divides the work among the threads it may use.
    base = {
        "data.image-size": 28, "discriminator.width": 32, "federation.sites": 3, "privacy.target-epsilon": 1.0,
        "privacy.kernel": kernel, "compute.site-threads": site_threads, "compute.server-threads": 2,
    }  # fmt: skip
    outcomes = []
    for parallel in (1, 2, 3):
        client.site._SITES.clear()
        config = toy_config({**base, "compute.parallel-sites": parallel})
        folders = make_sites(tmp_path / f"sites-{parallel}", sizes=(40, 24, 9))
        outcomes.append(run(run_local, tmp_path / f"run-{parallel}", config, folders))
    assert len({outcome.digest for outcome in outcomes}) == 1


@pytest.mark.parametrize(
    ("site_threads", "server_threads"),
    [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 2), (2, 2)])],
)
def test_sites_and_server_compute_with_their_own_number_of_threads(
    site_threads: int, server_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, set[int]] = {"site": set(), "server": set()}
    real_site, real_step = client.site.site_gradient, engines.serve.__globals__["ServerTraining"].step

    def at_site(*args: object, **settings: object) -> np.ndarray:
        seen["site"].add(torch.get_num_threads())
        return real_site(*args, **settings)

    def at_server(*args: object) -> dict[str, float]:
        seen["server"].add(torch.get_num_threads())
        return real_step(*args)

    monkeypatch.setattr(client.site, "site_gradient", at_site)
    monkeypatch.setattr(engines.serve.__globals__["ServerTraining"], "step", at_server)
    threads = {"compute.site-threads": site_threads, "compute.server-threads": server_threads}
    config = toy_config({"privacy.name": "none", **threads})
    run(run_local, tmp_path / "run", config, make_sites(tmp_path / "sites"))
    assert seen == {"site": {site_threads}, "server": {server_threads}}


def test_a_message_survives_the_wire_and_shares_nothing_with_the_sender(tmp_path: Path):
    sent = instruction(toy_config())
    grid = LocalGrid(make_app([]), sites=1, parallel_sites=1)
    with grid:
        message = Message(encode_instruction(sent), 1001, "train", group_id="1")
        arrived = put_together(*take_apart(message))
    got = decode_instruction(arrived.content)
    assert np.array_equal(got.weights, sent.weights)
    assert not np.shares_memory(got.weights, sent.weights)
    assert arrived.metadata.dst_node_id == 1001
    assert arrived.metadata.group_id == "1"


def test_leaving_the_grid_waits_for_sites_and_forgets_their_replies():
    done: list[int] = []

    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.2)
        done.append(context.node_id)
        return Message(message.content, reply_to=message)

    with LocalGrid(slow, sites=4, parallel_sites=2) as grid:
        grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
    assert len(done) == 2  # those at work ended, those that waited never began


# ---- Ray


class Recorder(SilentObserver):
    def __init__(self) -> None:
        self.rounds: dict[int, Mapping[str, float]] = {}

    def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
        self.rounds[server_round] = figures


@pytest.mark.slow
def test_ray_ends_in_the_weights_of_the_local_engine(tmp_path: Path):
    config = toy_config({"federation.rounds": 3, "warm-start.enabled": True, "warm-start.steps": 3})
    folders, local, ray = make_sites(tmp_path / "sites"), Recorder(), Recorder()
    expected = run(run_local, tmp_path / "local", config, make_sites(tmp_path / "others"), local)
    # Nothing that is loaded here may matter there: the engine starts in the release's folder.
    outcome = run(run_ray, tmp_path / "ray", config, folders, ray)
    assert outcome == expected
    assert json.dumps(ray.rounds) == json.dumps(local.rounds)
    assert (tmp_path / "ray/events.jsonl").read_bytes() == (tmp_path / "local/events.jsonl").read_bytes()
    assert not list(Path("/tmp").glob(f"fedcanvas-{os.getpid()}-*"))  # nothing of the engine stays behind


@pytest.mark.slow
def test_a_run_that_was_interrupted_in_ray_goes_on_in_the_local_engine(tmp_path: Path):
    class Interrupting(Recorder):
        def on_round(self, server_round: int, figures: Mapping[str, float]) -> None:
            super().on_round(server_round, figures)
            if server_round == 2:
                raise KeyboardInterrupt

    config, folders, until = toy_config({"federation.rounds": 30}), make_sites(tmp_path / "sites"), Interrupting()
    # Sites of its own: those that are interrupted have the run reserved once.
    expected = run(run_local, tmp_path / "local", config, make_sites(tmp_path / "others"))
    with pytest.raises(KeyboardInterrupt):
        run(run_ray, tmp_path / "ray", config, folders, until)
    assert list(until.rounds) == [1, 2]
    with RunDirectory.resume(tmp_path / "ray") as rundir:  # the engine is gone, its lock is free
        assert rundir.steps_charged() < 30
        resumed = run_local(config, site_dirs=folders, rundir=rundir, prompts=PROMPTS, observer=SilentObserver())
    assert resumed.digest == expected.digest


@pytest.mark.slow
def test_a_site_that_refuses_stops_ray_with_the_same_error(tmp_path: Path):
    folders = make_sites(tmp_path / "sites")
    (folders[1] / "data.npz").unlink()
    with pytest.raises(FederationError, match="round 1: site site-1 refused with code 'site'"):
        run(run_ray, tmp_path / "ray", toy_config({"privacy.name": "none"}), folders)
    with RunDirectory.resume(tmp_path / "ray") as rundir:  # its lock is free again
        assert rundir.steps_charged() == 1


# ---- what `flwr build` bundles and `flwr run` runs


def flower_table() -> dict[str, object]:
    return tomllib.loads((RELEASE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]


def flat(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_flower_s_config_table_is_that_of_the_settings():
    """`--run-config` may change only keys that stand in the table; "" stands for unset, 0 for "has no default"."""
    table = dict(flat(flower_table()["config"]))
    assert set(table) == {*setting_names(), *PLACES}
    assert {table[place] for place in PLACES} == {""}
    required = {"privacy.delta": 1e-5, "privacy.sampling-rate": 0.1, "federation.published-records": 1000}
    assert {table[key] for key in required} == {0}
    settings = {key: value for key, value in table.items() if value != "" and key not in PLACES}
    expected = RunConfig.from_flat(required)
    assert {**settings, **required} == expected.to_flat()
    assert all(type({**settings, **required}[key]) is type(value) for key, value in expected.to_flat().items())


@pytest.mark.parametrize("missing", [place for place in PLACES if place not in OPTIONAL])
def test_a_place_that_flwr_run_does_not_name_is_asked_for(missing: str, tmp_path: Path):
    places = {key: str(tmp_path / "x") for key in PLACES if key != missing}
    with pytest.raises(ConfigError, match=missing):
        open_run({**toy_config().to_flat(), "text.path": "", **places})


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the release under the name that `flwr build` asks of its folder."""
    folder = tmp_path_factory.mktemp("build") / "fedcanvas"
    folder.mkdir()
    for package in ("client", "server", "shared", "simulations"):
        shutil.copytree(RELEASE / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (RELEASE / name).exists():
            shutil.copy(RELEASE / name, folder / name)
    (folder / "data.json").write_text('{"caption": "private"}')
    return folder


def flower(*arguments: str, cwd: Path, env: Mapping[str, str] = os.environ) -> str:
    command = [str(Path(sys.executable).with_name("flwr")), *arguments]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_bundle_holds_code_and_licence_only(bundle_folder: Path):
    flower("build", cwd=bundle_folder)
    (fab,) = bundle_folder.glob("*.fab")
    names = set(zipfile.ZipFile(fab).namelist())
    fab.unlink()
    assert {"client/app.py", "server/app.py", "shared/records.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if not name.endswith((".py", "pyproject.toml", "LICENSE")) and name[0] != "."]
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A fresh home with its own port; what Flower left running in it is ended."""
    home = tmp_path / "flower-home"
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the CLI starts its SuperLink by name
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as rays:  # names of sockets are short
        yield {
            **os.environ, "FLWR_HOME": str(home), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port, "PATH": path,
            "RAY_TMPDIR": rays,
        }  # fmt: skip
        _end_what_runs_in(home)


def _end_what_runs_in(home: Path) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def name_captions(folders: list[Path]) -> tuple[bytes, ...]:
    """Gives the sites captions that no prompt holds, and returns what must not be found."""
    names = ("hemangioma", "melanoma", "nevus")
    for folder in folders:
        with np.load(folder / "data.npz") as data:
            arrays = dict(data)
        np.savez(folder / "data.npz", **{**arrays, "class_names": np.array(names)})
    return tuple(name.encode() for name in names)


@pytest.mark.slow
def test_flwr_run_on_a_fresh_home_ends_in_the_weights_of_the_local_engine(
    bundle_folder: Path, flower_home: dict[str, str], tmp_path: Path
):
    config, folders = toy_config({"federation.rounds": 3}), make_sites(tmp_path / "sites")
    words = name_captions([*folders, *(others := make_sites(tmp_path / "others"))])
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS.texts))
    places = {
        "simulation.run-dir": tmp_path / "run",
        "simulation.sites": tmp_path / "sites",
        "simulation.prompts": tmp_path / "prompts.txt",
    }
    lines = {**config.to_flat(), **{key: str(place) for key, place in places.items()}}
    (tmp_path / "run.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
    # An empty folder: Ray's workers look for `client` first where the SuperLink was started.
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    started = flower(
        "run", str(bundle_folder), "local", "--run-config", str(tmp_path / "run.toml"),
        "--federation-config", "num-supernodes=2 client-resources-num-cpus=1", "--format", "json",
        cwd=nowhere, env=flower_home,
    )  # fmt: skip
    answer = json.loads(started[started.index("{") :])
    assert answer.get("success"), answer
    run_id = answer["run-id"]
    status, until = "", time.monotonic() + 240
    while not status.startswith("finished") and time.monotonic() < until:
        time.sleep(2)
        listed = flower("list", "local", "--run-id", str(run_id), "--format", "json", cwd=nowhere, env=flower_home)
        status = json.loads(listed)["runs"][0]["status"]
    assert status == "finished:completed", listed
    client.site._SITES.clear()
    expected = run(run_local, tmp_path / "local", config, others)
    # PRIVACY rule 20: neither the run directory nor what Flower and Ray keep holds a caption.
    kept = [tmp_path / "run", Path(flower_home["FLWR_HOME"]), Path(flower_home["RAY_TMPDIR"])]
    files = [file for folder in kept for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(files) > 20
    for file in files:
        assert not any(word in file.read_bytes() for word in words), file
    with RunDirectory.open(tmp_path / "run") as rundir:
        assert rundir.read_json("model/model.json")["weights_digest"] == expected.digest
