"""The `fedcanvas` command: what it offers, how it fails, and how it talks.

A command's module is imported when that command is called, so `fedcanvas --help` answers at once and a site
never loads server code. Every error that a person can cause becomes two lines on stderr, `error:` and `hint:`,
and the exit code of its kind (`shared.errors`); a traceback means a bug.
Results go to stdout, everything else to stderr. Not here: what the commands do.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import click
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from shared import __version__
from shared.errors import FedCanvasError, UsageError
from shared.registry import nearest_name_hint

INTERRUPTED = 130
BROKEN_PIPE = 141


# Options that several commands have.
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Foreground = Annotated[
    bool, typer.Option("--foreground", help="Stay, until SIGTERM or Ctrl-C: for systemd and containers.")
]
LanguageModelPlace = Annotated[
    str,
    typer.Option(
        "--language-model", metavar="ID_OR_FOLDER", show_default=False,
        help="A causal language model of transformers that writes descriptions.  [default: rules do]",
    ),
]
ModelPlace = typer.Option(
    "--model", show_default=False,
    help="A released model, a finished run, its folder `model`, or a model that a site received.",
)  # fmt: skip
Releaser = Annotated[
    str | None,
    typer.Option(
        "--releaser", metavar="FINGERPRINT", show_default=False,
        help="Fingerprint of the key that must have signed the model.  [default: any, which is named]",
    ),
]
TextEncoderPlace = Annotated[
    Path | None,
    typer.Option(
        "--text-encoder", metavar="FOLDER", show_default=False,
        help="Where the model's text encoder lies, if it is of transformers.  [default: what its settings name]",
    ),
]
LogForm = Annotated[Literal["text", "json"], typer.Option("--log-format", help="Of a line of the logs.")]


@dataclass(frozen=True)
class LazyCommand:
    """`module:attribute` of a typer app, and its line in the list, which needs no import."""

    place: str
    summary: str


COMMANDS = {
    "simulate": LazyCommand("simulations.cli:simulate", "train a private federation on this machine, sites and all"),
    "plan": LazyCommand("server.plan_cli:plan", "before anyone joins: what a run costs, whether it can learn"),
    "generate": LazyCommand("server.cli:generate", "pictures from prompts, by the model of a finished run"),
    "describe": LazyCommand("server.describe_cli:describe", "what a text becomes in a model's own words"),
    "serve": LazyCommand("server.serve_cli:serve", "a model as a service: OpenAI's images API, and a page"),
    "release": LazyCommand("server.release_cli:release", "a finished run as a folder to share, with signed evidence"),
    "verify": LazyCommand("server.release_cli:verify", "whether a released model is whole, and what it cost"),
    "export": LazyCommand("server.export_cli:export", "a model for onnxruntime: neither fedcanvas nor torch is needed"),
    "evaluate": LazyCommand("server.evaluate_cli:evaluate", "figures of a finished run, against public pictures"),
    "compare": LazyCommand("server.evaluate_cli:compare", "evaluated runs side by side: which differences are real"),
    "report": LazyCommand("server.cli:report", "one HTML file about a run: curves, samples, epsilon"),
    "server": LazyCommand("server.deployment_cli:server", "an operator's part: sites, keys, serving, runs"),
    "client": LazyCommand("client.cli:client", "a site's own say: data, policy, runs, ledger, receipts"),
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that can go on; `command` continues it."""

    def __init__(self, message: str, command: str) -> None:
        super().__init__(message)
        self.message, self.command = message, command


class PlainCommand(TyperCommand):
    """A command whose help is plain text: typer escapes brackets for a markup that is switched off here."""

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[")


class PlainGroup(TyperGroup):
    """Commands under one name, such as `fedcanvas client ...`; alone it shows its help."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UsageError(
                f"unknown command '{ctx.info_name} {args[0]}'", hint=nearest_name_hint(args[0], list(self.commands))
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class LazyGroup(click.Group):
    """A group whose commands are modules by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].place.partition(":")
        command = get_command(getattr(importlib.import_module(module), attribute))
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise UsageError(f"unknown command '{args[0]}'", hint=nearest_name_hint(args[0], list(COMMANDS)))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


def _print_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"fedcanvas {__version__}")
        ctx.exit()


@click.pass_context
def _print_help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


