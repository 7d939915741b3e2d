"""What a first picture costs, from exec to exit beside a bare `import torch`, and what each after it costs.

    python benchmarks/first_picture.py [--run runs/demo] [--rounds 7]

The floor is a fresh Python that imports torch and draws nothing: no generator that torch computes can answer sooner.
Each command is a process of its own. A round measures each of them once, in turn, and a ratio is the median of those
within a round, since a shared machine changes from minute to minute. Processor time, user and system of all threads,
says what a machine without an idle core needs. One round before is not counted: it fills the disk's cache and writes
bytecode. Without --run a run of the demo's size and one round is made first, which takes a minute or two.

Then, with the model loaded: pictures a second of `Generator.generate` at 1 and at 64 pictures a call, beside a bare
loop over the network with as many rows, whose text is encoded and whose latents are drawn before. Not here: pictures
over HTTP (`benchmarks/serving.py`).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOOR = "import torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--run", type=lambda text: Path(text).resolve(), help="a finished run, whose sites' statements are there"
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "XDG_CONFIG_HOME": str(folder), "PYTHONPATH": str(ROOT)}  # no key is left behind
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        run, bundle, key = options.run or folder / "runs/demo", folder / "bundle", folder / "key.pem"
        if options.run is None:
            _timed(_fedcanvas("simulate", "demo", "--rounds", "1", "--out", str(run)), environment)
        _timed(_fedcanvas("release", str(run), "--out", str(bundle), "--key", str(key)), environment)
        asked = ("a large red circle", "--n", "1", "--out", str(folder / "pictures"), "--model")
        commands = {
            FLOOR: [sys.executable, "-c", FLOOR],
            "generate, from a run": _fedcanvas("generate", *asked, str(run)),
            "generate, from a released model": _fedcanvas("generate", *asked, str(bundle)),
            "describe": _fedcanvas("describe", "a big red ball", "--model", str(bundle)),
            "verify": _fedcanvas("verify", str(bundle)),
            "release": _fedcanvas("release", str(run), "--key", str(key), "--out"),
        }
        rounds = []
        for number in range(options.rounds + 1):
            fresh = {"release": [str(folder / f"bundle-{number}")]}
            measured = {
                name: _timed([*command, *fresh.get(name, [])], environment) for name, command in commands.items()
            }
            if number:
                rounds.append(measured)
        drawn = _drawn(run)
    print(f"medians of {options.rounds} rounds, lowest and highest behind them; ratios to `{FLOOR}` within a round")
    print(f"{'':32}{'seconds':>22}{'processor seconds':>22}{'ratio':>8}{'of processor':>14}")
    for name in commands:
        wall, processor = ([measured[name][which] for measured in rounds] for which in (0, 1))
        ratios = (
            statistics.median([measured[name][which] / measured[FLOOR][which] for measured in rounds])
            for which in (0, 1)
        )
        print("{:32}{:>22}{:>22}{:8.2f}{:14.2f}".format(name, _spread(wall), _spread(processor), *ratios))
    for rows, shares in drawn.items():
        print(f"Generator.generate, {rows} a call: {_spread(shares)} of the pictures a second of a bare loop")


def _drawn(run: Path, *, pairs: int = 9) -> dict[int, list[float]]:
    """By pictures a call: pictures a second of `Generator.generate` over those of a bare loop, pair by pair."""
    import torch

    from fedcanvas import Generator

    generator, prompt = Generator.load(run), "a large red circle"
    network, found = generator.model.generator, dict[int, list[float]]()
    for rows in (1, 64):
        latents = torch.randn(rows, network.latent_dim)
        embeddings = generator.model.encoder.encode([prompt] * rows)
        found[rows] = []
        with torch.no_grad():
            for _ in range(pairs):
                asked = _seconds_a_call(lambda n=rows: generator.generate([prompt], n=n))
                bare = _seconds_a_call(lambda z=latents, e=embeddings: network(z, e))
                found[rows].append(bare / asked)
    return found


def _seconds_a_call(call: Callable[[], object], *, seconds: float = 0.3) -> float:
    call()
    began, calls = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        call()
        calls += 1
    return took / calls


def _fedcanvas(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shared.cli", *arguments]


def _timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds from exec to exit, processor seconds) of a process, which has to succeed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
