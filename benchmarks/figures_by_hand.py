"""The distances of an evaluation, computed again by torch-fidelity's own command line from files anyone can look at.

    fedcanvas evaluate RUN --reference DATA --extractor WEIGHTS.pth --metrics fid,kid,is,prdc --n 500
    python benchmarks/figures_by_hand.py RUN --reference DATA --weights WEIGHTS.pth --n 500 \\
        --evaluation RUN/evaluations/KEY/evaluation.json --out by-hand

Draws the same pictures with `fedcanvas generate`, writes the part of the public set that they were compared with beside
them as PNG, runs `fidelity` on the two folders, and prints its figures beside those of the evaluation. WEIGHTS.pth are
Inception weights: release v0.2.0 of github.com/toshas/torch-fidelity, weights-inception-2015-12-05-6726825d.pth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from shared.data import open_dataset
from shared.data.encoding import encode_png
from shared.metrics.public_sets import divide
from shared.rundir import load_model, reference_cache

PAIRS = {
    "fid": ("frechet", "frechet_inception_distance"), "kid": ("kernel", "kernel_inception_distance_mean"),
    "is": ("score", "inception_score_mean"), "prdc": ("precision", "precision"),
}  # fmt: skip
FIDELITY = (
    "from shared.torchvision_operators import ensure_importable; ensure_importable();"
    "from torch_fidelity.fidelity import main; main()"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="the evaluation.json that `evaluate` named")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("by-hand"))
    asked = parser.parse_args()
    pictures, reference = asked.out / "pictures", asked.out / "reference"
    prompts = str(asked.run / "prompts.txt")
    drawing = ["--model", str(asked.run), "--prompts", prompts, "--total", str(asked.n), "--seed", "1"]
    subprocess.run([sys.executable, "-m", "shared.cli", "generate", *drawing, "--out", str(pictures)], check=True)
    (pictures / "sheet.png").unlink()  # not one of them
    model = load_model(asked.run)
    public = open_dataset(asked.reference, config=model.config.data, cache_dir=reference_cache(asked.run))
    tested = None
    if asked.reference.suffix == ".npz":
        tested = open_dataset(
            asked.reference, config=model.config.data, cache_dir=reference_cache(asked.run), split="test"
        )
    part = divide(public, n=asked.n, test=tested).reference
    reference.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(part.images):
        (reference / f"{place:06d}.png").write_bytes(encode_png(image))
    command = [
        "--input1", str(pictures), "--input2", str(reference), "--isc", "--fid", "--kid", "--prc", "--no-cache",
        "--json", "--silent", "--kid-subset-size", str(min(1000, asked.n, len(part))),
        "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(asked.weights),
    ]  # fmt: skip
    print("fidelity", *command, flush=True)
    ran = subprocess.run([sys.executable, "-c", FIDELITY, *command], capture_output=True, text=True, check=True)
    said = json.loads(ran.stdout)
    metrics = json.loads(asked.evaluation.read_text(encoding="utf-8"))["metrics"]
    print(f"{'':<34}{'fidelity':>14}{'evaluate':>14}")
    for metric, (word, theirs) in PAIRS.items():
        for figure in metrics.get(metric, {}).get("figures", []):
            if word in figure["name"]:
                print(f"{figure['name'][:32]:<34}{said[theirs]:>14.5f}{figure['value']:>14.5f}")


if __name__ == "__main__":
    main()
