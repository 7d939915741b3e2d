"""The two processes of a deployed site: Flower's SuperNode and our worker.

The SuperNode alone has a connection: outwards, to the federation's server, in the way of `client.network`. It runs in
process isolation, so it starts nothing by itself; tasks are taken by `client.worker`.
Not here: keeping processes up (`shared.supervisor`), what both share (`shared.flower_runtime`), and whether the site
was admitted: that only the server knows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from client.activity import Activity
from client.membership import NODE, SIGNING, open_channel, read_federation
from client.network import environment_of, proxy_of, trusted, write_trusted
from client.policy import SitePolicy
from client.settings import RELEASE_CODE, SETTINGS, SiteConfig
from client.status import Connection, open_account, read_connection
from shared.disk import make_private
from shared.errors import ConfigError, DataError, FederationError
from shared.flower_runtime import ENVIRONMENT, Runtime
from shared.protection.keys import SigningKey, read_node_key
from shared.supervisor import (
    NOTE,
    LogFormat,
    Program,
    detach,
    is_held,
    log_lines,
    status,
    supervise,
    until_told,
)

NODE_SECONDS = 5.0, 10.0  # Flower refuses a node for about a minute after it was killed: it keeps trying
WORKER_END_SECONDS = 60.0  # what is charged is charged: it may end its message
START_SECONDS = 60.0  # until both have said how they are


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
    proxy = proxy_of(SiteConfig.read(site_dir), federation.address, os.environ)
    make_private(site_dir, "run", "run/flower")
    runtime = Runtime.prepare(site_dir)
    # The level is that of which `client.status` reads the words; Flower's DEBUG may show what is sensitive.
    environment = {
        **ENVIRONMENT, **environment_of(None, os.environ), "FLWR_HOME": str(site_dir / "run/flower"),
        "FLWR_LOG_LEVEL": "INFO",
    }  # fmt: skip
    node = [
        sys.executable, "-P", "-m", "client.node", "--superlink", federation.address,
        "--root-certificates", str(write_trusted(site_dir)), "--auth-supernode-private-key", str(site_dir / NODE),
        *runtime.options(site_dir), "--node-config", f"site-dir='{site_dir}'",
    ]  # fmt: skip
    # -P: nothing is imported from the folder where somebody happened to start it.
    worker = [sys.executable, "-P", "-m", "client.worker", str(site_dir)]
    return [
        Program(
            "node", node, {**environment, **environment_of(proxy, os.environ)}, restart_seconds=NODE_SECONDS[0],
            most_seconds=NODE_SECONDS[1],
        ),
        Program("worker", worker, environment, end_seconds=WORKER_END_SECONDS),
    ]


def check_can_start(site_dir: Path) -> list[str]:
    """What a person should know of a site that can be started, in words.

    Raises:
        FedCanvasError: what would keep it from answering.
    """
    if is_held(site_dir):
        raise FederationError(f"{site_dir} is started already", hint="`fedcanvas client status` says how it does")
    config = SiteConfig.read(site_dir)
    if config.simulated_seed is not None:
        raise ConfigError(f"{site_dir} is a simulated site: it answers in its simulation only")
    if config.published_records is None:
        raise ConfigError(f"{site_dir / SETTINGS}: 'published-records' is missing", hint="see `client init --help`")
    federation = read_federation(site_dir)
    if federation is None:
        raise ConfigError(f"{site_dir} joined no federation", hint="`fedcanvas client join KIT SITE_DIR` does that")
    SigningKey.read(site_dir / SIGNING)
    read_node_key(site_dir / NODE)
    open_channel(site_dir, config.site_id)
    proxy_of(config, federation.address, os.environ)
    trusted(site_dir)
    open_account(site_dir)
    if not (data := site_dir / config.data).exists():
        raise DataError(f"the data of the site are not at {data}", hint="mount them, or edit site.toml")
    policy, warnings = SitePolicy.read(site_dir), []
    if policy.code and RELEASE_CODE not in policy.code:
        warnings.append(f"nothing is answered: the installed code {RELEASE_CODE[:12]} is not in the policy's list")
    if policy.federations and federation.name not in policy.federations:
        warnings.append(f"nothing is answered: federation {federation.name} is not in the policy's list")
    return warnings


def start(site_dir: Path, *, form: LogFormat = "text") -> Connection:
    """Both programs, detached; how the node's connection is.

    Raises:
        FederationError: the worker does not stay up (then nothing is left running), or nothing is heard of it in time.
    """
    site_dir = site_dir.resolve()
    command = [
        sys.executable, "-P", "-m", "shared.cli", "client", "start", str(site_dir), "--foreground", "--quiet",
        "--log-format", form,
    ]  # fmt: skip
    made = detach(command, site_dir)
    try:
        ready = made.wait_until(lambda: _is_ready(site_dir), seconds=START_SECONDS)
    except BaseException:  # also a person who does not want to wait
        made.end()
        raise
    if not ready:
        raise FederationError(
            f"{site_dir} is started, and after {START_SECONDS:.0f} s not both programs have said how they are",
            hint="`fedcanvas client status` says more, and `fedcanvas client stop` ends it",
        )
    return read_connection(log_lines(site_dir, "node"))


def run_here(site_dir: Path, *, form: LogFormat, aloud: bool) -> None:
    """Both programs, until SIGTERM or Ctrl-C."""
    kept = programs(site_dir)
    until_told(lambda stopped: supervise(site_dir.resolve(), kept, stopped=stopped, form=form, aloud=aloud))


def _is_ready(site_dir: Path) -> bool:
    """Whether the worker waits for messages, and the node's first attempt to connect has ended in some way."""
    worker = ((status(site_dir) or {}).get("programs") or {}).get("worker", {})
    if worker.get("ended"):
        said = [line.text for line in log_lines(site_dir, "worker") if not line.text.startswith(NOTE)]
        raise FederationError(
            f"the worker does not stay up: {said[-1] if said else worker['ended']}",
            hint=f"{site_dir / 'logs/worker.log'} has what it said; nothing was left running",
        )
    activity = Activity.read(site_dir)
    waits = activity is not None and activity.pid == worker.get("pid")
    return waits and read_connection(log_lines(site_dir, "node")).state != "unknown"
