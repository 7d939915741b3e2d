"""`fedcanvas client`: what the institution that owns the data decides and sees, in its own files.

    init, join, check-data      a site and its lineage of records, begun; its keys for a federation
    policy, runs, approve, deny what may happen here, and what a person decides
    ledger, receipts            what was spent, and what left
    start, stop, status         a site at work; with models, trust, doctor, leave in `client.deployment_cli`

Results go to standard output and are for the person at the site: counts of records among them never leave otherwise.
No command here opens a connection. Not here: the figures themselves (`client.spending`, `client.data_check`), the page
for a data-protection officer (`client.receipts`), and answering (`client.app`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from client.deployment_cli import commands
from shared.cli import AsJson, group_command, new_group, say, warn
from shared.errors import ConfigError, FedCanvasError, LedgerError, PrivacyError, UsageError
from shared.progress import StepProgress

if TYPE_CHECKING:
    from client.account import ProposedRun, SiteAccount
    from client.data_check import DataFigures
    from client.policy import SitePolicy
    from client.settings import SiteConfig
    from client.spending import RunFigures, Totals
    from shared.data import ImageCaptionDataset
    from shared.privacy.budget import Lifetime
    from shared.privacy.ledger import Ledger

NO_FEDERATION = "none: asked here"  # of a question that a person at the site asked
TERMS_DIGITS = 12

client = new_group(
    "What the institution that owns the data decides and sees: its site, its policy, its ledger, its receipts."
    " Everything is read from the site's own folder; `start` alone connects to a federation."
)
client.add_typer(commands)

Site = Annotated[Path, typer.Argument(metavar="SITE_DIR", hidden=True)]
Run = Annotated[str, typer.Argument(metavar="RUN", hidden=True)]
Overlaps = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LINEAGE", help="A lineage that holds some of these records too; each run is charged in both. Several."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask; for scripts.")]


# ---- beginning


@group_command(client, "init", "begin a site: settings, policy, and the ledger of its records")
def init(
    site_dir: Site,
    data: Annotated[Path, typer.Option(help="Captioned images: a folder or an .npz.", show_default=False)] = ...,  # type: ignore[assignment]
    lineage: Annotated[str, typer.Option(help="Name of these records, for their lifetime.", show_default=False)] = ...,  # type: ignore[assignment]
    max_epsilon: Annotated[
        float, typer.Option(help="All runs together, for ever.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    delta: Annotated[
        float, typer.Option(help="Of the lifetime; below 1 / units, better a tenth of that.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    site_id: Annotated[str | None, typer.Option(help="Name of the site in messages.  [default: the folder's]")] = None,
    unit: Annotated[
        Literal["example", "subject"] | None,
        typer.Option(help="What is protected.  [default: subject where the data have a subject_id, else example]"),
    ] = None,
    account_filter: Annotated[
        Literal["sum", "renyi"], typer.Option("--filter", help="How runs add up; fixed for the lineage's lifetime.")
    ] = "sum",
    order: Annotated[float | None, typer.Option(help="Of the Renyi filter.  [default: the best one]")] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of all ledgers of this machine.  [default: ~/.local/state/fedcanvas/lineages]"),
    ] = None,
    published_records: Annotated[
        int | None, typer.Option(help="Units as they may be told.  [default: rounded up to two digits]")
    ] = None,
    slot_seconds: Annotated[float, typer.Option(help="Answers leave at the end of such a time slot.")] = 10.0,
    shares_records_with: Overlaps = None,
    as_json: AsJson = False,
) -> None:
    """Begin a site in SITE_DIR: its settings, its policy, and the ledger of its records.

    The data stay where they are and are opened once, to count them and to see whether another lineage on this machine
    holds some of the records already. Either everything is written or nothing.
    """
    table, lines = _begin(
        site_dir, data, lineage=lineage, max_epsilon=max_epsilon, delta=delta, site_id=site_id, unit=unit,
        account_filter=account_filter, order=order, store=store, published_records=published_records,
        slot_seconds=slot_seconds, overlaps=list(dict.fromkeys(shares_records_with or [])),
    )  # fmt: skip
    if as_json:
        _print_json(table)
    else:
        _print(lines)


def _begin(
    site_dir: Path, data: Path, *, lineage: str, max_epsilon: float, delta: float, overlaps: Sequence[str],
    site_id: str | None = None, unit: Literal["example", "subject"] | None = None,
    account_filter: Literal["sum", "renyi"] = "sum", order: float | None = None, store: Path | None = None,
    published_records: int | None = None, slot_seconds: float = 10.0, federations: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """A new site; what there is to tell about it, for a program and for a person."""
    from client.account import default_store
    from client.data_check import advice, choose_unit, data_figures, open_as_training, rounded_up
    from client.enrolment import (
        check_declared,
        check_sharing,
        create_site,
        has_ledger,
        record_digests,
        store_locked,
        whole_or_nothing,
    )
    from client.policy import SitePolicy
    from client.settings import RELEASE_CODE, SETTINGS, SiteConfig
    from shared.privacy.accounting import best_renyi_order
    from shared.privacy.budget import Lifetime
    from shared.privacy.ledger import Lineage

    if (site_dir / SETTINGS).exists():
        raise ConfigError(f"{site_dir} holds a site already", hint="name a new folder, or edit its site.toml")
    if site_dir.exists() and not site_dir.is_dir():
        raise UsageError(f"{site_dir} is a file", hint="name a folder for the site; it is made when it is not there")
    site_id = _name("--site-id", site_id if site_id is not None else site_dir.resolve().name)
    lineage = _name("--lineage", lineage)
    if not (0 < max_epsilon < math.inf):
        raise UsageError(f"--max-epsilon: {max_epsilon:g} is no finite number above 0", hint="8 is usual, 1 is strong")
    if not 0 < delta < 1:
        raise UsageError(f"--delta: {delta:g} is not between 0 and 1", hint="a public constant such as 1e-6")
    if not 0 <= slot_seconds <= 3600:
        raise UsageError(f"--slot-seconds: {slot_seconds:g} is not between 0 and 3600", hint="10 is usual")
    if account_filter == "sum" and order is not None:
        raise UsageError("--order belongs to the Renyi filter", hint="--filter renyi, or leave the order out")
    if account_filter == "renyi" and order is None:
        order = best_renyi_order(max_epsilon, delta)
    lifetime = Lifetime(max_epsilon, delta, account_filter, order)
    store = (store or default_store()).absolute()
    place = store / lineage
    if place.exists() and not place.is_dir():
        raise UsageError(f"--lineage: {lineage} is the name of a file in {store}", hint="choose another name")

    for name in overlaps:
        check_declared(store, name, lineage=lineage)

    with whole_or_nothing(site_dir, place):
        site_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        dataset = open_as_training(data, cache_dir=site_dir / "cache", progress=StepProgress("decoding pictures"))
        figures = data_figures(dataset)
        chosen, why = choose_unit(figures, unit)
        units = figures.units(chosen)
        words = "subjects" if chosen == "subject" else "records"
        if delta * units >= 1:
            raise PrivacyError(
                f"delta {delta:.0e} is not below 1 / {units:,}, the {words} of this site",
                hint=f"at such a delta a mechanism may publish one {chosen} whole: --delta {_power_below(0.1 / units)}",
            )
        if published_records is not None and published_records < units:
            raise UsageError(
                f"--published-records: {published_records:,} is below the {units:,} {words} that are there",
                hint=f"round up: {rounded_up(units)}",
            )
        config = SiteConfig(
            site_id=site_id, data=str(data.resolve()), lineage=lineage, store=str(store),
            published_records=published_records or rounded_up(units), slot_seconds=slot_seconds,
        )  # fmt: skip
        policy = SitePolicy(
            max_epsilon=max_epsilon, delta=delta, unit=chosen, code=[RELEASE_CODE], federations=list(federations)
        )
        with store_locked(store):
            digests = record_digests(dataset, store)
            shared = check_sharing(digests, store, lineage=lineage, declared=overlaps)
            joined = has_ledger(place)
            ledger = create_site(
                site_dir, config, policy, Lineage(lineage, chosen, lifetime), digests=digests, overlaps=overlaps
            )
    for name in overlaps:
        count = shared.get(name, 0)
        say(f"lineage '{name}' shares {count:,} pictures as far as pixels tell; each run is charged in both")
    for line in advice(figures, unit=chosen, delta=delta):
        warn(line)
    table = {
        "site": str(site_dir), "site_id": site_id, "lineage": lineage, "ledger": str(ledger.path), "unit": chosen,
        "unit_because": why, "units": units, "published_records": config.published_records, "joined": joined,
        "lifetime": _lifetime_dict(ledger.lineage.lifetime), "shared": shared,
    }  # fmt: skip
    counts = ledger.lineage.lifetime
    lines = [
        f"site {site_id} is ready in {site_dir}",
        f"  data       {config.data}: {figures.records:,} records, {figures.captions:,} captions"
        + (f", {figures.subjects:,} subjects" if figures.subjects else ""),
        f"  unit       {chosen}: {why}",
        f"  lineage    {lineage}, {'joined: its ledger goes on' if joined else 'new'}: {ledger.path}",
        f"  lifetime   epsilon {counts.max_epsilon:g} at delta {counts.delta:.0e} for all runs together,"
        f" {_filter_words(counts)}",
        f"  published  {config.published_records:,} {words}: this figure is treated as public, and the true one never"
        " leaves the site",
        f"  policy     {site_dir / 'policy.toml'}: each run waits for a person's approval",
    ]
    if joined and counts != lifetime:
        lines.append(f"             the lineage keeps its own lifetime; this site's policy says {max_epsilon:g}, the"
                     " lower one counts")  # fmt: skip
    quoted = shlex.quote(str(site_dir))
    lines += [
        "next:",
        f"  fedcanvas client check-data {quoted}    a closer look at the data",
        f"  fedcanvas client policy {quoted}        what a federation may do here; edit policy.toml to change it",
        f"  fedcanvas client runs {quoted}          runs that were proposed, once a federation asks",
        "Keep a copy of the ledger after each run (`fedcanvas client ledger SITE_DIR --export FILE`); never put an old"
        " one back.",
    ]
    return table, lines


@group_command(client, "join", "begin a site for a federation, from the kit that its operator sent")
def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", hidden=True)],
    site_dir: Site,
    data: Annotated[Path | None, typer.Option(help="As of `init`; for a new site.", show_default=False)] = None,
    lineage: Annotated[str | None, typer.Option(help="As of `init`; for a new site.", show_default=False)] = None,
    max_epsilon: Annotated[float | None, typer.Option(help="As of `init`; for a new site.", show_default=False)] = None,
    delta: Annotated[float | None, typer.Option(help="As of `init`; for a new site.", show_default=False)] = None,
    store: Annotated[Path | None, typer.Option(help="As of `init`.", show_default=False)] = None,
    unit: Annotated[
        Literal["example", "subject"] | None, typer.Option(help="As of `init`; for a new site.", show_default=False)
    ] = None,
    published_records: Annotated[
        int | None, typer.Option(help="As of `init`; for a new site.", show_default=False)
    ] = None,
    slot_seconds: Annotated[float, typer.Option(help="As of `init`; for a new site.")] = 10.0,
    shares_records_with: Overlaps = None,
    also_trust: Annotated[
        Path | None, typer.Option(help="PEM of an institution's own authority: `client trust`.", show_default=False)
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Join the federation whose KIT its operator sent, with a new site in SITE_DIR or one that is there.

    Asks whether the fingerprint is the one that the operator tells you another way, makes the site's own keys, which
    never leave it, and writes SITE_DIR/request.json for the operator. Nothing is sent by itself. Where the environment
    names a file FEDCANVAS_PASSPHRASE_FILE, its first line encrypts the signing key; then it has to name it for
    `client start`, `doctor` and `leave` as well.
    """
    from client.joining import join as join_federation
    from client.network import also_trust as trust_too
    from client.policy import FILE as POLICY
    from client.settings import SETTINGS, SiteConfig
    from shared.protection.kit import read_kit

    found = read_kit(kit)
    known = found.federation
    say(f"this kit is of federation '{known.name}' at {known.address}, for site {found.site}")
    say(f"fingerprint: {known.fingerprint}")
    if not yes and not typer.confirm("does the operator read out the same?", default=False, err=True):
        raise UsageError("nothing was joined", hint="ask for a new kit, by a way that you trust; --yes does not ask")
    if not (site_dir / SETTINGS).exists():
        wanted = {"--data": data, "--lineage": lineage, "--max-epsilon": max_epsilon, "--delta": delta}
        if missing := [name for name, value in wanted.items() if value is None]:
            raise UsageError(f"there is no site in {site_dir} yet, and a new one needs {', '.join(missing)}",
                             hint="`fedcanvas client init --help` explains them")  # fmt: skip
        assert data is not None
        assert lineage is not None
        assert max_epsilon is not None
        assert delta is not None
        _, lines = _begin(
            site_dir, data, lineage=lineage, max_epsilon=max_epsilon, delta=delta, site_id=found.site, store=store,
            unit=unit, published_records=published_records, slot_seconds=slot_seconds,
            overlaps=list(dict.fromkeys(shares_records_with or [])), federations=[known.name],
        )  # fmt: skip
        if not as_json:
            _print([*lines[: lines.index("next:")], ""])
    site_id = SiteConfig.read(site_dir).site_id
    if site_id != found.site:
        raise UsageError(
            f"the kit is for site {found.site}, and {site_dir} is site {site_id}",
            hint="ask the operator for a kit of that name, or make another site",
        )
    if also_trust is not None:
        for authority in trust_too(site_dir, also_trust):
            say(f"trusted beside the federation's authority: {authority.name}, SHA-256 {authority.sha256}")
    made = join_federation(site_dir, found, site_id=site_id)
    if as_json:
        _print_json({"site": str(site_dir), "site_id": site_id, "federation": known.name, "request": str(made.request),
                     "federation_fingerprint": known.fingerprint, "fingerprint": made.keys.fingerprint})  # fmt: skip
        return
    _print([
        f"site {site_id} has its keys for federation {known.name}",
        f"  send         {made.request} to the operator; nothing in it is secret",
        f"  read out     {made.keys.fingerprint}",
        f"  policy       {site_dir / POLICY}: what the federation may do here",
    ])  # fmt: skip


