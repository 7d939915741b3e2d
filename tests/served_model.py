"""A service that tests talk to over real sockets: in a thread, where its inside can be looked at, or as the command."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from server.generator import Generator
from server.prompting import PromptPipeline
from server.serving.app import Studio, make_app
from server.serving.keys import ApiKeys
from server.serving.listener import listen
from server.serving.service import Service
from server.serving.settings import ServingSettings

ROOT = Path(__file__).resolve().parents[1]


class Served:
    """A service in a thread.

    Attributes:
        client: waits long, and tries nothing again.
    """

    def __init__(
        self, generator: Generator, keys: ApiKeys | None = None, pipeline: PromptPipeline | None = None, **settings: Any
    ) -> None:
        limits = ServingSettings(**settings)
        app = make_app(generator, limits, keys=keys, pipeline=pipeline)
        self.studio: Studio = app.state.studio
        self._listening = listen("127.0.0.1", 0)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.service = Service(app, limits)
        self._thread = threading.Thread(target=self.service.run, args=([self._listening],), daemon=True)
        self._thread.start()
        wait_until(lambda: self.service.started)
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def close(self) -> None:
        self.client.close()
        self.service.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def draw(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json={"prompt": "a red circle", **fields})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def figure(self, name: str) -> float:
        """Of /metrics; 0 where it has not been counted yet."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextlib.contextmanager
def served(
    generator: Generator, keys: ApiKeys | None = None, pipeline: PromptPipeline | None = None, **settings: Any
) -> Iterator[Served]:  # fmt: skip
    service = Served(generator, keys, pipeline, **settings)
    try:
        yield service
    finally:
        service.close()


class HeldBack:
    """A generator that draws only once `let` is set; it counts what it was asked for.

    Attributes:
        batches: the prompts of each batch.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator, self.let, self.asked = generator, threading.Event(), threading.Event()
        self.batches: list[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def arrays(self, prompts: list[str], **options: Any) -> np.ndarray:
        self.batches.append(list(prompts))
        self.asked.set()
        assert self.let.wait(60)
        return self._generator.arrays(prompts, **options)


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`fedcanvas serve` as a process of its own: (process, its address, what it says on stderr so far)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shared.cli", "serve", "--port", "0", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    said: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda lines: said.extend(lines), args=(process.stderr,), daemon=True)
    lines = iter(process.stderr)
    address = ""
    try:
        while not address:
            line = next(lines, "")
            assert line, f"it ended: {said}"
            said.append(line)
            found = re.search(r"http://\S+", line)
            address = found[0] if found else ""
        reader.start()
        wait_until(lambda: _answers(address))
        yield process, address, said
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)
        if reader.ident is not None:
            reader.join(10)
        assert process.stdout is not None
        process.stdout.close()
        process.stderr.close()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
