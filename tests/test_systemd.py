"""The units of systemd: what they start exists, and what they forbid is what is written here by hand."""

from __future__ import annotations

import configparser
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shared.supervisor import END_SECONDS, STOP_SECONDS

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"site": "client start %f --foreground", "server": "server start %f --foreground"}
HARDENED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ReadWritePaths": "%f",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "ProtectProc": "invisible",
    "ProtectClock": "yes",
    "ProtectControlGroups": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "RemoveIPC": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "SystemCallArchitectures": "native",
    "SystemCallFilter": "@system-service",
    "SystemCallErrorNumber": "EPERM",
    "UMask": "0077",
    "LimitNOFILE": "65536",
    "LimitCORE": "0",
}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / f"packaging/systemd/fedcanvas-{name}@.service")
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_forbids_what_is_not_needed(name: str) -> None:
    service = dict(unit(name)["Service"])
    assert {key: service.get(key) for key in HARDENED} == HARDENED
    assert "MemoryDenyWriteExecute" not in service  # torch's convolutions fail under it
    assert service["User"] == service["Group"] == "fedcanvas"


def test_what_a_server_takes_of_the_memory_is_bounded_and_one_process_that_takes_it_ends_alone() -> None:
    service = unit("server")["Service"]
    assert (service["MemoryMax"], service["OOMPolicy"]) == ("80%", "continue")


@pytest.mark.parametrize(("name", "command"), UNITS.items())
def test_a_unit_starts_again_for_ever_and_gives_time_to_end(name: str, command: str) -> None:
    service = unit(name)["Service"]
    program, _, arguments = service["ExecStart"].partition(" ")
    assert Path(program).is_absolute()
    assert Path(program).name == "fedcanvas"
    assert arguments == command
    assert (service["Restart"], service["RestartSec"], service["Type"]) == ("always", "15", "exec")
    assert unit(name)["Unit"]["StartLimitIntervalSec"] == "0"
    # The supervisor alone is told, and ends its programs one after another.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"]) >= STOP_SECONDS > 2 * END_SECONDS
    assert unit(name)["Install"]["WantedBy"] == "multi-user.target"


def test_what_a_site_s_unit_starts_exists() -> None:
    words = [word for word in shlex.split(UNITS["site"]) if word != "%f"]
    said = subprocess.run(
        [sys.executable, "-m", "shared.cli", *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--foreground" in said
