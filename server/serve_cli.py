"""`fedcanvas serve`: a model as a service on this machine, and the keys of those who may call it.

Not here: the service itself (`server.serving`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.cli import LanguageModelPlace, LogForm, ModelPlace, Releaser, TextEncoderPlace, new_app, say, warn
from shared.errors import UsageError

if TYPE_CHECKING:
    from server.serving.keys import ApiKeys
    from server.serving.settings import ServingSettings

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@new_app
def serve(
    model: Annotated[Path | None, ModelPlace] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and says which.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="The file of API keys; clients then need one.", show_default=False)
    ] = None,
    new_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Add a key for NAME to --api-keys, print it once, and end.", show_default=False
        ),
    ] = None,
    public_without_keys: Annotated[
        bool, typer.Option("--public-without-keys", help="Listen for other machines without any key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name by which a proxy here is called; several times.", show_default=False),
    ] = None,
    language_model: LanguageModelPlace = "",
    releaser: Releaser = None,
    text_encoder: TextEncoderPlace = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take a released model that does not verify; every answer says so.")
    ] = False,
    queue: Annotated[
        int, typer.Option(min=1, max=2**20, help="Pictures asked for at once; more are told to come again.")
    ] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds that a request may take.")] = 60.0,
    log_format: LogForm = "text",
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log; they may be about people.")
    ] = False,
) -> None:
    """Serve a model over HTTP in the shape of OpenAI's images API, with a page for browsers at the same address.

    Only this machine can reach it unless --host says otherwise, and then clients need a key. A released model is
    verified first, or refused. Stays until Ctrl-C or SIGTERM; work under way is then finished.
    """
    if new_key is not None:
        _add_key(api_keys, new_key)
        return
    if model is None:
        raise UsageError("missing --model", hint="a released model or a run, such as --model runs/demo")
    _check_installed()
    from server.generator import Generator
    from server.serving.app import make_app
    from server.serving.keys import ApiKeys
    from server.serving.listener import listen, raise_file_limit, url
    from server.serving.log import log_to_stderr
    from server.serving.service import SPARE_CONNECTIONS, serve

    keys = None if api_keys is None else ApiKeys(api_keys)
    if keys is not None and not len(keys):
        raise UsageError(
            f"{api_keys} holds no key", hint=f"fedcanvas serve --api-keys {api_keys} --new-key NAME makes one"
        )
    hosts = _hosts(host, keys, allow_host or [], public_without_keys=public_without_keys)
    settings = _settings(queue, timeout, hosts, log_prompts, files=raise_file_limit() - SPARE_CONNECTIONS - 128)
    listening = listen(host, port)  # before the model: a port that is taken is told at once
    with listening:
        generator = Generator.load(
            model, releaser=releaser, unverified=unverified, recompute=True, text_encoder=text_encoder
        )
        say(generator.line)
        app = make_app(generator, settings, keys=keys, pipeline=generator.pipeline_by(language_model))
        log_to_stderr(log_format)
        who = "anybody who can reach it" if keys is None else f"whoever has one of {len(keys)} keys"
        say(f"{generator.name} is served at {url(listening)} for {who}; Ctrl-C ends it")
        serve(app, settings, listening)
    say("stopped")


def _add_key(path: Path | None, name: str) -> None:
    from server.serving.keys import add_key

    if path is None:
        raise UsageError("--new-key needs --api-keys, the file that the key's digest goes into")
    key = add_key(path, name)
    say(f"the key of {name}; it is shown this once, {path} has only its digest:")
    typer.echo(key)


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} is not installed", hint="pip install 'fedcanvas[serve]'")


def _hosts(
    host: str, keys: ApiKeys | None, allowed: list[str], *, public_without_keys: bool
) -> tuple[str, ...] | None:  # fmt: skip
    """Names that a client may call the service by; `None` for any, where a key keeps others out."""
    from server.serving.listener import LOCAL_NAMES, is_loopback

    local = is_loopback(host)
    if not local and keys is None:
        if not public_without_keys:
            raise UsageError(
                f"{host} can be reached from other machines, and there are no keys",
                hint="name a file with --api-keys, or say --public-without-keys if everybody may draw",
            )
        warn(f"everybody who can reach {host} may draw: there are no keys")
    names = tuple(name.lower() for name in allowed)
    if local and keys is None:
        return (*LOCAL_NAMES, f"[{host}]" if ":" in host else host.lower(), *names)
    return names or None


def _settings(
    queue: int, timeout: float, hosts: tuple[str, ...] | None, log_prompts: bool, *, files: int
) -> ServingSettings:  # fmt: skip
    from server.serving.settings import ServingSettings

    most = int(ServingSettings.model_fields["most_connections"].default)
    return ServingSettings(
        most_units=queue, drawing_seconds=timeout, hosts=hosts, log_prompts=log_prompts,
        most_connections=max(1, min(most, files)),
    )  # fmt: skip
