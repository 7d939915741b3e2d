"""What a service costs: throughput and waiting at 1, 16 and 64 clients beside a bare loop over the model; what it does
when far too much is asked of it, and after that; memory.

    OMP_NUM_THREADS=1 python benchmarks/serving.py [--rounds 5] [--seconds 2] [--pictures 4] [--requests 10000]

The model has the demo's size and the weights it starts with. The bare loop draws arrays and makes no files, in this
process, request by request (as a script would) and in full batches. The service is the command in a process of its own;
clients are sockets of this process on the same machine, so they take time from it. A round measures each of them once,
and a ratio is the median of those within a round, since a shared machine changes from minute to minute. Processor time
a picture is shown as well: it says what a machine without an idle core can reach.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from server.generator import Generator
from server.serving.batching import BATCH
from shared.models import build_discriminator, build_generator
from shared.privacy.accounting import EpsilonReport
from shared.privacy.plan import make_plan
from shared.rundir import RunDirectory
from shared.text import build_encoder
from simulations.scenarios import demo

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = tuple(f"a picture of {number}" for number in range(96))
CLIENTS = (1, 16, 64)
CROWD, CROWD_SECONDS = 512, 5  # clients, and how many times as long as the others they come


@dataclass(frozen=True)
class Measured:
    """Pictures a second, seconds of each request that was served, and requests that were told to come again."""

    rate: float
    waits: list[float]
    refused: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=4, help="of a request")
    parser.add_argument("--requests", type=int, default=10_000, help="over which memory is looked at")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = _make_run(Path(folder) / "run")
        generator = Generator.load(run)
        rounds: list[tuple[dict[str, float], dict[int, Measured]]] = []
        with Service(run) as (process, port):
            for _ in range(options.rounds):
                loops = _loops(generator, options.pictures, options.seconds / 2)
                rows = {
                    clients: asyncio.run(_load(port, clients, options.pictures, seconds=options.seconds))
                    for clients in CLIENTS
                }
                rounds.append((loops, rows))
            too_many = asyncio.run(_load(port, CROWD, options.pictures, seconds=CROWD_SECONDS * options.seconds))
            afterwards = asyncio.run(_load(port, 16, options.pictures, seconds=options.seconds))
            spent = _processor(process.pid)
            before = _resident(process.pid)
            asyncio.run(_load(port, 16, options.pictures, requests=options.requests))
            after = _resident(process.pid)
            spent = (_processor(process.pid) - spent) / (options.requests * options.pictures)
    print(f"{options.pictures} pictures a request; pictures a second, medians of {options.rounds} rounds:")
    for name, said in (("request", "bare loop, request by request"), ("full", f"bare loop, batches of {BATCH}")):
        rates = [loops[name] for loops, _ in rounds]
        print(f"  {said:30} {_median(rates):6.0f}   ({_all(rates)})")
    print("  clients  pictures/s  of the loop by request  of full batches   p50 ms   p99 ms   refused")
    for clients in CLIENTS:
        found = [rows[clients] for _, rows in rounds]
        quantiles = statistics.quantiles([wait for one in found for wait in one.waits], n=100)
        by_request, full = (
            _median([rows[clients].rate / loops[name] for loops, rows in rounds]) for name in ("request", "full")
        )
        print(
            f"  {clients:7}  {_median([one.rate for one in found]):10.0f}  {by_request:22.2f}  {full:15.2f}"
            f"  {quantiles[49] * 1e3:7.1f}  {quantiles[98] * 1e3:7.1f}  {sum(one.refused for one in found):8}"
        )
    usual = _median([rows[16].rate for _, rows in rounds])
    print(
        f"{CROWD} clients for {CROWD_SECONDS * options.seconds:g} s: {too_many.rate:.0f} pictures/s,"
        f" {too_many.rate / usual:.2f} of 16 clients, p99 {_quantile(too_many, 99):.0f} ms, {too_many.refused} requests"
        f" told to come again; 16 clients afterwards: {afterwards.rate / usual:.2f} of before,"
        f" p99 {_quantile(afterwards, 99):.0f} ms"
    )
    bare = _median([loops["processor"] for loops, _ in rounds])
    print(
        f"processor time a picture: {bare * 1e3:.2f} ms in the loop of full batches, {spent * 1e3:.2f} ms in the"
        f" service at 16 clients (ratio {bare / spent:.2f})"
    )
    print(
        f"memory of the service: {before / 2**20:.1f} MiB, after {options.requests} requests more"
        f" {after / 2**20:.1f} MiB"
    )


def _make_run(path: Path) -> Path:
    config = demo()
    plan, encoder = make_plan(config), build_encoder(config.text)
    spent = EpsilonReport(8.0, 7.9, 8.2, plan.delta, 1, unit="example")
    with RunDirectory.create(path, config=config, prompts=PROMPTS) as rundir:
        rundir.charge(1, steps=1, reserved_steps=plan.reserved_steps)
        rundir.save_model(
            generator=build_generator(config, embedding_dim=encoder.dim).state_dict(),
            discriminator=build_discriminator(config, embedding_dim=encoder.dim).state_dict(),
            card={"encoder_fingerprint": encoder.fingerprint, "plan": plan.to_dict(), "spent": spent.to_dict()},
        )
    return path


def _loops(generator: Generator, pictures: int, seconds: float) -> dict[str, float]:
    """Pictures a second, request by request and in full batches, and processor time a picture of the latter."""
    prompts, full = [PROMPTS[0]] * pictures, [PROMPTS[index % len(PROMPTS)] for index in range(BATCH)]
    by_request, _ = _rate(
        lambda: generator.arrays(prompts, seeds=[1] * pictures, indices=range(pictures)), pictures, seconds
    )
    in_full, processor = _rate(
        lambda: generator.arrays(full, seeds=range(BATCH), indices=[0] * BATCH), BATCH, seconds
    )  # fmt: skip
    return {"request": by_request, "full": in_full, "processor": processor}


def _rate(draw: Callable[[], object], pictures: int, seconds: float) -> tuple[float, float]:
    """(pictures a second, processor time a picture)."""
    draw()
    began, spent, count = time.perf_counter(), time.process_time(), 0
    while (took := time.perf_counter() - began) < seconds:
        draw()
        count += pictures
    return count / took, (time.process_time() - spent) / count


class Service:
    """The command as a process: (process, port)."""

    def __init__(self, run: Path) -> None:
        self._command = [sys.executable, "-m", "shared.cli", "serve", "--model", str(run), "--port", "0"]

    def __enter__(self) -> tuple[subprocess.Popen[bytes], int]:
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self._command, cwd=ROOT, stderr=self._log)
        while True:
            self._log.seek(0)
            found = re.search(rb"http://127.0.0.1:(\d+)", self._log.read())
            if found:
                time.sleep(1.0)
                return self.process, int(found[1])
            assert self.process.poll() is None, "it ended"
            time.sleep(0.1)

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


async def _load(
    port: int, clients: int, pictures: int, *, seconds: float = float("inf"), requests: int = 2**62
) -> Measured:
    until, left = time.perf_counter() + seconds, [requests]
    waits: list[float] = []
    refused = 0

    async def client(number: int) -> None:
        nonlocal refused
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = 0
        while time.perf_counter() < until and left[0] > 0:
            left[0] -= 1
            asked += 1
            body = json.dumps({"prompt": PROMPTS[(number + asked) % len(PROMPTS)], "n": pictures, "seed": asked})
            began = time.perf_counter()
            writer.write(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body.encode())
            )
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", head)
            assert found is not None
            await reader.readexactly(int(found[1]))
            if head.startswith(b"HTTP/1.1 200"):
                waits.append(time.perf_counter() - began)
            else:
                assert head.startswith(b"HTTP/1.1 429"), head
                refused += 1
                await asyncio.sleep(0.5)
        writer.close()
        await writer.wait_closed()

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return Measured(len(waits) * pictures / (time.perf_counter() - began), waits, refused)


def _resident(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def _processor(process: int) -> float:
    """Seconds that it has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _quantile(measured: Measured, percent: int) -> float:
    """Milliseconds."""
    return statistics.quantiles(measured.waits, n=100)[percent - 1] * 1e3


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _all(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


if __name__ == "__main__":
    main()
