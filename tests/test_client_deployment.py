"""`fedcanvas client start`, `stop`, `status`: what is looked at first, what is said, and what is left running."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from deployed_site import CHEAP, OPEN, instruction
from flower_processes import ROOT, Flower, eventually, flower, listens
from flwr.common.serde import recorddict_to_proto
from joined_sites import Operator, sent, signed
from test_site_processes import pid_of
from test_supervisor import alive
from test_worker import hostile_bundle, kinds, send
from toy_federation import make_sites, toy_config, toy_policy

from client.activity import FILE, Activity, note_activity
from client.deployment import programs
from client.joining import AUTHORITY
from client.membership import NODE, SIGNING
from client.status import read_connection
from client.worker import Ending
from server.cohort import opened
from shared.app_bundle import digest_of_bundle
from shared.cli import run
from shared.flower_runtime import free_port
from shared.protection.keys import read_node_key, write_node_key
from shared.records import SiteReply
from shared.supervisor import LogLine, log_lines

CONFIG = toy_config({**CHEAP, "privacy.retry-slack": 3})


def joined_site(folder: Path, *, address: str = "", authority: Path | None = None) -> tuple[Path, Operator]:
    """A deployed site with the keys of a federation, and that federation's operator."""
    (site,) = make_sites(folder, sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    operator = Operator()
    if authority is not None:
        operator.federation = dataclasses.replace(
            operator.federation, address=address, authority=authority.read_text()
        )
    operator.admit([site])
    write_node_key(site / NODE)
    (site / AUTHORITY).write_text(operator.federation.authority)
    return site, operator


def admit_node(here: Flower, site: Path) -> None:
    (here.folder / f"{site.name}.pub").write_text(read_node_key(site / NODE) + "\n")
    here.flwr("supernode", "register", f"{site.name}.pub", "here")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return joined_site(tmp_path)[0]


def status_of(site: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["client", "status", str(site), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def shown(site: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(["client", "status", str(site)]) == 0
    return capsys.readouterr().out


# ---- before anything is started


def make_simulated(site: Path) -> None:
    with (site / "site.toml").open("a") as file:
        file.write("simulated-seed = 7\n")


def cut_ledger(site: Path) -> None:
    (ledger,) = site.rglob("ledger.jsonl")
    ledger.write_bytes(ledger.read_bytes()[:-20] + b"\n")


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda site: (site / "federation.json").unlink(), 3, "joined no federation"),
        (make_simulated, 3, "is a simulated site"),
        (lambda site: (site / "policy.toml").unlink(), 3, "has no policy.toml"),
        (lambda site: (site / "policy.toml").write_text("max-epsilon = 'much'\n"), 3, "max-epsilon"),
        (lambda site: (site / "data.npz").unlink(), 4, "the data of the site are not at"),
        (cut_ledger, 5, "ledger.jsonl"),
        (lambda site: (site / SIGNING).chmod(0o644), 10, "can be read by others"),
        (lambda site: (site / NODE).write_text("no key"), 10, "node's key"),
        (lambda site: (site / "aggregator-keys.json").unlink(), 10, "aggregator-keys.json cannot be read"),
        (shutil.rmtree, 3, "is no site"),
    ],
)
def test_what_would_keep_a_site_from_answering_is_said_and_nothing_is_started(
    site: Path, spoil: Callable[[Path], object], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(site)
    assert run(["client", "start", str(site)]) == code
    assert said in capsys.readouterr().err
    assert not (site / "run").exists()
    assert not (site / "logs").exists()


def test_a_site_that_was_not_started_is_stopped_without_an_error(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["client", "stop", str(site)]) == 0
    assert "was not started" in capsys.readouterr().out


@pytest.mark.slow
def test_no_process_imports_from_the_folder_where_it_was_started(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path / "sites", sizes=(8,), seed=None)  # joined nothing: its worker ends by itself
    joined, _ = joined_site(tmp_path / "joined")
    decoy = tmp_path / "decoy"
    for package in ("client", "shared"):
        (decoy / package).mkdir(parents=True)
        (decoy / package / "__init__.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w').write('imported')\n")
    command = [*programs(joined)[1].command[:-1], str(site)]
    ended = subprocess.run(
        command, cwd=decoy, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert "joined no federation: nothing that came over a network is answered" in ended.stderr
    assert not (tmp_path / "evil").exists()


# ---- what is said


def lines(*texts: str) -> list[LogLine]:
    return [LogLine(f"2026-11-26T21:40:{second:02}+00:00", text) for second, text in enumerate(texts)]


STARTS = "--- started"  # by a new supervisor
ENDED = ("--- 2026-11-26T21:40:43+00:00: code 1, after 6 s; it is started again in 5 s", "--- started again")
GAVE_UP = ("ERROR :     Exit Code: 305", "Failed to initialize the connection to the SuperLink.")
NOT_ADMITTED = (*GAVE_UP, "[code: 2004] Failed to activate SuperNode.")
RETRIES = "WARNING :   Connection attempt failed, retrying in 0.87 seconds"


@pytest.mark.parametrize(
    ("said", "state", "second"),
    [
        ((), "unknown", None),
        ((STARTS,), "unknown", 0),
        ((STARTS, "INFO :      SuperNode ID: 88728973"), "connected", 1),
        ((STARTS, RETRIES, RETRIES, RETRIES), "trying", 1),
        ((STARTS, "INFO :      SuperNode ID: 1", RETRIES), "trying", 2),
        ((RETRIES, "INFO :      Connection successful after 3.10 seconds and 3 tries."), "connected", 1),
        ((STARTS, *NOT_ADMITTED), "refused", 2),
        ((STARTS, *NOT_ADMITTED, *ENDED), "refused", 2),  # until there is another answer
        ((STARTS, *NOT_ADMITTED, STARTS), "unknown", 4),
        ((STARTS, *NOT_ADMITTED, *ENDED, "INFO :      SuperNode ID: 1"), "connected", 6),
        (("INFO :      SuperNode ID: 1", *ENDED), "unknown", 1),
        ((RETRIES, STARTS), "unknown", 1),
        ((STARTS, *GAVE_UP, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), "failed", 2),
        # A server chooses the names in such a line.
        (("INFO :      [RUN 7, ROUND SuperNode ID: 1]",), "unknown", None),
    ],
)
def test_the_connection_is_what_the_node_s_last_words_say(said: tuple[str, ...], state: str, second: int) -> None:
    found = read_connection(lines(*said))
    assert (found.state, found.since[17:19]) == (state, "" if second is None else f"{second:02}")
    if state == "failed":
        assert "CERTIFICATE_VERIFY_FAILED" in found.words


def test_a_stopped_site_tells_its_budget_its_answers_and_what_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, operator = joined_site(tmp_path)
    for server_round in (1, 2):
        sent(site, signed(operator.channel, instruction(CONFIG, server_round=server_round)))
    (site / "policy.toml").write_text(toy_policy(**OPEN, approve_each_run=True).to_toml())
    sent(site, signed(operator.channel, instruction(CONFIG, run_id="next")))
    with (site / "site.log").open("a") as log:
        log.write("2026-11-26T21:40:00+00:00 incident: the answer missed 2 slot(s) of 10 s\n")
    found = status_of(site, capsys)
    (ledger,) = site.rglob("ledger.jsonl")  # the oracle: its own lines
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    (reserved,) = (entry for entry in entries if entry["kind"] == "run")
    charges = [entry for entry in entries if entry["kind"] == "charge"]
    assert [(answer["run"], answer["server_round"], answer["charged"]) for answer in found["answered"]] == [
        ("run", entry["server_round"], entry["time"]) for entry in charges
    ]
    assert found["epsilon"]["reserved"] == reserved["epsilon"]
    assert found["epsilon"]["left"] == pytest.approx(8.0 - reserved["epsilon"])
    assert 0 < found["epsilon"]["spent"] < reserved["epsilon"]
    assert found["waiting"] == ["next"]
    assert found["incidents"]["count"] == 1
    assert (found["started"], found["programs"], found["connection"], found["charged"]) == (False, {}, None, None)
    text = shown(site, capsys)
    assert "not started" in text
    assert "round 2 of run run, charged" in text
    assert "run next waits for your decision" in text
    assert "missed 2 slot(s)" in text


def test_a_damaged_ledger_is_told_beside_the_rest(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut_ledger(site)
    found = status_of(site, capsys)
    assert "ledger.jsonl" in found["account_error"]
    assert found["epsilon"] is None
    assert "ledger.jsonl" in shown(site, capsys)


def test_what_a_worker_does_is_noted_and_a_full_disk_does_not_matter(tmp_path: Path) -> None:
    note_activity(tmp_path)
    idle = Activity.read(tmp_path)
    assert idle is not None
    assert (idle.pid, idle.message) == (os.getpid(), "")
    note_activity(tmp_path, flower_run=17, group="3" * 1000)
    busy = Activity.read(tmp_path)
    assert busy is not None
    assert busy.message == f"Flower's run 17, group {'3' * 64}"
    (tmp_path / FILE).write_text("{")
    assert Activity.read(tmp_path) is None
    (tmp_path / FILE).unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file where a folder should be")
    note_activity(tmp_path)


def test_a_worker_that_waits_ends_at_once_and_one_at_work_ends_its_message() -> None:
    ending = Ending()
    ending.busy = True
    ending.tell(signal.SIGTERM, None)
    assert ending.told
    ending.busy = False
    with pytest.raises(SystemExit) as ended:
        ending.tell(signal.SIGTERM, None)
    assert ended.value.code == 0


# ---- at work


@pytest.mark.slow
def test_a_site_is_started_answers_is_told_of_and_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    place = tmp_path / "coordinator"
    place.mkdir()
    bundle = hostile_bundle(tmp_path / "evil")
    with flower(tmp_path / "flower") as here:
        site, operator = joined_site(
            tmp_path / "sites", address=f"127.0.0.1:{here.port}", authority=here.folder / "ca.crt"
        )
        (site / "policy.toml").write_text(toy_policy(**OPEN, bundles=[digest_of_bundle(bundle)]).to_toml())
        try:
            # Not admitted: it is up all the same, and says what the server said.
            assert run(["client", "start", str(site), "--log-format", "json"]) == 0
            out, _ = capsys.readouterr()
            assert "is started" in out
            assert "not admitted (yet)" in out
            found = status_of(site, capsys)
            pids = [found["supervisor"]["pid"], found["programs"]["worker"]["pid"]]
            assert all(map(alive, pids))
            assert found["connection"]["state"] == "refused"
            assert found["worker"]["answers"] == ""
            for line in (site / "logs/worker.log").read_text().splitlines():
                assert set(json.loads(line)) == {"time", "program", "text"}

            assert run(["client", "start", str(site)]) == 7
            assert "is started already" in capsys.readouterr().err
            assert alive(pids[0])

            admit_node(here, site)
            eventually(lambda: status_of(site, capsys)["connection"]["state"] == "connected", "a connection", 120.0)
            here.start_serverapps(COORDINATOR=str(place))
            asked = instruction(CONFIG, server_round=3)
            (place / "down").write_bytes(recorddict_to_proto(signed(operator.channel, asked)).SerializeToString())
            assert isinstance(opened(send(here, place, bundle, "round"), operator.channel, asked), SiteReply)
            found = status_of(site, capsys)
            assert [(one["run"], one["server_round"]) for one in found["answered"]] == [("run", 3)]
            text = shown(site, capsys)
            assert "work        idle since" in text
            assert "server      connected since" in text

            # When the supervisor is killed its programs end, and it can be started again.
            os.kill(pids[0], signal.SIGKILL)
            eventually(lambda: not alive(pids[1]), "the worker's end")
            assert run(["client", "start", str(site)]) == 0
            found = status_of(site, capsys)
            assert found["connection"]["since"] >= found["supervisor"]["since"]  # it said nothing of before the kill
            pids = [pid for pid in (pid_of(site, "worker"), pid_of(site, "node")) if pid]
            assert run(["client", "stop", str(site)]) == 0
            assert not any(map(alive, pids))
            eventually(lambda: not alive(found["supervisor"]["pid"]), "the supervisor's end")
            assert status_of(site, capsys)["started"] is False
        finally:
            run(["client", "stop", str(site)])
    assert kinds(site) == ["opened", "run", "charge", "commit"]


@pytest.mark.slow
def test_a_worker_that_does_not_stay_up_is_said_and_nothing_is_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    site, _ = joined_site(tmp_path / "sites")
    (site / "run/flower").mkdir(parents=True)
    (site / "keys/runtime.crt").write_text("what no look before a start reads")
    assert run(["client", "start", str(site)]) == 7
    assert "it ended with code 1: " in capsys.readouterr().err  # the supervisor
    assert status_of(site, capsys)["started"] is False
    (site / "keys/runtime.crt").unlink()

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import sys\nif 'client.worker' in sys.orig_argv: sys.exit('no torch here')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{ROOT}")
    assert run(["client", "start", str(site)]) == 7
    assert "the worker does not stay up: SystemExit: no torch here" in capsys.readouterr().err
    assert status_of(site, capsys)["started"] is False


@pytest.mark.slow
def test_in_the_foreground_it_ends_with_code_0_and_a_server_that_is_away_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, _ = joined_site(tmp_path, address=f"127.0.0.1:{free_port()}", authority=own_authority(tmp_path))
    command = [sys.executable, "-P", "-m", "shared.cli", "client", "start", str(site), "--foreground"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        eventually(lambda: (status_of(site, capsys)["connection"] or {}).get("state") == "trying", "an attempt")
        eventually(lambda: (status_of(site, capsys)["worker"] or {}).get("answers") == "", "a worker that waits")
        began = datetime.fromisoformat(status_of(site, capsys)["supervisor"]["since"])
        assert abs((datetime.now(began.tzinfo) - began).total_seconds()) < 120
        port = int((site / "run/runtime-address").read_text().rpartition(":")[2])
        assert listens(port)
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not listens(port)
    repeated = (tmp_path / "said").read_text()
    assert "node: INFO :      Starting Flower SuperNode" in repeated
    assert len(log_lines(site, "node")) <= repeated.count(" node: ")


def own_authority(folder: Path) -> Path:
    from shared.protection.certificates import make_authority

    make_authority("test", certificate=folder / "ca.crt", key=folder / "ca.key")
    return folder / "ca.crt"
