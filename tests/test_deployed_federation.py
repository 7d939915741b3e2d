"""Whole federations as they are deployed: runs, what the relay sees, kills of everything, revocation."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from deployed_federation import DeployedFederation
from flower_processes import eventually
from gaussian_oracle import epsilon_of_gaussians
from safetensors.numpy import load_file
from scipy.stats import chi2, kstest
from toy_federation import make_sites, toy_policy

from client.deployment import programs as site_programs
from client.joining import join
from server.release import release
from shared.errors import UsageError
from shared.protection.keys import SigningKey
from shared.protection.kit import read_kit
from shared.rundir import RunDirectory, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedFederation]:
    folder = tmp_path_factory.mktemp("federation")
    (folder / "secret.txt").write_text("correct horse\n")
    (folder / "secret.txt").chmod(0o600)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FEDCANVAS_PASSPHRASE_FILE", str(folder / "secret.txt"))
        with DeployedFederation(folder) as made:
            assert b"ENCRYPTED" in (made.folder / "keys/aggregator-1-opening.pem").read_bytes()
            assert b"ENCRYPTED" in (made.sites[0] / "keys/signing.pem").read_bytes()
            yield made


def charged(deployed: DeployedFederation, site: Path, run_id: str) -> list[dict[str, object]]:
    return [one for one in deployed.entries(site) if one["kind"] == "charge" and one["run"] == run_id]


def committed(deployed: DeployedFederation, site: Path, run_id: str) -> list[int]:
    return [one["server_round"] for one in deployed.entries(site) if one["kind"] == "commit" and one["run"] == run_id]


def run_id(deployed: DeployedFederation, name: str) -> str:
    return RunDirectory.open(deployed.queue[name].path).run_id


def sums_of(run: Path) -> list[np.ndarray]:
    """Round by round, in lattice units, as the sites sent them."""
    return [load_file(file)["total"] for file in sorted((run / "releases").iterdir())]


def test_a_run_ends_with_a_model_and_each_site_was_asked_once_a_round(deployed: DeployedFederation) -> None:
    deployed.begin("first", {"federation.rounds": 3})
    run = deployed.finish("first")
    assert run.state == "finished", run.reason
    assert load_model(run.path).card["run_id"] == run_id(deployed, "first")
    result = json.loads((run.path / "result.json").read_text())
    assert result["sites"] == ["site-0", "site-1", "site-2"]
    for site in deployed.sites:
        assert [one["server_round"] for one in charged(deployed, site, run_id(deployed, "first"))] == [1, 2, 3]
        # Written once a second.
        eventually(lambda name=site.name: deployed.seen(name)["answered"] == 3, "what was seen of it", 10.0)  # type: ignore[misc]
    for name in ("sheet.png", "report.html", "model/generator.safetensors"):
        assert (run.path / name).stat().st_size > 1000


def test_its_model_is_released_with_what_each_site_signed(deployed: DeployedFederation, tmp_path: Path) -> None:
    run = deployed.queue["first"].path
    eventually(lambda: len(list((run / "statements").glob("*.json"))) == 3, "the statements", 60.0)
    made = release(run, tmp_path / "model", key=SigningKey.generate())
    assert made.federation == deployed.federation.federation.fingerprint
    assert not made.simulated
    plan = load_model(run).card["plan"]  # every record is in every step
    exact = epsilon_of_gaussians(plan["noise_multiplier"], 3, plan["delta"])
    assert made.epsilon == pytest.approx(exact, rel=2e-3)
    assert made.epsilon >= exact
    for site in deployed.sites:
        nonces = [charge["nonce"] for charge in charged(deployed, site, run_id(deployed, "first"))]
        assert [charge[5] for charge in made.statements[site.name].charges] == nonces


def test_the_relay_holds_what_goes_down_and_nothing_of_what_comes_up(deployed: DeployedFederation) -> None:
    """With one site the sum is that site's payload: what the aggregator opened must not be anywhere in the relay."""
    deployed.begin("seen", {"federation.rounds": 4, "federation.published-records": 32}, deployed.sites[:1])
    database, held = deployed.folder / "run/superlink.db", set[bytes]()
    path = deployed.queue["seen"].path
    sums: dict[str, bytes] = {}

    def look() -> None:
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1)
        try:
            held.update(bytes(row[0]) for row in connection.execute("SELECT content FROM objects") if row[0])
        except sqlite3.OperationalError:
            pass  # it is being written
        finally:
            connection.close()
        for file in path.glob("releases/*"):
            try:
                sums.setdefault(file.name, load_file(file)["total"].tobytes())
            except Exception:  # being written, or gone
                continue

    assert deployed.finish("seen", each=look).state == "finished"
    assert len(sums) >= 3
    everything = b"".join(held)
    files = [database, *deployed.folder.glob("run/superlink.db*"), *deployed.folder.glob("logs/*")]
    everything += b"".join(file.read_bytes() for file in files)
    assert any(content[:4] == b"FCS1" or b"FCS1" in content for content in held)  # sealed answers were there
    config = RunDirectory.open(path).config.to_json().encode()
    assert config in everything  # the control: what goes down in clear is found by the same search
    for total in sums.values():
        assert len(total) > 1000
        for start in range(0, len(total) - 16, 64):
            assert total[start : start + 16] not in everything
    for word in (b"red", b"green", b"blue"):
        assert b'class_names": ["' + word not in everything
    assert b"x_train" not in everything


