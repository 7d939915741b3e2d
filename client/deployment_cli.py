"""`fedcanvas client start`, `stop`, `status`, `models`, `trust`, `doctor`, `leave`: a site at work in a federation.

The commands stand in the group of `client.cli`. Not here: what they do (`client.deployment`, `client.status`,
`client.delivery`, `client.network`, `client.doctor`, `client.leaving`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.cli import AsJson, Foreground, LogForm, group_command, printable, say, warn
from shared.errors import UsageError
from shared.progress import StepProgress

if TYPE_CHECKING:
    from client.status import Connection

commands = typer.Typer()

Site = Annotated[Path, typer.Argument(metavar="SITE_DIR", hidden=True)]


@group_command(commands, "start", "answer the federation that was joined, from now on")
def start(
    site_dir: Site,
    foreground: Foreground = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="In the foreground: lines go to the logs in SITE_DIR/logs only.")
    ] = False,
    log_format: LogForm = "text",
) -> None:
    """Keep the two processes of SITE_DIR running: Flower's node, which alone has a connection, and the worker.

    First everything is looked at that would keep the site from answering. Whether the operator has admitted it, only
    the server knows: `fedcanvas client status` tells what the server said to the node.
    """
    from client.deployment import check_can_start, run_here
    from client.deployment import start as start_detached

    for words in check_can_start(site_dir):
        warn(words)
    if foreground:
        run_here(site_dir, form=log_format, aloud=not quiet)
        return
    say("starting")
    connection = start_detached(site_dir, form=log_format)
    _print([
        f"{site_dir} is started; its logs are in {site_dir / 'logs'}",
        f"  server  {_connection_words(connection)}",
        f"  next    fedcanvas client status {shlex.quote(str(site_dir))}",
    ])  # fmt: skip


@group_command(commands, "stop", "end the site's two processes")
def stop(site_dir: Site) -> None:
    """End the processes of SITE_DIR. A message that is being answered is ended first, for up to a minute.

    Where systemd keeps the site, stop its unit instead: systemd would start it again.
    """
    from client.settings import SiteConfig
    from shared.supervisor import stop as stop_supervisor

    SiteConfig.read(site_dir)
    say("stopping")
    _print([f"{site_dir} is stopped" if stop_supervisor(site_dir) else f"{site_dir} was not started"])


@group_command(commands, "status", "is it up, connected, at work; what was answered and what waits")
def status(site_dir: Site, as_json: AsJson = False) -> None:
    """Say how SITE_DIR does: processes, the node's connection, work, budget, and what waits for a person."""
    from client.status import site_status

    about = site_status(site_dir)
    if as_json:
        _print_json(about)
    else:
        _print(_status_lines(site_dir, about))


@group_command(commands, "models", "trained models that came back from runs, and how to draw with them")
def models(site_dir: Site, as_json: AsJson = False) -> None:
    """List the trained models that SITE_DIR received: run, time, what each says it cost, where it lies.

    The SHA-256 is that of the operator's own model.json, and of every other site's, where all have the same model. Of a
    model whose folder was removed the operator has the confirmation already: it does not come again by itself.
    """
    from client.delivery import received_models
    from client.settings import SiteConfig

    SiteConfig.read(site_dir)
    found = received_models(site_dir)
    commands_of = [f"fedcanvas generate {shlex.quote('A PROMPT')} --model {shlex.quote(str(one.folder))}"
                   for one in found]  # fmt: skip
    if as_json:
        _print_json({
            "site": str(site_dir),
            "models": [
                {**vars(one), "folder": str(one.folder), "command": command}
                for one, command in zip(found, commands_of, strict=True)
            ],
        })  # fmt: skip
        return
    lines = [] if found else [f"no model has come to {site_dir} yet: one comes when a run that it took part in is over"]
    for one, command in zip(found, commands_of, strict=True):
        when = f"received {_time(one.received)}" if one.received else "received at a time that is not noted"
        lines.append(f"run {one.run} of {one.federation or 'an unknown federation'}, {when}")
        if not one.whole:
            lines.append(f"  damaged     {one.folder}: its files are not those that its model.json names")
            continue
        lines += [
            f"  cost        epsilon {one.epsilon:.4g} at delta {one.delta:.0e} for one {one.unit} at a site, at most:"
            " it says so itself",
            f"  sha256      {one.sha256}, of model.json",
            f"  files       {one.folder}",
            f"  pictures    {command}",
        ]
    _print(lines)


