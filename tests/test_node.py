"""A site's node outlives connections that break, and ends where it would be deaf."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker

from client.node import node_retries
from shared.flower_runtime import loopback_retries
from shared.protection.certificates import issue_server_certificate, make_authority

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("authority")
    for name in ("here", "elsewhere"):
        make_authority(name, certificate=made / f"{name}.crt", key=made / f"{name}.key")
    issue_server_certificate(
        ["localhost"], authority=made / "here.crt", authority_key=made / "here.key", certificate=made / "server.crt",
        key=made / "server.key",
    )  # fmt: skip
    return made


@contextmanager
def server(folder: Path, *, cut: int) -> Iterator[str]:
    """Of one that ends so many connections within the handshake, and answers those after them."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for place in range(1000):
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    if place < cut:
                        connection.recv(10)  # of its hello
                        connection.shutdown(socket.SHUT_RDWR)
                        continue
                    with context.wrap_socket(connection, server_side=True) as wrapped:
                        wrapped.recv(2**16)
                        wrapped.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nhere")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"https://localhost:{listening.getsockname()[1]}"


def ask(address: str, authority: Path, retries: RetryInvoker) -> str:
    with httpx.Client(verify=ssl.create_default_context(cafile=str(authority))) as client:
        return str(retries.invoke(client.get, address).text)


def hurried(made: RetryInvoker) -> RetryInvoker:
    made.wait_function = lambda seconds: None
    return made


@pytest.mark.parametrize("retries", [node_retries, loopback_retries])
def test_a_connection_that_is_cut_in_its_handshake_is_tried_again(
    retries: Callable[[], RetryInvoker], folder: Path
) -> None:
    with server(folder, cut=3) as address:
        assert ask(address, folder / "here.crt", hurried(retries())) == "here"
    with server(folder, cut=1) as address, pytest.raises(httpx.TransportError, match=r"SSL|reset"):
        # The control: Flower's own does not. When this fails, `client.node` has one reason less.
        ask(address, folder / "here.crt", hurried(make_simple_http_retry_invoker()))


@pytest.mark.parametrize("retries", [node_retries, loopback_retries])
def test_a_certificate_that_is_not_trusted_is_not_tried_again(
    retries: Callable[[], RetryInvoker], folder: Path
) -> None:
    with server(folder, cut=0) as address, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(address, folder / "elsewhere.crt", hurried(retries()))


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("return", 1, "the node's loop has ended"), ("raise SystemExit(200)", 200, ""),
        pytest.param("raise RuntimeError('broken')", 1, "RuntimeError: broken", marks=pytest.mark.slow),
        pytest.param("raise SystemExit", 0, "", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_node_whose_loop_has_ended_ends_whatever_threads_go_on(how: str, code: int, said: str) -> None:
    script = (
        "import threading, time, client.node\n"
        "def supernode():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"    {how}\n"
        "client.node.flower_supernode = supernode\n"
        "client.node.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
