"""Rounds of a deployed federation on this machine: seconds, bytes, and memory of every process over time.

    python benchmarks/deployed_rounds.py OUT [--rounds 100] [--local-steps 8] [--slot-seconds 0] [--records 2000]

A server and three sites as processes over TLS on loopback (`simulations.rehearsal`), the demo's model, no warm start.
Prints a table of seconds a round and of resident memory over the rounds, and writes OUT/rounds.json.
The baseline of an exchange is the same round in this process: `fedcanvas simulate` with the same settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from shared.supervisor import status
from simulations.rehearsal import RUN, SITES, Rehearsal

SETTINGS = """\
[privacy]
target-epsilon = 8.0
delta = 1e-5
sampling-rate = 0.1
[federation]
rounds = {rounds}
local-steps = {local_steps}
fewest-sites = 2
published-records = {published}
[generator]
width = 24
[training]
fakes = 64
generator-batch = 96
[evaluation]
every = 50
round-samples = 0
"""


def memory(folder: Path) -> dict[str, float]:
    """Resident megabytes of each process that is supervised in the rehearsal's folder."""
    found = {}
    for place in ("server", *SITES):
        for name, about in ((status(folder / place) or {}).get("programs") or {}).items():
            if about["pid"]:
                lines = Path(f"/proc/{about['pid']}/status").read_text().splitlines()
                (size,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
                found[f"{place} {name}"] = int(size) / 1024
    return found


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("out", type=Path)
    asked.add_argument("--rounds", type=int, default=100)
    asked.add_argument("--local-steps", type=int, default=8)
    asked.add_argument("--slot-seconds", type=float, default=0.0)
    asked.add_argument("--records", type=int, default=2000)
    given = asked.parse_args()
    settings = SETTINGS.format(
        rounds=given.rounds, local_steps=given.local_steps, published=len(SITES) * given.records
    )
    given.out.mkdir(parents=True)
    rehearsal = Rehearsal(given.out, settings=settings, records=given.records, slot_seconds=given.slot_seconds)
    rehearsal.begin()
    sizes: dict[int, dict[str, float]] = {}  # by the round that was done last
    with rehearsal.started():
        rehearsal.type("server", "run", "server", f"{RUN}.toml")
        rehearsal.approve(rehearsal.ask("server", "runs", "server")["runs"][0]["run_id"])
        began = time.monotonic()
        while (about := rehearsal.ask("server", "runs", "server")["runs"][0])["state"] in ("waiting", "running"):
            sizes[about["rounds_done"]] = memory(given.out)
            time.sleep(10)  # each look is a process of its own
        seconds = time.monotonic() - began
    lines = (given.out / "server/runs" / RUN / "timings.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines[1:]]  # the first opens the data
    taken = sorted(line["seconds"] for line in rounds)
    found = {
        "state": about["state"], "rounds": about["rounds_done"], "seconds": seconds,
        "median": statistics.median(taken), "p90": taken[int(0.9 * len(taken))], "most": taken[-1],
        "bytes_down": rounds[-1]["bytes_down"], "bytes_up": rounds[-1]["bytes_up"],
        "memory": sizes,
    }  # fmt: skip
    (given.out / "rounds.json").write_text(json.dumps(found, indent=2) + "\n")
    print(
        f"\n{found['state']}: {found['rounds']} rounds in {seconds:.0f} s; a round: median {found['median']:.2f} s,"
        f" p90 {found['p90']:.2f} s, most {found['most']:.2f} s; {found['bytes_down']:,} bytes down,"
        f" {found['bytes_up']:,} up"
    )
    done = list(sizes)
    shown = [min(done, key=lambda one: abs(one - part * given.rounds)) for part in (0.1, 0.25, 0.5, 0.75, 1.0)]
    print(f"{'resident memory, MB':<22}" + "".join(f"{f'round {one}':>11}" for one in shown))
    for name in sizes[done[-1]]:
        print(f"{name:<22}" + "".join(f"{sizes[one].get(name, float('nan')):>11.0f}" for one in shown))


if __name__ == "__main__":
    main()