@group_command(client, "check-data", "open the data as training would, and say what is there")
def check_data(
    site_dir: Annotated[Path, typer.Argument(metavar="SITE_DIR|DATA", hidden=True)],
    image_size: Annotated[
        Literal["8", "28", "32", "64"], typer.Option(help="Side of the pictures, as the federation asks for.")
    ] = "32",
    channels: Annotated[Literal["1", "3"], typer.Option(help="1 = grey, 3 = colour.")] = "3",
    shares_records_with: Overlaps = None,
    as_json: AsJson = False,
) -> None:
    """Open the data of SITE_DIR, or of a folder or file, as training would, and say what is there.

    The figures are for the person at the site. With SITE_DIR the decoded pictures are kept in the site's cache, so that
    the first round need not wait for them, and records that came since are added to the lineage.
    """
    import tempfile

    from client.data_check import advice, choose_unit, data_figures, open_as_training
    from client.settings import SETTINGS

    size, depth = int(image_size), int(channels)
    if not (site_dir / SETTINGS).is_file():
        if shares_records_with:
            raise UsageError("--shares-records-with is about a site's lineage", hint="name the folder of a site")
        # No trace of the pictures beside data that belong to no site yet.
        with tempfile.TemporaryDirectory(prefix="fedcanvas-check-") as folder:
            progress = StepProgress("decoding pictures")
            dataset = open_as_training(
                site_dir, cache_dir=Path(folder), image_size=size, channels=depth, progress=progress
            )
            figures = data_figures(dataset)
        unit, why = choose_unit(figures, None)
        found = advice(figures, unit=unit, delta=None)
        if as_json:
            _print_json({"data": str(site_dir), "unit": unit, **figures.to_dict(), "advice": found})
            return
        units = figures.units(unit)
        lines = _figure_lines(figures)
        lines.append(f"unit               {unit}: {why}")
        lines.append(f"delta              below 1 / {units:,}; a usual choice is {_power_below(0.1 / units)} or less")
        _print([*lines, *(f"note: {line}" for line in found)])
        return

    config, account = _open(site_dir)
    if config.indices is not None:
        raise UsageError(f"{site_dir} uses only some rows of its data", hint=f"check the data itself: {config.data}")
    cache = site_dir / config.cache_dir
    usual = _open_data(config, site_dir, cache, 32, 3)  # digests are compared at this size, whatever runs ask for
    dataset = usual if (size, depth) == (32, 3) else _open_data(config, site_dir, cache, size, depth)
    figures = data_figures(dataset)
    ledger = account.ledger
    unit = "subject" if ledger.lineage.unit == "subject" else "example"
    choose_unit(figures, unit)
    added = 0
    if account.durable:
        added = _keep_digests(account, usual, declared=shares_records_with or [])
    found = advice(
        figures, unit=unit, delta=ledger.lineage.lifetime.delta, published_records=config.published_records
    )  # fmt: skip
    if as_json:
        about = {"site": str(site_dir), "unit": unit, "records_added_to_lineage": added}
        _print_json({**about, **figures.to_dict(), "advice": found})
        return
    lines = _figure_lines(figures)
    lines.append(f"lineage            {config.lineage}: {_added_words(added)}")
    lines.append(f"cache              {cache}: a run with pictures of {size} px decodes nothing")
    _print([*lines, *(f"note: {line}" for line in found)])


