"""The address of a service: loopback unless told, never open to a network without keys by accident.

Not here: TLS; a proxy in front does that (docs/serving.md).
"""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket
from typing import Any

from shared.errors import UsageError

BACKLOG = 2048
# Of each connection, in the kernel, which would else take megabytes for a client that reads none of them, and hide for
# minutes that one reads slowly.
SENDING_BYTES = 2**17
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_FILES = 2**16


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one.

    Raises:
        UsageError: the name is unknown, the address is not of this machine, or the port is taken or not allowed.
    """
    family, kind, protocol, _, address = _resolved(host, port)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDING_BYTES)  # connections have it from here
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {host} is taken", hint="stop what listens there, or name another with --port"
            ) from None
        if error.errno == errno.EACCES:
            raise UsageError(
                f"port {port} of {host} is not allowed to you", hint="name one above 1023 with --port"
            ) from None
        said = (error.strerror or str(error)).lower()
        raise UsageError(f"{host} port {port} cannot be listened on: {said}") from None
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it; `UsageError` for a name that nobody knows."""
    return all(ipaddress.ip_address(str(found[4][0]).partition("%")[0]).is_loopback for found in _resolved(host, 0))


def url(made: socket.socket) -> str:
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if made.family == socket.AF_INET6 else f"http://{host}:{port}"


def raise_file_limit() -> int:
    """Open files that this process may have from now on: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _FILES if soft == resource.RLIM_INFINITY else soft


def _resolved(host: str, port: int) -> list[tuple[Any, ...]]:
    """As of `getaddrinfo`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise UsageError(
            f"nobody knows a machine called {host!r}", hint="--host takes an address of this machine"
        ) from None
    return list(found)
