"""One place builds what leaves a site: read from the source of `client/`, so that no path is missed by not being run.

What the gate lets through is in test_records.py and test_site.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What may be called, and by which module of `client` alone.
CALLS = {
    "SiteReply": {"client.gate"}, "Refusal": {"client.gate"}, "pack_envelope": {"client.gate"},
    "Message": {"client.app"}, "encode_reply": {"client.app"}, "ClientApp": {"client.app"},
    "build": {"client.app", "client.query", "client.site"}, "print": set(),
}  # fmt: skip
# Ways out of a process that a site has no use for. `client.app` alone makes messages of Flower's, and `client.worker`
# carries them, which it cannot make. `client.doctor`, a command of a person at the site, tries the way to the server,
# and `client.network` reads certificates; no process that answers messages loads the former. `client.node` is Flower's
# own node, which carries what is sealed and has no records.
IMPORTS = {
    "flwr": {"client.app", "client.node", "client.worker"}, "rich": set(),
    "typer": {"client.cli", "client.deployment_cli"},
    "ssl": {"client.doctor", "client.network"}, "socket": {"client.doctor"}, "http": {"client.doctor"},
    "urllib": set(), "urllib3": set(), "requests": set(), "httpx": set(), "aiohttp": set(),
    "asyncio": set(),
    "ftplib": set(), "smtplib": set(), "socketserver": set(), "xmlrpc": set(), "grpc": set(), "ray": set(),
    "websockets": set(), "webbrowser": set(), "logging": set(), "syslog": set(), "subprocess": set(),
    "multiprocessing": set(), "ctypes": set(), "telnetlib": set(), "huggingface_hub": set(), "transformers": set(),
}  # fmt: skip
# What is looked up by name, wherever it comes from.
ATTRIBUTES = {
    "sys.stdout": {"client.cli"}, "sys.stderr": {"client.cli"}, "os.system": set(), "os.popen": set(),
    "os.execv": set(), "os.fork": set(), "os.posix_spawn": set(), "warnings.warn": set(),
    "importlib.import_module": set(),
}  # fmt: skip


@pytest.mark.slow
def test_what_answers_messages_loads_nothing_that_tries_the_network() -> None:
    """In a process of its own, as the worker is started."""
    look = "import client.worker, sys; print(sorted({'client.doctor', 'client.deployment_cli'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@cache
def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "client").rglob("*.py"))
    }


def ways_out(name: str, tree: ast.Module) -> Iterator[str]:
    """Everything in module `name` that may not be there."""
    for node in ast.walk(tree):
        found: list[str] = []
        allowed: dict[str, set[str]] = {}
        if isinstance(node, ast.Import):
            found, allowed = [alias.name.partition(".")[0] for alias in node.names], IMPORTS
        elif isinstance(node, ast.ImportFrom):
            found, allowed = [str(node.module).partition(".")[0]], IMPORTS
            # Under another name a call would not be found below.
            renamed = [alias.name for alias in node.names if alias.name in CALLS and alias.asname]
            yield from (f"{each} under another name" for each in renamed)
        elif isinstance(node, ast.Call):
            function = node.func
            found = [function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")]
            allowed = CALLS
        elif isinstance(node, ast.Attribute):
            found, allowed = [ast.unparse(node)], ATTRIBUTES
        yield from (each for each in found if each in allowed and name not in allowed[each])
        if isinstance(node, ast.Name) and node.id == "__import__":
            yield "__import__"


@pytest.mark.parametrize("name", modules())
def test_nothing_leaves_a_site_but_through_the_gate(name: str) -> None:
    assert list(ways_out(name, modules()[name])) == []


def test_every_way_that_is_allowed_is_used_where_it_is() -> None:
    """A rule whose one exception is gone would be there for nothing."""
    trees = modules()
    for name, places in CALLS.items():
        for place in places:
            calls = [node for node in ast.walk(trees[place]) if isinstance(node, ast.Call)]
            assert any(name in (getattr(c.func, "id", ""), getattr(c.func, "attr", "")) for c in calls), (name, place)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from shared.records import SiteReply\nSiteReply('run', 1, 'site', b'')", "SiteReply"),
        ("import shared.records\nshared.records.Refusal('site', code)", "Refusal"),
        ("from shared.records import SiteReply as Note", "SiteReply under another name"),
        ("from flwr.app import Message", "flwr"), ("def f():\n    import socket", "socket"),
        ("import urllib.request", "urllib"), ("from http import client", "http"), ("import logging", "logging"),
        ("print('3 records')", "print"), ("import sys\nsys.stderr.write('3')", "sys.stderr"),
        ("import os\nos.system('curl')", "os.system"), ("__import__('socket')", "__import__"),
        ("import importlib\nimportlib.import_module('socket')", "importlib.import_module"),
        ("from client.gate import build\nbuild(code, site_id='')", "build"),
    ],
)  # fmt: skip
def test_a_way_round_the_gate_would_be_found(source: str, found: str) -> None:
    assert found in list(ways_out("client.training", ast.parse(source)))