# ---- deciding


@group_command(client, "policy", "in words: what a federation may do here, and what never")
def policy(site_dir: Site, as_json: AsJson = False) -> None:
    """Say in words what a federation may do at SITE_DIR, and what never.

    The words are read from policy.toml; edit that file to change them.
    """
    from client.policy import SitePolicy
    from client.settings import RELEASE_CODE

    config, account = _open(site_dir)
    read = SitePolicy.read(site_dir)
    ledger = account.ledger
    counts = read.ceiling(ledger.lineage.lifetime)
    if as_json:
        _print_json({
            "site": str(site_dir), "policy": read.model_dump(by_alias=True), "installed_code": RELEASE_CODE,
            "ceiling": {
                "ledger": _lifetime_dict(ledger.lineage.lifetime), "policy": {"max_epsilon": read.max_epsilon,
                "delta": read.delta}, "counts": _lifetime_dict(counts),
            },
        })  # fmt: skip
        return
    *may, never = read.in_words()
    lifetime = ledger.lineage.lifetime
    lines = [f"site {config.site_id}, lineage {config.lineage}: what a federation may do here", ""]
    lines += [f"  - {line}" for line in may]
    lines.append(
        f"  - The ledger's own ceiling is epsilon {lifetime.max_epsilon:g} at delta {lifetime.delta:.0e}, the policy's"
        f" is {read.max_epsilon:g} at {read.delta:.0e}; the lower one counts. {_left_words(account, counts)}"
    )
    if read.code and RELEASE_CODE not in read.code:
        lines.append(
            f"  - NOTHING IS ANSWERED NOW: the installed code {RELEASE_CODE[:12]} is not in the policy's list. When you"
            f' trust this release, put "{RELEASE_CODE}" into `code` of policy.toml.'
        )
    if ledger.overlaps:
        lines.append(f"  - Each run is charged to lineages that share records too: {', '.join(ledger.overlaps)}.")
    lines += ["", never, ""]
    lines.append(f"To change what it may do, edit {site_dir / 'policy.toml'}")
    _print(lines)


