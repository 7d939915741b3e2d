"""Pictures from prompts by the model in this folder. Needs numpy, onnxruntime and Pillow; README.md explains it."""
import argparse
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, PngImagePlugin

MODEL = onnxruntime.InferenceSession(str(Path(__file__).with_name("generator.onnx")))
ENCODER = json.loads(Path(__file__).with_name("encoder.json").read_text("utf-8"))


def embedding(prompt: str) -> np.ndarray:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())
    kinds = [(c, "gap" if "\ufe00" <= c <= "\ufe0f" else unicodedata.category(c)) for c in folded]
    runs = "".join(c if kind[0] in "LNM" else f" {c} " if kind == "So" else " " for c, kind in kinds).split(" ")
    words = [word for run in runs for word in re.findall(ENCODER["pieces"], run)]
    words = [word for word in words if word not in ENCODER["function_words"]] or words or [prompt]
    pairs = [f"{a} {b}" for i, a in enumerate(words) for b in words[i + 1 : i + 1 + ENCODER["pair_reach"]]]
    total = np.zeros(ENCODER["dim"], np.int64)
    for tokens, weight in ((words, ENCODER["word_weight"]), (pairs, ENCODER["pair_weight"])):
        for token in set(tokens):
            hashed = np.frombuffer(hashlib.shake_256(token.encode()).digest(-(-len(total) // 8)), np.uint8)
            total += weight * (2 * np.unpackbits(hashed)[: len(total)].astype(np.int64) - 1)
    total[0] += not total.any()
    return np.asarray(total / np.sqrt((total**2).sum()), np.float32)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompts", nargs="+", metavar="PROMPT", type=str.strip)
for option, default in {"--n": 1, "--seed": 0, "--truncation": 1.0, "--out": "pictures"}.items():
    parser.add_argument(option, type=type(default), default=default)
asked = parser.parse_args()
Path(asked.out).mkdir(parents=True, exist_ok=True)
for row, index in np.ndindex(len(asked.prompts), asked.n):
    rng = np.random.Generator(np.random.Philox(key=np.array([asked.seed, index], np.uint64)))
    latents = asked.truncation * rng.standard_normal(MODEL.get_inputs()[0].shape[1]).astype(np.float32)
    picture = MODEL.run(None, {"latents": latents[None], "text": embedding(asked.prompts[row])[None]})[0][0]
    about = {"prompt": asked.prompts[row], "seed": asked.seed, "index": index, "truncation": f"{asked.truncation:g}"}
    entries = PngImagePlugin.PngInfo()
    for key, value in {**about, **MODEL.get_modelmeta().custom_metadata_map}.items():
        entries.add_itxt(key, str(value))
    Image.fromarray(picture).save(Path(asked.out) / f"{row:03d}-{index:03d}.png", pnginfo=entries)
