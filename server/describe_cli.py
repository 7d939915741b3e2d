"""`fedcanvas describe`: what a person's words become before a model draws them, stage by stage.

Reads a model's public prompts and no weights. Not here: the stages (`server.prompting`), drawing (`server.cli`).
"""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.cli import AsJson, LanguageModelPlace, ModelPlace, Releaser, new_app, printable, say
from shared.errors import UsageError

if TYPE_CHECKING:
    from server.prompting import Description

DEMO, DEMO_PROMPTS = Path("runs/demo"), "demo_prompts.txt"
LONGEST_SHOWN = 160  # characters of what a stage made


@new_app
def describe(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", hidden=True)] = None,
    model: Annotated[Path | None, ModelPlace] = None,
    language_model: LanguageModelPlace = "",
    previous: Annotated[
        list[str] | None,
        typer.Option(help="What was said before; TEXT may change it. Again for a longer talk.", show_default=False),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="Leave out unicode, language, keywords, topic or description. Again for several.",
            show_default=False,
        ),
    ] = None,
    releaser: Releaser = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take a released model that does not verify.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say each TEXT in the words that a trained model knows, and show what each stage made of it.

    Unicode, language, keywords, topic, description: the last is what `fedcanvas generate` should draw. Words that the
    model was not trained on are named, with the nearest that it knows. "the same but larger" changes what was said
    with --previous. Without --model the words are those of the demo.
    """
    from server.generator import public_prompts
    from server.prompting import STAGES, PromptPipeline
    from shared.registry import nearest_name_hint

    if not texts:
        raise UsageError("no text", hint='for example: fedcanvas describe "kids party, blue theme"')
    for name in without or ():
        if name not in STAGES:
            raise UsageError(f"--without: unknown stage '{name}'", hint=nearest_name_hint(name, list(STAGES)))
    if model is None:
        prompts, line = _demo_prompts(), f"no --model: the words of the demo, whose model `make demo` puts at {DEMO}"
    else:
        prompts, line = public_prompts(model, releaser=releaser, unverified=unverified)
    say(line)
    model = model or DEMO
    pipeline = PromptPipeline(prompts, language_model=language_model or None)
    before: Description | None = None
    for text in previous or ():
        before = pipeline.describe(text, previous=before)
    stages = [name for name in STAGES if name not in (without or ())]
    found = [pipeline.describe(text, previous=before, stages=stages) for text in texts]
    if as_json:
        typer.echo(json.dumps({"model": str(model), "descriptions": [each.to_dict() for each in found]}))
        return
    for place, description in enumerate(found):
        typer.echo(("\n" if place else "") + "\n".join(stage_lines(description)))
    drawn = printable(shlex.join(dict.fromkeys(each.description for each in found)))
    say(f"next: fedcanvas generate {drawn} --model {shlex.quote(str(model))}")
    if any(each.keeps_latents for each in found):
        say("with the same --seed it stays the same picture, changed")


def _demo_prompts() -> tuple[str, ...]:
    return tuple(resources.files("server").joinpath(DEMO_PROMPTS).read_text(encoding="utf-8").splitlines())


def stage_lines(description: Description) -> list[str]:
    """Each stage in one line: its name, what it made, and what it says about that."""
    lines = []
    for stage in description.stages:
        made = printable(stage.made)
        made = made if len(made) <= LONGEST_SHOWN else f"{made[:LONGEST_SHOWN]}..."
        # Who wrote the last one stands before how.
        note = f"{description.writer}: {stage.note}" if stage.name == "description" else stage.note
        lines.append(f"{stage.name:<12} {made or '(nothing)'}  [{printable(note)}]")
    if "description" not in {stage.name for stage in description.stages}:
        lines.append(f"{'as written':<12} {printable(description.description)}")
    return lines
