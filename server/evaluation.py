"""Pictures of what was learned, from public prompts, beside real ones of a public reference set: no privacy cost.

Not here: a look at any site's images, the choice between models (PRIVACY rule 16), and figures (`server.evaluator`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from server.sheet import SheetCell, contact_sheet
from server.training import ServerTraining, sample
from shared.data import ImageCaptionDataset
from shared.rundir import GeneratorModel, RunDirectory

SAMPLE_SEED = 0  # of pictures that are shown; the same latents in every sheet, so that rounds can be compared
SHEET_PROMPTS, SHEET_GENERATED, SHEET_REAL = 24, 4, 2
ROUND_PROMPTS, ROUND_GENERATED = 12, 4


def write_samples(training: ServerTraining, rundir: RunDirectory, server_round: int) -> Path:
    """`samples/round-00050.png`: a dozen prompts, four pictures each, always with the same latents."""
    prompts = shown_prompts(rundir.prompts, ROUND_PROMPTS)
    images = training.samples(
        [prompt for prompt in prompts for _ in range(ROUND_GENERATED)], seed=SAMPLE_SEED,
        indices=list(range(len(prompts) * ROUND_GENERATED)),
    )  # fmt: skip
    cells = [
        SheetCell(prompt, images[place * ROUND_GENERATED : (place + 1) * ROUND_GENERATED])
        for place, prompt in enumerate(prompts)
    ]
    sheet = contact_sheet(cells, title=f"round {server_round} of {rundir.config.federation.rounds}")
    return rundir.write_bytes(rundir.sample_name(server_round), sheet)


def final_sheet(model: GeneratorModel, reference: ImageCaptionDataset | None, *, title: str, notes: list[str]) -> bytes:
    """The sheet of a finished run: generated pictures, and beside them real ones of the public reference set."""
    places: dict[str, list[int]] = {}
    if reference is not None:
        for row, captions in enumerate(reference.captions):
            for caption in captions:
                places.setdefault(caption, []).append(row)
    prompts = shown_prompts(model.prompts, SHEET_PROMPTS)
    images = pictures(
        model, [prompt for prompt in prompts for _ in range(SHEET_GENERATED)], seed=SAMPLE_SEED,
        indices=range(len(prompts) * SHEET_GENERATED),
    )  # fmt: skip
    cells = []
    for place, prompt in enumerate(prompts):
        rows = places.get(prompt, [])[:SHEET_REAL]
        real = reference.images[rows] if reference is not None and rows else None
        cells.append(SheetCell(prompt, images[place * SHEET_GENERATED : (place + 1) * SHEET_GENERATED], real))
    if any(cell.real is not None for cell in cells):
        notes = ["left of the line generated, right of it real pictures of the public reference set", *notes]
    return contact_sheet(cells, title=title, notes=notes)


def pictures(model: GeneratorModel, prompts: Sequence[str], *, seed: int, indices: Sequence[int]) -> np.ndarray:
    """`(N, H, W, C)` uint8: prompt i with the latents of (seed, indices[i])."""
    different = list(dict.fromkeys(prompts))
    rows = {prompt: row for row, prompt in enumerate(different)}
    embeddings = model.encoder.encode(different)[[rows[prompt] for prompt in prompts]]
    return sample(model.generator, embeddings.to(model.config.compute.device), seed=seed, indices=indices)


def shown_prompts(prompts: Sequence[str], count: int) -> list[str]:
    """At most `count` of them, in their order, chosen by their SHA-256: an even step could miss a whole colour."""
    chosen = set(sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())[:count])
    return [prompt for prompt in prompts if prompt in chosen]
