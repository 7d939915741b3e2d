"""`fedcanvas server start`, `stop`, `status`, `run`, `runs`, `cancel`, `resume`: a federation at work.

The commands stand in the group of `server.federation_cli`. Not here: what they do (`server.deployment`,
`server.run_queue`, `server.status`).
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.federation_cli import Folder, server
from shared.cli import AsJson, Foreground, LogForm, group_command, printable, say, warn
from shared.errors import FederationError, UsageError

if TYPE_CHECKING:
    from server.federation import FederationFolder
    from server.run_queue import QueuedRun
    from shared.config import RunConfig

FOLLOW_SECONDS = 1.0
Name = Annotated[str, typer.Argument(metavar="RUN", hidden=True)]


@group_command(server, "start", "begin to serve the sites")
def start(
    folder: Folder,
    foreground: Foreground = False,
    listen: Annotated[
        str,
        typer.Option(metavar="[HOST]:PORT", help="Where the proxy listens.  [default: the address's port, everywhere]"),
    ] = "",
    quiet: Annotated[
        bool, typer.Option("--quiet", help="In the foreground: lines go to the logs in DIR/logs only.")
    ] = False,
    log_format: LogForm = "text",
) -> None:
    """Keep the three processes of DIR running: Flower's SuperLink, the proxy in front of it, and the worker.

    Sites reach the proxy alone. Runs that were not over go on from their last checkpoint.
    """
    from server.deployment import plan_start, run_here
    from server.deployment import start as start_detached

    opened = _open(folder)
    opened.channel()  # keys that have ended, or that others can read, are said before anything starts
    for words in opened.warnings():
        warn(words)
    planned = plan_start(folder, listen=listen)
    if foreground:
        run_here(folder, planned, form=log_format, aloud=not quiet)
        return
    say("starting")
    address = start_detached(folder, listen=listen, form=log_format)
    typer.echo(f"{folder} is started: sites find it at {address}; its logs are in {folder / 'logs'}")


@group_command(server, "stop", "end the server's processes")
def stop(folder: Folder) -> None:
    """End the processes of DIR. A run that is not over goes on after the next start.

    Where systemd keeps the server, stop its unit instead: systemd would start it again.
    """
    from shared.supervisor import stop as stop_supervisor

    _open(folder)
    say("stopping")
    typer.echo(f"{folder} is stopped" if stop_supervisor(folder) else f"{folder} was not started")


@group_command(server, "status", "processes, sites, runs, and what is due")
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show how the server in DIR does, what is seen of each site, how far its runs are, and what ends soon."""
    from server.status import server_status

    about = server_status(folder)
    typer.echo(json.dumps(about) if as_json else "\n".join(_status_lines(folder, about)))
    if not as_json:
        for words in about["warnings"]:
            warn(words)


