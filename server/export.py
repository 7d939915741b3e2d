"""A model as a folder for `onnxruntime`: whoever has it draws the same pictures without fedcanvas and without torch.

    generator.onnx       latents `(N, Z)` and text `(N, E)`, float32, to pictures `(N, H, W)` or `(N, H, W, 3)`, uint8;
                         N is free; its metadata hold what every picture says of the model: digest, epsilon, delta
    encoder.json         the hashing encoder: from a prompt to its row of text
    text.onnx tokenizer.json   in its place where the encoder is a text model of `transformers`
    generate.py          shows the way from prompt and seed to a PNG (`server.onnx_generate`, `onnx_generate_tokens`)
    card.json prompts.txt README.md

The graphs are compared with the model, picture by picture, before the folder appears. The folder holds no statements
and no signatures: evidence stays with the released model, which was verified when it was read.
Not here: anything that could be trained on.
"""

from __future__ import annotations

import importlib.util
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.generator import Generator
from shared import text, words
from shared.disk import write_folder
from shared.errors import RunDirectoryError, UsageError
from shared.rundir import to_json

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
GRAPH, ENCODER, SCRIPT = "generator.onnx", "encoder.json", "generate.py"
TEXT, TOKENIZER = "text.onnx", "tokenizer.json"
MOST_BYTES = 2**31 - 2**20  # of an ONNX file in one piece
CLOSE = 1  # of 255: rounding at the last bit of a float may fall on either side of a grey level
COMPARED = 48  # pictures
ODD_PROMPTS = ("ein großer ROTER Kreis", "红色的圆 🟥", "دائرة حمراء", "zyzzyva 3rd-of-May", "?!")