def test_a_deployed_run_and_one_in_this_process_are_equal_in_distribution(
    deployed: DeployedFederation, tmp_path: Path
) -> None:
    """Every record is in every step (q = 1), so the two sums of the first round differ by their noise alone."""
    from toy_federation import PROMPTS

    from server.app import serve
    from server.cohort import Cohort
    from shared.observer import SilentObserver
    from simulations.engines import LocalGrid

    deployed.begin("alike", {"federation.rounds": 3, "compute.checkpoint-every": 100})
    run = deployed.finish("alike")
    there = sums_of(run.path)
    opened = RunDirectory.open(run.path)
    config, plan = opened.config, load_model(run.path).card["plan"]

    open_policy = toy_policy(max_sampling_rate=1.0, federations=["toy"])
    sites = make_sites(tmp_path / "sites", sizes=(40, 40, 40), seed=None, policy=open_policy)
    from client.app import make_app

    grid = LocalGrid(make_app(), sites=3, parallel_sites=1)
    for context, site in zip(grid._contexts.values(), sites, strict=True):
        context.node_config["site-dir"] = str(site)
    again = RunDirectory.create(tmp_path / "run", config=config, prompts=PROMPTS.texts, entropy="system")
    with again, grid:
        serve(Cohort(grid, config.federation, SilentObserver()), again, SilentObserver())
        here = sums_of(again.path)
    assert len(there) == len(here) == 3
    # Noise of one site in lattice units; three sites a sum, two sums a difference.
    sigma = plan["noise_multiplier"] * plan["clipping_norm"] / plan["lattice"]
    difference = (there[0] - here[0]) / (sigma * math.sqrt(6))
    low, high = chi2.ppf([1e-6, 1 - 1e-6], len(difference))
    assert low < float(np.sum(difference**2)) < high
    assert abs(float(difference.mean())) * math.sqrt(len(difference)) < 5
    for one, other in zip(there[1:], here[1:], strict=True):
        assert kstest(one / sigma, other / sigma).pvalue > 1e-6


def test_everything_may_be_killed_and_no_spend_is_under_counted(deployed: DeployedFederation) -> None:
    rounds = 7
    deployed.begin("killed", {"federation.rounds": rounds, "federation.fewest-sites": 2})
    killed = [
        (deployed.folder, "superlink"), (deployed.folder, "worker"), (deployed.folder, "proxy"),
        (deployed.sites[0], "worker"), (deployed.sites[1], "node"),
    ]  # fmt: skip
    for server_round, (folder, program) in enumerate(killed, start=1):
        deployed.reached("killed", server_round)
        deployed.kill(folder, program)
    run = deployed.finish("killed", seconds=400.0)
    assert run.state == "finished", run.reason
    name = run_id(deployed, "killed")
    sums = len(json.loads((run.path / "result.json").read_text())["sites"])
    assert sums == 3
    for site in deployed.sites:
        charges, commits = charged(deployed, site, name), committed(deployed, site, name)
        # Every answer that may have left was charged before; a charge without its commit counts as spent.
        assert len(charges) >= len(commits) >= len(set(commits))
        # A killed site misses the round that it was in, and those that the others do until its node is let in again.
        assert set(commits) >= set(range(1, 4)) | ({*range(4, rounds + 1)} if site == deployed.sites[2] else set())
        (reserved,) = (one for one in deployed.entries(site) if one["kind"] == "run" and one["run"] == name)
        plan = reserved["plan"]
        last = [one for one in deployed.entries(site) if one["kind"] == "commit" and one["run"] == name][-1]
        exact = epsilon_of_gaussians(plan["noise_multiplier"], len(charges), plan["delta"])
        assert last["epsilon_after"] >= exact * (1 - 1e-6)
        assert last["epsilon_after"] <= reserved["epsilon"]
    deployed.all_online()


def test_a_site_that_hangs_costs_a_deadline_and_the_others_go_on(deployed: DeployedFederation) -> None:
    hanging = deployed.sites[2]
    deployed.begin(
        "hangs", {"federation.rounds": 4, "federation.fewest-sites": 2, "federation.deadline-seconds": 20.0}
    )
    deployed.reached("hangs", 1)
    pid = deployed.pid(hanging, "worker")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        run = deployed.finish("hangs")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert run.state == "finished", run.reason
    log = (deployed.folder / "logs/worker.log").read_text()
    assert "no reply from site site-2 within 20 s; the round goes on with 2 sites" in log


