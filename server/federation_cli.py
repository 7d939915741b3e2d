"""`fedcanvas server`: what the operator of a federation does, in a folder of the operator's own.

    init, kit, admit, revoke, rotate   who belongs to the federation, and with which keys

Nothing here opens a connection. Not here: the folder itself (`server.federation`), and the commands of a federation at
work (`server.deployment_cli`).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.cli import AsJson, group_command, new_group, printable, say
from shared.errors import FederationError, UsageError

if TYPE_CHECKING:
    from server.federation import FederationFolder

server = new_group(
    "What the operator of a federation does: its keys, its sites. Everything lies in the operator's own folder; the"
    " federation's identity may have a passphrase, which is read from a file (--passphrase-file)."
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", hidden=True)]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")]
PassphraseFile = Annotated[
    Path | None, typer.Option(help="First line: the passphrase of the identity's key.  [default: it has none]")
]


@group_command(server, "init", "begin a federation: its identity, keys and certificates")
def init(
    folder: Folder,
    name: Annotated[
        str, typer.Option(help="Small letters, digits and dashes, such as retina-2026.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where sites will find the server.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Begin a federation in DIR: its identity, its certificate authority, and the aggregator's first keys.

    Keep a copy of DIR/keys offline: whoever has identity.pem can admit sites, and without it none can be. The
    aggregator's keys, which work every day, have the passphrase of the file that FEDCANVAS_PASSPHRASE_FILE names in
    the environment, if it does; then it has to name it for `server start` and `rotate` as well.
    """
    from server.federation import FederationFolder

    made = FederationFolder.create(folder, name=name, address=address, passphrase=_passphrase(passphrase_file))
    known = made.federation
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "name": known.name, "address": known.address,
                               "fingerprint": known.fingerprint}))  # fmt: skip
        return
    quoted = shlex.quote(str(folder))
    typer.echo(
        f"federation {known.name} at {known.address} is begun in {folder}\n"
        f"  fingerprint  {known.fingerprint}\n"
        "               tell it to each site by another way than its kit, for example by telephone\n"
        "next:\n"
        f"  fedcanvas server kit {quoted} --site NAME --out NAME.zip    for each site; nothing in it is secret\n"
        f"  fedcanvas server admit {quoted} request.json               what a site sends back"
    )


@group_command(server, "kit", "what a site needs to ask to be admitted")
def kit(
    folder: Folder,
    site: Annotated[str, typer.Option(help="Name of the site in messages and reports.", show_default=False)] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The zip file to write.", show_default=False)] = ...,  # type: ignore[assignment]
    as_json: AsJson = False,
) -> None:
    """Write the kit of a site. Nothing in it is secret: the site makes its own keys.

    Whoever has a kit can only ask to be admitted.
    """
    made = _open(folder).kit(site, out)
    if as_json:
        typer.echo(json.dumps({"kit": str(out), "site": site, "fingerprint": made.federation.fingerprint}))
        return
    typer.echo(f"{out}: the kit of site {site}; tell it by another way: {made.federation.fingerprint}")


@group_command(server, "admit", "take a site up, after its fingerprint was compared")
def admit(
    folder: Folder,
    request: Annotated[Path, typer.Argument(metavar="REQUEST", hidden=True)],
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Show the fingerprint of REQUEST, the file that a site sent, ask, and take the site up into the roster.

    Compare the fingerprint with what a person at the site reads out: the file may have come from anybody.
    """
    opened = _open(folder)
    try:
        content = request.read_bytes()
    except OSError as error:
        raise UsageError(f"{request} cannot be read: {error.strerror or error}") from None
    asked = opened.read_request(content, what=str(request))
    say(f"site {asked.site} asks to join federation {asked.federation}; its fingerprint is {asked.fingerprint}")
    if not yes and not typer.confirm("does a person at the site read out the same?", default=False, err=True):
        raise UsageError("nobody was admitted", hint="--yes admits without asking")
    opened.admit(asked, passphrase=_passphrase(passphrase_file))
    if as_json:
        typer.echo(json.dumps({"site": asked.site, "fingerprint": asked.fingerprint}))
        return
    typer.echo(f"site {asked.site} is admitted: {len(opened.roster())} in the roster of {asked.federation}")


@group_command(server, "revoke", "end a site's part at once")
def revoke(
    folder: Folder,
    site: Annotated[str, typer.Argument(metavar="SITE", hidden=True)],
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """End the part of SITE: from now on nothing that it sends counts. Its own ledger and data are not touched."""
    opened = _open(folder)
    if not yes and not typer.confirm(f"revoke site {printable(site)}?", default=False, err=True):
        raise UsageError("nothing was changed", hint="--yes revokes without asking")
    keys = opened.revoke(site)
    typer.echo(json.dumps({"site": site, "fingerprint": keys.fingerprint}) if as_json else f"site {site} is revoked")


@group_command(server, "rotate", "new keys and a new certificate; sites need no new kit")
def rotate(folder: Folder, passphrase_file: PassphraseFile = None, as_json: AsJson = False) -> None:
    """Make new keys of the aggregator and a new TLS certificate; sites take them up with the next instruction.

    A server that is started begins to use them at once: its proxy and its worker start again, and a run goes on.
    """
    from server.federation import USES_KEYS
    from shared.supervisor import restart

    keys = _open(folder).rotate(passphrase=_passphrase(passphrase_file))
    until = keys.not_after.isoformat()
    typer.echo(
        json.dumps({"serial": keys.serial, "not_after": until}) if as_json
        else f"the aggregator's keys {keys.serial} are in force until {keys.not_after:%Y-%m-%d}"
    )  # fmt: skip
    try:
        restart(folder, USES_KEYS)
    except FederationError as error:  # the keys are made, and a person must know who does not know them
        raise FederationError(f"the server still uses the keys before: {error.message}", hint=error.hint) from None


def _open(folder: Path) -> FederationFolder:
    from server.federation import FederationFolder

    return FederationFolder.open(folder)


def _passphrase(file: Path | None) -> bytes | None:
    from shared.protection.keys import read_passphrase

    return None if file is None else read_passphrase(file)
