"""What an evaluation found, as sections of a run's report, for people who do not know the figures' names.

Each figure stands with its interval, its numbers of pictures, what made the features, what real pictures get in the
same place and what guessing gets; what could not be measured stands there with its reason, never as a number.
Not here: measuring (`server.evaluator`), reading evaluations (`server.evaluations`), several runs (`server.compare`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.charts import MOST_LINES, Line, confusion, curves
from server.evaluations import evaluate_hint, figures_of, gallery_bytes, interrupted_evaluations, left_aside
from shared.errors import RunDirectoryError
from shared.metrics import METRICS
from shared.metrics.figure import Figure
from shared.page import Code, Small, bullets, escaped, image, table, warning
from shared.rundir import RunDirectory

MOST_CONFUSED = 40  # classes of a matrix that is drawn; a larger one is a table to open
BETTER = {"lower": "lower is better", "higher": "higher is better", "neither": "neither direction is better"}

# Metric to what it is called, what it says, and what it does not.
METRIC_WORDS: dict[str, tuple[str, str, str]] = {
    "caption-accuracy": (
        "caption accuracy",
        "how often a classifier, trained on real pictures, sees in a picture what its prompt asked for",
        "whether pictures are sharp or varied; a picture can please this one classifier and no person",
    ),
    "clip-score": (
        "CLIP score",
        "how near picture and prompt are for a model that knows both pictures and language",
        "a share of anything: only its distance to chance and to real pictures has a meaning",
    ),
    "downstream": (
        "usefulness",
        "how often a classifier that saw only generated pictures in training is right about real ones",
        "how good the pictures look; another classifier would learn something else from them",
    ),
    "fid": (
        "Fréchet distance (FID)",
        "how far generated and real pictures are from each other as two crowds, by the mean and spread of features",
        "which pictures are bad; it shrinks as more are measured, so only equal numbers of pictures compare",
    ),
    "is": (
        "inception score",
        "whether each picture is clearly of one kind, and all kinds occur",
        "whether pictures resemble the real ones: it never looks at them",
    ),
    "kid": (
        "kernel distance (KID)",
        "how far generated and real pictures are from each other as two crowds, also where few are measured",
        "which pictures are bad; 0 means that the crowds cannot be told apart, and noise can take it below",
    ),
    "nearest": (
        "nearest public pictures",
        "whether generated pictures come closer to public pictures than real ones come to each other",
        "anything of a site's own pictures: those are not looked at, and epsilon is what bounds copying them",
    ),
    "prdc": (
        "precision, recall, density, coverage",
        "precision and density: are pictures like real ones; recall and coverage: are all real kinds reached",
        "how far off a picture is that misses; single odd real pictures weigh much in precision and recall",
    ),
    "retrieval": (
        "retrieval",
        "how often the right prompt is found for a picture, and the right picture for a prompt, among all others",
        "how good the pictures look; it depends on how many prompts there are and how near they are to each other",
    ),
}  # fmt: skip


def evaluation_sections(
    run: RunDirectory, evaluation: Mapping[str, Any] | None, *, epsilon_at: Mapping[int, float],
    folder: Path | None = None,
) -> list[str]:  # fmt: skip
    """HTML of all sections; none where nothing was evaluated, begun, or measured during training.

    Args:
        evaluation: as `load_evaluation` gives it; `None` where there is no complete one.
        epsilon_at: round to the epsilon spent by its end, for the rounds of `quality_rounds`; empty without privacy.
        folder: with the pictures of the evaluation; default is the one of its key in the run.
    """
    parts: list[str] = []
    unfinished = interrupted_evaluations(run.path)
    if evaluation is not None or unfinished:
        parts.append("<h2>How good are the pictures?</h2>")
    for key in unfinished:
        measured = sorted(file.stem for file in (run.path / "evaluations" / key).glob("*.json"))
        shown = f": it has measured {', '.join(measured)}" if measured else ""
        again = f"{evaluate_hint(run.path)} goes on"
        parts.append(warning(f"Evaluation {key} was interrupted{shown}. It is not shown here; {again}."))
    if evaluation is not None:
        parts += [
            *_about(run, evaluation),
            *_headline(evaluation),
            *_not_measured(evaluation),
            *_explained(evaluation),
            *_notes(evaluation),
            *_sheets(run, evaluation, folder),
            *_tables(evaluation),
        ]
    parts += _over_rounds(run, evaluation, epsilon_at)
    if evaluation is not None:
        parts += _behind(evaluation)
    return parts


def quality_rounds(run: RunDirectory) -> list[int]:
    """Rounds with figures of quality in `events.jsonl`, ascending."""
    return sorted({int(event["server_round"]) for event in run.events() if isinstance(event.get("quality"), Mapping)})


def metric_name(metric: str) -> str:
    return METRIC_WORDS[metric][0] if metric in METRIC_WORDS else metric


def _both_names(metric: str) -> tuple[str, ...]:
    name = metric_name(metric)
    return (name,) if name == metric else (name, Small(metric))


def figure_label(metric: str, figure: Figure) -> str:
    """What a figure is called where figures of several metrics stand together."""
    return figure.name if figure.name.split(" ")[0] == metric else f"{metric}: {figure.name}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.1f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"


def span(figure: Figure) -> str:
    if not math.isfinite(figure.interval.high - figure.interval.low):
        return "no interval"
    return f"{number(figure.interval.low)} to {number(figure.interval.high)}"


def privacy_words(evaluation: Mapping[str, Any]) -> str:
    """Epsilon of the evaluated model, with delta, adjacency and unit."""
    privacy = evaluation.get("privacy") or {}
    try:
        epsilon, delta = float(privacy.get("epsilon", math.nan)), float(privacy.get("delta", math.nan))
    except (TypeError, ValueError):
        epsilon, delta = math.nan, math.nan
    if privacy.get("name") == "none" or math.isinf(epsilon):
        return "no privacy: epsilon = inf"
    if math.isnan(epsilon):
        return "epsilon not stated"
    simulated = ", simulated" if privacy.get("simulated") else ""
    protected = f"{privacy.get('adjacency')} one {privacy.get('unit')}"
    return f"epsilon {epsilon:.3g} at delta {delta:.0e}, {protected}{simulated}"


# ---- the sections


def _about(run: RunDirectory, evaluation: Mapping[str, Any]) -> list[str]:
    reference = evaluation["reference"]
    cut = ", ".join(f"{int(count):,} {name}" for name, count in reference.get("parts", {}).items())
    parts = [
        f"<p>{int(evaluation['n']):,} generated pictures (seed {escaped(evaluation.get('seed', '?'))}) against the"
        f" public set {escaped(reference.get('name', '?'))}"
        + (f", cut into parts that never mix: {escaped(cut)}" if cut else "")
        + f". Features by {escaped(evaluation.get('extractor') or 'none')}. They cost no privacy.</p>"
    ]
    stated, here = evaluation["model"].get("weights_digest"), _weights_digest(run)
    if stated and here and stated != here:
        parts.append(warning("These figures are of other weights than the run has now: evaluate it again."))
    aside = left_aside(run.path, evaluation)
    if aside:
        parts += ["<p>Further evaluations of this run are left aside here:</p>", bullets(aside)]
    return parts


def _weights_digest(run: RunDirectory) -> str:
    if not (run.path / "model/model.json").is_file():
        return ""
    try:
        card = run.read_json("model/model.json")
    except RunDirectoryError:
        return ""
    return str(card.get("weights_digest", "")) if isinstance(card, Mapping) else ""


def _headline(evaluation: Mapping[str, Any]) -> list[str]:
    rows: list[list[Any]] = []
    for metric in evaluation["metrics"]:
        for figure in figures_of(evaluation, metric):
            name: tuple[str, ...] = (figure_label(metric, figure), Small(BETTER[figure.better]))
            real: tuple[str, ...] = (number(figure.floor),)
            if figure.floor is not None and figure.floor_n is not None:
                real += (Small(f"of {figure.floor_n:,}"),)
            if figure.at_floor_n is not None:
                real += (Small(f"generated, of as many: {number(figure.at_floor_n)}"),)
            about: tuple[str, ...] = (Small(f"against {figure.reference}"),)
            if figure.extractor is not None:
                about += (Small(f"by {figure.extractor}"),)
            if figure.warning:
                about += (Small(f"⚠ {figure.warning}"),)
            rows.append(
                [name, (number(figure.value), Small(span(figure))), real, number(figure.chance),
                 (f"{figure.n:,}", Small(f"against {figure.reference_n:,}")), about]
            )  # fmt: skip
    if not rows:
        return [warning("No figure could be measured.")]
    head = ["figure", "value, 95 % interval", "real pictures", "guessing", "pictures", "how, and what to beware of"]
    caption = (
        "Under each value its 95 % interval: how sure it is with so many pictures and seeds; another public set or"
        " extractor would give another figure altogether. “Real pictures” is what real ones get in place of generated"
        " ones. A generator of typical or of few pictures can get past them in caption accuracy, precision, density,"
        " class score and “very near”, which is no merit"
    )
    return [table(head, rows, caption=caption, text_at=(5,))]


def _not_measured(evaluation: Mapping[str, Any]) -> list[str]:
    """Every metric that is not in the table above, and why."""
    rows = []
    for metric, entry in evaluation["metrics"].items():
        if "not_measured" in entry:
            rows.append([_both_names(metric), entry["not_measured"], entry.get("hint") or "–"])
        elif not entry.get("figures"):
            rows.append([_both_names(metric), "interrupted before it was finished", "evaluate again"])
    parts = []
    if rows:
        parts += ["<h3>Not measured</h3>", table(["", "why", "what helps"], rows, text=3)]
    absent = [metric for metric in METRICS.names() if metric not in evaluation["metrics"]]
    if absent:
        parts.append(
            f'<p class="warning">This evaluation is partial: {escaped(", ".join(absent))}'
            f" {'was' if len(absent) == 1 else 'were'} not asked for, or not reached.</p>"
        )
    return parts


def _explained(evaluation: Mapping[str, Any]) -> list[str]:
    rows = [
        [_both_names(metric), *METRIC_WORDS[metric][1:]]
        for metric in evaluation["metrics"]
        if metric in METRIC_WORDS
    ]
    if not rows:
        return []
    return ["<h3>What these figures say</h3>", table(["", "it says", "it does not say"], rows, text=3)]


def _notes(evaluation: Mapping[str, Any]) -> list[str]:
    notes = [str(text) for text in evaluation.get("conversions", [])]
    for metric, entry in evaluation["metrics"].items():
        notes += [f"{metric}: {note}" for note in entry.get("notes", [])]
    return ["<h3>To be known with them</h3>", bullets(notes)] if notes else []


def _sheets(run: RunDirectory, evaluation: Mapping[str, Any], folder: Path | None) -> list[str]:
    def picture(file: str, title: str) -> str:
        content = gallery_bytes(run.path, evaluation, file, folder)
        if content is None:
            return f"<p>The picture {escaped(file)} (“{escaped(title)}”) is missing, or is no picture.</p>"
        return image(content, title)

    parts: list[str] = []
    if sheet := evaluation.get("prompts_sheet"):
        title = "Each prompt under its first pictures; they were not chosen"
        parts += ["<h3>The first pictures of each prompt</h3>", picture(str(sheet), title)]
    for metric, entry in evaluation["metrics"].items():
        galleries = entry.get("galleries", [])
        if galleries:
            parts.append(f"<h3>Chosen by {escaped(metric_name(metric))}</h3>")
        parts += [picture(str(gallery["file"]), str(gallery["title"])) for gallery in galleries]
    return parts


def _tables(evaluation: Mapping[str, Any]) -> list[str]:
    drawn, others = [], []
    for metric, entry in evaluation["metrics"].items():
        for made in entry.get("tables", []):
            title, note = f"{metric_name(metric)}: {made['title']}", str(made.get("note", ""))
            matrix = _matrix(made)
            if matrix is not None and len(matrix) <= MOST_CONFUSED:
                drawn.append(confusion(title, [str(row[0]) for row in made["rows"]], matrix, note=note))
            else:
                shown = table([str(name) for name in made["head"]], made["rows"], caption=note)
                others.append(f"<details><summary>{escaped(title)}</summary>{shown}</details>")
    parts = []
    if drawn:
        parts += ["<h3>What is taken for what</h3>", '<div class="curves">', *drawn, "</div>"]
    return [*parts, *(["<h3>Further tables</h3>", *others] if others else [])]


def _matrix(made: Mapping[str, Any]) -> list[list[float]] | None:
    """Counts of a confusion matrix; `None` for any other table."""
    classes = [str(name) for name in made["head"][1:]]
    if not str(made["title"]).startswith("confusion of") or [str(row[0]) for row in made["rows"]] != classes:
        return None
    try:
        counts = [[float(count) for count in row[1:]] for row in made["rows"]]
    except (TypeError, ValueError):
        return None
    return counts if all(0 <= count < math.inf for row in counts for count in row) else None


# ---- during training


def _over_rounds(
    run: RunDirectory, evaluation: Mapping[str, Any] | None, epsilon_at: Mapping[int, float]
) -> list[str]:
    probes = [(int(e["server_round"]), e["quality"]) for e in run.events() if isinstance(e.get("quality"), Mapping)]
    if not probes:
        return []
    names: dict[tuple[str, str], None] = {}
    reasons: dict[str, str] = {}
    for _, quality in probes:
        for metric, figures in quality.items():
            if metric == "not_measured" and isinstance(figures, Mapping):
                reasons.update({str(name): str(why) for name, why in figures.items()})
            elif metric != "about" and isinstance(figures, Mapping):
                names.update(dict.fromkeys((metric, name) for name in figures))
    over_rounds, over_epsilon = [], []
    for metric in dict.fromkeys(metric for metric, _ in names):
        lines = [_quality_line(probes, metric, name) for known, name in names if known == metric]
        lines = [line for line in lines if line.values]
        if not lines:
            continue
        first, title = lines[0], metric_name(metric)
        marks = _marks(run, evaluation, probes, metric, first.name)
        for start in range(0, len(lines), MOST_LINES):
            over_rounds.append(
                curves(f"{title} over rounds", metric, lines[start : start + MOST_LINES], x_label="round",
                       marks=marks if start == 0 else [], smooth=False)
            )  # fmt: skip
        priced = _over_epsilon(first, epsilon_at)
        if priced.values:
            over_epsilon.append(
                curves(f"{title} for its epsilon", metric, [priced], x_label="epsilon spent per site", marks=marks,
                       smooth=False)
            )  # fmt: skip
    if not over_rounds and not reasons:
        return []
    sizes = sorted({int(quality["n"]) for _, quality in probes if isinstance(quality.get("n"), int | float)})
    counted = f" At each point {' or '.join(f'{n:,}' for n in sizes)} pictures were measured," if sizes else ""
    parts = ["<h2>Quality over rounds</h2>"]
    if over_rounds:
        parts += [
            f"<p>The band is the 95 % interval.{counted}{' fewer than for the figures above.' if counted else ''}"
            f"{escaped(_measured_by(probes))}{_time_taken(run)}</p>",
            '<div class="curves">', *over_rounds, "</div>",
        ]  # fmt: skip
    if over_epsilon:
        parts += [
            "<h3>What epsilon bought</h3><p>The same figures over the epsilon that had been spent by then.</p>",
            '<div class="curves">', *over_epsilon, "</div>",
        ]  # fmt: skip
    elif over_rounds and run.config.privacy.name == "none":
        parts.append("<p>No quality over epsilon: the run had no privacy, so epsilon is infinite throughout.</p>")
    if reasons:
        rows = [[metric_name(name), why] for name, why in sorted(reasons.items())]
        parts.append(table(["not measured during training", "why"], rows, text=2))
    return parts


def _quality_line(probes: Sequence[tuple[int, Mapping[str, Any]]], metric: str, name: str) -> Line:
    taken = {}
    for server_round, quality in probes:
        figures = quality.get(metric)
        if isinstance(figures, Mapping) and name in figures:
            value, low, high = (float(part) for part in figures[name])
            if math.isfinite(value):
                known = math.isfinite(low) and math.isfinite(high)
                taken[server_round] = (value, low, high) if known else (value, math.nan, math.nan)
    rounds = sorted(taken)
    columns = [[taken[number][part] for number in rounds] for part in range(3)]
    return Line(name, rounds, *columns)


def _over_epsilon(line: Line, epsilon_at: Mapping[int, float]) -> Line:
    assert line.low is not None
    assert line.high is not None
    kept = [place for place, server_round in enumerate(line.x) if int(server_round) in epsilon_at]
    columns = [[column[place] for place in kept] for column in (line.values, line.low, line.high)]
    return Line(line.name, [epsilon_at[int(line.x[place])] for place in kept], *columns)


def _beside(probes: Sequence[tuple[int, Mapping[str, Any]]], metric: str) -> Mapping[str, Any]:
    """What the last event says beside the numbers of a metric; empty in runs of before it did."""
    for _, quality in reversed(probes):
        about = quality.get("about")
        if isinstance(about, Mapping) and isinstance(about.get(metric), Mapping):
            return dict(about[metric])
    return {}


def _measured_by(probes: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    metrics = dict.fromkeys(metric for _, quality in probes for metric in quality)
    said = {
        f"{metric_name(metric)} against {about.get('reference_n')} pictures of {about.get('reference')}"
        + (f", by {about['extractor']}" if about.get("extractor") else "")
        for metric in metrics if (about := _beside(probes, metric))
    }  # fmt: skip
    return f" Measured: {'; '.join(sorted(said))}." if said else ""


def _time_taken(run: RunDirectory) -> str:
    taken, rounds = (math.fsum(float(line["seconds"]) for line in run.timings(of=of)) for of in ("quality", "round"))
    return f" They took {taken:.0f} s, {taken / (taken + rounds):.1%} of the training's time." if taken else ""


def _marks(
    run: RunDirectory, evaluation: Mapping[str, Any] | None, probes: Sequence[tuple[int, Mapping[str, Any]]],
    metric: str, name: str,
) -> list[tuple[str, float]]:  # fmt: skip
    """What real pictures and what guessing gets, as far as it is known."""
    known = _beside(probes, metric).get("marks")
    real, chance = known[name] if isinstance(known, Mapping) and name in known else (None, None)
    if chance is None:
        chance = _chance(run, evaluation, metric, name)
    marks = [(f"real pictures, {name}", real), (f"guessing, {name}", chance)]
    return [(text, float(value)) for text, value in marks if value is not None]


def _chance(run: RunDirectory, evaluation: Mapping[str, Any] | None, metric: str, name: str) -> float | None:
    """What guessing gets for a figure of the events: the evaluation says it, or the result of the run."""
    for figure in figures_of(evaluation, metric) if evaluation is not None else ():
        if name in _names_of(figure) and figure.chance is not None:
            return figure.chance
    if run.finished:
        for figure in figures_of(run.read_json("result.json"), metric):
            if name in _names_of(figure) and figure.chance is not None:
                return figure.chance
    return None


def _names_of(figure: Figure) -> set[str]:
    """Events may call "accuracy of colour" plainly "colour", and "accuracy" "all"."""
    return {figure.name, figure.name.removeprefix("accuracy of "), "all" if figure.name == "accuracy" else figure.name}


# ---- what is behind


def _behind(evaluation: Mapping[str, Any]) -> list[str]:
    model, reference = evaluation["model"], evaluation["reference"]
    facts = [
        ["model", Code(model.get("weights_digest") or "not stated")],
        ["public set, all parts", Code(reference.get("digest") or "not stated")],
        *([["public set, part test", Code(reference["test_digest"])]] if reference.get("test_digest") else []),
        ["evaluation", Code(evaluation["key"])],
        ["privacy of the model", privacy_words(evaluation)],
    ]
    intervals = [
        [figure_label(metric, figure), figure.interval.how,
         "; ".join(f"{name} {', '.join(map(str, seeds))}" for name, seeds in figure.seeds.items()) or "–"]
        for metric in evaluation["metrics"]
        for figure in figures_of(evaluation, metric)
    ]  # fmt: skip
    seconds = [
        [metric_name(metric), f"{float(entry['seconds']):,.1f}"]
        for metric, entry in evaluation["metrics"].items()
        if isinstance(entry.get("seconds"), int | float)
    ]
    versions = [[name, value] for name, value in (evaluation.get("versions") or {}).items()]
    command = evaluation.get("command")
    return [
        "<h2>Behind these figures</h2>",
        *([f"<p>The same figures again:</p><pre><code>{escaped(command)}</code></pre>"] if command else []),
        table(["", "SHA-256, or in words"], facts, text=2),
        '<details><summary>Where the intervals come from, seeds, seconds, versions</summary>',
        table(["figure", "interval", "seeds"], intervals, text=3) if intervals else "",
        table(["", "seconds"], seconds) if seconds else "",
        table(["", "version"], versions, text=2) if versions else "",
        "</details>",
    ]  # fmt: skip
