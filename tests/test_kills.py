"""The relay, the proxy and a site's node are killed after each step of a round, in a deployed federation."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed_federation import DeployedFederation
from flower_processes import eventually

import shared.supervisor
from shared.rundir import RunDirectory

pytestmark = pytest.mark.slow

# All that a node sends in a round, in this order; the proxy logs each when it has been answered.
REQUESTS = ("pull-messages", "pull-object", "confirm-message-received", "push-messages", "push-object")
# What a node logs in a round, before and after each half of it.
STEPS = ("Receiving: train", "Received successfully", "Sending: train", "Sent successfully")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedFederation]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared.supervisor, "QUICK_SECONDS", 0.0)  # each is killed often, and starts again at once
        with DeployedFederation(tmp_path_factory.mktemp("federation"), sizes=(40,) * (len(STEPS) + 1)) as made:
            yield made


def kill_after(deployed: DeployedFederation, words: str, log: Path, folder: Path, program: str) -> None:
    """As soon as the log says so once more."""
    pid, began = deployed.pid(folder, program), log.stat().st_size
    assert pid is not None
    eventually(lambda: words.encode() in log.read_bytes()[began:], words, 120.0)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: deployed.pid(folder, program) not in (None, pid), f"another {program}", 60.0)


def rounds_charged(deployed: DeployedFederation, site: Path, name: str) -> list[int]:
    run = RunDirectory.open(deployed.queue[name].path).run_id
    return [one["server_round"] for one in deployed.entries(site) if (one["kind"], one.get("run")) == ("charge", run)]


@pytest.mark.parametrize("program", ["superlink", "proxy"])
def test_each_round_comes_about_with_every_site_and_is_charged_once(program: str, deployed: DeployedFederation) -> None:
    rounds = len(REQUESTS) + 1
    deployed.begin(program, {"federation.rounds": rounds, "privacy.retry-slack": 0})
    for server_round, request in enumerate(REQUESTS):
        deployed.reached(program, server_round)
        kill_after(deployed, f"/v1/fleet/{request}", deployed.folder / "logs/proxy.log", deployed.folder, program)
    run = deployed.finish(program, seconds=400.0)
    assert run.state == "finished", run.reason
    for site in deployed.sites:
        assert rounds_charged(deployed, site, program) == list(range(1, rounds + 1))


def test_a_node_that_is_killed_costs_its_site_alone_and_no_second_charge(deployed: DeployedFederation) -> None:
    """Flower lets a node in again a minute after it was killed; here all but one are, each after another step."""
    changes = {"federation.rounds": 200, "federation.fewest-sites": 1, "federation.deadline-seconds": 10.0}
    deployed.begin("node", {**changes, "privacy.retry-slack": 0})
    deployed.reached("node", 1)
    for site, step in zip(deployed.sites, STEPS, strict=False):
        kill_after(deployed, step, site / "logs/node.log", site, "node")
    deployed.all_online()
    before = {site: len(rounds_charged(deployed, site, "node")) for site in deployed.sites}
    for site in deployed.sites:
        eventually(lambda site=site: len(rounds_charged(deployed, site, "node")) > before[site], "an answer", 120.0)  # type: ignore[misc]
    deployed.queue.cancel("node")
    assert deployed.finish("node").state == "cancelled"
    for site in deployed.sites:
        charged = rounds_charged(deployed, site, "node")
        assert charged == sorted(set(charged))
    assert rounds_charged(deployed, deployed.sites[-1], "node") == list(range(1, charged[-1] + 1))