def export_onnx(generator: Generator, out: Path) -> int:
    """
    Args:
        out: the new folder.
    Returns:
        By how much the graph's pictures differ from the generator's, at most, of 255.
    Raises:
        UsageError: the packages for it are not installed, or the text encoder is none that torch can export.
        DataError: the text encoder's tokenizer is of Python code.
        RunDirectoryError: `out` is there or cannot be written, the model has no prompts, or the graph draws other
            pictures.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"an export needs {', '.join(missing)}", hint="pip install 'fedcanvas[export]'")
    if out.exists():
        raise RunDirectoryError(f"{out} is there already", hint="name a new folder: nothing is written over")
    if not generator.prompts:
        raise RunDirectoryError("the model names no prompt that it was trained on", hint="get it again, whole")
    encoder = generator.model.encoder
    files = {GRAPH: _graph(generator)}
    rows: Callable[[Sequence[str]], Tensor] = encoder.encode
    if isinstance(encoder, text.HashingEncoder):
        files[ENCODER] = to_json(_encoder_table(encoder))
        script = "onnx_generate.py"
    elif isinstance(encoder, text.TransformersEncoder):
        files[TEXT], files[TOKENIZER] = _text_graph(encoder)
        rows = _rows_of_graph(encoder, files[TEXT], files[TOKENIZER].decode())
        script = "onnx_generate_tokens.py"
    else:
        raise UsageError(f"the text encoder '{generator.model.config.text.encoder}' is none that can be exported")
    difference = _difference(generator, files[GRAPH], rows)
    if difference > CLOSE:
        raise RunDirectoryError(
            f"the exported graph draws other pictures than the model, up to {difference} of 255; nothing is written",
            hint="a fault of the exporter: install the versions of torch, onnx and onnxscript in constraints.txt",
        )
    files |= {
        SCRIPT: Path(__file__).with_name(script).read_bytes(),
        "card.json": to_json(generator.model.card),
        "prompts.txt": "".join(f"{prompt}\n" for prompt in generator.prompts).encode(),
        "README.md": _readme(generator, difference).encode(),
    }
    write_folder(out, files)
    return difference


def _graph(generator: Generator) -> bytes:
    """`generator.onnx`."""
    import onnx
    import torch
    from torch import nn

    from shared.models import draw_latents

    class Drawing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            images = self.inner(latents, text)  # (N, C, H, W) in [-1, 1]
            pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
            drawn: torch.Tensor = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
            return drawn

    drawing = Drawing(generator.model.generator).eval()
    # Two rows: the exporter would take a single one for a shape that never changes.
    rows = draw_latents(0, [0, 1], generator.model.generator.latent_dim), generator.model.encoder.encode(["a", "b"])
    count = torch.export.Dim("pictures")
    free = {"latents": {0: count}, "text": {0: count}}
    model = _exported(drawing, rows, free, inputs=["latents", "text"], output="pictures")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "pictures"
    for key, value in generator.provenance.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _text_graph(encoder: text.TransformersEncoder) -> tuple[bytes, bytes]:
    """`text.onnx`, of one text: token ids and mask `(1, tokens)` to `(1, E)`, not yet of norm 1; `tokenizer.json`."""
    import onnx
    import torch
    from torch import nn

    class Pooled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            if "text_embeds" in output:
                pooled: torch.Tensor = output.text_embeds
            else:
                mask = attention_mask[:, :, None]
                pooled = (output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
            return pooled

    inner, most_tokens, tokenizer = encoder.for_export()
    if sum(tensor.numel() * tensor.element_size() for tensor in inner.state_dict().values()) > MOST_BYTES:
        raise UsageError("the text model is larger than an ONNX file can be, 2 GiB")
    ids = torch.zeros(1, max(2, min(4, most_tokens)), dtype=torch.long)
    tokens = torch.export.Dim("tokens", max=most_tokens)
    free = {"input_ids": {1: tokens}, "attention_mask": {1: tokens}}
    try:
        model = _exported(
            Pooled(inner).eval(), (ids, torch.ones_like(ids)), free, inputs=list(free), output="pooled"
        )
    except Exception as error:  # whatever a foreign model makes the exporter raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UsageError(
            f"torch cannot export the text model {type(inner).__name__}: {type(error).__name__}: {reason}",
            hint="draw with `fedcanvas generate`, where transformers loads the encoder",
        ) from None
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_param = "tokens"
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True)), tokenizer.encode()


def _exported(module: nn.Module, example: Any, free: Any, *, inputs: list[str], output: str) -> Any:
    """An ONNX `ModelProto` that says nothing of this machine; `free` are the axes whose length may change."""
    import torch

    attention = torch.ops.aten.scaled_dot_product_attention.default
    apart = {op: how for op, how in torch.export.default_decompositions().items() if op is attention}
    with warnings.catch_warnings():
        # torch 2.13 copies a class of its own that it has deprecated.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        # Before the exporter sees it: given a module it falls back to axes that are fixed, without an error.
        program = torch.export.export(module, example, dynamic_shapes=free, strict=False)
        # The exporter knows attention with heads only, ours has none: it is taken apart into matrix products.
        program = program.run_decompositions(apart)
        made = torch.onnx.export(
            program, (), dynamo=True, input_names=inputs, output_names=[output], verbose=False
        )
    assert made is not None
    model = made.model_proto
    _without_traces(model)
    return model


def _without_traces(model: Any) -> None:
    """Takes out what the exporter says of this machine, such as paths of files, and sizes that it named by numbers."""
    graph = model.graph
    model.producer_name, model.producer_version, model.doc_string = "fedcanvas", "", ""
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions):
        del part.metadata_props[:]
    for part in (*graph.node, *graph.initializer):
        part.ClearField("doc_string")
    del graph.value_info[:]


def _rows_of_graph(
    encoder: text.TransformersEncoder, graph: bytes, tokenizer: str
) -> Callable[[Sequence[str]], Tensor]:  # fmt: skip
    """Rows as `generate.py` makes them, by `text.onnx` and `tokenizer.json`."""
    import onnxruntime
    import torch
    from tokenizers import Tokenizer

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    tokens = Tokenizer.from_str(tokenizer)

    def row(prompt: str) -> np.ndarray:
        found = tokens.encode(prompt)
        none = np.full(encoder.dim, encoder.dim**-0.5)
        if not found.ids:
            return none
        feed = {"input_ids": np.array([found.ids]), "attention_mask": np.array([found.attention_mask])}
        pooled: np.ndarray = session.run(None, feed)[0][0]
        norm = np.linalg.norm(pooled)
        return pooled / norm if np.isfinite(norm) and norm > 0 else none

    return lambda prompts: torch.from_numpy(np.array([row(prompt) for prompt in prompts], np.float32))


def _difference(generator: Generator, graph: bytes, rows_of: Callable[[Sequence[str]], Tensor]) -> int:
    """Of the largest of pixels, between the graphs under `onnxruntime` and the model; one by one and all at once."""
    import onnxruntime

    from shared.models import draw_latents

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    known = generator.prompts[:: max(1, len(generator.prompts) // 16)]
    prompts = [*ODD_PROMPTS, *known] * COMPARED
    prompts, indices = prompts[:COMPARED], range(COMPARED)
    seeds = [index % 5 for index in indices]
    expected = generator.arrays(prompts, seeds=seeds, indices=indices)
    latents = np.concatenate([
        draw_latents(seed, [index], generator.model.generator.latent_dim).numpy()
        for seed, index in zip(seeds, indices, strict=True)
    ])  # fmt: skip
    rows = rows_of(prompts).numpy()
    together = session.run(None, {"latents": latents, "text": rows})[0]
    alone = [session.run(None, {"latents": latents[i : i + 1], "text": rows[i : i + 1]})[0] for i in range(4)]
    if together.shape != expected.shape or together.dtype != np.uint8:
        return 255
    pairs: Sequence[tuple[Any, Any]] = [(together, expected), (np.concatenate(alone), expected[:4])]
    return max(int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max()) for one, other in pairs)


def _encoder_table(encoder: text.HashingEncoder) -> dict[str, Any]:
    return {
        "kind": "hashing",
        "version": text.HASHING_VERSION,
        "fingerprint": encoder.fingerprint,
        "dim": encoder.dim,
        "word_weight": text.WORD_WEIGHT,
        "pair_weight": text.PAIR_WEIGHT,
        "pair_reach": text.PAIR_REACH,
        "function_words": sorted(text.FUNCTION_WORDS),
        "pieces": words.PIECES.pattern,
    }


def _readme(generator: Generator, difference: int) -> str:
    about, config, latent_dim, text_dim = (
        generator.provenance, generator.model.config, generator.model.generator.latent_dim, generator.model.encoder.dim,
    )  # fmt: skip
    shape = f"{generator.size}, {generator.size}" + (", 3" if config.data.channels == 3 else "")
    hashed = isinstance(generator.model.encoder, text.HashingEncoder)
    files, packages = (ENCODER, "") if hashed else (f"{TOKENIZER}` and `{TEXT}", " tokenizers")
    warning = "\n**NOT VERIFIED**: whoever exported this model did not check it. What it says of itself may be false.\n"
    return f"""\
