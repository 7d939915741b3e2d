"""A deployed site's two processes, against Flower's own SuperLink: kept up, and back by themselves after a kill."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from deployed_site import CHEAP, OPEN, instruction
from flower_processes import eventually, flower
from flwr.common.serde import recorddict_to_proto
from joined_sites import Operator, signed
from test_worker import hostile_bundle, kinds, send
from toy_federation import make_sites, toy_config, toy_policy

from client.deployment import programs
from client.joining import AUTHORITY
from client.membership import NODE
from server.cohort import opened
from shared.app_bundle import digest_of_bundle
from shared.errors import ConfigError
from shared.protection.keys import read_node_key, write_node_key
from shared.records import SiteReply
from shared.supervisor import status, supervise

CONFIG = toy_config({**CHEAP, "privacy.retry-slack": 3})


def pid_of(site: Path, program: str) -> int | None:
    found = (status(site) or {}).get("programs", {}).get(program, {}).get("pid")
    return int(found) if found else None


def another(site: Path, program: str, before: int) -> bool:
    return pid_of(site, program) not in (None, before)


def since_the_kill(site: Path) -> str:
    return (site / "logs/node.log").read_text().partition("signal 9")[2]


def test_a_site_that_joined_nothing_has_no_processes(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path, sizes=(8,), seed=None)
    with pytest.raises(ConfigError, match="joined no federation"):
        programs(site)


@pytest.mark.slow
def test_a_site_answers_and_comes_back_by_itself_after_its_worker_and_its_node_were_killed(tmp_path: Path) -> None:
    (site,) = make_sites(tmp_path / "sites", sizes=(40,), seed=None, policy=toy_policy(**OPEN))
    operator, place = Operator(), tmp_path / "coordinator"
    place.mkdir()
    bundle = hostile_bundle(tmp_path / "evil")
    (site / "policy.toml").write_text(toy_policy(**OPEN, bundles=[digest_of_bundle(bundle)]).to_toml())
    stopped = threading.Event()
    with flower(tmp_path / "flower") as here:
        operator.federation = dataclasses.replace(
            operator.federation, address=f"127.0.0.1:{here.port}", authority=(here.folder / "ca.crt").read_text()
        )
        operator.admit([site])
        write_node_key(site / NODE)
        (site / AUTHORITY).write_text(operator.federation.authority)
        (here.folder / "site-0.pub").write_text(read_node_key(site / NODE) + "\n")
        here.flwr("supernode", "register", "site-0.pub", "here")
        here.start_serverapps(COORDINATOR=str(place))
        keeper = threading.Thread(target=supervise, args=(site, programs(site)), kwargs={"stopped": stopped})
        keeper.start()
        try:
            for server_round, killed in ((1, None), (2, "worker"), (3, "node")):
                if killed is not None:
                    before = pid_of(site, killed)
                    assert before is not None
                    os.kill(before, signal.SIGKILL)
                    began = time.monotonic()
                    eventually(partial(another, site, killed, before), f"another {killed}", 30.0)
                if killed == "node":  # until then Flower answers in its place that it is not there
                    eventually(lambda: "SuperNode ID: " in since_the_kill(site), "the node's return", 120.0)
                asked = instruction(CONFIG, server_round=server_round)
                records = recorddict_to_proto(signed(operator.channel, asked))
                (place / "down").write_bytes(records.SerializeToString())
                answer = opened(send(here, place, bundle, f"round-{server_round}"), operator.channel, asked)
                assert isinstance(answer, SiteReply), (site / "site.log").read_text()
                if killed is not None:
                    assert time.monotonic() - began < 120
        finally:
            stopped.set()
            keeper.join(timeout=60)
        assert status(site) is None
    assert kinds(site) == ["opened", "run", *["charge", "commit"] * 3]
    assert not (tmp_path / "evil").exists()