ROOT = LazyGroup(
    "fedcanvas",
    help="Train one text-to-image GAN on images that may not be pooled, under differential privacy.",
    epilog="`fedcanvas COMMAND --help` explains a command; `fedcanvas simulate demo --out runs/demo` is a start.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    callback=_print_help,
    params=[
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
            help="Show the version and exit.",
        )
    ],
)


def main() -> NoReturn:
    """Entry point of the installed command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a prompt in a script that the terminal lacks is no error
    code = run(sys.argv[1:])
    # What is left in buffers may meet a closed pipe; the interpreter would complain about it at exit.
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; the only place where errors become text."""
    try:
        with ROOT.make_context("fedcanvas", list(arguments)) as context:
            ROOT.invoke(context)
        return 0
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        return fail(_usage_error(error))
    except FedCanvasError as error:
        return fail(error)
    except KeyboardInterrupt as stopped:
        return _stopped(stopped)
    except click.Abort:
        return _stopped(KeyboardInterrupt())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise  # not about a file that someone named: a bug shows where it is
        return fail(FedCanvasError(f"{error.filename}: {(error.strerror or str(error)).lower()}"))


def say(message: str = "") -> None:
    """One line of talk, to stderr: stdout holds results only.

    It is made `printable` here, since much of what is told stands in somebody else's file.
    """
    print(printable(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    say(f"warning: {message}")


def printable(text: str) -> str:
    """One line whose control characters are replaced: a text from a file could otherwise move a terminal's cursor."""
    return "".join(character if character.isprintable() else "�" for character in text)


def fail(error: FedCanvasError) -> int:
    """Tells a person, on stderr; the exit code."""
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    return error.exit_code


def _stopped(stopped: KeyboardInterrupt) -> int:
    say()
    if isinstance(stopped, Interrupted):
        say(f"stopped: {stopped.message}")
        say(f"hint: continue with `{stopped.command}`")
    else:
        say("stopped")
    return INTERRUPTED


def _usage_error(error: click.ClickException) -> UsageError:
    """Click's complaint in our words, with the nearest option or value."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "fedcanvas"
    help_hint = f"`{command} --help` lists what it takes"
    if isinstance(error, click.NoSuchOption):
        known = [name for parameter in context.command.params for name in parameter.opts] if context else []
        near = difflib.get_close_matches(error.option_name, [*known, "--help"], n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? {help_hint}" if near else help_hint
        return UsageError(f"unknown option '{error.option_name}'", hint=hint)
    if isinstance(error, click.MissingParameter):
        name = error.param.get_error_hint(context) if error.param and context else "a value"
        return UsageError(f"missing {name}".replace("'", ""), hint=help_hint)
    if isinstance(error, click.BadParameter) and error.param is not None:
        name = "/".join(error.param.opts) if error.param.opts[0].startswith("-") else str(error.param.name).upper()
        hint = help_hint
        choices = getattr(error.param.type, "choices", None)
        if choices:
            given = error.message.partition("'")[2].partition("'")[0]
            hint = nearest_name_hint(given, [str(getattr(choice, "value", choice)) for choice in choices])
        return UsageError(f"{name}: {_lowered(error.message)}", hint=hint)
    return UsageError(_lowered(error.format_message()), hint=help_hint)


def _lowered(message: str) -> str:
    message = message.strip().rstrip(".").removesuffix(" range")
    return message[:1].lower() + message[1:]


def new_app(function: Callable[..., None]) -> typer.Typer:
    """Decorator: `function` as a typer app of one command in this command line's style.

    Arguments are explained in the function's docstring, by the name in their metavar.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(cls=PlainCommand, context_settings={"help_option_names": ["-h", "--help"]})(function)
    return app


def new_group(summary: str) -> typer.Typer:
    """A typer app for several commands under one name; `group_command` adds them."""
    app = typer.Typer(
        cls=PlainGroup, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=summary,
        invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip

    @app.callback()
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return app


def group_command(
    app: typer.Typer, name: str, summary: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:  # fmt: skip
    """Decorator: `function` as the command `name` of a group, in this command line's style."""
    settings = {"help_option_names": ["-h", "--help"]}
    return app.command(name, cls=PlainCommand, short_help=summary, context_settings=settings)


if __name__ == "__main__":
    main()
