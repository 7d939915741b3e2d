"""Pictures from prompts by the model in this folder. Needs numpy, onnxruntime and Pillow; README.md explains it."""
import argparse
import hashlib
import json
import re
from pathlib import Path
from unicodedata import category, normalize

import numpy as np
import onnxruntime
from PIL import Image, PngImagePlugin

MODEL = onnxruntime.InferenceSession(str(Path(__file__).with_name("generator.onnx")))
ENCODER = json.loads(Path(__file__).with_name("encoder.json").read_text("utf-8"))


def embedding(prompt: str) -> np.ndarray:
    folded = re.sub("[\ufe00-\ufe0f]", " ", normalize("NFKC", normalize("NFKC", prompt).casefold()))
    runs = "".join(c if category(c)[0] in "LNM" else f" {c} " if category(c) == "So" else " " for c in folded).split()
    words = [word for run in runs for word in re.findall(ENCODER["pieces"], run)]
    words = [word for word in words if word not in ENCODER["function_words"]] or words or [prompt]
    pairs = [f"{a} {b}" for i, a in enumerate(words) for b in words[i + 1 : i + 1 + ENCODER["pair_reach"]]]
    total = np.zeros(ENCODER["dim"], np.int64)
    for t, weight in [(t, ENCODER["word_weight"]) for t in {*words}] + [(t, ENCODER["pair_weight"]) for t in {*pairs}]:
        hashed = np.frombuffer(hashlib.shake_256(t.encode()).digest(-(-len(total) // 8)), np.uint8)
        total += weight * (2 * np.unpackbits(hashed)[: len(total)].astype(np.int64) - 1)
    total[0] += not total.any()
    return np.asarray(total / np.sqrt((total**2).sum()), np.float32)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompts", nargs="+", metavar="PROMPT", type=str.strip)
for option, default in {"--n": 1, "--seed": 0, "--truncation": 1.0, "--out": "pictures"}.items():
    parser.add_argument(option, type=type(default), default=default)
args = parser.parse_args()
if not (all(args.prompts) and 1 <= args.n <= 10**5 and 0 <= args.seed < 2**63 and 0 <= args.truncation <= 1):
    parser.error("no prompt is empty; --n is 1 to 100000, --seed 0 to 2^63 - 1 and --truncation 0 to 1")
Path(args.out).mkdir(parents=True, exist_ok=True)
for row, index in np.ndindex(len(args.prompts), args.n):
    rng = np.random.Generator(np.random.Philox(key=np.array([args.seed, index], np.uint64)))
    latents = args.truncation * rng.standard_normal(MODEL.get_inputs()[0].shape[1]).astype(np.float32)
    picture = MODEL.run(None, {"latents": latents[None], "text": embedding(args.prompts[row])[None]})[0][0]
    about = {"prompt": args.prompts[row], "seed": args.seed, "index": index} | MODEL.get_modelmeta().custom_metadata_map
    entries = PngImagePlugin.PngInfo()
    for key, value in {**about, "truncation": repr(args.truncation).removesuffix(".0")}.items():
        entries.add_itxt(key, str(value))
    Image.fromarray(picture).save(Path(args.out) / f"{row:03d}-{index:03d}.png", pnginfo=entries)
