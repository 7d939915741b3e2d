"""Which sites are there now: the federation's roster, brought to Flower's SuperLink, and what is seen of each site.

Every second the SuperLink's nodes are made those of the roster: an admitted site's node is registered, a revoked
one's is taken off, and nothing that it sends is taken any more.

    FOLDER/run/sites.json    what is seen of each site; `fedcanvas server status` reads it

Not here: who is admitted (`server.federation`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx

from server.federation import FederationFolder
from server.superlink import Node, SuperLink
from shared.disk import write_whole
from shared.errors import RunDirectoryError
from shared.flower_runtime import Runtime
from shared.protection.keys import node_key_pem

SEEN = "run/sites.json"
LOOK_SECONDS = 1.0
TAKEN_BEFORE = 412  # Flower's answer to a key that it has already, be it of a node that was unregistered
NEVER = "its key was taken off before and cannot come back: it must join with new keys"  # Flower forgets none


@dataclass
class SeenSite:
    """What is seen of one site.

    Attributes:
        node: Flower's number of its node; 0 before it is registered.
        last_seen: of its node's last sign of life, UTC; "" for none.
        state: what it does or did for the run that is done: asked, answered, late, waits for approval, refused ...
        server_round: of `state`.
        trouble: why the SuperLink does not take its node; "" where it does.
    """

    node: int = 0
    online: bool = False
    last_seen: str = ""
    state: str = ""
    server_round: int = -1
    answered: int = -1  # the last round that it answered
    run: str = ""
    trouble: str = ""


class LiveRoster:
    """A thread that looks and registers. Use it as a context manager."""

    def __init__(self, federation: FederationFolder, runtime: Runtime) -> None:
        self.federation, self.runtime = federation, runtime
        self.trouble = "not looked yet"  # "" when the SuperLink answered the last time
        self._outages = 0
        self._seen: dict[str, SeenSite] = {}
        self._refused: dict[bytes, str] = {}  # node keys that Flower will not have, and why
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="roster", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(timeout=10)

    def sites(self) -> set[str]:
        with self._lock:
            return set(self._seen)

    def online(self) -> dict[int, str]:
        """Node to site."""
        with self._lock:
            return {about.node: site for site, about in self._seen.items() if about.online}

    def outages(self) -> int:
        """How often the SuperLink was lost."""
        return self._outages

    def tell(self, site: str, state: str, server_round: int, *, run: str) -> None:
        """Notes what a site does for a run."""
        with self._lock:
            if site in self._seen:
                about = self._seen[site]
                about.state, about.server_round, about.run = state, server_round, run
                if state == "answered":
                    about.answered = server_round

    # ---- the thread

    def _look_on(self) -> None:
        while not self._ending.is_set():
            # Whatever it is, a full disk or an answer that Flower cannot read: without this thread no site is ever
            # seen again, and nobody would be told.
            try:
                with SuperLink(self.runtime) as superlink:
                    while not self._ending.wait(LOOK_SECONDS):
                        self._look(superlink)
            except Exception as error:
                self._note_trouble(error)
                self._ending.wait(LOOK_SECONDS)

    def _note_trouble(self, error: Exception) -> None:
        words = str(error) or type(error).__name__
        self._outages += not self.trouble
        if words != self.trouble:
            print(f"roster: {type(error).__name__}: {words}", flush=True)  # once, not every second
        self.trouble = words
        with self._lock:
            for about in self._seen.values():
                about.online = False
        with contextlib.suppress(RunDirectoryError):  # that may be the trouble
            self._write(words)

    def _look(self, superlink: SuperLink) -> None:
        admitted = {site.site: node_key_pem(site.node) for site in self.federation.roster()}
        nodes = {node.key: node for node in superlink.nodes()}
        for key, node in nodes.items():  # first: nothing that another site does may keep a revoked one in
            if key not in admitted.values():
                with contextlib.suppress(httpx.HTTPStatusError):  # it went by itself; else the next look tries again
                    superlink.unregister(node.id)
        for site, key in admitted.items():
            if key not in nodes and self._refused.get(key) != NEVER:
                self._register(superlink, site, key)
        with self._lock:
            self._seen = {site: self._seen.get(site, SeenSite()) for site in admitted}
            for site, key in admitted.items():
                _note(self._seen[site], nodes.get(key))
                self._seen[site].trouble = self._refused.get(key, "")
        self._write("")
        self.trouble = ""

    def _register(self, superlink: SuperLink, site: str, key: bytes) -> None:
        """A site's key that Flower does not take costs that site alone."""
        before = self._refused.pop(key, "")
        try:
            superlink.register(key, name=site)
        except httpx.HTTPStatusError as error:
            code = error.response.status_code
            words = NEVER if code == TAKEN_BEFORE else f"the SuperLink does not take its node: HTTP {code}"
            self._refused[key] = words
            if words != before:
                print(f"roster: site {site}: {words}", flush=True)

    def _write(self, trouble: str) -> None:
        with self._lock:
            sites = {site: asdict(about) for site, about in self._seen.items()}
        about: dict[str, Any] = {"time": _utc(time.time()), "trouble": trouble, "sites": sites}
        write_whole(self.federation.path / SEEN, json.dumps(about, indent=2).encode() + b"\n", durable=False)


class RunRoster:
    """Of a `LiveRoster` the sites that may take part in one run."""

    def __init__(self, live: LiveRoster, sites: Collection[str]) -> None:
        self._live, self._sites = live, set(sites)

    def sites(self) -> set[str]:
        return self._live.sites() & self._sites

    def online(self) -> dict[int, str]:
        return {node: site for node, site in self._live.online().items() if site in self._sites}

    def outages(self) -> int:
        return self._live.outages()


def read_seen(folder: Path) -> dict[str, Any]:
    """What the worker of `folder` last wrote; `{}` where there is nothing."""
    try:
        return dict(json.loads((folder / SEEN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _note(about: SeenSite, node: Node | None) -> None:
    about.node, about.online = (node.id, node.online) if node is not None else (0, False)
    if node is not None and node.seen:
        about.last_seen = _utc(node.seen)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