# {generator.name}, for onnxruntime

{generator.size} px pictures from prompts, without fedcanvas and without torch.
{warning if generator.unverified else ""}
```
pip install numpy onnxruntime pillow{packages}
python generate.py {shlex.quote(generator.prompts[0])} --n 4 --seed 1 --out pictures
```

## What it cost in privacy

epsilon {about["epsilon"]} at delta {about["delta"]}, {generator.privacy["adjacency"]} one {about["unit"]}, the
largest of all sites. `card.json` is the card of the model with the digest

    {about["model"]}

This folder holds no evidence for it: the released model does, and `fedcanvas verify` checks it there.

## How a picture comes about

1. With `{files}` a prompt, without blanks around it, becomes a row `text` of {text_dim} numbers;
   `embedding` in `generate.py` is the whole of it.
2. Picture `index` (from 0) with a seed (0 to 2^63 - 1) has the `latents` of numpy's
   `Generator(Philox(key=[seed, index])).standard_normal({latent_dim})`, as float32, times
   the truncation (0 to 1).
3. `generator.onnx` takes `latents` (N, {latent_dim}) and `text` (N, {text_dim}),
   both float32, and gives `pictures` (N, {shape}), uint8, for any N.

The pictures are those of `fedcanvas generate` with the same prompt, seed and number; {COMPARED} of them were compared
when this folder was made, and differed by {difference} of 255 at most. `prompts.txt` holds every text that the model
was trained on: it draws nothing reliable for others.
"""
