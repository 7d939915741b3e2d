"""Pictures from prompts by the model in this folder. Needs numpy, onnxruntime, tokenizers and Pillow; see README.md."""
import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, PngImagePlugin
from tokenizers import Tokenizer

MODEL, TEXT = (
    onnxruntime.InferenceSession(str(Path(__file__).with_name(name))) for name in ("generator.onnx", "text.onnx")
)
TOKENIZER = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))


def embedding(prompt: str) -> np.ndarray:
    tokens, dim = TOKENIZER.encode(prompt), MODEL.get_inputs()[1].shape[1]
    if not tokens.ids:
        return np.full(dim, dim**-0.5, np.float32)
    feed = {"input_ids": np.array([tokens.ids]), "attention_mask": np.array([tokens.attention_mask])}
    pooled = TEXT.run(None, feed)[0][0]
    norm = np.linalg.norm(pooled)
    return np.asarray(pooled / norm if np.isfinite(norm) and norm > 0 else np.full(dim, dim**-0.5), np.float32)


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
