"""The two processes of a deployed site: Flower's SuperNode and our worker.

The SuperNode alone has a connection: outwards, to the federation's server, under the federation's authority. It runs in
process isolation, so it starts nothing by itself; tasks are taken by `client.worker`.
Not here: keeping processes up (`shared.supervisor`), what both share (`shared.flower_runtime`), and whether the site
was admitted.
"""

from __future__ import annotations

import sys
from pathlib import Path

from client.joining import AUTHORITY
from client.membership import NODE, read_federation
from shared.errors import ConfigError
from shared.flower_runtime import ENVIRONMENT, Runtime
from shared.supervisor import Program

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
    (site_dir / "run/flower").mkdir(mode=0o700, parents=True, exist_ok=True)
    runtime = Runtime.prepare(site_dir)
    environment = {**ENVIRONMENT, "FLWR_HOME": str(site_dir / "run/flower")}
    node = [
        str(Path(sys.executable).with_name("flower-supernode")), "--superlink", federation.address,
        "--root-certificates", str(site_dir / AUTHORITY), "--auth-supernode-private-key", str(site_dir / NODE),
        *runtime.options(site_dir), "--node-config", f"site-dir='{site_dir}'",
    ]  # fmt: skip
    return [
        Program("node", node, environment, restart_seconds=NODE_SECONDS[0], most_seconds=NODE_SECONDS[1]),
        Program("worker", [sys.executable, "-m", "client.worker", str(site_dir)], environment),
    ]