@group_command(client, "runs", "runs that were proposed, and those that have begun")
def runs(site_dir: Site, as_json: AsJson = False) -> None:
    """List the runs that were proposed to SITE_DIR, and those that have begun.

    A run that waits for a decision is shown with what it asks for, and the command that approves exactly that.
    """
    _, account = _open(site_dir)
    begun, proposed = _begun(account.ledger), {run.run: run for run in account.all_proposed()}
    rows: list[dict[str, Any]] = []
    for name, figures in begun.items():
        asked = proposed[name].asked if name in proposed else figures.began
        rows.append({
            "run": name, "federation": figures.federation, "state": figures.state, "asked": asked,
            "epsilon_reserved": figures.epsilon_reserved, "epsilon_spent": figures.epsilon_spent,
            "delta": figures.delta, "steps": figures.steps, "steps_reserved": figures.steps_reserved,
            "through": figures.through, "closed": figures.closed, "summary": [], "terms": None,
        })  # fmt: skip
        if name in proposed:
            rows[-1].update(summary=proposed[name].summary, terms=_terms(proposed[name]))
    for name, run in proposed.items():
        if name not in begun:
            rows.append({
                "run": name, "federation": run.federation, "state": run.decision, "asked": run.asked,
                "epsilon_reserved": 0.0, "epsilon_spent": 0.0, "delta": None, "steps": 0, "steps_reserved": 0,
                "through": "", "closed": None, "summary": run.summary, "terms": _terms(run),
            })  # fmt: skip
    if as_json:
        _print_json({"site": str(site_dir), "left": _left_dict(account), "runs": rows})
        return
    if not rows:
        _print([f"no run was proposed here yet. {_left_words(account)}"])
        return
    table = [["run", "federation", "state", "epsilon reserved", "spent", "steps", "asked"]]
    for row in rows:
        steps = f"{row['steps']} of {row['steps_reserved']}" if row["run"] in begun else "-"
        reserved = f"{row['epsilon_reserved']:.4g}" if row["run"] in begun else "-"
        table.append([row["run"], row["federation"] or NO_FEDERATION, row["state"], reserved,
                      f"{row['epsilon_spent']:.4g}", steps, row["asked"][:16].replace("T", " ")])  # fmt: skip
    lines = [*_aligned(table), "", _left_words(account)]
    quoted = shlex.quote(str(site_dir))
    for row in rows:
        if row["state"] == "pending":
            lines += ["", f"run {row['run']} waits for your decision:"]
            lines += [f"  - {line}" for line in row["summary"]]
            lines.append(f"  fedcanvas client approve {quoted} {row['run']} --terms {row['terms']}")
            lines.append(f"  fedcanvas client deny {quoted} {row['run']}")
    _print(lines)


