"""A run as one HTML file that needs no network and runs no script: curves, samples, epsilon, settings.

Reads the run directory only, so it also shows a run that is going on. Everything from outside is escaped.
Figures whose text matters (curves) have a text alternative and their numbers in a table.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shared import __version__
from shared.config import setting_names
from shared.errors import RunDirectoryError
from shared.privacy.accounting import EpsilonReport, epsilon_curve
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.rundir import RunDirectory

EPSILON_POINTS = 24
MOST_SAMPLES = 8
COLOURS = ("#1b5e9b", "#b3541e", "#3a7d44")  # told apart also in grey, where the line styles help
STYLES = ("-", "--", ":")

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 62rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h1 + p { margin-top: 0; color: #444; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th.text, td.text { text-align: left; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .9rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 0 1.5rem; }
figure svg, figure img { max-width: 100%; height: auto; }
img.sheet { border: 1px solid #ddd; }
.warning { border-left: 4px solid #b3541e; padding: .25rem 0 .25rem .8rem; background: #fdf4ee; }
summary { cursor: pointer; } code { font-size: .9em; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } h2, h2 + p { break-after: avoid; }
  figure, tr { break-inside: avoid; } details.long { display: none; } .curves { grid-template-columns: 1fr 1fr; } }
"""

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
    "Other runs on the same data add to this one; no site keeps an account over runs yet.",
    "A person with several records at a site, or with records at two sites, is protected less; where the unit is the"
    " subject, one with records at two sites or under two names.",
    "What is common to many records is learned: that is the purpose.",
    "Prompts, settings, the published number of records and the number of rounds are public.",
    "Settings that were looked for on private data would cost privacy that is not counted here.",
)


@dataclass(frozen=True)
class Line:
    name: str
    rounds: list[int]
    values: list[float]


def report_html(run: RunDirectory) -> str:
    """The whole page.

    Raises:
        RunDirectoryError: no round is finished yet, or a file of the run is damaged.
    """
    events = [event for event in run.events() if event.get("server_round", 0) > 0]
    if not events:
        raise RunDirectoryError(f"the run in {run.path} has no finished round yet", hint="wait for its first rounds")
    plan = make_plan(run.config)
    result = run.read_json("result.json") if run.finished else {}
    spent = [] if not plan.private else _epsilon_over_rounds(plan, run)
    done, rounds = events[-1]["server_round"], run.config.federation.rounds
    state = "finished" if run.finished else f"at round {done} of {rounds}"
    title = f"{run.path.resolve().name}: {state}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(_summary(run))}</p>",
        *_accuracy(result),
        *_privacy(run, plan, spent),
        *_pictures(run),
        *_curves(events, run.timings(), spent),
        *_protection(run),
        *_settings(run),
    ]
    return _page(title, parts)


def _summary(run: RunDirectory) -> str:
    config = run.config
    steps = f", {config.federation.local_steps} local steps" if config.federation.local_steps > 1 else ""
    return (
        f"{config.federation.sites} sites, {config.federation.rounds} rounds{steps},"
        f" {config.federation.published_records:,} {config.privacy.units} as published,"
        f" {len(run.prompts)} public prompts, run {run.run_id}, fedcanvas {__version__}"
    )


def _accuracy(result: dict[str, Any]) -> list[str]:
    figures = result.get("metrics", {}).get("caption-accuracy")
    if figures is None:
        return []
    if "accuracy" not in figures:
        return ["<h2>Accuracy</h2>", f"<p>Not measured: {_text(figures.get('not_measured', 'no reference set'))}.</p>"]
    rows = [
        [name, f"{value:.3f}", f"{float(figures['held_out_real'][name]):.3f}", f"{float(figures['chance'][name]):.3f}"]
        for name, value in figures["accuracy"].items()
    ]
    note = (
        f"{figures['n']} generated pictures, judged by a classifier that was trained on real pictures of the public"
        " reference set; 'real' is the same classifier on real pictures it was not trained on"
    )
    return ["<h2>Are prompts obeyed?</h2>", _table(["", "generated", "real", "chance"], rows, caption=note)]


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
    parts.append(_table(["", "PRV", "PLD", "RDP"], rows, caption=caption))
    if now.fallback:
        parts.append(f'<p class="warning">{_text(now.fallback)}</p>')
    if run.entropy == "seeded":
        parts.append(f'<p class="warning">{_text(NOT_PROTECTED[0])}</p>')
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
    return [*parts, _table(["", "of the plan"], facts)]


def _sites(run: RunDirectory) -> list[str]:
    count = run.config.federation.sites
    return [f"{site:02d}" for site in range(count)] if count <= 20 else [f"00 to {count - 1:02d}, each"]


