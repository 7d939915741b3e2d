"""A site where an institution's network lets almost nothing out: it works, and tries nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deployed_site import CHEAP, OPEN, instruction
from flower_processes import ROOT, Flower, eventually, flower
from flwr.common.serde import recorddict_to_proto
from joined_sites import signed
from test_client_deployment import admit_node, joined_site, status_of
from test_network import BEYOND, forget_proxies
from test_worker import hostile_bundle, send
from tls_servers import certificate, connect_proxy, copy, listening, write_pair
from toy_federation import PROMPTS, toy_config, toy_policy

from server.cohort import opened
from shared.app_bundle import digest_of_bundle
from shared.cli import run
from shared.records import SiteReply

CONFIG = toy_config({**CHEAP, "privacy.retry-slack": 3})

# Notes every call out of a Python process, whichever library makes it.
RECORDER = """
import json, os, sys
NAMED = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0,
         "socket.gethostbyname": 0}
OURS = [name for name in ("worker", "node") if f"client.{name}" in sys.orig_argv]
PROGRAM = OURS[0] if OURS else "".join(sys.orig_argv[1:2]).rpartition("/")[2]
def note(event, arguments):
    if event in NAMED:
        line = json.dumps([PROGRAM, event, arguments[NAMED[event]]], default=repr) + "\\n"
        descriptor = os.open(os.environ["CALLS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)
sys.addaudithook(note)
"""


class Federation:
    """Flower's server, an operator, and one deployed site that was admitted."""

    def __init__(self, folder: Path, here: Flower, *, address: str) -> None:
        self.here, self.place = here, folder / "coordinator"
        self.place.mkdir()
        self.site, self.operator = joined_site(folder / "sites", address=address, authority=here.folder / "ca.crt")
        self.bundle = hostile_bundle(folder / "evil")
        policy = toy_policy(**OPEN, bundles=[digest_of_bundle(self.bundle)])
        (self.site / "policy.toml").write_text(policy.to_toml())
        admit_node(here, self.site)
        here.start_serverapps(COORDINATOR=str(self.place))

    def answer(self) -> tuple[SiteReply, SiteReply]:
        """(as it came, opened) of the site's answer to a round."""
        asked, operator = instruction(CONFIG), self.operator
        records = recorddict_to_proto(signed(operator.channel, asked))
        (self.place / "down").write_bytes(records.SerializeToString())
        came = send(self.here, self.place, self.bundle, "round")
        plain = opened(came, operator.channel, asked)
        assert isinstance(came, SiteReply)
        assert isinstance(plain, SiteReply), (self.site / "site.log").read_text()
        return came, plain


@contextmanager
def federation(folder: Path, *, address: str = "") -> Iterator[Federation]:
    with flower(folder / "flower", BEYOND.rpartition(":")[0]) as here:
        made = Federation(folder, here, address=address or f"127.0.0.1:{here.port}")
        try:
            yield made
        finally:
            run(["client", "stop", str(made.site)])


def calls(record: Path) -> set[tuple[str, str, Any]]:
    found = set()
    for line in record.read_text().splitlines():
        program, event, where = json.loads(line)
        found.add((program, event, tuple(where) if isinstance(where, list) else where))
    return found


@pytest.mark.slow
def test_behind_a_proxy_a_site_answers_and_calls_the_proxy_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_proxies(monkeypatch)
    (tmp_path / "recorder").mkdir()
    (tmp_path / "recorder/sitecustomize.py").write_text(RECORDER)
    with federation(tmp_path, address=BEYOND) as made, connect_proxy({BEYOND: ("127.0.0.1", made.here.port)}) as proxy:
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'recorder'}{os.pathsep}{ROOT}")
        monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert run(["client", "start", str(made.site)]) == 0
        made.answer()
        assert run(["client", "stop", str(made.site)]) == 0
    found = calls(tmp_path / "calls")
    reached = {(program, where) for program, event, where in found if event == "socket.connect"}
    (worker,) = (where for program, where in reached if program == "worker")
    assert reached == {("node", ("127.0.0.1", proxy.port)), ("worker", worker)}
    assert worker[0] == "127.0.0.1"
    assert worker[1] == int((made.site / "run/runtime-address").read_text().rpartition(":")[2])
    # No name is looked up but this machine's own number, and nothing is sent without a connection.
    assert {(event, where) for _, event, where in found if event != "socket.connect"} == {
        ("socket.getaddrinfo", "127.0.0.1")
    }
    assert set(proxy.asked) == {f"CONNECT {BEYOND}"}


@pytest.mark.slow
def test_who_opens_tls_on_the_way_reads_the_instruction_and_not_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_proxies(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    institution = certificate("institution")
    read: list[bytearray] = []  # of each connection, up and down
    inwards = write_pair(tmp_path, certificate("border", by=institution, names=(BEYOND.rpartition(":")[0],)))
    (tmp_path / "it.pem").write_text(institution.pem)
    with federation(tmp_path, address=BEYOND) as made:
        outwards = ssl.create_default_context(cafile=str(made.here.folder / "ca.crt"))

        def inspect(raw: socket.socket) -> None:
            with (
                inwards.wrap_socket(raw, server_side=True) as site,
                socket.create_connection(("127.0.0.1", made.here.port)) as plain,
                outwards.wrap_socket(plain, server_hostname="localhost") as server,
            ):
                up, down = bytearray(), bytearray()
                read.extend((up, down))
                back = threading.Thread(target=copy, args=(server, site, down), daemon=True)
                back.start()
                copy(site, server, up)
                back.join()

        with listening(inspect) as border, connect_proxy({BEYOND: ("127.0.0.1", border)}) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
            assert run(["client", "trust", str(made.site), str(tmp_path / "it.pem")]) == 0
            assert run(["client", "start", str(made.site)]) == 0
            came, plain = made.answer()
            assert run(["client", "stop", str(made.site)]) == 0
    assert all(any(prompt.encode() in part for part in read) for prompt in PROMPTS.texts)
    assert any(came.envelope in part for part in read)  # sealed
    assert not any(plain.envelope[:64] in part or plain.envelope[-64:] in part for part in read)


def namespaces() -> bool:
    return subprocess.run(["unshare", "--map-root-user", "--net", "--mount", "true"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="needs user namespaces")
def test_where_nothing_but_the_server_can_be_reached_a_site_answers_and_the_kernel_saw_no_other_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_proxies(monkeypatch)
    with federation(tmp_path) as made, (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-P", str(ROOT / "benchmarks/hospital_network.py"), str(made.site)], stdout=said,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            eventually(lambda: (status_of(made.site, capsys)["connection"] or {}).get("state") == "connected", "a node")
            made.answer()
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "said").read_text()) == {"code": 0, "attempts_elsewhere": 0}
