"""`fedcanvas plan`: what a run would cost and whether it can learn, asked before anyone joins; as text, JSON, figure.

Public figures only: it opens no data, writes nothing but the figure that was asked for, and binds nobody.
Not here: what is computed (`server.planner`).
"""

from __future__ import annotations

import io
import math
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from shared.cli import AsJson, new_app, say
from shared.errors import FedCanvasError, UsageError

if TYPE_CHECKING:
    from server.planner import Outlook, Proposal
    from shared.config import RunConfig, Scalar

COLUMNS, LABEL = 100, 22
OPTIONS = {
    "federation.published-records": "--records",
    "federation.sites": "--sites",
    "privacy.target-epsilon": "--epsilon",
    "privacy.delta": "--delta",
    "federation.rounds": "--rounds",
    "federation.local-steps": "--local-steps",
    "privacy.sampling-rate": "--sampling-rate",
    "privacy.unit": "--unit",
    "privacy.noise": "--noise",
    "privacy.clipping-norm": "--clipping-norm",
    "warm-start.epsilon-share": "--warm-start-share",
    "warm-start.enabled": "--warm-start",
}
UNITS = {
    "example": "one record (an image with all its captions)",
    "subject": "one subject (a person with all images)",
}


@new_app
def plan(
    records: Annotated[
        int, typer.Option(help="Published number of records of ALL sites together.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    sites: Annotated[int, typer.Option(help="Number of sites.", show_default=False)] = ...,  # type: ignore[assignment]
    epsilon: Annotated[
        float, typer.Option(help="Privacy budget of the run, per site.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    delta: Annotated[
        float, typer.Option(help="A public constant below 1 / records of a site.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    rounds: Annotated[int, typer.Option(help="Federated rounds.", show_default=False)] = ...,  # type: ignore[assignment]
    local_steps: Annotated[int, typer.Option(help="Steps at a site a round; every one is charged.")] = 1,
    batch: Annotated[
        float | None,
        typer.Option(help="Records of a step over all sites, on average.  [default: a quarter, at most 2,048]"),
    ] = None,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Instead of --batch: the chance of each record to be in a step.")
    ] = None,
    unit: Annotated[Literal["example", "subject"], typer.Option(help="What is protected.")] = "example",
    ceiling: Annotated[
        float | None, typer.Option(help="Epsilon of a site's lifetime, over all runs.  [default: that of the run]")
    ] = None,
    warm_start: Annotated[bool, typer.Option(help="One release of moments before the first round.")] = False,
    warm_start_share: Annotated[float, typer.Option(help="Part of epsilon that it may spend.")] = 0.15,
    noise: Annotated[Literal["local", "distributed"], typer.Option(help="Who adds the noise.")] = "local",
    clipping_norm: Annotated[float, typer.Option(help="C, the largest length of one record's gradient.")] = 12.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw epsilon over the rounds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a run would cost and whether it can learn, before anyone joins.

    It derives the noise from epsilon, delta, sampling rate and steps as a run does, shows epsilon over the rounds,
    and compares noise and signal with runs that were measured. Where the plan cannot learn it says why, and proposes
    the smallest change that would do. All figures are public; no data are opened.
    """
    rate_is_free = batch is None and sampling_rate is None
    if batch is not None and sampling_rate is not None:
        raise UsageError("--batch and --sampling-rate say the same thing", hint="leave one of them out")
    if batch is not None and not 1 <= batch <= records:
        raise UsageError(
            f"--batch {batch:g} is not between 1 and {records}, the records of all sites",
            hint="it counts what one step draws over all sites, on average",
        )
    for name, value in {"--epsilon": epsilon, "--ceiling": ceiling}.items():
        if value is not None and not value < math.inf:
            raise UsageError(f"{name} {value:g} is no privacy", hint=f"name a budget, for example {name} 8")
    if ceiling is not None and ceiling <= 0:
        raise UsageError(f"--ceiling {ceiling:g} allows no run", hint="name what a site may spend in its lifetime")
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: the figure is a PNG", hint=f"name it {plot.with_suffix('.png')}")
    if plot is not None and plot.is_dir():
        raise UsageError(f"--plot {plot} is a folder", hint="name a file in it, for example plan.png")
    from server.planner import outlook, proposed_sampling_rate
    from shared.disk import write_whole
    from shared.rundir import to_json

    if sampling_rate is None:
        sampling_rate = proposed_sampling_rate(records) if batch is None else batch / records
    say("deriving the noise and pricing the rounds, some seconds")
    try:
        config = _config(
            {
                "federation.published-records": records, "federation.sites": sites, "federation.rounds": rounds,
                "federation.local-steps": local_steps, "privacy.target-epsilon": epsilon, "privacy.delta": delta,
                "privacy.sampling-rate": sampling_rate, "privacy.clipping-norm": clipping_norm,
                "privacy.noise": noise, "privacy.unit": unit, "warm-start.enabled": warm_start,
                "warm-start.epsilon-share": warm_start_share,
            }
        )  # fmt: skip
        found = outlook(config, ceiling=ceiling, rate_is_free=rate_is_free)
    except FedCanvasError as error:
        raise _in_options(error) from None
    commands = [_command(proposal, ceiling, rate_is_free=rate_is_free) for proposal in found.proposals]
    result: dict[str, Any] = found.to_dict()
    for proposal, command in zip(result["proposals"], commands, strict=True):
        proposal["command"] = command
    result["sampling_rate_proposed"] = rate_is_free
    if plot is not None:
        result["plot"] = str(write_whole(plot, _figure(found)))
    if as_json:
        typer.echo(to_json(result).decode(), nl=False)
    else:
        typer.echo("\n".join(_lines(found, commands, rate_is_free=rate_is_free)))
        if plot is not None:
            typer.echo(f"\nfigure: {plot}")


def _config(settings: dict[str, Scalar]) -> RunConfig:
    from shared.config import RunConfig

    return RunConfig.from_flat(settings, origin="plan")


def _in_options(error: FedCanvasError) -> FedCanvasError:
    """The error of a setting in the words of this command line, with a next step."""

    def worded(text: str) -> str:
        text = text.removeprefix("plan: ").replace("set warm-start.enabled = false", "leave --warm-start out")
        for setting, option in OPTIONS.items():
            text = text.replace(f"setting '{setting}'", option).replace(setting, option)
        return text

    hint = worded(error.hint) if error.hint else "`fedcanvas plan --help` says what each option takes"
    return type(error)(worded(error.message), hint=hint)


def _command(proposal: Proposal, ceiling: float | None, *, rate_is_free: bool) -> str:
    """What plans `proposal`: what was given, and what it changes."""
    config = proposal.config
    federation, privacy = config.federation, config.privacy
    words = ["fedcanvas", "plan", "--records", str(federation.published_records), "--sites", str(federation.sites)]
    words += ["--epsilon", f"{privacy.target_epsilon:g}", "--delta", f"{privacy.delta:g}"]
    words += ["--rounds", str(federation.rounds)]
    follows = rate_is_free and "federation.published-records" in proposal.changes
    if not follows and (not rate_is_free or "privacy.sampling-rate" in proposal.changes):
        words += ["--sampling-rate", f"{privacy.sampling_rate:g}"]
    if federation.local_steps != 1:
        words += ["--local-steps", str(federation.local_steps)]
    if config.warm_start.enabled:
        words += ["--warm-start", "--warm-start-share", f"{config.warm_start.epsilon_share:g}"]
    for option, value, default in (
        ("--unit", privacy.unit, "example"), ("--noise", privacy.noise, "local"),
        ("--clipping-norm", privacy.clipping_norm, 12.0), ("--ceiling", ceiling, None),
    ):  # fmt: skip
        if value != default:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


# ---- text


def _lines(found: Outlook, commands: list[str], *, rate_is_free: bool) -> Iterator[str]:
    plan, federation = found.plan, found.config.federation
    sites, rounds = _counted(federation.sites, "site"), _counted(federation.rounds, "round")
    budget = f"epsilon {found.config.privacy.target_epsilon:g} (delta {plan.delta:.0e})"
    yield f"{federation.published_records:,} records over {sites}, {rounds}, {budget}"
    yield ""
    yield from _fact("protected", f"{UNITS.get(plan.unit, plan.unit)} at one site, added or removed")
    slack = (plan.reserved_steps - plan.steps) // federation.local_steps
    local = f" of {federation.local_steps} steps" if federation.local_steps > 1 else ""
    yield from _fact(
        "noise multiplier",
        f"{plan.noise_multiplier:.4g}, derived; it pays for {rounds}{local} and {slack} repeated ones",
    )
    if plan.warm_start_noise_multiplier is not None:
        yield from _fact("  of the warm start", f"{plan.warm_start_noise_multiplier:.4g}")
    chosen = ": proposed, a quarter of the records but at most 2,048 a step" if rate_is_free else ""
    yield from _fact("sampling rate q", f"{plan.sampling_rate:.4g}{chosen}")
    batch = plan.expected_batch_size
    yield from _fact("records a step", f"{batch:,.0f} over all sites, {_short(batch / plan.sites)} a site, on average")
    yield ""
    yield from _epsilon_table(found)
    yield ""
    left = f"{found.left:.2f} is left" if found.left >= 0 else f"{-found.left:.2f} is missing"
    yield from _fact(
        "lifetime ceiling",
        f"{found.ceiling:g} a site: this run reserves {found.reserved.epsilon:.2f}, {left}; room for"
        f" {_counted(found.runs_in_ceiling, 'run')} in all. Epsilon and delta of runs add up.",
    )
    yield ""
    yield from _noise_table(found)
    yield ""
    yield from _verdict(found, commands)


def _epsilon_table(found: Outlook) -> Iterator[str]:
    rows = [(f"{at:,}" if at else "warm start", spent) for at, spent in found.rows]
    rows.append(("with repeats", found.reserved))
    yield f"{'epsilon after round':{LABEL}}{'PRV':>10}{'PLD':>10}{'RDP':>10}   the larger of PRV and PLD counts"
    for name, spent in rows:
        yield f"{name:>{LABEL - 3}}   {spent.prv:>10.3f}{spent.pld:>10.3f}{spent.rdp:>10.3f}"
    for fallback in sorted({spent.fallback for _, spent in rows if spent.fallback}):
        yield from textwrap.wrap(f"note: {fallback}", COLUMNS)


def _noise_table(found: Outlook) -> Iterator[str]:
    from server.planner import FEWEST_ROUNDS, LEAST_RUN_SIGNAL, MOST_ROUNDS, MOST_STEP_NOISE, demo_noise

    plan, noise, trusted, demo = found.plan, found.noise, found.trusted_noise, demo_noise()
    yield f"{'noise and signal':{LABEL}}{'this plan':>12}{'the demo':>12}{'ratio':>9}   limit"
    ratio, limit = _short(noise.step / demo.step), f"at most {MOST_STEP_NOISE:g}"
    yield f"{'noise of a step':{LABEL}}{noise.step:>12.3g}{demo.step:>12.3g}{ratio:>9}   {limit}"
    ratio, limit = _short(noise.run / demo.run), f"at least {LEAST_RUN_SIGNAL:g}"
    yield f"{'signal of the run':{LABEL}}{noise.run:>12,.0f}{demo.run:>12,.0f}{ratio:>9}   {limit}"
    largest = plan.expected_batch_size * plan.clipping_norm
    told = (
        f"Noise of a step: standard deviation in the sum over sites ({noise.step * largest:.3g}), over the largest sum"
        f" ({plan.expected_batch_size:,.0f} records x C = {largest:,.0f}). Signal of the run: square root of the steps,"
        " over the noise of a step. The demo is `fedcanvas simulate demo`, where .83 of the pictures come out right."
    )
    yield from textwrap.wrap(told, COLUMNS)
    yield ""
    if noise.step > trusted.step:
        yield from _fact(
            "price of local noise",
            f"{noise.step / trusted.step:.3g} times the noise: one trusted aggregator of the {plan.sites} sites would"
            f" need {trusted.step:.3g} ({trusted.step * largest:.3g})",
        )
    if found.rounds is None:
        yield from _fact("rounds that pass", "none at this epsilon and q: no number of rounds keeps both limits")
        return
    fewest, most = found.rounds
    upper = f"{most:,}" if most < MOST_ROUNDS else f"{most:,} or more"
    yield from _fact(
        "rounds that pass",
        f"{fewest:,} to {upper} at this epsilon and q: fewer carry too little signal or are under {FEWEST_ROUNDS},"
        " more have too much noise a step",
    )


def _verdict(found: Outlook, commands: list[str]) -> Iterator[str]:
    from server.planner import LARGEST_EPSILON

    for warned in found.warnings:
        yield from textwrap.wrap(f"warning: {warned.message}", COLUMNS, subsequent_indent="  ")
    if not found.warnings:
        yield "no warning: noise and signal are within what learned in measured runs (docs/planning.md)"
        return
    for proposal, command in zip(found.proposals, commands, strict=True):
        yield f"better: {_words(proposal)}"
        yield f"  {command}"
    learns = any(warned.code != "ceiling" for warned in found.warnings)
    if not learns:
        return
    changed = {name for proposal in found.proposals for name in proposal.changes}
    ceiling = min(LARGEST_EPSILON, found.ceiling if found.ceiling > found.config.privacy.target_epsilon else 20)
    if not found.proposals:
        yield f"better: nothing was found, with any number of records or an epsilon up to {ceiling:g}"
    elif "federation.published-records" in changed and "privacy.target-epsilon" not in changed:
        yield f"With these records no epsilon up to {ceiling:g} is enough, at any sampling rate and number of rounds."


def _words(proposal: Proposal) -> str:
    changes, config = proposal.changes, proposal.config
    words = []
    if "federation.published-records" in changes:
        words.append(f"{config.federation.published_records:,} records")
    if "privacy.sampling-rate" in changes and "federation.published-records" not in changes:
        batch = f"{config.expected_batch_size:,.0f} records a step"
        words.append(f"sampling rate {config.privacy.sampling_rate:g} ({batch})")
    if "federation.rounds" in changes:
        words.append(f"{config.federation.rounds:,} rounds")
    if "privacy.target-epsilon" in changes:
        words.append(f"epsilon {config.privacy.target_epsilon:g}")
    if "privacy.delta" in changes:
        words.append(f"delta {config.privacy.delta:.0e}")
    return ", ".join(words)


def _fact(name: str, text: str) -> Iterator[str]:
    yield from textwrap.wrap(f"{name:{LABEL}}{text}", COLUMNS, subsequent_indent=" " * LABEL)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# ---- figure


def _figure(found: Outlook) -> bytes:
    """Epsilon over the rounds as a PNG, for a page in print: lines differ in style, not in colour alone."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan, federation = found.plan, found.config.federation
    curve = [(at, spent.epsilon, spent.rdp) for at, spent in found.curve]
    if curve[0][0] > 0:
        curve.insert(0, (0, 0.0, 0.0))
    rounds, epsilon, rdp = zip(*curve, strict=True)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        axes.axhline(found.ceiling, color="#b3541e", linewidth=1.4, linestyle="-.", label="ceiling of a site")
        axes.plot(rounds, rdp, color="#777777", linewidth=1.2, linestyle="--", label="RDP, looser")
        axes.plot(rounds, epsilon, color="#1b5e9b", linewidth=2, label="spent (PRV and PLD, the larger)")
        axes.set_title(
            f"{federation.published_records:,} records over {_counted(federation.sites, 'site')},"
            f" q = {plan.sampling_rate:.3g}, noise multiplier {plan.noise_multiplier:.3g}",
            fontsize=10, loc="left",
        )  # fmt: skip
        axes.set_xlabel("round")
        axes.set_ylabel(f"epsilon of a site (delta {plan.delta:.0e}, one {plan.unit})")
        axes.set_xlim(0, rounds[-1])
        axes.set_ylim(0, 1.15 * max(found.ceiling, *epsilon, rdp[-1]))
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
        buffer = io.BytesIO()
        cast(Any, FigureCanvasAgg(figure)).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