def test_a_wire_that_breaks_while_a_site_sends_costs_nothing(deployed: DeployedFederation) -> None:
    deployed.begin("cut", {"federation.rounds": 4})
    for server_round, size in ((1, 30_000), (2, 12_000)):
        deployed.reached("cut", server_round)
        deployed.wire.cut_after = size
    run = deployed.finish("cut")
    assert run.state == "finished", run.reason
    assert deployed.wire.cuts == 2
    for site in deployed.sites:
        assert [one["server_round"] for one in charged(deployed, site, run_id(deployed, "cut"))] == [1, 2, 3, 4]


def test_a_server_that_was_restored_from_an_older_copy_gets_no_second_answer_to_an_old_question(
    deployed: DeployedFederation, tmp_path: Path
) -> None:
    deployed.begin("restored", {"federation.rounds": 40, "federation.deadline-seconds": 30.0})
    path = deployed.queue["restored"].path
    deployed.reached("restored", 1)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("lock"))
    deployed.reached("restored", 4)
    deployed.stop(deployed.folder)
    spent = [len(charged(deployed, site, run_id(deployed, "restored"))) for site in deployed.sites]
    shutil.rmtree(path)
    shutil.copytree(copy, path)
    deployed.start_server()
    run = deployed.finish("restored")
    assert run.state == "failed"
    assert "refused with code" in run.reason
    assert [len(charged(deployed, site, run_id(deployed, "restored"))) for site in deployed.sites] == spent


def test_a_site_that_was_restored_from_an_older_copy_is_noticed_and_the_others_go_on(
    deployed: DeployedFederation, tmp_path: Path
) -> None:
    site = deployed.sites[1]
    deployed.begin("set-back", {"federation.rounds": 12, "federation.fewest-sites": 2})
    deployed.reached("set-back", 1)
    deployed.stop(site)
    copy = tmp_path / "copy"
    shutil.copytree(site, copy)
    deployed.start(site, site_programs(site))
    deployed.all_online()
    before = deployed.seen(site.name)["answered"]
    eventually(lambda: deployed.seen(site.name)["answered"] > before, "another answer", 60.0)
    deployed.stop(site)
    shutil.rmtree(site)
    shutil.copytree(copy, site)
    left = len(charged(deployed, site, run_id(deployed, "set-back")))
    deployed.start(site, site_programs(site))
    run = deployed.finish("set-back", seconds=300.0)
    assert run.state == "finished", run.reason
    assert len(charged(deployed, site, run_id(deployed, "set-back"))) == left  # it let nothing go
    assert "does not have" in (site / "site.log").read_text()


def test_a_stolen_kit_lets_nobody_in(deployed: DeployedFederation, tmp_path: Path) -> None:
    (thief,) = make_sites(tmp_path, sizes=(20,), seed=None, policy=toy_policy())
    kit = read_kit(deployed.folder.parent / "site-0.zip")
    request = join(thief, kit, site_id="site-0").request
    with pytest.raises(UsageError, match="site-0 is admitted already, with other keys"):
        deployed.federation.read_request(request.read_bytes(), what="request.json")
    deployed.start(thief, site_programs(thief))
    try:
        log = thief / "logs/node.log"
        eventually(lambda: log.exists() and "2004" in log.read_text(), "the refusal", 90.0)
        assert "SuperNode ID: " not in log.read_text()
    finally:
        deployed.stop(thief)


def test_two_nodes_with_one_key_are_not_two_sites(deployed: DeployedFederation, tmp_path: Path) -> None:
    """A copy of a site on another machine: the server lets one of the two in, and the other is refused."""
    copy = tmp_path / "copy"
    shutil.copytree(deployed.sites[0], copy, ignore=shutil.ignore_patterns("run", "logs"))
    time.sleep(1)
    deployed.start(copy, site_programs(copy))
    try:
        log = copy / "logs/node.log"
        eventually(lambda: log.exists() and "2004" in log.read_text(), "the refusal", 90.0)
        assert "SuperNode ID: " not in log.read_text()
        assert deployed.seen("site-0")["online"]
    finally:
        deployed.stop(copy)


def test_a_revoked_site_is_out_at_once_and_a_site_restored_from_a_copy_of_its_keys_stays_out(
    deployed: DeployedFederation,
) -> None:
    out = deployed.sites[2]
    deployed.begin("revoked", {"federation.rounds": 4, "federation.fewest-sites": 2})
    deployed.reached("revoked", 1)
    deployed.federation.revoke(out.name)
    run = deployed.finish("revoked")
    assert run.state == "finished", run.reason
    answered = committed(deployed, out, run_id(deployed, "revoked"))
    assert 4 not in answered
    # Its node is not let in again, however often it starts; it may have ended by itself already.
    if (pid := deployed.pid(out, "node")) is not None:
        os.kill(pid, signal.SIGKILL)
    log = out / "logs/node.log"
    began = len(log.read_text())
    eventually(lambda: "2004" in log.read_text()[began:], "the refusal", 90.0)
    assert "SuperNode ID: " not in log.read_text()[began:]
