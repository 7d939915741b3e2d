"""`fedcanvas client doctor` and `trust`: what can be wrong between a site and its server, each told apart."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from flower_processes import flower
from test_client_deployment import cut_ledger, joined_site
from test_network import AUTHORITY, BEYOND, forget_proxies, site_at
from tls_servers import DAY, Pair, certificate, connect_proxy, listening, tls_server
from toy_federation import toy_policy

import client.doctor
from client.deployment import programs
from client.membership import NODE
from client.network import write_trusted
from shared.cli import run
from shared.flower_runtime import free_port
from shared.protection.keys import write_node_key


class Found(NamedTuple):
    state: str
    words: str
    next: str
    code: int


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_proxies(monkeypatch)


def looked(site: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, list[Found]]:
    """Findings by the name of their check."""
    capsys.readouterr()
    assert run(["client", "doctor", str(site), "--json", *options]) == code
    said = json.loads(capsys.readouterr().out)
    found: dict[str, list[Found]] = {}
    for finding in said["findings"]:
        found.setdefault(finding.pop("check"), []).append(Found(**finding))
    assert said["failed"] == sum(one.state == "failed" for part in found.values() for one in part)
    return found


def states(found: Mapping[str, list[Found]]) -> dict[str, str]:
    """The worst of each check."""
    order = ["ok", "warning", "failed"]
    return {name: max((one.state for one in part), key=order.index) for name, part in found.items()}


# ---- the way to the server


def test_where_everything_is_right_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = certificate("server", by=AUTHORITY)
    with tls_server(tmp_path, pair) as server:
        found = looked(site_at(tmp_path, f"localhost:{server.port}"), capsys)
    assert states(found) == {
        "versions": "ok", "federation": "ok", "policy": "ok", "ledger": "ok", "keys": "ok", "disk": "ok",
        "data": "warning",  # 40 toy records are few
        "proxy": "ok", "name": "ok", "connection": "ok", "certificate": "ok", "server": "ok", "clock": "ok",
        "control": "ok", "processes": "warning",  # not started
    }  # fmt: skip
    assert pair.sha256 in found["certificate"][0].words
    assert found["processes"][0].next == "`fedcanvas client start`"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: certificate("late", by=AUTHORITY, start=-9 * DAY, end=-2 * DAY), "certificate ended on"),
        (lambda: certificate("early", by=AUTHORITY, start=2 * DAY), "is not valid before"),
        (lambda: certificate("other", by=certificate("the institution's own")), "not by the federation's authority"),
        (lambda: certificate("self"), "not by the federation's authority"),
        (lambda: certificate("name", by=AUTHORITY, names=("another.example.org",)), "is not for localhost"),
    ],
)
def test_each_thing_that_is_wrong_with_a_certificate_is_told_apart_with_its_fingerprint(
    tmp_path: Path, made: Callable[[], Pair], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = made()
    with tls_server(tmp_path, pair) as server:
        found = looked(site_at(tmp_path, f"localhost:{server.port}"), capsys, "--skip-data", code=10)
    (finding,) = found["certificate"]
    assert said in finding.words
    assert pair.sha256 in finding.words  # what the operator compares it with
    assert finding.next
    assert server.requests == []  # nothing is said to whom is not trusted
    assert "server" not in found


def test_an_address_of_numbers_is_held_against_the_certificate_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tls_server(tmp_path, certificate("server", by=AUTHORITY, names=("localhost",))) as server:
        found = looked(site_at(tmp_path / "a", f"127.0.0.1:{server.port}"), capsys, "--skip-data", code=10)
    assert "is not for 127.0.0.1" in found["certificate"][0].words


def test_what_speaks_no_tls_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(lambda connection: connection.sendall(b"220 mail.example.org ESMTP\r\n")) as port:
        found = looked(site_at(tmp_path, f"localhost:{port}"), capsys, "--skip-data", code=7)
    assert "there is no TLS at the other end" in found["certificate"][0].words


@pytest.mark.parametrize(
    ("address", "check", "said"),
    [
        ("no.such.invalid:443", "name", "no.such.invalid cannot be resolved"),
        (None, "connection", "refuses connections"),
    ],
)
def test_a_name_that_is_not_there_and_a_port_where_nobody_listens_are_told_apart(
    tmp_path: Path, address: str | None, check: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site = site_at(tmp_path, address or f"localhost:{free_port()}")
    found = looked(site, capsys, "--skip-data", code=7)
    assert states(found)[check] == "failed"
    assert said in found[check][-1].words
    assert "certificate" not in found


def test_a_firewall_that_drops_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dropped(address: tuple[str, int], timeout: float) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", dropped)
    found = looked(site_at(tmp_path, "localhost:443"), capsys, "--skip-data", code=7)
    assert "does not answer" in found["connection"][0].words
    assert "outwards" in found["connection"][0].next


@pytest.mark.parametrize(
    ("ahead", "state", "said"),
    [
        (0.0, "ok", "as the server's"),
        (-10.0, "failed", "s ahead of the server's: the server refuses the node"),
        (120.0, "warning", "s behind the server's"),
        (400.0, "failed", "s behind the server's: the server refuses the node"),
        (None, "warning", "tells no time"),
    ],
)
def test_the_clock_is_compared_with_the_server_s(
    tmp_path: Path, ahead: float | None, state: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with tls_server(tmp_path, certificate("server", by=AUTHORITY), ahead=ahead) as server:
        site = site_at(tmp_path, f"localhost:{server.port}")
        found = looked(site, capsys, "--skip-data", code=7 if state == "failed" else 0)
    (finding,) = found["clock"]
    assert (finding.state, said in finding.words) == (state, True), finding.words


@pytest.mark.parametrize(
    ("answers", "check", "state", "said"),
    [
        ({"/v1/fleet/pull-messages": 401, "/v1/control/list-nodes": 415}, "control", "warning", "can start runs"),
        ({"/v1/fleet/pull-messages": 503}, "server", "failed", "Flower behind it does not"),
        ({"/v1/fleet/pull-messages": 200}, "server", "failed", "no federation's server"),
        ({}, "server", "failed", "no federation's server"),
    ],
)
def test_what_the_server_lets_a_site_reach_is_said(
    tmp_path: Path, answers: dict[str, int], check: str, state: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with tls_server(tmp_path, certificate("server", by=AUTHORITY), answers=answers) as server:
        site = site_at(tmp_path, f"localhost:{server.port}")
        found = looked(site, capsys, "--skip-data", code=7 if state == "failed" else 0)
    assert states(found)[check] == state
    assert said in found[check][-1].words


def test_nothing_of_the_site_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tls_server(tmp_path, certificate("server", by=AUTHORITY)) as server:
        site = site_at(tmp_path / "a", f"localhost:{server.port}")
        looked(site, capsys)
        first = list(server.requests)
        other = site_at(tmp_path / "b", f"localhost:{server.port}")
        (other / "data.npz").write_bytes(b"no data at all")
        (other / "site.toml").write_text((other / "site.toml").read_text().replace("site-0", "st-anna"))
        server.requests.clear()
        looked(other, capsys, code=5)  # another lineage, too
    # Both asked the same, to the byte: two empty questions.
    assert server.requests == first
    assert [request.split(b" ")[1] for request in first] == [b"/v1/fleet/pull-messages", b"/v1/control/list-nodes"]
    assert all(b"content-length: 0\r\n" in request.lower() and request.endswith(b"\r\n\r\n") for request in first)


@pytest.mark.slow
def test_against_flower_s_own_server_it_sees_that_the_operator_s_side_is_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with flower(tmp_path / "flower") as here:
        site, _ = joined_site(tmp_path / "sites", address=f"localhost:{here.port}", authority=here.folder / "ca.crt")
        found = looked(site, capsys)
        assert here.flwr("list", "here", "--format", "json")  # and nothing was started
    assert states(found)["server"] == "ok"
    assert states(found)["control"] == "warning"
    assert states(found)["clock"] == "ok"


# ---- through a proxy


@pytest.fixture
def beyond(tmp_path: Path) -> Iterator[tuple[str, int]]:
    with tls_server(tmp_path, certificate("server", by=AUTHORITY, names=("fl.example.test",))) as server:
        yield "127.0.0.1", server.port


@pytest.mark.parametrize("where", ["site.toml", "environment"])
def test_a_proxy_is_used_wherever_it_is_set_and_looks_the_name_up(
    tmp_path: Path, beyond: tuple[str, int], where: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    site = site_at(tmp_path / "site", BEYOND)
    with connect_proxy({BEYOND: beyond}) as proxy:
        if where == "site.toml":
            with (site / "site.toml").open("a") as file:
                file.write(f'https-proxy = "http://localhost:{proxy.port}"\n')
        else:
            monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{proxy.port}")
        found = looked(site, capsys, "--skip-data")
    assert where in found["proxy"][0].words or "HTTPS_PROXY" in found["proxy"][0].words
    assert states(found)["certificate"] == states(found)["server"] == "ok"
    assert set(proxy.asked) == {f"CONNECT {BEYOND}"}


def test_a_proxy_that_wants_a_login_or_forbids_the_way_says_so_and_no_password_is_shown(
    tmp_path: Path, beyond: tuple[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = site_at(tmp_path / "site", BEYOND)
    login = base64.b64encode(b"anna:tulips").decode()
    with connect_proxy({BEYOND: beyond}, login=login) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{proxy.port}")
        found = looked(site, capsys, "--skip-data", code=7)
        assert "407" in found["connection"][0].words
        assert "wants a login" in found["connection"][0].next
        monkeypatch.setenv("HTTPS_PROXY", f"http://anna:tulips@localhost:{proxy.port}")
        found = looked(site, capsys, "--skip-data")
        assert states(found)["server"] == "ok"
        assert not any("tulips" in one.words for part in found.values() for one in part)
        proxy.leads.clear()
        found = looked(site, capsys, "--skip-data", code=7)
        assert "403" in found["connection"][0].words
        assert f"CONNECT to {BEYOND}" in found["connection"][0].next


# ---- an institution's own authority


def test_a_trusted_institution_is_accepted_told_and_given_to_the_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    institution = certificate("Clínica: inspección TLS")
    (tmp_path / "it.pem").write_text(f"subject: Clínica\n{institution.pem}")
    with tls_server(tmp_path, certificate("server", by=institution)) as server:
        site = site_at(tmp_path, f"localhost:{server.port}")
        assert "CN=Clínica" in looked(site, capsys, "--skip-data", code=10)["certificate"][0].words
        assert run(["client", "trust", str(site), str(tmp_path / "it.pem"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["trusted"][0]["sha256"] == institution.sha256
        found = looked(site, capsys, "--skip-data")
        assert states(found)["certificate"] == "warning"
        assert "TLS is opened on the way" in found["certificate"][0].next
        assert states(found)["server"] == "ok"
        # The node is given both, in bytes that Flower reads as ASCII.
        command = programs(site)[0].command
        trusted = Path(command[command.index("--root-certificates") + 1])
        assert len(re.findall("BEGIN CERT", trusted.read_bytes().decode("ascii"))) == 2
        assert run(["client", "trust", str(site), "--remove"]) == 0
        looked(site, capsys, "--skip-data", code=10)
    assert len(re.findall("BEGIN CERT", write_trusted(site).read_text())) == 1


# ---- the site's own files


def others_may_read(name: str) -> Callable[[Path], object]:
    return lambda site: (site / name).chmod(0o640)


def empty_list(site: Path) -> None:
    (site / "policy.toml").write_text(toy_policy(models=[]).to_toml())


@pytest.mark.parametrize(
    ("spoil", "check", "code", "said"),
    [
        (lambda site: (site / "federation.json").unlink(), "federation", 3, "joined no federation"),
        (lambda site: (site / "policy.toml").unlink(), "policy", 3, "has no policy.toml"),
        (empty_list, "policy", 3, "a list of what is allowed is empty"),
        (lambda site: (site / "policy.toml").write_text(toy_policy(federations=["other"]).to_toml()), "policy", 3,
         "is not in the policy's list"),
        (lambda site: (site / "policy.toml").write_text(toy_policy(code=["0" * 64]).to_toml()), "policy", 3,
         "the installed code"),
        (cut_ledger, "ledger", 5, "ledger.jsonl"),
        (others_may_read("keys/signing.pem"), "keys", 10, "can be read by others"),
        (others_may_read("keys/node"), "keys", 10, "can be read by others"),
        (lambda site: (site / "data.npz").unlink(), "data", 4, "data.npz"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_site_s_own_files_is_a_failure_of_its_kind(
    tmp_path: Path, spoil: Callable[[Path], object], check: str, code: int, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with tls_server(tmp_path, certificate("server", by=AUTHORITY)) as server:
        site = site_at(tmp_path, f"localhost:{server.port}")
        spoil(site)
        found = looked(site, capsys, code=code)
    assert states(found)[check] == "failed"
    assert said in found[check][-1].words
    if check != "federation":
        assert states(found)["server"] == "ok"  # what is wrong in one place keeps nobody from looking at another


def test_a_disk_that_fills_up_is_told_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = site_at(tmp_path, f"localhost:{free_port()}")
    for free, state, code in ((10**9, "warning", 7), (10**8, "failed", 8)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(1, 1, free))
        assert states(looked(site, capsys, "--skip-data", code=code))["disk"] == state


def test_a_policy_that_others_may_write_and_another_flower_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = site_at(tmp_path, f"localhost:{free_port()}")
    (site / "policy.toml").chmod(0o666)
    assert states(looked(site, capsys, "--skip-data", code=7))["policy"] == "warning"
    monkeypatch.setattr(client.doctor, "version", lambda _: "1.42.0")
    found = looked(site, capsys, "--skip-data", code=3)  # the first failure's, though the server is away too
    assert states(found)["versions"] == states(found)["connection"] == "failed"


def test_for_a_person_there_is_a_line_for_each_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = site_at(tmp_path, f"localhost:{free_port()}")
    (site / NODE).unlink()
    write_node_key(site / NODE)
    assert run(["client", "doctor", str(site), "--skip-data"]) == 7
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"failed +connection +localhost:\d+ refuses connections", line) for line in lines)
    place = next(number for number, line in enumerate(lines) if line.startswith("failed"))
    assert lines[place + 1].lstrip().startswith("-> ask the operator")
