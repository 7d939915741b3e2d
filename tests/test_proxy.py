"""What the proxy in front of the SuperLink lets through, asked from outside: real Caddy and TLS, a stand-in behind."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from flower_processes import eventually, listens
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_object_tree

import server.deployment
from server.deployment import PROXY, SITES_PATHS, programs
from server.federation import FederationFolder
from shared.errors import UsageError
from shared.flower_runtime import CERTIFICATE, CERTIFICATE_KEY, Runtime, free_port
from shared.records import MAX_PARAMETERS

MIB = 2**20


class Behind(BaseHTTPRequestHandler):
    """Stands in for the SuperLink, and notes what reaches it whole."""

    timeout = 30
    reached: list[str]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if len(self.rfile.read(size)) < size:
            return  # the proxy broke it off
        self.reached.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    """(folder, port, paths that came through)."""
    folder, port = tmp_path_factory.mktemp("proxy") / "fed", free_port()
    FederationFolder.create(folder, name="retina", address=f"localhost:{port}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.deployment, "HEAD_SECONDS", 2)
        patch.setattr(server.deployment, "STALL_SECONDS", 3)
        patch.setattr(server.deployment, "FILES", 200)
        program = next(program for program in programs(folder) if program.name == "proxy")
    runtime = Runtime.read(folder)
    handler = type("Handler", (Behind,), {"reached": []})
    behind = ThreadingHTTPServer(("127.0.0.1", runtime.port), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / CERTIFICATE, folder / CERTIFICATE_KEY)
    behind.socket = context.wrap_socket(behind.socket, server_side=True)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    environment = {**os.environ, **program.environment}
    with (folder / "proxy.log").open("wb") as log:
        process = subprocess.Popen(list(program.command), env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: listens(port), "the proxy", 20.0)
        yield folder, port, handler.reached  # type: ignore[attr-defined]
    finally:
        process.terminate()
        process.wait(timeout=20)
        behind.shutdown()
        behind.server_close()


def trusting(folder: Path) -> ssl.SSLContext:
    """As a site: the federation's authority alone."""
    authority = json.loads((folder / "federation.json").read_text())["authority"]
    return ssl.create_default_context(cadata=authority)


def asked(
    proxy: tuple[Path, int, list[str]], path: str, *, method: str = "POST", body: bytes = b"", **headers: str
) -> int:
    folder, port, _ = proxy
    connection = http.client.HTTPSConnection("localhost", port, context=trusting(folder), timeout=20)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("path", SITES_PATHS)
def test_what_a_site_asks_for_passes(path: str, proxy: tuple[Path, int, list[str]]) -> None:
    assert asked(proxy, path, body=b"x" * 1000) == 200
    assert proxy[2][-1] == path


@pytest.mark.parametrize(
    "path",
    [
        "/", "/docs", "/openapi.json", "/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/acquire-task",
        "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/", "/v1/fleet/../control/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/..%2fcontrol/list-nodes", "//v1/control/list-nodes", "/v1/fleet/pull-messages%00/x",
        "/v1/fleet/pull-messages/x", "/v1/fleet\\..\\control\\list-nodes", "/V1/CONTROL/list-nodes",
        "http://127.0.0.1/v1/control/list-nodes", "/v1/fleet/./../control/start-run", "/v1/responses",
    ],
)  # fmt: skip
def test_nothing_else_reaches_the_superlink(path: str, proxy: tuple[Path, int, list[str]]) -> None:
    before = len(proxy[2])
    assert asked(proxy, path) in (400, 403)
    assert len(proxy[2]) == before


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE"])
def test_no_other_method_passes(method: str, proxy: tuple[Path, int, list[str]]) -> None:
    before = len(proxy[2])
    assert asked(proxy, SITES_PATHS[0], method=method) in (400, 403, 405)
    assert len(proxy[2]) == before


def test_whether_it_is_well_the_superlink_says(proxy: tuple[Path, int, list[str]]) -> None:
    assert asked(proxy, "/health", method="GET") == 200
    assert proxy[2][-1] == "/health"


@pytest.mark.parametrize("path", SITES_PATHS)
def test_a_body_that_is_too_long_is_not_passed_on(path: str, proxy: tuple[Path, int, list[str]]) -> None:
    most = 8 * MIB if path.endswith("/push-object") else MIB
    assert asked(proxy, path, body=b"x" * most) == 200
    before = len(proxy[2])
    assert asked(proxy, path, body=b"x" * (most + 1)) == 413
    assert len(proxy[2]) == before


def test_a_look_at_its_health_has_no_body(proxy: tuple[Path, int, list[str]]) -> None:
    assert asked(proxy, "/health", method="GET", body=b"x" * 1000) in (400, 413, 502)


def test_what_flower_sends_of_the_longest_answer_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = ArrayChunk(memoryview(bytes(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE)))
    pushed = PushObjectRequest(object_id=chunk.object_id, object_content=chunk.deflate())
    assert 5 * MIB < pushed.ByteSize() < 6 * MIB
    # The message names each chunk: as many as the longest answer has, here of 1 kB each.
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 1024)
    chunks = 8 * MAX_PARAMETERS // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 1
    content = np.random.default_rng(0).bytes(1024 * chunks)
    reply = RecordDict(
        {"envelope": ArrayRecord({"payload": Array(dtype="|u1", shape=(len(content),), stype="raw", data=content)})}
    )
    tree = get_object_tree(reply)
    assert 64 * chunks < tree.ByteSize() < MIB / 20


