"""Runs a site in a network of its own, in which nothing is reachable but the federation's server, or the proxy.

    python benchmarks/hospital_network.py SITE_DIR --seconds 60

The two processes live in network, mount and user namespaces of their own (Linux; no privileges where the kernel allows
it). At the server's address a relay listens that leads out through a Unix socket; there is no route to anything else.
At the end it says how often anybody in there tried to go anywhere else: the kernel counts that (`OutNoRoutes`),
whatever library tried. Names other than the server's cannot be looked up.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import ipaddress
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from client.membership import read_federation
from client.network import proxy_of, split
from client.settings import SiteConfig

SIOCSIFADDR, SIOCSIFFLAGS, IFF_UP = 0x8916, 0x8914, 1
NOWHERE = ("198.51.100.1", 443)  # of a documentation network: a try that the counter must see
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site_dir", type=Path)
    parser.add_argument("--seconds", type=float, help="how long; without it until SIGTERM or Ctrl-C")
    parser.add_argument("--inside", nargs=3, metavar=("HOST", "PORT", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    site_dir = given.site_dir.resolve()
    if given.inside is not None:
        host, port, way = given.inside
        run_inside(site_dir, host, int(port), way)
        return
    federation = read_federation(site_dir)
    if federation is None:
        sys.exit(f"{site_dir} joined no federation")
    proxy = proxy_of(SiteConfig.read(site_dir), federation.address, os.environ)
    host, port = (proxy.host, proxy.port) if proxy else split(federation.address)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        way = f"{folder}/way"
        listener.bind(way)
        relay(listener, partial(socket.create_connection, (host, port)))
        command = [
            "unshare", "--map-root-user", "--net", "--mount", "--", sys.executable, "-P", __file__, str(site_dir),
            "--inside", host, str(port), way,
        ]  # fmt: skip
        inside = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: inside.send_signal(signal.SIGTERM))
        if given.seconds is not None:
            threading.Timer(given.seconds, inside.terminate).start()
        sys.exit(inside.wait())


def run_inside(site_dir: Path, host: str, port: int, way: str) -> None:
    bring_up("lo", "127.0.0.1")
    address = host
    try:
        if not ipaddress.ip_address(host).is_loopback:
            bring_up("lo:1", host)
    except ValueError:
        address = "127.0.0.1"
        hosts = Path(way).with_name("hosts")
        hosts.write_text(f"127.0.0.1 localhost {host}\n")
        subprocess.run(["mount", "--bind", str(hosts), "/etc/hosts"], check=True)
    before = attempts_elsewhere()
    with socket.socket() as tried, contextlib.suppress(OSError):
        tried.connect(NOWHERE)
        sys.exit("this network reaches elsewhere")
    if attempts_elsewhere() != before + 1:
        sys.exit("the kernel does not count what has no route")

    def lead_out() -> socket.socket:
        leading = socket.socket(socket.AF_UNIX)
        leading.connect(way)
        return leading

    with socket.socket() as listener:
        listener.bind((address, port))
        relay(listener, lead_out)
        site = subprocess.Popen(
            [sys.executable, "-P", "-m", "shared.cli", "client", "start", str(site_dir), "--foreground", "--quiet"]
        )
        signal.signal(signal.SIGTERM, lambda *_: site.terminate())
        code = site.wait()
    print(json.dumps({"code": code, "attempts_elsewhere": attempts_elsewhere() - before - 1}), flush=True)


def bring_up(name: str, address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        wanted = struct.pack("16sH2s4s8x", name.encode(), socket.AF_INET, b"", socket.inet_aton(address))
        fcntl.ioctl(control, SIOCSIFADDR, wanted)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", name.encode(), IFF_UP))


def attempts_elsewhere() -> int:
    """Of this network since it was made: what anybody wanted to send to where no way leads."""
    heads, values = (
        line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if line.startswith("Ip: ")
    )
    newer = dict(line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines())
    return int(values[heads.index("OutNoRoutes")]) + int(newer["Ip6OutNoRoutes"])


def relay(listener: socket.socket, lead: Callable[[], socket.socket]) -> None:
    """Whatever connects to `listener` goes on where `lead` leads, for the life of this process."""
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=pair, args=(connection,), daemon=True).start()

    def pair(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError), lead() as leading:
            back = threading.Thread(target=copy, args=(leading, connection), daemon=True)
            back.start()
            copy(connection, leading)
            back.join()

    threading.Thread(target=serve, daemon=True).start()


def copy(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(2**16):
            to.sendall(piece)
    with contextlib.suppress(OSError):
        to.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main()