@group_command(server, "run", "train a model with the sites of the federation")
def run(
    folder: Folder,
    settings: Annotated[Path, typer.Argument(metavar="SETTINGS", hidden=True)],
    prompts: Annotated[
        Path | None, typer.Option(help="Public prompts, one a line.  [default: prompts.txt beside SETTINGS]")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the run in this folder.  [default: the name of SETTINGS]")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="A site that may take part; several times.  [default: all admitted ones]")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Public captioned images, for figures during training.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stay until the run is over, and say how it goes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask the sites to train together, by the settings in SETTINGS, a TOML file; returns at once.

    Each site holds the run against its own policy, and a person there approves it; rounds begin when enough have.
    The run is done by the server that `fedcanvas server start` keeps running, now or when it is started.
    """
    from server.app import REFERENCE, reference_document
    from server.run_queue import RunQueue
    from server.training import check_buildable
    from shared.privacy.plan import make_plan
    from shared.prompts import PromptPool

    opened = _open(folder)
    sites = _chosen(opened, site)
    config = _settings(opened, settings, len(sites))
    pool = PromptPool.from_file(prompts or settings.with_name("prompts.txt"))
    check_buildable(config)
    plan = make_plan(config)
    queue = RunQueue(folder)
    name = name or settings.stem
    documents = {} if reference is None else {REFERENCE: reference_document(reference, folder / "runs" / name)}
    queued = queue.add(name, config=config, prompts=pool.texts, sites=sites, documents=documents)
    from server.status import run_status

    about = run_status(queued, queue)
    if follow:
        about = _follow(queue, name)
    if as_json:
        typer.echo(json.dumps(about))
        return
    cost = f"epsilon {config.privacy.target_epsilon:g} at delta {plan.delta:.0e}" if plan.private else "no privacy"
    typer.echo("\n".join([
        f"run {name} ({about['run_id']}) is {about['state']}: {config.federation.rounds} rounds of"
        f" {config.federation.local_steps} step(s) with {', '.join(sites)}; {cost} for one {plan.unit} of a site",
        f"  at each site  fedcanvas client approve SITE_DIR {about['run_id']}",
        f"  here          fedcanvas server status {shlex.quote(str(folder))}",
        f"  the model     {queued.path / 'model'}, when it is finished",
    ]))  # fmt: skip
    if config.federation.local_steps == 1:
        say("note: an exchange takes some seconds whatever it holds; federation.local-steps makes fewer of them")


@group_command(server, "runs", "all runs, and how far they are")
def runs(folder: Folder, as_json: AsJson = False) -> None:
    """List the runs of the federation in DIR, in the order in which they were asked for."""
    from server.run_queue import RunQueue
    from server.status import runs_status

    _open(folder)
    found = runs_status(RunQueue(folder))
    typer.echo(json.dumps({"runs": found}) if as_json else "\n".join(map(_run_line, found)) or "there is no run yet")


@group_command(server, "cancel", "end a run before its time")
def cancel(folder: Folder, name: Name) -> None:
    """End RUN. What its sites have spent stays spent; `resume` goes on with it."""
    from server.run_queue import RunQueue

    _open(folder)
    RunQueue(folder).cancel(name)
    typer.echo(f"run {name} is being cancelled")


@group_command(server, "resume", "go on with a failed or cancelled run")
def resume(folder: Folder, name: Name) -> None:
    """Go on with RUN from its last checkpoint; sites keep their approval and their ledger.

    A cancellation that the server has not seen yet is taken back.
    """
    from server.run_queue import RunQueue

    _open(folder)
    queued = RunQueue(folder).resume(name)
    typer.echo(f"run {name} is {queued.state}: it goes on while the server is started")


def _open(folder: Path) -> FederationFolder:
    from server.federation import FederationFolder

    return FederationFolder.open(folder)


def _chosen(opened: FederationFolder, wanted: list[str] | None) -> list[str]:
    admitted = [site.site for site in opened.roster()]
    if not admitted:
        raise UsageError("no site is admitted yet", hint="`fedcanvas server kit` begins that")
    if unknown := [name for name in wanted or [] if name not in admitted]:
        raise UsageError(f"there is no site '{printable(unknown[0])}'", hint=f"admitted are: {', '.join(admitted)}")
    return sorted(set(wanted or admitted))


def _settings(opened: FederationFolder, path: Path, sites: int) -> RunConfig:
    from shared.config import RunConfig, flatten_table, read_toml

    flat = flatten_table(read_toml(path))
    for key, value in (("federation.name", opened.federation.name), ("federation.sites", sites)):
        if flat.setdefault(key, value) != value:
            raise UsageError(f"{path}: {key} is {flat[key]!r}, here it is {value!r}", hint="leave it out")
    return RunConfig.from_flat(flat, origin=str(path))


def _follow(queue: Any, name: str) -> dict[str, Any]:
    from server.run_queue import OVER
    from server.status import run_status

    told = ""
    while True:
        queued: QueuedRun = queue[name]
        about = run_status(queued, queue)
        if (line := _run_line(about)) != told:
            say(line)
            told = line
        if queued.state == "failed":
            raise FederationError(f"run {name} failed: {queued.reason}", hint=f"fedcanvas server resume ... {name}")
        if about["state"] == "unreadable":
            raise FederationError(f"run {name} is unreadable: {about['reason']}")
        if queued.state in OVER:
            return about
        time.sleep(FOLLOW_SECONDS)


def _status_lines(folder: Path, about: dict[str, Any]) -> list[str]:
    lines = [
        f"federation {about['name']} at {about['address']}", f"  fingerprint  {about['fingerprint']}",
        f"  keys         {about['keys']['serial']}, in force until {about['keys']['not_after'][:10]}",
        f"  release      {about['release']}",
    ]  # fmt: skip
    if not about["started"]:
        lines.append(f"  not started: `fedcanvas server start {shlex.quote(str(folder))}`")
    for name, program in about["programs"].items():
        again = f"; started {program['starts']} times, it ended last {program['ended']}"
        up = f"up, process {program['pid']}" if program["pid"] else "down, to be started again"
        lines.append(f"  {name:<11}  {up}{again if program['ended'] else ''}")
    if about["trouble"]:
        lines.append(f"  trouble      {printable(about['trouble'])}")
    for site in about["sites"]:
        lines.append(f"  site         {site['site']:<20} {_site_words(about, site)}")
        lines.append(f"               {'':<20} {site['fingerprint']}")
    if not about["sites"]:
        lines.append("  no site is admitted yet")
    return [*lines, *(f"  run          {_run_line(one)}" for one in about["runs"])]


def _site_words(about: dict[str, Any], site: dict[str, Any]) -> str:
    if not about["started"]:
        return "admitted"
    if site["trouble"]:
        return f"admitted, not registered: {printable(site['trouble'])}"
    if not site["registered"]:
        return "admitted, not registered yet"
    seen = f"last seen {site['last_seen']}" if site["last_seen"] else "never seen"
    words = f"online, {seen}" if site["online"] else f"offline, {seen}"
    if site["state"]:
        words += f"; run {site['run']} round {site['round']}: {site['state']}"
        if site["answered"] >= 0 and site["state"] != "answered":
            words += f", answered last in round {site['answered']}"
    return words


def _run_line(run: dict[str, Any]) -> str:
    words = f"{run['run']:<20} {run['state']}"
    if run["cancelling"]:
        words += ", being cancelled"
    if run["behind"]:
        words += f" behind {run['behind']}"
    if run["state"] != "unreadable":
        words += f", round {run['rounds_done']} of {run['rounds']}"
    if run["seconds_a_round"]:
        words += f", {run['seconds_a_round']:.1f} s a round, {_size(run['bytes_down_a_round'])} down"
        words += f" and {_size(run['bytes_up_a_round'])} up"
    if run["state"] == "finished":
        words += f"; model in {run['folder']}/model"
        if run["delivered"]:
            words += f", received by {', '.join(run['delivered'])}"
        if run["undelivered"]:
            named = (f"{site} (refused: {code})" if code else site for site, code in run["undelivered"].items())
            words += f", not yet by {', '.join(named)}"
    return f"{words}; {printable(run['reason'])}" if run["reason"] else words


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count / 1e3:.1f} kB"