def _pictures(run: RunDirectory) -> list[str]:
    parts = []
    sheet = run.path / "sheet.png"
    if sheet.is_file():
        parts += ["<h2>Pictures at the end</h2>", _image(sheet.read_bytes(), "Contact sheet: prompts under pictures")]
    samples = run.sample_paths()
    if samples:
        chosen = [samples[round(place)] for place in _evenly(len(samples), MOST_SAMPLES)]
        parts.append("<h2>Pictures over rounds</h2><p>The same prompts with the same latents in every sheet.</p>")
        parts += [_image(path.read_bytes(), f"Samples after round {number}") for number, path in chosen]
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
        _chart(title, y_label, lines, x_label="steps" if title == "Epsilon" else "round")
        for title, y_label, lines in charts
        if lines[0].values
    ]
    return ["<h2>Over rounds</h2>", '<div class="curves">', *drawn, "</div>"]


def _protection(run: RunDirectory) -> list[str]:
    if run.config.privacy.name == "none":
        return ["<h2>What was protected, and what not</h2>", "<p>Nothing was protected in this run.</p>"]
    not_protected = NOT_PROTECTED if run.entropy == "seeded" else NOT_PROTECTED[1:]
    return [
        "<h2>What was protected, and what not</h2>",
        "<p>Protected:</p>", _list([PROTECTED[run.config.privacy.unit]]), "<p>Not protected:</p>", _list(not_protected),
    ]  # fmt: skip


def _settings(run: RunDirectory) -> list[str]:
    described = setting_names()
    rows = [[key, value, described.get(key, "")] for key, value in run.config.to_flat().items()]
    versions = [[name, value] for name, value in run.read_json("versions.json").items()]
    return [
        "<h2>Settings</h2>",
        _table(["setting", "value", "meaning"], rows, text_from=1),
        "<h2>Versions</h2>",
        _table(["", "version"], versions, text_from=1),
        '<details class="long"><summary>Public prompts</summary>', _list(run.prompts), "</details>",
    ]  # fmt: skip


def _epsilon_over_rounds(plan: PrivacyPlan, run: RunDirectory) -> list[EpsilonReport]:
    """At some step counts up to what is charged now; from public quantities alone."""
    charged = max(1, run.steps_charged())
    steps = sorted({max(1, round(place)) for place in _evenly(charged + 1, EPSILON_POINTS)})
    return epsilon_curve(
        sampling_rate=plan.sampling_rate, noise_multiplier=plan.noise_multiplier, steps=steps, delta=plan.delta,
        warm_start_noise_multiplier=plan.warm_start_noise_multiplier, unit=plan.unit,
    )  # fmt: skip


def _evenly(count: int, most: int) -> list[float]:
    if count <= most:
        return [float(place) for place in range(count)]
    return [place * (count - 1) / (most - 1) for place in range(most)]


def _chart(title: str, y_label: str, lines: Sequence[Line], *, x_label: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Letters as paths would be unreadable for a screen reader and large; ids from a fixed salt keep the file stable.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for place, line in enumerate(line for line in lines if line.values):
            colour, window = COLOURS[place % 3], len(line.values) // 40
            if window > 1:  # what jumps from round to round is drawn thin, behind its moving average
                axes.plot(line.rounds, line.values, color=colour, linewidth=0.8, alpha=0.25)
            axes.plot(
                line.rounds, _smoothed(line.values, window), label=line.name, color=colour, linewidth=1.8,
                linestyle=STYLES[place % 3], marker="." if len(line.rounds) < 3 else None,
            )  # fmt: skip
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=min(0, *(min(line.values) for line in lines if line.values)))
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    alternative = f"{title}. " + " ".join(_described(line, x_label) for line in lines if line.values)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(alternative)}"', 1)
    return f"<figure>{svg}<figcaption>{_text(alternative)}</figcaption></figure>"


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of `window` values before and after each; fewer at the ends."""
    totals = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, place - window), min(len(values), place + window + 1)) for place in range(len(values))]
    return [(totals[end] - totals[start]) / (end - start) for start, end in spans]


def _described(line: Line, x_label: str) -> str:
    first, last = line.values[0], line.values[-1]
    return (
        f"{line.name}: {first:.3g} at {x_label} {line.rounds[0]}, {last:.3g} at {line.rounds[-1]},"
        f" between {min(line.values):.3g} and {max(line.values):.3g}."
    )


def _image(png: bytes, alternative: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img class="sheet" src="data:image/png;base64,{data}" alt="{_text(alternative)}">'
        f"<figcaption>{_text(alternative)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", text_from: int = 99) -> str:
    # A paragraph, since a browser makes a caption no wider than its table.
    note = f"<p>{_text(caption)}</p>" if caption else ""
    kinds = [' class="text"' if place >= text_from else "" for place in range(len(head))]
    heads = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = []
    for first, *cells in rows:
        text = "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds[1:], cells, strict=True))
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{text}</tr>')
    return f"{note}<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _page(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # Nothing may be fetched and nothing may run, whatever stands in a prompt.
            '<meta http-equiv="Content-Security-Policy"'
            " content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>",
            *parts,
            "</body></html>",
            "",
        ]
    )