def test_the_folder_of_what_runs_is_closed_to_others_also_where_it_stood_open(tmp_path: Path) -> None:
    folder = tmp_path / "fed"
    FederationFolder.create(folder, name="retina", address="localhost:9443")
    (folder / "run").mkdir(mode=0o755)
    (folder / "run").chmod(0o755)
    programs(folder)
    for name in ("run", "run/flower", "run/caddy"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700
    for path in (folder / "run").iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022


def test_a_look_at_the_configuration_stays_in_the_folder_and_does_not_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, caddy = tmp_path / "fed", tmp_path / "caddy"
    FederationFolder.create(folder, name="retina", address="localhost:9443")
    caddy.write_text(f'#!/bin/sh\necho "$XDG_DATA_HOME $XDG_CONFIG_HOME" > {tmp_path}/homes\nexec sleep 60\n')
    caddy.chmod(0o755)
    monkeypatch.setattr(server.deployment, "find_proxy", lambda: str(caddy))
    monkeypatch.setattr(server.deployment, "CHECK_SECONDS", 1.0)
    with pytest.raises(UsageError, match="did not look at its configuration within 1 s"):
        programs(folder)
    assert (tmp_path / "homes").read_text().split() == [str(folder.resolve() / "run/caddy")] * 2


def test_a_head_that_is_too_long_is_refused(proxy: tuple[Path, int, list[str]]) -> None:
    before = len(proxy[2])
    assert asked(proxy, SITES_PATHS[0], X_Long="x" * 40_000) == 431
    assert len(proxy[2]) == before


def raw(proxy: tuple[Path, int, list[str]]) -> ssl.SSLSocket:
    folder, port, _ = proxy
    plain = socket.create_connection(("localhost", port), timeout=20)
    return trusting(folder).wrap_socket(plain, server_hostname="localhost")


@pytest.mark.slow
def test_a_head_that_never_ends_is_dropped(proxy: tuple[Path, int, list[str]]) -> None:
    with raw(proxy) as opened:
        opened.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n")
        began = time.monotonic()
        while opened.recv(4096):
            pass
        assert time.monotonic() - began < 8


@pytest.mark.slow
@pytest.mark.parametrize("bytes_a_second", [0, 5])
def test_a_body_that_stands_still_or_trickles_is_refused_and_reaches_nobody(
    bytes_a_second: int, proxy: tuple[Path, int, list[str]]
) -> None:
    before = len(proxy[2])
    with raw(proxy) as opened:
        opened.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\nx")
        opened.settimeout(0.2)
        answer, until = b"", time.monotonic() + 12
        while not answer and time.monotonic() < until:
            try:
                answer = opened.recv(4096)
            except TimeoutError:
                if bytes_a_second:
                    opened.sendall(b"x")
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
    assert len(proxy[2]) == before


@pytest.mark.parametrize(
    "garbage",
    [b"\x00" * 4096, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
     b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
     b"0\r\n\r\nPOST /v1/control/list-nodes HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"],
)  # fmt: skip
def test_garbage_is_no_request(garbage: bytes, proxy: tuple[Path, int, list[str]]) -> None:
    with raw(proxy) as opened:
        opened.sendall(garbage)
        opened.settimeout(2)  # one of them it lets stand; what would pass has passed by then
        try:
            while opened.recv(4096):
                pass
        except (TimeoutError, ConnectionError):
            pass
    assert "/v1/control/list-nodes" not in proxy[2]
    assert asked(proxy, SITES_PATHS[0]) == 200


def test_more_connections_than_it_may_hold_do_not_end_it(proxy: tuple[Path, int, list[str]]) -> None:
    held = []
    try:
        for _ in range(300):
            opened = socket.socket()
            opened.setblocking(False)
            opened.connect_ex(("127.0.0.1", proxy[1]))
            held.append(opened)
    finally:
        for opened in held:
            opened.close()
    eventually(lambda: asked(proxy, SITES_PATHS[0]) == 200, "an answer after the flood", 30.0)


def handshake(port: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["openssl", "s_client", "-connect", f"localhost:{port}", "-CAfile", str(folder / "keys/authority.crt"),
         "-verify_return_error", "-verify_hostname", "localhost", *options],
        input="", capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "spoken"), [("-tls1", False), ("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)]
)
def test_tls_is_1_2_or_newer_as_openssl_sees_it(
    version: str, spoken: bool, proxy: tuple[Path, int, list[str]]
) -> None:
    # Level 0, or openssl itself would not offer the old ones.
    found = handshake(proxy[1], proxy[0], version, "-cipher", "DEFAULT:@SECLEVEL=0")
    assert ("Verify return code: 0 (ok)" in found.stdout and found.returncode == 0) is spoken, found.stderr


def test_the_log_holds_no_head_since_a_node_is_known_by_what_stands_there(proxy: tuple[Path, int, list[str]]) -> None:
    assert asked(proxy, SITES_PATHS[0], Flwr_Signature="aSignatureThatIsValidForMinutes") == 200
    log = proxy[0] / "proxy.log"
    eventually(lambda: f'"uri":"{SITES_PATHS[0]}"' in log.read_text(), "a line of the log", 5.0)
    assert "aSignatureThatIsValidForMinutes" not in log.read_text()


def test_the_configuration_has_no_way_to_be_changed_from_outside(proxy: tuple[Path, int, list[str]]) -> None:
    assert json.loads((proxy[0] / PROXY).read_text())["admin"]["disabled"] is True
    assert not listens(2019)  # where Caddy has its admin API by default
