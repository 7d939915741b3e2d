"""The port that work is handed out on: kept from start to start, unless somebody else has it by then."""

from __future__ import annotations

import fcntl
import socket
from pathlib import Path

import pytest

from shared.flower_runtime import ADDRESS, Runtime


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("run", "keys"):
        (tmp_path / name).mkdir(mode=0o700)
    Runtime.prepare(tmp_path)
    return tmp_path


def test_a_port_that_nobody_took_is_kept_also_right_after_it_was_used(folder: Path) -> None:
    before = Runtime.prepare(folder)
    with socket.create_server(("127.0.0.1", before.port)) as served:  # it closes first: its end waits for a minute
        client = socket.create_connection(("127.0.0.1", before.port))
        served.accept()[0].close()
    client.close()
    with pytest.raises(OSError, match="in use"), socket.socket() as tried:
        tried.bind(("127.0.0.1", before.port))
    assert Runtime.prepare(folder) == before


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_where_somebody_else_listens_another_port_is_taken_and_nothing_else_changes(host: str, folder: Path) -> None:
    before = Runtime.prepare(folder)
    with socket.create_server((host, before.port)):
        after = Runtime.prepare(folder)
    assert after.port != before.port
    assert (after.authority, after.secret) == (before.authority, before.secret)
    assert (folder / ADDRESS).read_text() == f"127.0.0.1:{after.port}\n"
    socket.create_server(("127.0.0.1", after.port)).close()  # the oracle: a server gets it


def test_a_port_that_a_connection_of_somebody_s_goes_out_from_is_taken(folder: Path) -> None:
    before = Runtime.prepare(folder)
    with socket.create_server(("127.0.0.1", 0)) as served, socket.socket() as going:
        going.bind(("127.0.0.1", before.port))
        going.connect(served.getsockname())
        assert Runtime.prepare(folder).port != before.port


def test_while_the_folder_is_started_it_is_its_own_that_listens(folder: Path) -> None:
    before = Runtime.prepare(folder)
    with (folder / "run/lock").open("w") as lock, socket.create_server(("127.0.0.1", before.port)):
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Runtime.prepare(folder) == before