@group_command(client, "approve", "let a proposed run begin")
def approve(
    site_dir: Site,
    run: Run,
    terms: Annotated[
        str | None,
        typer.Option(help="As `client runs` shows it: approves exactly what you have read.", show_default=False),
    ] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Approve RUN, so that it begins when its federation asks again.

    Approved are the settings and prompts that were proposed: a run of the same name with others is another run, and
    waits again. Without --terms you are shown what the run asks for, and asked.
    """
    _, account = _open(site_dir)
    shown = _proposed(account, run)
    _refuse_begun(account, shown.run)
    if terms is None and not yes:
        for line in shown.summary:
            say(_printable(f"  - {line}"))
        say(_left_words(account))
        _confirm("approve", f"to approve run {run}, type: approve")
        terms = _terms(shown)
    with account.locked():
        # Read again under the lock: the federation may have proposed something else since it was shown.
        now = _proposed(account, run)
        _refuse_begun(account, run)
        if terms is not None and not _terms(now).startswith(terms.lower()):
            raise UsageError(
                f"run {run} asks for other terms than {terms}: they are {_terms(now)}",
                hint=f"read them again: fedcanvas client runs {shlex.quote(str(site_dir))}",
            )
        decided = account.decide(run, "approved")
    if as_json:
        _print_json({"run": run, "decision": decided.decision, "terms": _terms(decided)})
        return
    lines = [f"run {run} of {decided.federation} is approved: terms {_terms(decided)}"]
    lines += [f"  - {line}" for line in decided.summary]
    _print([*lines, "It begins when the federation asks again. " + _left_words(account)])


@group_command(client, "deny", "refuse a run, or close one that has begun")
def deny(
    site_dir: Site,
    run: Run,
    reason: Annotated[str, typer.Option(help="For the ledger; it does not leave the site.")] = "denied at the site",
    as_json: AsJson = False,
) -> None:
    """Deny RUN. A run that has begun is closed for ever, and nothing of what it reserved comes back."""
    _, account = _open(site_dir)
    begun = account.ledger.runs.get(run)
    proposed = account.proposed(run) if run in {p.run for p in account.all_proposed()} else None
    if begun is None and proposed is None:
        _proposed(account, run)
    if begun is not None and begun.closed is not None:
        raise UsageError(f"run {run} is closed already: {begun.closed}", hint="a closed run stays closed")
    with account.locked():
        if proposed is not None:
            account.decide(run, "denied")
        account.close(run, _printable(reason))
    if as_json:
        _print_json({"run": run, "decision": "denied", "closed": begun is not None})
        return
    if begun is None:
        _print([f"run {run} is denied: its federation gets the word `denied`, and no reason"])
    else:
        price = begun.price.epsilon
        _print([f"run {run} is closed: no more of it leaves. Its epsilon of {price:.4g} stays reserved."])


# ---- what was spent


@group_command(client, "ledger", "what was spent, reserved and left; verify, export")
def ledger(
    site_dir: Site,
    verify: Annotated[bool, typer.Option("--verify", help="Read every line again and say what was checked.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write a copy of the ledger to a new file.", show_default=False)
    ] = None,
    renew_anchor: Annotated[
        bool, typer.Option("--renew-anchor", help="Trust the ledger as it is, after the anchor was lost.")
    ] = False,
    raise_to: Annotated[
        float | None, typer.Option(help="Raise the lineage's lifetime epsilon.", show_default=False)
    ] = None,
    leave_federation: Annotated[
        str | None, typer.Option(metavar="NAME", help="Close all open runs of a federation.", show_default=False)
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept in the ledger.", show_default=False)] = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Show what SITE_DIR's lineage has spent, reserved and left, run by run.

    Damage, an older copy put back, or a lock that another process holds is said as it is; then nothing is answered
    until a person has mended it.
    """
    changes = [verify, export is not None, renew_anchor, raise_to is not None, leave_federation is not None]
    if sum(changes) > 1:
        raise UsageError("one thing at a time", hint="call the command once for each option")
    if reason is not None and raise_to is None and leave_federation is None:
        raise UsageError("--reason goes with --raise-to and --leave-federation", hint="leave it out")
    if renew_anchor:
        _renew_anchor(site_dir, yes=yes, as_json=as_json)
        return
    config, account = _open(site_dir)
    if verify:
        _verify(site_dir, account, as_json=as_json)
    elif export is not None:
        _export(account.ledger, export, as_json=as_json)
    elif raise_to is not None:
        _raise_ceiling(site_dir, account, raise_to, reason, yes=yes, as_json=as_json)
    elif leave_federation is not None:
        _leave_federation(site_dir, account, leave_federation, reason, as_json=as_json)
    else:
        _show_ledger(site_dir, config, account, as_json=as_json)


@group_command(client, "statement", "what a run spent here, signed, as a file")
def statement(
    site_dir: Site,
    run: Run,
    out: Annotated[Path, typer.Option(help="The file to write; it must be new.", show_default=False)] = ...,  # type: ignore[assignment]
    close: Annotated[
        bool, typer.Option("--close", help="First close the run for ever: the statement says that it is whole.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write what RUN spent at SITE_DIR, signed with the site's key: each charge, its noise, and the head of all.

    Nothing in it depends on records. It goes to the operator with the site's receipt of the trained model by itself,
    which closes the run; by hand it is needed where a site takes no models.
    """
    from client.delivery import MODELS
    from client.statement import spend_statement
    from shared.records import GENERATOR_FILE

    _, account = _open(site_dir)
    with account.locked():
        received = site_dir / MODELS / run / GENERATOR_FILE
        weights = hashlib.sha256(received.read_bytes()).hexdigest() if received.is_file() else ""
        content = spend_statement(site_dir, account.ledger, run, weights=weights)
        if close:  # once it is clear that the site can sign, and write it
            _check_place(out, replace=False)
            account.close(run, "its statement was signed")
            content = spend_statement(site_dir, account.ledger, run, weights=weights)
    _write(out, content, replace=False)
    if as_json:
        _print_json({"run": run, "statement": str(out), "closed": account.ledger.runs[run].closed is not None})
        return
    lines = [f"{out}: send it to the operator; it says {account.ledger.runs[run].charges:,} charges and nothing else"]
    if account.ledger.runs[run].closed is None:
        lines.append("The run is open here and may be charged again; once it is over, write another with --close.")
    _print(lines)


@group_command(client, "receipts", "every message that left, and a page for a data-protection officer")
def receipts(
    site_dir: Site,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write one page for a data-protection officer.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every message that left SITE_DIR: when, to whom, what was in it, what it cost.

    Receipts are derived from the ledger, so they hold the messages of all site folders with these records.
    """
    from client.spending import receipts as receipts_of
    from client.spending import refusals, totals

    config, account = _open(site_dir)
    found, refused = receipts_of(account.ledger), refusals(site_dir)
    if html is not None:
        from client.receipts import receipts_page

        page = receipts_page(site_dir, config, account.ledger, _ceiling(site_dir, account))
        _write(html, page.encode(), replace=True)
        say(f"{len(found):,} messages; the page needs no network: open it in a browser")
        if not as_json:
            _print([str(html)])
            return
    counted = totals(account.ledger, _ceiling(site_dir, account))
    if as_json:
        _print_json({
            "site": str(site_dir), "lineage": config.lineage, "unit": account.ledger.lineage.unit,
            "receipts": [receipt.to_dict() for receipt in found], "refusals": refused.entries,
            "refused": refused.by_code, "received": refused.received, "totals": _totals_dict(counted),
            **({"html": str(html)} if html else {}),
        })  # fmt: skip
        return
    table = [["charged (UTC)", "federation", "run", "round", "release", "bytes", "sha256", "charge", "epsilon of run"]]
    for receipt in found:
        table.append([
            receipt.time[:19].replace("T", " "), receipt.federation or NO_FEDERATION, receipt.run,
            str(receipt.server_round), f"{receipt.kind}{', again' if receipt.again else ''}", f"{receipt.bytes:,}",
            receipt.sha256[:12],
            f"{receipt.charge:.4g}", f"{receipt.epsilon_before:.4g} -> {receipt.epsilon_after:.4g}",
        ])  # fmt: skip
    lines = _aligned(table) if found else ["nothing has left this site"]
    size = sum(receipt.bytes for receipt in found)
    again = sum(receipt.again for receipt in found)
    lines += ["", f"messages   {len(found):,}, {size:,} bytes in all; {again:,} were the same bytes again, at no cost"]
    lines += _totals_lines(counted)
    codes = ", ".join(f"{count:,} x {code}" for code, count in refused.by_code.items()) or "none"
    lines.append(f"refusals   {codes}; a refusal is a code and nothing else")
    if refused.received:
        names = ", ".join(dict.fromkeys(str(entry["run"]) for entry in refused.received))
        lines.append(f"models     {len(refused.received):,} x received, a code and nothing else; of {names}")
    if refused.incidents:
        lines.append(f"incidents  {refused.incidents:,} in {site_dir / 'site.log'}")
    _print(lines)


# ---- parts of `ledger`


def _show_ledger(site_dir: Path, config: SiteConfig, account: SiteAccount, *, as_json: bool) -> None:
    from client.spending import run_figures, totals
    from shared.privacy.accounting import ADJACENCY

    opened, lineage = account.ledger, account.ledger.lineage
    counted, figures = totals(opened, _ceiling(site_dir, account)), run_figures(opened)
    if as_json:
        _print_json({
            "site": str(site_dir), "lineage": lineage.name, "unit": lineage.unit, "adjacency": ADJACENCY,
            "simulated": lineage.simulated, "ledger": str(opened.path), "lines": len(opened.entries),
            "head": opened.head, "overlaps": opened.overlaps, "lifetime": _lifetime_dict(lineage.lifetime),
            "runs": [vars(figure) for figure in figures], "totals": _totals_dict(counted),
        })  # fmt: skip
        return
    lines = [
        f"lineage {lineage.name}: {_lines_words(len(opened.entries))} in {opened.path}",
        f"unit {lineage.unit}, adjacency {ADJACENCY} one {lineage.unit}, {_filter_words(lineage.lifetime)}"
        + (", SIMULATED" if lineage.simulated else ""),
        "",
    ]
    if figures:
        table = [["run", "federation", "state", "epsilon reserved", "spent", "at delta", "steps charged", "releases"]]
        table += [_run_row(figure) for figure in figures]
        lines += [*_aligned(table), ""]
    else:
        lines += ["no run has begun", ""]
    lines += _totals_lines(counted)
    lines.append(
        f"composed   epsilon {counted.composed.epsilon:.4g} at delta {counted.composed.delta:.0e}, of everything"
        " charged taken together: shown, never used to admit"
    )
    if counted.composed.fallback:
        lines.append(f"           {counted.composed.fallback}")
    if opened.overlaps:
        lines.append(f"overlaps   each run is charged to these lineages too: {', '.join(opened.overlaps)}")
    _print(lines)


def _run_row(figure: RunFigures) -> list[str]:
    unsampled = f" + {figure.unsampled} unsampled" if figure.unsampled else ""
    state = f"{figure.state}, through {figure.through}" if figure.through else figure.state
    return [
        figure.run, figure.federation or NO_FEDERATION, state, f"{figure.epsilon_reserved:.4g}",
        f"{figure.epsilon_spent:.4g}", f"{figure.delta:.1e}",
        f"{figure.steps:,} of {figure.steps_reserved:,}{unsampled}", f"{figure.releases:,}",
    ]  # fmt: skip


def _verify(site_dir: Path, account: SiteAccount, *, as_json: bool) -> None:
    """Opening a ledger is what checks it: whoever comes here has found each line whole."""
    replies = _check_replies(site_dir, account.ledger)
    lines, verified = [], []
    for each in account.ledgers:
        verified.append({"lineage": each.lineage.name, "lines": len(each.entries), "head": each.head})
        lines += [
            f"lineage {each.lineage.name}: {_lines_words(len(each.entries))} of {each.path} read; each has the hash"
            " that it states and follows the one before it",
            f"  head {each.head}",
        ]
    lines.append(f"the site's anchor, {site_dir / 'anchor.json'}, fits: no line that this site has seen is missing")
    lines.append(f"kept replies that have the SHA-256 that the ledger notes for them: {replies}")
    lines.append("What this cannot see: ledger and anchor put back together to an older state, or a cloned machine.")
    if as_json:
        _print_json({"verified": verified, "anchor": "fits", "replies": replies})
        return
    _print(lines)


def _check_replies(site_dir: Path, opened: Ledger) -> int:
    import hashlib

    from client.account import read_reply

    known = {entry["sha256"] for entry in opened.entries if entry["kind"] in ("commit", "resent")}
    count = 0
    for path in sorted((site_dir / "replies").glob("*.reply")):
        found = read_reply(path)
        if found is not None and hashlib.sha256(found[1].leaves).hexdigest() in known:
            count += 1
        else:
            warn(f"{path} is not what the ledger notes as sent: it was changed, or a crash came before it was noted")
    return count


def _export(opened: Ledger, file: Path, *, as_json: bool) -> None:
    content = opened.path.read_bytes()
    whole = content[: content.rindex(b"\n") + 1]  # a line that is being written now is no entry yet
    _write(file, whole, replace=False)
    lines = whole.count(b"\n")
    if as_json:
        _print_json({"export": str(file), "lines": lines, "bytes": len(whole)})
        return
    _print([f"{_lines_words(lines)} in {file}; the last one's hash is {whole.splitlines()[-1][9:73].decode()}"])


def _renew_anchor(site_dir: Path, *, yes: bool, as_json: bool) -> None:
    from client.account import ANCHOR
    from client.settings import SiteConfig, log
    from shared.privacy.ledger import Ledger

    config = SiteConfig.read(site_dir)
    place = site_dir / config.store / config.lineage
    opened = Ledger(place)  # damage is said, and nothing is renewed over it
    try:
        Ledger(place, anchor=site_dir / ANCHOR)
        before = "fits"
    except LedgerError as error:
        before = error.message
    if before == "fits":
        text = f"the anchor fits the ledger of {_lines_words(len(opened.entries))}: there is nothing to renew"
    else:
        warn(before)
        say(
            "The anchor is what tells an older ledger from this one. Once renewed, the ledger counts as it is now: what"
            " was spent in entries that it lacks is forgotten, and the records are protected less than is written."
        )
        say(f"The ledger has {_lines_words(len(opened.entries))}; the last is of {opened.entries[-1]['time']}.")
        if not yes:
            _confirm("renew", "to trust this ledger as it is, type: renew")
        opened.renew_anchor(site_dir / ANCHOR)
        text = f"the anchor is renewed: entry {len(opened.entries) - 1}, head {opened.head}"
        log(site_dir, f"incident: by hand, {text}")
    if as_json:
        _print_json({"renewed": before != "fits", "before": before, "head": opened.head})
        return
    _print([text])


def _raise_ceiling(
    site_dir: Path, account: SiteAccount, epsilon: float, reason: str | None, *, yes: bool, as_json: bool
) -> None:
    from dataclasses import replace

    from client.policy import SitePolicy

    now = account.ledger.lineage.lifetime
    if not epsilon > now.max_epsilon or math.isinf(epsilon):
        raise UsageError(
            f"--raise-to: {epsilon:g} is not above the lifetime epsilon {now.max_epsilon:g}",
            hint="the ledger's ceiling only rises; a lower one is set in policy.toml, where the lower of both counts",
        )
    if not reason:
        raise UsageError("missing --reason", hint="say why: it stays in the ledger beside the new ceiling")
    raised = replace(now, max_epsilon=epsilon)
    unit = account.ledger.lineage.unit
    say(
        f"This weakens what was promised to each {unit} of lineage '{account.lineage}', those included who agreed to"
        f" epsilon {now.max_epsilon:g}. It cannot be taken back, and it stays in the ledger for all time."
    )
    say(_guess_words(now.max_epsilon, epsilon, now.delta, unit))
    if not yes:
        _confirm(account.lineage, f"to raise it to {epsilon:g}, type the lineage's name: {account.lineage}")
    with account.locked():
        account.ledger.note("ceiling", reason=_printable(reason), **_lifetime_dict(raised))
    if as_json:
        _print_json({"lifetime": _lifetime_dict(account.ledger.lineage.lifetime), "reason": reason})
        return
    lines = [f"the lifetime epsilon of lineage {account.lineage} is {epsilon:g}, it was {now.max_epsilon:g}"]
    if (policy_epsilon := SitePolicy.read(site_dir).max_epsilon) < epsilon:
        lines.append(
            f"policy.toml still says {policy_epsilon:g}, and the lower one counts: edit {site_dir / 'policy.toml'} too"
        )
    _print(lines)


def _leave_federation(site_dir: Path, account: SiteAccount, name: str, reason: str | None, *, as_json: bool) -> None:
    proposed = [run for run in account.all_proposed() if run.federation == name and run.decision != "denied"]
    begun = [
        run for run in _begun(account.ledger).values()
        if run.federation == name and not run.through and run.state != "closed"
    ]  # fmt: skip
    if not proposed and not begun:
        known = {run.federation for run in account.all_proposed()}
        known |= {run.federation for run in _begun(account.ledger).values() if run.federation}
        raise UsageError(f"no open run of federation '{name}' is here", hint=f"known: {_listed(sorted(known))}")
    why = _printable(reason or f"left federation {name}")
    with account.locked():
        for run in proposed:
            account.decide(run.run, "denied")
        closed = [run.run for run in begun if account.close(run.run, _printable(why))]
    denied = [run.run for run in proposed if run.run not in closed]
    if as_json:
        _print_json({"federation": name, "closed": closed, "denied": denied})
        return
    lines = [
        f"federation {name}: closed {_listed(closed)}, denied {_listed(denied)}; nothing more of them leaves",
        "What they reserved stays reserved, and what has left cannot be called back.",
        f"A federation may ask again, under any name: take it out of `federations` in {site_dir / 'policy.toml'} where"
        " it stands there, and deny what it proposes.",
    ]
    _print(lines)


# ---- opening


def _open(site_dir: Path) -> tuple[SiteConfig, SiteAccount]:
    from client.status import open_account

    return open_account(site_dir)


def _open_data(config: SiteConfig, site_dir: Path, cache: Path, size: int, channels: int) -> ImageCaptionDataset:
    from client.data_check import open_as_training

    return open_as_training(
        site_dir / config.data, cache_dir=cache, image_size=size, channels=channels,
        progress=StepProgress("decoding pictures"),
    )  # fmt: skip


def _keep_digests(account: SiteAccount, dataset: ImageCaptionDataset, *, declared: Sequence[str]) -> int:
    """Adds what came since to the lineage's records; refused while another lineage holds some and nobody said so."""
    from client.enrolment import (
        add_records,
        check_sharing,
        declare_overlaps,
        other_lineage,
        record_digests,
        store_locked,
    )

    opened = account.ledger
    with store_locked(account.store):
        digests = record_digests(dataset, account.store)
        check_sharing(digests, account.store, lineage=account.lineage, declared=[*opened.overlaps, *declared])
        others = [other_lineage(account.store, name, opened.lineage) for name in dict.fromkeys(declared)]
        if others:
            declare_overlaps(opened, others)
        return add_records(opened, digests)


def _begun(opened: Ledger) -> dict[str, RunFigures]:
    from client.spending import run_figures

    return {figures.run: figures for figures in run_figures(opened)}


def _proposed(account: SiteAccount, run: str) -> ProposedRun:
    from shared.registry import nearest_name_hint

    known = {proposed.run: proposed for proposed in account.all_proposed()}
    if run not in known:
        hint = nearest_name_hint(run, list(known)) if known else "no run was proposed yet"
        raise UsageError(f"no run '{run}' was proposed here", hint=hint)
    return known[run]


def _refuse_begun(account: SiteAccount, run: str) -> None:
    begun = account.ledger.runs.get(run)
    if begun is not None and begun.closed is not None:
        raise UsageError(f"run {run} was closed: {begun.closed}", hint="a closed run stays closed")
    if begun is not None:
        raise UsageError(f"run {run} has begun already", hint="there is nothing to approve; `deny` closes it")


def _terms(proposed: ProposedRun) -> str:
    """Names the settings and prompts that a decision is about."""
    import hashlib

    both = f"{proposed.config_digest} {proposed.prompts_digest}"
    return hashlib.sha256(both.encode()).hexdigest()[:TERMS_DIGITS]


def _ceiling(site_dir: Path, account: SiteAccount) -> Lifetime:
    from client.policy import SitePolicy

    policy: SitePolicy = SitePolicy.read(site_dir)
    return policy.ceiling(account.ledger.lineage.lifetime)


# ---- words


def _figure_lines(figures: DataFigures) -> list[str]:
    lines = [
        f"data               {figures.name}",
        f"records            {figures.records:,} pictures, prepared to {figures.image_size} x {figures.image_size} px,"
        f" {'grey' if figures.channels == 1 else 'colour'}",
        f"captions           {figures.captions:,}; {figures.captions_per_record.of_each('record')}",
        f"caption length     {figures.caption_characters.of_each('caption')}, in characters; {figures.at_the_limit:,}"
        f" reach the {figures.longest_allowed} at which they are cut",
        f"same pixels        {figures.same_pixels:,} records have the picture of another one",
    ]
    if figures.subjects is not None:
        spread = f"; pictures: {figures.images_per_subject.of_each('subject')}" if figures.images_per_subject else ""
        lines.append(f"subjects           {figures.subjects:,}{spread}; {figures.without_subject:,} records name none")
    columns = ", ".join(f"{_printable(name)} ({count:,} values)" for name, count in figures.attributes.items())
    lines.append(f"further columns    {columns or 'none'}")
    skipped = sum(count for count, _ in figures.skipped.values())
    lines.append(f"rows skipped       {skipped:,}")
    for reason, (count, rows) in figures.skipped.items():
        more = ", ..." if count > len(rows) else ""
        lines.append(f"  {count:,} x {reason}: line {', '.join(map(str, rows))}{more}")
    return lines


def _added_words(added: int) -> str:
    if not added:
        return "every picture is known to it"
    return f"{added:,} pictures are new to it and were added; what was spent before counts for them too"


def _filter_words(lifetime: Lifetime) -> str:
    if lifetime.order is not None:
        return f"runs add up by a Renyi filter of order {lifetime.order:g}"
    return "runs add up by sums of epsilon and delta"


def _left_words(account: SiteAccount, ceiling: Lifetime | None = None) -> str:
    from shared.privacy.budget import what_is_left

    ceiling = ceiling or _ceiling(account.folder, account)
    left = what_is_left(account.ledger.reserved, ceiling)
    if math.isinf(left.epsilon):
        return "There is no ceiling: this is a simulation."
    return f"Left for runs to come: epsilon {left.epsilon:.4g} at delta {left.delta:.1e}."


def _left_dict(account: SiteAccount) -> dict[str, float]:
    from shared.privacy.budget import what_is_left

    return vars(what_is_left(account.ledger.reserved, _ceiling(account.folder, account)))


def _totals_lines(counted: Totals) -> list[str]:
    return [
        f"reserved   epsilon {counted.reserved:.4g} of {counted.ceiling.max_epsilon:g} at delta"
        f" {counted.ceiling.delta:.0e}; never given back",
        f"spent      epsilon {counted.spent:.4g} so far",
        f"left       epsilon {counted.left.epsilon:.4g} at delta {counted.left.delta:.1e} for runs to come",
    ]


def _totals_dict(counted: Totals) -> dict[str, Any]:
    return {
        "ceiling": _lifetime_dict(counted.ceiling), "reserved": counted.reserved, "spent": counted.spent,
        "left": vars(counted.left), "composed": counted.composed.to_dict(),
        "composed_is": "of all that was charged, as if fixed beforehand: shown, never used to admit",
    }  # fmt: skip


def _lifetime_dict(lifetime: Lifetime) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(lifetime)


def _guess_words(before: float, after: float, delta: float, unit: str) -> str:
    from client.spending import best_guess, percent

    share = [percent(best_guess(epsilon, delta)) for epsilon in (before, after)]
    return (
        f"Of one {unit}, an attacker who knows everything else could at most tell in {share[0]} of the cases whether it"
        f" was in the data; at epsilon {after:g} that is {share[1]} (50 % is a coin)."
    )


def _power_below(bound: float) -> str:
    return f"{10.0 ** math.floor(math.log10(bound)):.0e}"


def _name(option: str, value: str) -> str:
    from shared.records import NAME

    if not NAME.fullmatch(value):
        raise UsageError(
            f"{option}: '{_printable(value)}' is no name",
            hint="1 to 64 letters, digits, dots, dashes and underscores, a letter or digit at both ends",
        )
    return value


def _lines_words(count: int) -> str:
    return f"{count:,} line{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# ---- talking


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        typer.echo(_printable(line))


def _print_json(content: dict[str, Any]) -> None:
    from shared.plain import plain

    typer.echo(json.dumps(plain(content), ensure_ascii=False, allow_nan=False))


def _printable(text: str) -> str:
    """A federation's words could hold codes that rewrite a terminal; here they are question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _confirm(word: str, question: str) -> None:
    say(question)
    answer = sys.stdin.readline()
    if answer.strip() != word:
        raise UsageError("not confirmed; nothing was changed", hint=f"type '{word}' when you are asked, or add --yes")


def _check_place(file: Path, *, replace: bool) -> None:
    if file.is_dir() or (file.exists() and not replace):
        raise UsageError(f"{file} is there already", hint="name a new file")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {file.absolute().parent}", hint="make it, or name another file")


def _write(file: Path, content: bytes, *, replace: bool) -> None:
    """A file for a person, readable by its owner only, whole or not there."""
    from shared.privacy.ledger import write_note

    _check_place(file, replace=replace)
    try:
        write_note(file, content, durable=True)
    except LedgerError as error:
        raise FedCanvasError(error.message, hint="free space, or name another file") from None