@group_command(commands, "trust", "an institution's own authority, where it opens TLS at its border")
def trust(
    site_dir: Site,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", hidden=True)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Trust the federation's authority alone again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Trust the authorities in FILE (PEM) beside the federation's own, from the next start on, instead of earlier ones.

    Only where the institution's TLS inspection cannot be told to let the federation's server through. Whoever holds
    such an authority can read instructions and stand in for server and node on the way; it can neither read replies
    nor make one, nor an instruction that is answered.
    """
    from client.network import also_trust, trust_no_other
    from client.settings import SiteConfig

    SiteConfig.read(site_dir)
    if remove == (file is not None):
        raise UsageError("name a FILE, or --remove", hint="`fedcanvas client trust --help` explains both")
    if file is None:
        was = trust_no_other(site_dir)
        if as_json:
            _print_json({"removed": was})
        else:
            _print(["the federation's authority alone is trusted" + ("" if was else ", as before")])
        return
    found = also_trust(site_dir, file)
    if as_json:
        _print_json({"trusted": [vars(authority) for authority in found]})
        return
    _print([
        *(f"trusted too: {one.name}, until {one.ends}, SHA-256 {one.sha256}" for one in found),
        f"from the next start on; `fedcanvas client doctor {shlex.quote(str(site_dir))}` tells whether it is met",
    ])  # fmt: skip


@group_command(commands, "doctor", "everything that could be wrong, looked at; and what to do")
def doctor(
    site_dir: Site,
    skip_data: Annotated[
        bool, typer.Option("--skip-data", help="Do not open the data: decoding may take long.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at everything of SITE_DIR that could keep it from answering: its files, its clock, the way to the server.

    Exit code 0 when nothing failed, else that of the first failure. Nothing that depends on the data is sent.
    """
    from client.doctor import examine

    found = []
    for finding in examine(site_dir, with_data=not skip_data, progress=StepProgress("decoding pictures")):
        found.append(finding)
        if not as_json:
            _print([f"{finding.state:<8} {finding.check:<12} {finding.words}"])
            if finding.next:
                _print([f"{'':<21} -> {finding.next}"])
    failed = [finding for finding in found if finding.state == "failed"]
    if as_json:
        _print_json({"site": str(site_dir), "findings": [vars(finding) for finding in found], "failed": len(failed)})
    if failed:
        raise typer.Exit(failed[0].code)


@group_command(commands, "leave", "give up the membership: its keys go, the account of the records stays")
def leave(
    site_dir: Site, yes: Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Leave the federation with SITE_DIR: end its processes, remove its keys and what else belongs to the membership.

    The ledger stays, and so do receipts, policy, decisions and data. A leaving that was cut off is ended by leaving
    again; to come back the site joins anew, with new keys.
    """
    from client.leaving import leave as leave_federation
    from client.leaving import may_be_deleted, membership
    from client.settings import SiteConfig

    config, known = SiteConfig.read(site_dir), membership(site_dir)
    ledger = (site_dir / config.store / config.lineage / "ledger.jsonl").resolve()
    whose = f"federation {known.federation}" if known.federation else "its federation"
    if known.names:
        say(f"site {config.site_id} leaves {whose}: its keys are removed and cannot be had back")
        if not yes and not typer.confirm("leave?", default=False, err=True):
            raise UsageError("nothing was changed", hint="--yes leaves without asking")
    leave_federation(site_dir)
    deletable = may_be_deleted(site_dir)
    if as_json:
        _print_json({
            "site": str(site_dir), "site_id": config.site_id, "federation": known.federation or None,
            "fingerprint": known.fingerprint or None, "removed": known.names, "ledger": str(ledger),
            "may_be_deleted": list(deletable),
        })  # fmt: skip
        return
    if not known.names:
        _print([f"site {config.site_id} belongs to no federation; nothing was changed"])
        return
    quoted = shlex.quote(str(site_dir))
    keys = f" (its keys were {known.fingerprint})" if known.fingerprint else ""
    _print([
        f"site {config.site_id} has left {whose}; removed from {site_dir}: {', '.join(known.names)}",
        "what remains to be done:",
        f"  tell the operator: `fedcanvas server revoke DIR {config.site_id}` ends the site's part there{keys}",
        *([f"  if runs are open: fedcanvas client ledger {quoted} --leave-federation {known.federation}"]
          if known.federation else []),
        f"  take it out of `federations` in {site_dir / 'policy.toml'}, and disable a systemd unit of this site",
        "what must stay as long as the data exist:",
        f"  {ledger}: what was spent on these records is spent for ever, and without it would be spent again",
        f"  {site_dir}: site.toml, anchor*.json, policy.toml, runs/, refusals.jsonl, site.log",
        *(["what can be deleted:"] if deletable else []),
        *(f"  {place}: {what}" for place, what in deletable.items()),
    ])  # fmt: skip


def _status_lines(site_dir: Path, about: dict[str, Any]) -> list[str]:
    from client.status import Connection

    where = f"of federation {about['federation']} at {about['address']}" if about["federation"] else "of no federation"
    lines, quoted = [f"site {about['site_id']} {where}"], shlex.quote(str(site_dir))
    if about["started"]:
        supervisor = about["supervisor"]
        lines.append(f"  supervisor  up since {_time(supervisor['since'])}, process {supervisor['pid']}")
        lines += [f"  {name:<10}  {_program_words(program)}" for name, program in about["programs"].items()]
        lines.append(f"  server      {_connection_words(Connection(**about['connection']))}")
        lines.append(f"  work        {_work_words(about)}")
    else:
        lines.append(f"  not started: `fedcanvas client start {quoted}`")
    if about["account_error"]:
        lines.append(f"  ledger      {about['account_error']}")
    else:
        lines += [
            f"  answered    {_answered_words(answered)}" for answered in about["answered"]
        ] or ["  answered    nothing yet"]  # fmt: skip
    codes = ", ".join(f"{count:,} x {code}" for code, count in about["refused"]["by_code"].items())
    if codes:
        newest = "".join(
            f"; last {one['code']} to run {one['run']}, {_time(one['time'])}" for one in about["refused"]["last"][-1:]
        )
        lines.append(f"  refused     {codes}{newest}")
    if about["epsilon"]:
        budget = about["epsilon"]
        lines.append(
            f"  epsilon     {budget['spent']:.4g} spent, {budget['reserved']:.4g} reserved of {budget['ceiling']:g} at"
            f" delta {budget['delta']:.0e}, for lineage {budget['lineage']}; {budget['left']:.4g} left"
        )
    incidents = about["incidents"]
    last = f"; last: {incidents['last']}" if incidents["last"] else ""
    lines.append(f"  incidents   {incidents['count']:,}{last}")
    for run in about["waiting"]:
        lines.append(f"run {run} waits for your decision: fedcanvas client runs {quoted}")
    return lines


def _program_words(program: dict[str, Any]) -> str:
    up = "down, to be started again"
    if program["pid"]:
        up = f"up since {_time(program['since'])}, process {program['pid']}"
    if not program["ended"]:
        return up
    return f"{up}; started {program['starts']:,} times, it ended last {program['ended']}"


def _connection_words(connection: Connection) -> str:
    since = f" since {_time(connection.since)}" if connection.since else ""
    return f"{connection.state}{since}: {connection.words}"


def _work_words(about: dict[str, Any]) -> str:
    worker, charged = about["worker"], about["charged"]
    if worker is None:
        return "none: the worker is not up"
    if not worker["answers"]:
        return f"idle since {_time(worker['since'])}"
    what = f"; charged is round {charged['server_round']} of run {charged['run']}" if charged else ""
    return f"answers a message since {_time(worker['since'])} ({worker['answers']}){what}"


def _answered_words(answered: dict[str, Any]) -> str:
    again = ", the same bytes again" if answered["again"] else ""
    return f"round {answered['server_round']} of run {answered['run']}, charged {_time(answered['charged'])}{again}"


def _time(iso: str) -> str:
    return f"{iso[:16].replace('T', ' ')} UTC" if iso else "a moment ago"


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(printable(line))


def _print_json(content: dict[str, Any]) -> None:
    from shared.plain import plain

    typer.echo(json.dumps(plain(content), ensure_ascii=False, allow_nan=False))
