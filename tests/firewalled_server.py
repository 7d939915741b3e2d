"""A port behind nftables rules, and machines that connect to it; run in network and mount namespaces of its own.

    python firewalled_server.py RULES...      loads each after the other; prints what got through, one JSON object
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

PORT = 9443
SERVER, SERVER6 = "10.9.0.1", "fd00:9::1"
# Each is tried once: what a connection before the rules still sends would count as new. The last is of another network.
MACHINES = ("10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5", "fd00:9::2", "fd00:9::3", "fd00:9:0:1::2")
PATIENCE_SECONDS = 0.25  # a packet that is dropped is not answered
NOBODY = 65534


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def serve(host: str, family: socket.AddressFamily, port: int = PORT) -> None:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listening.bind((host, port))
    listening.listen(256)

    def accept() -> None:
        while True:
            threading.Thread(target=until_closed, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def until_closed(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.recv(1)


def connect(source: str, count: int, *, hold: bool, to: str, port: int = PORT) -> int:
    """How many of so many connections came about."""
    came, held = 0, []
    for _ in range(count):
        tried = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        tried.settimeout(PATIENCE_SECONDS)
        tried.bind((source, 0))
        with contextlib.suppress(OSError):
            tried.connect((to, port))
            came += 1
        if hold:
            held.append(tried)
        else:
            tried.close()
    return came


def from_outside(source: str, count: int, *, hold: bool = False) -> int:
    there = ["ip", "netns", "exec", "outside", sys.executable, __file__]
    command = [*there, "connect", source, str(count), str(int(hold))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


def as_nobody(port: int) -> int:
    """How many of five connections over loopback come about for a user who is not the server's."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(OSError):
            os.setuid(NOBODY)
            os.write(write, str(connect("127.0.0.1", 5, hold=False, to="127.0.0.1", port=port)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    if not (said := os.read(read, 10)):
        raise PermissionError
    return int(said)


def main() -> dict[str, Any]:
    # What `ip netns` keeps is this process's own.
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
    ip("netns add outside")
    ip("link add here type veth peer name there netns outside")
    for link in ("link set lo up", "link set here up", "-n outside link set there up"):
        ip(link)
    ip(f"addr add {SERVER}/24 dev here")
    ip(f"addr add {SERVER6}/48 dev here nodad")
    for machine in MACHINES:
        size, way = (48, "nodad") if ":" in machine else (24, "")
        ip(f"-n outside addr add {machine}/{size} dev there {way}".rstrip())
    serve("0.0.0.0", socket.AF_INET)
    serve("::", socket.AF_INET6)
    found: dict[str, Any] = {"without rules": from_outside("10.9.0.2", 80)}
    for rules in sys.argv[1:]:
        subprocess.run(["nft", "-f", rules], check=True)
    found["one after another"] = from_outside("10.9.0.4", 80)
    found["at once"] = from_outside("10.9.0.3", 40, hold=True)
    found["from another address"] = from_outside("10.9.0.5", 5)
    found["of one network, one after another"] = from_outside("fd00:9::2", 80)
    found["of the same network"] = from_outside("fd00:9::3", 5)
    found["of another network"] = from_outside("fd00:9:0:1::2", 5)
    found["over loopback"] = connect("127.0.0.1", 80, hold=False, to="127.0.0.1")
    serve("127.0.0.1", socket.AF_INET, 40123)
    found["runtime, the server's user"] = connect("127.0.0.1", 5, hold=False, to="127.0.0.1", port=40123)
    with contextlib.suppress(PermissionError):  # there is no other user where only one is mapped
        found["runtime, another user"] = as_nobody(40123)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "connect":
        _, _, source, count, hold = sys.argv
        print(connect(source, int(count), hold=hold == "1", to=SERVER6 if ":" in source else SERVER))
    else:
        print(json.dumps(main()))
