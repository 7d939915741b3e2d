"""A run as one HTML file that needs no network and runs no script: curves, samples, epsilon, settings, evaluation.

Reads the run directory only, so it also shows a run that is going on. Everything from outside is escaped.
Not here: what an evaluation says (`server.evaluation_page`), tables of later commands (`server.report_tables`),
drawing (`server.charts`) and the page's frame (`shared.page`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from server.charts import Line, curves, evenly
from server.evaluation_page import evaluation_sections, number, quality_rounds, span
from server.evaluations import check_evaluation, complete_evaluations, figures_of, load_evaluation
from server.report_tables import REPORT_TABLES
from shared import __version__
from shared.config import setting_names
from shared.errors import RunDirectoryError
from shared.page import Small, bullets, counted, escaped, html_page, image, table, warning
from shared.privacy.accounting import EpsilonReport, epsilon_curve
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.rundir import RunDirectory

EPSILON_POINTS = 24
MOST_SAMPLES = 8

PROTECTED = {
    unit: f"One {meaning}: adding or removing it at one site changes what leaves the site by at most the epsilon and"
    " delta above, against everyone who sees all messages, the server and the other sites together."
    for unit, meaning in {
        "example": "record (an image with all its captions)",
        "subject": "subject (a subject_id with all its images and their captions)",
    }.items()
}
NOT_PROTECTED = (
    "This is a simulation: all sites share one machine, and their draws and noise come from a seed that is written"
    " down. The epsilon is that of the same run with noise from the operating system.",
    "Other runs on the same data add to this one: each site's own ledger adds up its runs, this report shows this run"
    " alone.",
    "A person with several records at a site, or with records at two sites, is protected less; where the unit is the"
    " subject, one with records at two sites or under two names.",
    "What is common to many records is learned: that is the purpose.",
    "Prompts, settings, the published number of records and the number of rounds are public.",
    "Settings that were looked for on private data would cost privacy that is not counted here.",
)


def report_html(
    run: RunDirectory, evaluation: Mapping[str, Any] | None = None, folder: Path | None = None
) -> str:
    """The whole page.

    Args:
        evaluation: to be shown; default is the one that `load_evaluation` takes, where the run has one.
        folder: of the evaluation, with its pictures; default is the one of its key in the run.
    Raises:
        RunDirectoryError: no round is finished yet, or a file of the run is damaged.
    """
    events = [event for event in run.events() if event.get("server_round", 0) > 0]
    if not events:
        raise RunDirectoryError(f"the run in {run.path} has no finished round yet", hint="wait for its first rounds")
    plan = make_plan(run.config)
    result = run.read_json("result.json") if run.finished else {}
    if evaluation is None:
        evaluation = load_evaluation(run.path) if complete_evaluations(run.path) else None
    else:
        check_evaluation(evaluation, origin=run.path / "the given evaluation")
    steps_at = {server_round: _steps_until(run, server_round) for server_round in quality_rounds(run)}
    spent = [] if not plan.private else _epsilon_over_rounds(plan, run, also=steps_at.values())
    after = {report.steps: report.epsilon for report in spent}
    epsilon_at = {server_round: after[steps] for server_round, steps in steps_at.items() if steps in after}
    done, rounds = events[-1]["server_round"], run.config.federation.rounds
    state = "finished" if run.finished else f"at round {done} of {rounds}"
    title = f"{run.path.resolve().name}: {state}"
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f"<p>{escaped(_summary(run))}</p>",
        *_accuracy(result, evaluated=evaluation is not None),
        *evaluation_sections(run, evaluation, epsilon_at=epsilon_at, folder=folder),
        *_privacy(run, plan, spent),
        *_pictures(run),
        *_curves(events, run.timings(), spent),
        *_tables(run),
        *_protection(run),
        *_settings(run),
    ]
    return html_page(title, parts)


def _summary(run: RunDirectory) -> str:
    config = run.config
    steps = f", {config.federation.local_steps} local steps" if config.federation.local_steps > 1 else ""
    return (
        f"{counted(config.federation.sites, 'site')}, {counted(config.federation.rounds, 'round')}{steps},"
        f" {config.federation.published_records:,} {config.privacy.units} as published,"
        f" {len(run.prompts)} public prompts, run {run.run_id}, fedcanvas {__version__}"
    )


def _accuracy(result: dict[str, Any], *, evaluated: bool) -> list[str]:
    """What the end of training measured; a reason for nothing is left out where an evaluation says more."""
    found = result.get("metrics", {}).get("caption-accuracy")
    if found is None:
        return []
    head = ["", "generated", "real", "chance"]
    if "figures" in found:
        figures = list(figures_of(result, "caption-accuracy"))
        rows = [[figure.name, (number(figure.value), Small(span(figure))), number(figure.floor), number(figure.chance)]
                for figure in figures]  # fmt: skip
        n = figures[0].n if figures else 0
    elif evaluated:
        return []
    else:
        return ["<h2>Accuracy</h2>", f"<p>Not measured: {escaped(found.get('not_measured', 'no reference set'))}.</p>"]
    note = (
        f"{n} generated pictures, judged by a classifier that was trained on real pictures of the public reference set;"
        " 'real' is the same classifier on real pictures it was not trained on"
    )
    return ["<h2>Are prompts obeyed?</h2>", table(head, rows, caption=note)]


def _privacy(run: RunDirectory, plan: PrivacyPlan, spent: Sequence[EpsilonReport]) -> list[str]:
    parts = ["<h2>Privacy</h2>"]
    if not plan.private:
        return [*parts, '<p class="warning">No privacy: epsilon = inf. Noise and clipping bound nothing here.</p>']
    now = spent[-1]
    rows = [[f"site {site}", *(f"{value:.3f}" for value in (now.prv, now.pld, now.rdp))] for site in _sites(run)]
    caption = (
        f"epsilon per site after {run.steps_charged()} charged steps, at delta {plan.delta:.0e}; the larger of PRV and"
        f" PLD counts; RDP is a looser bound. Adjacency: {now.adjacency} one {now.unit}"
    )
    parts.append(table(["", "PRV", "PLD", "RDP"], rows, caption=caption))
    if now.fallback:
        parts.append(warning(now.fallback))
    if run.entropy == "seeded":
        parts.append(warning(NOT_PROTECTED[0]))
    facts = [
        ["target epsilon", f"{run.config.privacy.target_epsilon:g}"],
        ["noise multiplier sigma", f"{plan.noise_multiplier:g}"],
        ["sampling rate q", f"{plan.sampling_rate:g}"],
        ["steps planned, and reserved with retries", f"{plan.steps}, {plan.reserved_steps}"],
        ["clipping norm C", f"{plan.clipping_norm:g}"],
        ["expected batch, all sites", f"{plan.expected_batch_size:g}"],
    ]
    if plan.warm_start_noise_multiplier is not None:
        facts.append(["noise multiplier of the warm start", f"{plan.warm_start_noise_multiplier:g}"])
    return [*parts, table(["", "of the plan"], facts)]


def _sites(run: RunDirectory) -> list[str]:
    count = run.config.federation.sites
    return [f"{site:02d}" for site in range(count)] if count <= 20 else [f"00 to {count - 1:02d}, each"]


def _pictures(run: RunDirectory) -> list[str]:
    parts = []
    sheet = run.path / "sheet.png"
    if sheet.is_file():
        parts += ["<h2>Pictures at the end</h2>", image(sheet.read_bytes(), "Contact sheet: prompts under pictures")]
    samples = run.sample_paths()
    if samples:
        chosen = [samples[place] for place in evenly(len(samples), MOST_SAMPLES)]
        parts.append("<h2>Pictures over rounds</h2><p>The same prompts with the same latents in every sheet.</p>")
        parts += [image(path.read_bytes(), f"Samples after round {number}") for number, path in chosen]
    return parts


def _curves(
    events: Sequence[dict[str, Any]], timings: Sequence[dict[str, Any]], spent: Sequence[EpsilonReport]
) -> list[str]:
    def of(key: str, name: str, of_event: Callable[[dict[str, Any]], float] | None = None) -> Line:
        taken = [(e["server_round"], float(of_event(e) if of_event else e[key])) for e in events if key in e]
        finite = [(number, value) for number, value in taken if math.isfinite(value)]
        return Line(name, [number for number, _ in finite], [value for _, value in finite])

    # Not the first round of a process, which opens the data.
    seconds = {line["server_round"]: float(line["seconds"]) for line in timings[1:]}
    charts = [
        ("The discriminator on fresh fakes", "part told to be fake", [of("fakes_accuracy", "moving average")]),
        ("Losses on fakes", "loss", [of("fakes_loss", "discriminator"), of("generator_loss", "generator")]),
        ("Generator steps", "steps, all in all", [of("generator_steps", "generator steps")]),
        ("Time", "seconds a round", [Line("seconds", sorted(seconds), [seconds[key] for key in sorted(seconds)])]),
    ]
    if spent:
        steps = [report.steps for report in spent]
        charts.append(
            ("Epsilon", "epsilon per site",
             [Line(name.upper(), steps, [getattr(report, name) for report in spent]) for name in ("prv", "pld", "rdp")])
        )  # fmt: skip
    drawn = [
        curves(title, y_label, lines, x_label="steps" if title == "Epsilon" else "round")
        for title, y_label, lines in charts
        if lines[0].values
    ]
    return ["<h2>Over rounds</h2>", '<div class="curves">', *drawn, "</div>"]


def _tables(run: RunDirectory) -> list[str]:
    """Whatever is registered as a table about a run and has something to say."""
    parts = []
    for name in REPORT_TABLES.names():
        made = REPORT_TABLES.get(name)(run)
        if made is not None:
            shown = table(made.head, made.rows, text=len(made.head), caption=made.note)
            parts.append(f"<h2>{escaped(made.title)}</h2>{shown}")
    return parts


def _protection(run: RunDirectory) -> list[str]:
    if run.config.privacy.name == "none":
        return ["<h2>What was protected, and what not</h2>", "<p>Nothing was protected in this run.</p>"]
    not_protected = NOT_PROTECTED if run.entropy == "seeded" else NOT_PROTECTED[1:]
    return [
        "<h2>What was protected, and what not</h2>",
        "<p>Protected:</p>", bullets([PROTECTED[run.config.privacy.unit]]),
        "<p>Not protected:</p>", bullets(not_protected),
    ]  # fmt: skip


def _settings(run: RunDirectory) -> list[str]:
    described = setting_names()
    rows = [[key, value, described.get(key, "")] for key, value in run.config.to_flat().items()]
    versions = [[name, value] for name, value in run.read_json("versions.json").items()]
    return [
        "<h2>Settings</h2>",
        table(["setting", "value", "meaning"], rows, text=3),
        "<h2>Versions</h2>",
        table(["", "version"], versions, text=2),
        '<details class="long"><summary>Public prompts</summary>', bullets(run.prompts), "</details>",
    ]  # fmt: skip


def _epsilon_over_rounds(plan: PrivacyPlan, run: RunDirectory, *, also: Collection[int]) -> list[EpsilonReport]:
    """At some step counts up to what is charged now, and at `also`; from public quantities alone."""
    charged = max(1, run.steps_charged())
    steps = sorted({*(max(1, place) for place in evenly(charged + 1, EPSILON_POINTS)), *also})
    return epsilon_curve(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps, delta=plan.delta,
        warm_start_noise_multiplier=plan.warm_start_noise_multiplier, unit=plan.unit,
    )  # fmt: skip


def _steps_until(run: RunDirectory, server_round: int) -> int:
    """Steps charged for all attempts of the rounds up to `server_round`."""
    return sum(line["steps"] for line in run.charges() if line["server_round"] <= server_round)
