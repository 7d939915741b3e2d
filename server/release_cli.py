"""`fedcanvas release` and `fedcanvas verify`: a finished run as a folder to share, and whether such a folder holds."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import AsJson, Releaser, new_app, printable, say, warn

if TYPE_CHECKING:
    from shared.bundle import Verified


@new_app
def release(
    run: Annotated[Path, typer.Argument(metavar="RUN", hidden=True)],
    out: Annotated[Path, typer.Option(help="The folder to make; it must be new.", show_default=False)] = ...,  # type: ignore[assignment]
    key: Annotated[
        Path | None,
        typer.Option(
            help="What the release is signed with; made when it is not there."
            "  [default: fedcanvas/releaser.pem in the user's configuration]",
            show_default=False,
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="First line: the passphrase of that key.  [default: it has none]")
    ] = None,
    federation: Annotated[
        Path | None,
        typer.Option(help="The operator's folder, where the run does not lie in it.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Release the model of RUN, a finished run: a folder with its weights, its card and the sites' signed statements.

    It holds nothing of the run's checkpoints and noised sums. `fedcanvas verify` reads it anywhere, offline; whoever
    gets it should hear the fingerprint of the key from you by another way.
    """
    from server.release import release as make
    from shared.model_card import SIMULATED
    from shared.protection.keys import SigningKey, read_passphrase

    path = key or _default_key()
    passphrase = None if passphrase_file is None else read_passphrase(passphrase_file)
    if not path.exists():
        SigningKey.generate().write(path, passphrase=passphrase)
        say(f"a key to release with was made: {path}; keep it, and keep it to yourself")
    made = make(run, out, key=SigningKey.read(path, passphrase=passphrase), federation=federation)
    if made.simulated:
        warn(f"do not share it if it was made of private data. {SIMULATED}")
    if as_json:
        typer.echo(json.dumps({"model": str(out), **_table(made)}))
        return
    privacy, place = made.card["privacy"], shlex.quote(str(out))
    typer.echo(
        f"{out} is released: {len(made.statements)} {'simulated sites' if made.simulated else 'sites'},"
        f" {_cost(privacy)}\n"
        f"  signed by  {made.releaser}\n"
        f"next:\n  fedcanvas verify {place}\n  fedcanvas generate {shlex.quote(made.card['example'])} --model {place}"
    )


@new_app
def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", hidden=True)],
    releaser: Releaser = None,
    as_json: AsJson = False,
) -> None:
    """Check MODEL, a released model: digests, signatures, and epsilon, which is computed again. Needs no network.

    Says what each signature shows, and what remains to be trusted. Exit code 10 where anything does not hold.
    """
    from shared.bundle import verify as check

    found = check(model, releaser=releaser)
    if as_json:
        typer.echo(json.dumps({"model": str(model), **_table(found)}))
        return
    card = found.card
    lines = [f"{model}: run {card['run_id']} of federation {card['federation']}, {_cost(card['privacy'])}"]
    lines += [f"  signed by  {found.releaser}"]
    for site, statement in sorted(found.statements.items()):
        epsilon = float(card["privacy"]["sites"][site]["epsilon"])  # JSON has no infinity: the text "inf"
        charges = f"{len(statement.charges)} charges, {statement.steps} steps"
        lines.append(f"  {site:<12} epsilon {epsilon:.4g}: {charges}; the run has {card['privacy']['rounds']} rounds")
    lines += [f"  code of the sites: {_whose_code(found.code)}"]
    lines += ["shown:", *(f"  - {line}" for line in found.proved)]
    lines += ["to be trusted:", *(f"  - {line}" for line in found.trusted)]
    # What stands in a card is somebody's: it must not move a terminal's cursor, nor begin a line of its own.
    typer.echo("\n".join(map(printable, lines)))


def _default_key() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fedcanvas/releaser.pem"


def _whose_code(digests: list[str]) -> str:
    from shared.tree import code_digest

    if digests == [code_digest(Path(__file__).resolve().parents[1])]:
        return f"{digests[0][:16]}, which is installed here"
    listed = ", ".join(digest[:16] for digest in digests)
    return f"{listed}; another release than is installed here"


def _cost(privacy: dict[str, Any]) -> str:
    if not privacy["private"]:
        return "no privacy: epsilon is infinite"
    return (
        f"epsilon {privacy['epsilon_max']:.4g} at delta {privacy['delta']:.0e},"
        f" {privacy['adjacency']} one {privacy['unit']}"
    )


def _table(found: Verified) -> dict[str, Any]:
    from shared.plain import plain

    table = {
        "run": found.card["run_id"], "signed_by": found.releaser, "federation": found.federation,
        "simulated": found.simulated, "code": found.code, "digest": found.digest, "epsilon": found.epsilon,
        "sites": {site: about["epsilon"] for site, about in found.card["privacy"]["sites"].items()},
        "shown": found.proved, "to_be_trusted": found.trusted,
    }  # fmt: skip
    return dict(plain(table))
