"""The two processes of a deployed site, and what both need: Flower's SuperNode and our worker.

    run/runtime-address      where the SuperNode hands out tasks: a free port of this machine's loopback, kept
    keys/runtime-*           its certificate, authority and key, and the secret that both processes know; made here

The SuperNode alone has a connection: outwards, to the federation's server, under the federation's authority. It runs in
process isolation, so it starts nothing by itself; tasks are taken by `client.worker`.
Not here: keeping processes up (`shared.supervisor`), and whether the site was admitted.
"""

from __future__ import annotations

import secrets
import socket
import sys
from pathlib import Path

from client.joining import AUTHORITY
from client.membership import NODE, read_federation
from client.worker import ADDRESS, CERTIFICATE, SECRET
from shared.disk import write_whole
from shared.errors import ConfigError
from shared.protection.certificates import issue_server_certificate, make_authority
from shared.protection.keys import write_private
from shared.supervisor import Program

RUNTIME_KEY, RUNTIME_CERTIFICATE, RUNTIME_AUTHORITY_KEY = (
    "keys/runtime.key", "keys/runtime.crt", "keys/runtime-authority.key",
)  # fmt: skip
# Flower says nothing to anybody but the server, and installs nothing.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}  # fmt: skip
NODE_SECONDS = 5.0, 10.0  # Flower refuses a node for about a minute after it was killed: it keeps trying


def programs(site_dir: Path) -> list[Program]:
    """What a supervisor keeps running; makes what is missing of the keys and the address.

    Raises:
        ConfigError: the site joined no federation.
        TrustError: what it holds of it is damaged.
    """
    site_dir = site_dir.resolve()
    federation = read_federation(site_dir)
    if federation is None:
        raise ConfigError(f"{site_dir} joined no federation", hint="`fedcanvas client join KIT SITE_DIR` does that")
    prepare(site_dir)
    host, _, port = (site_dir / ADDRESS).read_text().strip().rpartition(":")
    environment = {**QUIET, "FLWR_HOME": str(site_dir / "run/flower")}
    node = [
        str(Path(sys.executable).with_name("flower-supernode")), "--superlink", federation.address,
        "--root-certificates", str(site_dir / AUTHORITY), "--auth-supernode-private-key", str(site_dir / NODE),
        "--host", host, "--port", port, "--isolation", "process",
        "--superexec-auth-secret-file", str(site_dir / SECRET), "--ssl-ca-certfile", str(site_dir / CERTIFICATE),
        "--ssl-certfile", str(site_dir / RUNTIME_CERTIFICATE), "--ssl-keyfile", str(site_dir / RUNTIME_KEY),
        "--node-config", f"site-dir='{site_dir}'",
    ]  # fmt: skip
    return [
        Program("node", node, environment, restart_seconds=NODE_SECONDS[0], most_seconds=NODE_SECONDS[1]),
        Program("worker", [sys.executable, "-m", "client.worker", str(site_dir)], environment),
    ]


def prepare(site_dir: Path) -> None:
    """Certificate, secret and address of the site's own runtime; each is made once."""
    (site_dir / "run/flower").mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (site_dir / RUNTIME_CERTIFICATE).exists():
        for name in (RUNTIME_AUTHORITY_KEY, RUNTIME_KEY):
            (site_dir / name).unlink(missing_ok=True)  # of an attempt that was cut off
        make_authority("this machine", certificate=site_dir / CERTIFICATE, key=site_dir / RUNTIME_AUTHORITY_KEY)
        issue_server_certificate(
            ["localhost", "127.0.0.1"], authority=site_dir / CERTIFICATE,
            authority_key=site_dir / RUNTIME_AUTHORITY_KEY, certificate=site_dir / RUNTIME_CERTIFICATE,
            key=site_dir / RUNTIME_KEY, days=3650,
        )  # fmt: skip
        (site_dir / RUNTIME_AUTHORITY_KEY).unlink()  # it signs nothing more
    if not (site_dir / SECRET).exists():
        write_private(site_dir / SECRET, secrets.token_hex(32).encode())
    if not (site_dir / ADDRESS).exists():
        with socket.socket() as tried:
            tried.bind(("127.0.0.1", 0))
            port = tried.getsockname()[1]
        write_whole(site_dir / ADDRESS, f"127.0.0.1:{port}\n".encode())
