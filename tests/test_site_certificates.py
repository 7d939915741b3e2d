"""A deployed node says nothing to a server whose certificate it does not trust, and its site says why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from flower_processes import eventually
from test_client_deployment import shown, status_of
from test_network import AUTHORITY, forget_proxies, site_at
from tls_servers import DAY, Pair, certificate, tls_server

from client.deployment import programs
from shared.supervisor import log_lines, supervise


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: certificate("right", by=AUTHORITY), ""),  # the oracle of this test: it does speak where all is well
        (lambda: certificate("late", by=AUTHORITY, start=-9 * DAY, end=-2 * DAY), "certificate has expired"),
        (lambda: certificate("early", by=AUTHORITY, start=2 * DAY), "certificate is not yet valid"),
        (lambda: certificate("other", by=certificate("another authority")), "unable to get local issuer certificate"),
    ],
    ids=["right", "expired", "not yet valid", "another authority"],
)
def test_a_node_sends_nothing_to_a_server_that_it_does_not_trust(
    made: Callable[[], Pair], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    forget_proxies(monkeypatch)
    stopped = threading.Event()
    with tls_server(tmp_path, made()) as server:
        site = site_at(tmp_path, f"localhost:{server.port}")
        node = [program for program in programs(site) if program.name == "node"]
        keeper = threading.Thread(target=supervise, args=(site, node), kwargs={"stopped": stopped})
        keeper.start()
        try:
            if not why:
                eventually(lambda: server.requests, "a request", 60.0)
                return
            eventually(lambda: status_of(site, capsys)["connection"]["state"] == "failed", "its words", 60.0)
            time.sleep(8)  # it is started again after 5 s, and tries once more
            eventually(lambda: status_of(site, capsys)["programs"]["node"]["starts"] > 1, "another start", 30.0)
            assert server.requests == []  # of what came inside of TLS
            assert any(why in line.text for line in log_lines(site, "node"))
            assert why in status_of(site, capsys)["connection"]["words"]
            assert why in shown(site, capsys)
        finally:
            stopped.set()
            keeper.join(timeout=60)
    assert server.requests == []
