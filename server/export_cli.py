"""`fedcanvas export`: a model as a folder that needs neither fedcanvas nor torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from shared.cli import AsJson, Releaser, TextEncoderPlace, new_app, say


@new_app
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", hidden=True)],
    out: Annotated[Path, typer.Option(help="The folder to make; it must be new.", show_default=False)] = ...,  # type: ignore[assignment]
    form: Annotated[Literal["onnx"], typer.Option("--format", help="What it is made for: onnxruntime.")] = "onnx",
    releaser: Releaser = None,
    text_encoder: TextEncoderPlace = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take a released model that does not verify; its pictures say so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export MODEL, a released model or a finished run, as an ONNX graph with its text encoder and a short script.

    A released model is verified first, or refused. Whoever has the folder, numpy, onnxruntime and Pillow draws the same
    pictures from the same prompt and seed; that is tried out before the folder appears. Needs fedcanvas[export].
    """
    from server.export import export_onnx
    from server.generator import Generator

    generator = Generator.load(
        model, releaser=releaser, unverified=unverified, recompute=True, text_encoder=text_encoder
    )
    say(generator.line)
    difference = export_onnx(generator, out)
    if as_json:
        result = {"model": str(model), "format": form, "folder": str(out), "difference": difference}
        typer.echo(json.dumps({**result, **generator.provenance}))
        return
    typer.echo(
        f"{out}: pictures differ from the model's by {difference} of 255 at most\n"
        f"next:\n  python {shlex.quote(str(out / 'generate.py'))} {shlex.quote(generator.prompts[0])} --seed 1"
    )
