"""`fedcanvas generate` and `fedcanvas report`: what a finished run gives to people.

Both read a run directory and look at no site's data. Not here: how pictures and pages are made
(`server.evaluation`, `server.report`).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import AsJson, LanguageModelPlace, ModelPlace, Releaser, TextEncoderPlace, new_app, say
from shared.errors import UsageError

if TYPE_CHECKING:
    from server.prompting import Description, PromptPipeline

MOST_PICTURES = 100_000
SLUG_CHARACTERS = 60


@new_app
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", hidden=True)] = None,
    model: Annotated[Path, ModelPlace] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder for the pictures; made when it is not there.")] = Path("pictures"),
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="A file of prompts, one a line.", show_default=False)
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=MOST_PICTURES, help="Pictures of each prompt.")] = 4,
    total: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PICTURES, help="In place of --n: so many in all, each with its own latents."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Another seed, other pictures.")] = 0,
    truncation: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Below 1 pictures are more typical and less varied.")
    ] = 1.0,
    describe: Annotated[
        bool, typer.Option("--describe", help="Say each prompt in the model's words first, and draw that.")
    ] = False,
    language_model: LanguageModelPlace = "",
    releaser: Releaser = None,
    text_encoder: TextEncoderPlace = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take a released model that does not verify; its pictures say so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw pictures of each PROMPT with a trained model. A released model is verified first, or refused.

    Writes one PNG a picture, named by prompt and number, and a contact sheet; each picture says in its text entries
    which prompt, seed and model made it, at which epsilon, and the sheet says all of that but the prompt. Picture
    number i of a prompt depends on the seed and i alone: a larger --n only adds to the others. With --total, picture i
    is of the prompts in turn: with the run's own prompts.txt and --seed 1 those that `fedcanvas evaluate` measures.
    """
    from server.generator import Generator, Picture
    from server.sheet import SheetCell, contact_sheet
    from shared.disk import write_whole
    from shared.prompts import PromptPool, clean_prompt
    from shared.rundir import to_json

    asked = list(prompts or []) if describe else [clean_prompt(prompt) for prompt in prompts or []]
    if prompts_file is not None:
        asked += PromptPool.from_file(prompts_file).texts
    asked = list(dict.fromkeys(asked))
    if not asked:
        raise UsageError("no prompt", hint='for example: fedcanvas generate "a large red circle" --model runs/a')
    if total is not None and total < len(asked):
        raise UsageError(f"--total {total} is fewer than the {len(asked)} prompts", hint="a picture of each at least")
    if total is None and len(asked) * n > MOST_PICTURES:
        raise UsageError(f"{len(asked)} prompts times {n} pictures is more than {MOST_PICTURES}", hint="lower --n")
    if language_model and not describe:
        raise UsageError("--language-model writes descriptions, and none are asked for", hint="add --describe")
    released = Generator.load(model, releaser=releaser, unverified=unverified, text_encoder=text_encoder)
    say(released.line)
    pipeline = released.pipeline_by(language_model) if describe else None
    unknown_words: dict[str, list[str]] = {}
    drawn_as = {text: text for text in asked}
    for text in asked:
        if pipeline is not None:
            description = _described(text, pipeline)
            drawn_as[text] = description.description
            unknown_words |= description.unknown
        else:
            unknown_words |= released.unknown_words(text)
    asked = list(dict.fromkeys(drawn_as.values()))
    known = set(released.prompts)
    unknown = [prompt for prompt in asked if prompt not in known]
    if unknown:
        say(f"note: {len(unknown)} of {len(asked)} prompts were not among the {len(known)} it was trained on")
    if unknown_words:
        from server.prompting import list_unknown

        say(f"note: words that it was not trained on: {list_unknown(unknown_words)}")

    made: list[dict[str, Any]] = []
    cells = []
    for place, (prompt, name) in enumerate(zip(asked, _names(asked), strict=True)):
        indices = range(n) if total is None else range(place, total, len(asked))
        images = released.arrays(
            [prompt] * len(indices), seeds=[seed] * len(indices), indices=indices, truncation=truncation
        )
        files = [out / f"{name}-{index:03d}.png" for index in indices]
        for file, image, index in zip(files, images, indices, strict=True):
            about = released.about(prompt, seed=seed, index=index, truncation=truncation)
            _write(file, Picture(image, about).png())
        made.append({"prompt": prompt, "files": [str(file) for file in files]})
        cells.append(SheetCell(prompt, images[:16]))
    sheet = out / "sheet.png"
    privacy = released.privacy
    notes = [f"epsilon {privacy['epsilon_max']:.3g} per site, {privacy['adjacency']} one {privacy['unit']}"]
    if released.unverified:
        notes.insert(0, "NOT VERIFIED: what this model says of itself may be false")
    common = released.about("", seed=seed, index=0, truncation=truncation)
    del common["prompt"], common["index"]  # of each picture
    write_whole(sheet, contact_sheet(cells[:200], title=f"{model}, seed {seed}", notes=notes, about=common))
    if as_json:
        result: dict[str, Any] = {"model": str(model), "seed": seed, "sheet": str(sheet), "pictures": made}
        result["unknown_words"] = unknown_words
        result |= {"drawn_as": drawn_as} if describe else {}
        typer.echo(to_json(result).decode(), nl=False)
    else:
        typer.echo(f"{total or len(asked) * n} pictures in {out}, all on one sheet: {sheet}")


@new_app
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write.  [default: report.html in the run directory]", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file about RUN, a run directory: curves, samples over rounds, epsilon, settings.

    The file needs no network. The run may still be going on.
    """
    from server.report import report_html
    from shared.disk import write_whole
    from shared.rundir import RunDirectory

    opened = RunDirectory.open(run)
    file = write_whole(out or run / "report.html", report_html(opened).encode())
    typer.echo(json.dumps({"run": str(run), "report": str(file)}) if as_json else f"{file}: open it in a browser")


def _described(text: str, pipeline: PromptPipeline) -> Description:
    """What is drawn for `text`, which a person is told."""
    found = pipeline.describe(text)
    if found.description != text:
        say(f"'{text}' is drawn as '{found.description}'  [{found.stages[-1].note}]")
    return found


def _write(file: Path, content: bytes) -> None:
    from shared.disk import write_whole

    # Thousands of small files: each whole, but not each flushed to the disk on its own.
    write_whole(file, content, durable=False)


def _names(prompts: list[str]) -> list[str]:
    """A file name for each prompt: readable, and different also where only punctuation differs."""
    slugs = [_slug(prompt) for prompt in prompts]
    count = Counter(slugs)
    return [
        slug if count[slug] == 1 and slug != "prompt" else f"{slug}-{_short_digest(prompt)}"
        for slug, prompt in zip(slugs, prompts, strict=True)
    ]


def _slug(prompt: str) -> str:
    """Letters and digits of any script, joined by dashes: no separator, dot or control character gets into a name."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).casefold())
    slug = "-".join(words)
    while len(slug.encode()) > SLUG_CHARACTERS:
        slug = slug[:-1]
    return slug.strip("-") or "prompt"


def _short_digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]
