"""A federation between institutions, rehearsed on one laptop: `python -m simulations.rehearsal OUT`.

A server and three sites as processes of their own, over TLS on loopback, by the very commands that an operator and
partners type; each is printed. The data are made shapes, another set at each site. At the end pictures, receipts and
ledgers are shown, and everything that was started is stopped, however it ended.

    OUT/server     the operator's folder; the trained model in runs/shapes/model
    OUT/site-a     a partner's folder, and site-b, site-c; the model that came back in its models; the data in OUT/data
    OUT/lineages   the ledgers, which on three machines would lie in three places

Not here: how any of it works (`server.deployment`, `client.deployment`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from shared.disk import write_whole
from shared.errors import FederationError, UsageError
from shared.flower_runtime import free_port
from shared.supervisor import stop
from simulations.shapes import make_shapes

SITES = ("site-a", "site-b", "site-c")
RECORDS = 3000  # of a site
SLOT_SECONDS = 5  # 10 is usual, and would be most of a round here
WAIT_SECONDS = 120.0
RUN, MARK = "shapes", "rehearsal.txt"
SETTINGS = """\
# What `fedcanvas server run` trains: `fedcanvas simulate --settings` lists all settings.
[privacy]
target-epsilon = 8.0
delta = 1e-5
sampling-rate = 0.15
[federation]
rounds = {rounds}
local-steps = 8
fewest-sites = 2
published-records = 9000
[discriminator]
near-prompt-share = 0.25
[generator]
width = 24
[training]
fakes = 64
generator-batch = 96
lead-rounds = 0
moment-weight = 30.0
[warm-start]
enabled = true
steps = 80
random-features = 2000
[evaluation]
every = 10
round-samples = 0
[compute]
checkpoint-every = 5
"""


class Rehearsal:
    """Types commands in `folder`, as people would.

    Args:
        settings: of the run, TOML.
        records: of each site.
        slot_seconds: of each site.
    """

    def __init__(
        self, folder: Path, *, settings: str, records: int = RECORDS, slot_seconds: float = SLOT_SECONDS
    ) -> None:
        self.folder, self.settings, self.records, self.slot_seconds = folder, settings, records, slot_seconds
        self.environment = {**os.environ, "FEDCANVAS_STATE": str((folder / "lineages").resolve())}

    def type(self, *arguments: str, shown: bool = True) -> str:
        """What the command prints; `FederationError` where it fails."""
        if shown:
            print(f"\n$ fedcanvas {shlex.join(arguments)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "shared.cli", *arguments], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=None if shown else subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise FederationError(f"`fedcanvas {shlex.join(arguments)}` ended with code {done.returncode}")
        if shown:
            print(done.stdout, end="", flush=True)
        return done.stdout

    def ask(self, *arguments: str) -> Any:
        return json.loads(self.type(*arguments, "--json", shown=False))

    def begin(self) -> None:
        """Keys, kits, data, sites."""
        for place, site in enumerate(SITES):
            make_shapes(self.folder / "data" / site, count=self.records, seed=100 + place, image_size=32)
        address = f"localhost:{free_port()}"
        self.type("server", "init", "server", "--name", "rehearsal", "--address", address)
        for site in SITES:
            self.type("server", "kit", "server", "--site", site, "--out", f"{site}.zip")
            self.type(
                "client", "join", f"{site}.zip", site, "--data", f"data/{site}", "--lineage", f"shapes-of-{site}",
                "--max-epsilon", "8.1", "--delta", "2e-5", "--slot-seconds", f"{self.slot_seconds:g}", "--yes",
            )  # fmt: skip
            self.type("server", "admit", "server", f"{site}/request.json", "--yes")
        write_whole(self.folder / f"{RUN}.toml", self.settings.encode())
        prompts = (self.folder / "data" / SITES[0] / "prompts.txt").read_bytes()
        write_whole(self.folder / "prompts.txt", prompts)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Server and sites, stopped at the end."""
        with ExitStack() as stopping:
            stopping.callback(self.type, "server", "stop", "server")
            self.type("server", "start", "server", "--listen", self._listen())
            for site in SITES:
                stopping.callback(self.type, "client", "stop", site)
                self.type("client", "start", site)
            yield

    def _listen(self) -> str:
        port = json.loads((self.folder / "server/federation.json").read_text())["address"].rpartition(":")[2]
        return f"127.0.0.1:{port}"

    def approve(self, run_id: str) -> None:
        """At each site, once the run was proposed there."""
        for site in SITES:
            until = time.monotonic() + WAIT_SECONDS
            while not any(run["run"] == run_id for run in self.ask("client", "runs", site)["runs"]):
                if time.monotonic() > until:
                    raise FederationError(f"the run was not proposed to {site}", hint=f"see {self.folder / site}/logs")
                time.sleep(1)
            self.type("client", "runs", site)
            self.type("client", "approve", site, run_id, "--yes")

    def await_models(self) -> None:
        """Until each site that took part has the trained model."""
        until = time.monotonic() + WAIT_SECONDS
        while left := self.ask("server", "runs", "server")["runs"][0]["undelivered"]:
            if time.monotonic() > until:
                raise FederationError(f"the model did not come to {', '.join(left)}", hint="see server/logs/worker.log")
            time.sleep(1)
        for site in SITES:
            self.type("client", "models", site)

    def show(self) -> None:
        self.type("server", "status", "server")
        for site in SITES:
            self.type("client", "status", site)
            self.type("client", "ledger", site)
        self.type("client", "receipts", SITES[0], "--html", "receipts.html")


def clear(folder: Path) -> None:
    """Ends and removes what a rehearsal left there; `UsageError` where the folder is not one's."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file():
        raise UsageError(f"{folder} is there already", hint="name a new folder")
    for place in ("server", *SITES):
        stop(folder / place)
    shutil.rmtree(folder)


def rehearse(folder: Path, *, rounds: int = 8) -> None:
    """Everything, into a new folder or that of a rehearsal before.

    Raises:
        UsageError: something else is there.
        FederationError: a command failed.
    """
    clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MARK, b"made by simulations.rehearsal, and removed by the next one\n")
    began = time.monotonic()
    rehearsal = Rehearsal(folder, settings=SETTINGS.format(rounds=rounds))
    rehearsal.begin()
    with rehearsal.started():
        rehearsal.type("server", "run", "server", f"{RUN}.toml")
        run_id = rehearsal.ask("server", "runs", "server")["runs"][0]["run_id"]
        rehearsal.approve(run_id)
        while (about := rehearsal.ask("server", "runs", "server")["runs"][0])["state"] in ("waiting", "running"):
            print(f"round {about['rounds_done']} of {about['rounds']}", flush=True)
            time.sleep(10)
        if about["state"] == "finished":
            rehearsal.await_models()
        rehearsal.show()
        if about["state"] != "finished":
            raise FederationError(f"the run is {about['state']}: {about['reason']}")
    model = folder / "server/runs" / RUN
    print(
        f"\ndone in {time.monotonic() - began:.0f} s; everything that was started is stopped\n"
        f"  pictures  {model / 'sheet.png'}\n"
        f"  model     {model / 'model'}\n"
        f"  report    {model / 'report.html'}\n"
        f"  receipts  {folder / 'receipts.html'}, as {SITES[0]}'s data-protection officer gets them"
    )


def main() -> None:
    from shared.cli import fail
    from shared.errors import FedCanvasError

    try:
        rehearse(Path(sys.argv[1]), rounds=int(sys.argv[2]) if len(sys.argv) > 2 else 8)
    except FedCanvasError as error:
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
