"""Evaluated runs side by side: which figures can be compared at all, and which differences are larger than noise.

Two runs are told apart in a figure when z = |a - b| / sqrt(s_a^2 + s_b^2), with s from each 95 % interval, is too
large for chance after Holm's correction over all pairs of that figure. Runs that differ in the seed alone are also
taken together, with Student's t over seeds, and told apart by Welch's test. Figures against another public set, by
another extractor, or of another number of pictures stand in blocks of their own, with the reason; so does usefulness
where the classifiers learned from another number of pictures, or were trained another number of times.

Not covered: a correction over figures (Holm holds the chance of any false statement at 5 % within one figure), and
what single runs have in common: the same latents and reference pictures make their differences a little safer than z.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from server.charts import Point, points
from server.evaluation_page import BETTER, METRIC_WORDS, figure_label, metric_name, number, privacy_words, span
from server.evaluations import check_evaluation, evaluation_words, figures_of, left_aside
from shared.cli import printable
from shared.errors import UsageError
from shared.metrics.figure import NORMAL_QUANTILE, Figure, Interval, seeds_interval
from shared.page import Code, Small, bullets, counted, escaped, html_page, image, table, warning
from shared.plain import plain
from shared.rundir import RunDirectory

FORMAT = 1
FALSE_ALARMS = 0.05  # of any pair of one figure
JOB = ("scenario", "data", "partition", "attribute", "alpha")  # of simulation.json: what data the sites had
MEANS = ("caption-accuracy", "clip-score")  # a mean over pictures: how many there are decides only how sure it is
# Their intervals hold one side fixed, or a threshold for known (docs/evaluation.md): too narrow to judge by.
ONE_SIDED = ("prdc", "nearest")
# Metrics, and figures of other metrics, that are shares of pictures and cannot leave [0, 1]. Density can.
SHARES = ("caption-accuracy", "downstream", "retrieval", "precision", "recall", "coverage", "very near")


@dataclass(frozen=True, eq=False)
class Column:
    """One run. `settings` are those of the run, the public prompts, the data and the versions, flat."""

    name: str
    run: RunDirectory
    evaluation: Mapping[str, Any]
    settings: dict[str, str]


@dataclass(frozen=True)
class Difference:
    """Of two runs, or two groups of seeds, in one figure.

    Attributes:
        first, second: names; the first is the better one, or the higher one where neither direction is better.
        reach: half the 95 % interval of the difference, before the correction.
        p: two-sided, after Holm's correction; `None` where there is no interval to tell by.
    """

    first: str
    second: str
    difference: float
    reach: float
    p: float | None
    better: str = "better"

    @property
    def larger_than_noise(self) -> bool:
        return self.p is not None and self.p <= FALSE_ALARMS

    @property
    def words(self) -> str:
        if self.p is None:
            return _nothing_to_tell_by([self])
        by = f"{self.difference:.3g} ± {self.reach:.2g}"
        if self.larger_than_noise:
            return f"{self.first} is {self.better} than {self.second} by {by}: larger than noise"
        return f"{self.first} and {self.second} are not told apart ({by})"


def _nothing_to_tell_by(pairs: Sequence[Difference]) -> str:
    """One sentence for all pairs of a figure without an interval, however many they are."""
    if len(pairs) == 1:
        named = f"{pairs[0].first} and {pairs[0].second}"
    else:
        named = f"{len(pairs)} pairs of {_listed(list(dict.fromkeys(n for d in pairs for n in (d.first, d.second))))}"
    return f"{named}: no interval to tell them apart by; runs of several seeds would"


def _words(differences: Sequence[Difference]) -> list[str]:
    known = [difference for difference in differences if difference.p is not None]
    unknown = [difference for difference in differences if difference.p is None]
    return [d.words for d in known] + ([_nothing_to_tell_by(unknown)] if unknown else [])


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, one a seed; `places` among the columns."""

    name: str
    places: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """One figure of the runs in which it can be compared.

    Attributes:
        figures: column to figure.
        missing: column to the reason why it has none.
        means: group to the mean over its seeds, with its interval.
        differences, over_seeds: of all pairs of runs, and of groups; those larger than noise first.
    """

    metric: str
    figures: dict[int, Figure]
    missing: dict[int, str]
    means: dict[str, tuple[float, Interval]]
    differences: list[Difference]
    over_seeds: list[Difference]

    @property
    def any(self) -> Figure:
        return next(iter(self.figures.values()))


@dataclass(frozen=True, eq=False)
class Block:
    """Figures that can be compared with each other; with a `reason`, not with those of the other runs."""

    reason: str
    places: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that is said. `aside` are further evaluations, which are not compared: the run's name, and which in words."""

    columns: list[Column]
    groups: list[Group]
    blocks: list[Block]
    cautions: list[str]
    aside: list[tuple[str, str]]


def compare(runs: Sequence[RunDirectory], evaluations: Sequence[Mapping[str, Any]]) -> Comparison:
    """What can be said of `runs`, each with its evaluation.

    Args:
        evaluations: in the order of `runs`, as `load_comparable` chooses them.
    Raises:
        UsageError: fewer than two runs, or one of them twice.
        RunDirectoryError: an evaluation is damaged.
    """
    if len(runs) < 2:
        raise UsageError("one run is nothing to compare", hint="name two or more: fedcanvas compare runs/a runs/b")
    paths = [run.path.resolve() for run in runs]
    twice = next((path for place, path in enumerate(paths) if path in paths[:place]), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice", hint="name each run once")
    for run, evaluation in zip(runs, evaluations, strict=True):
        check_evaluation(evaluation, origin=run.path / "evaluations")
    names = _names(paths)
    columns = [
        Column(name, run, evaluation, _settings(run))
        for name, run, evaluation in zip(names, runs, evaluations, strict=True)
    ]
    groups = _groups(columns)
    aside = [(c.name, words) for c in columns for words in left_aside(c.run.path, c.evaluation)]
    return Comparison(columns, groups, _blocks(columns, groups), list(_cautions(columns)), aside)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: one at most 0.05 keeps the chance of any false alarm among all at 5 %.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


# ---- what is the same, and what can be compared


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell all apart."""
    for parts in itertools.count(1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names) or parts > max(len(path.parts) for path in paths):
            break
    return names


def _settings(run: RunDirectory) -> dict[str, str]:
    found = {key: str(value) for key, value in run.config.to_flat().items()}
    digest = hashlib.sha256("\n".join(run.prompts).encode()).hexdigest()[:8]
    found["public prompts"] = f"{len(run.prompts)} ({digest})"
    found["randomness"] = run.entropy
    try:
        job = json.loads((run.path / "simulation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        job = {}
    if isinstance(job, Mapping):
        found.update({f"simulation {name}": str(job[name]) for name in JOB if job.get(name) is not None})
    found.update({f"version of {name}": str(value) for name, value in run.read_json("versions.json").items()})
    return found


def _groups(columns: Sequence[Column]) -> list[Group]:
    alike: dict[str, dict[str, int]] = {}
    for place, column in enumerate(columns):
        others = {key: value for key, value in column.settings.items() if key != "seed"}
        seeds = alike.setdefault(json.dumps(others, sort_keys=True), {})
        seeds.setdefault(column.settings["seed"], place)  # of two runs with one seed, one tells all there is
    return [
        Group(f"mean of {_listed([columns[place].name for place in seeds.values()])}", tuple(seeds.values()))
        for seeds in alike.values()
        if len(seeds) > 1
    ]


def _context(metric: str, figure: Figure, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal for two figures to be comparable, by its name in words."""
    reference = evaluation["reference"]
    whole = str(reference.get("digest", "not stated"))[:12]
    if metric == "downstream":  # n pictures are what the classifiers learn from: more of them teach more
        return {
            "test pictures": str(reference.get("test_digest") or whole)[:12],
            "number of pictures": f"{figure.n:,}",
            "number of trainings": f"{len(figure.seeds.get('trainings', []))}",
        }
    if metric in MEANS and figure.extractor is not None:
        return {"extractor": figure.extractor}
    if metric in MEANS:
        return {"public set": whole}
    return {"public set": whole, "extractor": figure.extractor or "none", "number of pictures": f"{figure.n:,}"}


def _blocks(columns: Sequence[Column], groups: Sequence[Group]) -> list[Block]:
    every = tuple(range(len(columns)))
    comparable = Block("", every)
    apart: dict[tuple[tuple[int, ...], str], Block] = {}
    for metric, name in _figure_names(columns):
        found: dict[int, Figure] = {}
        for place, column in enumerate(columns):
            figure = next((f for f in figures_of(column.evaluation, metric) if f.name == name), None)
            if figure is not None:
                found[place] = figure
        contexts = {place: _context(metric, figure, columns[place].evaluation) for place, figure in found.items()}
        alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for place, context in contexts.items():
            alike.setdefault(tuple(context.items()), []).append(place)
        for places in alike.values():
            missing = {place: _why_missing(columns[place], metric) for place in every if place not in found}
            if len(alike) == 1:
                comparable.rows.append(_row(metric, found, missing, columns, groups))
                continue
            own = contexts[places[0]]
            differ = [key for key in own if len({context.get(key) for context in contexts.values()}) > 1]
            reason = "; ".join(f"{key}: {own[key]}" for key in differ)
            block = apart.setdefault((tuple(places), reason), Block(reason, tuple(places)))
            block.rows.append(_row(metric, {place: found[place] for place in places}, {}, columns, groups))
    return [*([comparable] if comparable.rows else []), *apart.values()]


def _figure_names(columns: Sequence[Column]) -> list[tuple[str, str]]:
    return list(
        dict.fromkeys(
            (metric, figure.name)
            for column in columns
            for metric in column.evaluation["metrics"]
            for figure in figures_of(column.evaluation, metric)
        )
    )


def _why_missing(column: Column, metric: str) -> str:
    entry = column.evaluation["metrics"].get(metric)
    if entry is None:
        return "not asked for"
    return f"not measured: {entry['not_measured']}" if "not_measured" in entry else "not measured"


def _cautions(columns: Sequence[Column]) -> Iterator[str]:
    """What a reader must know before any figure."""
    if len({column.settings["public prompts"] for column in columns}) > 1:
        yield "The runs have different public prompts: figures about prompts were asked different questions."
    for name in ("unit", "delta", "adjacency"):
        stated = {str((column.evaluation.get("privacy") or {}).get(name)) for column in columns}
        if len(stated) > 1:
            yield f"The runs differ in the {name} of their privacy: their epsilons do not mean the same."
    weights: dict[str, list[str]] = {}
    for column in columns:
        digest = column.evaluation["model"].get("weights_digest")
        if digest:
            weights.setdefault(str(digest), []).append(column.name)
    for names in weights.values():
        if len(names) > 1:
            yield f"{_listed(names)} have the very same weights."


# ---- what is larger than noise


def _row(
    metric: str, figures: dict[int, Figure], missing: dict[int, str], columns: Sequence[Column],
    groups: Sequence[Group],
) -> Row:  # fmt: skip
    first = next(iter(figures.values()))
    better, share = first.better, metric in SHARES or first.name in SHARES
    values: dict[str, list[float]] = {}
    for group in groups:
        if all(place in figures and math.isfinite(figures[place].value) for place in group.places):
            values[group.name] = [figures[place].value for place in group.places]
    means = {name: (sum(seeds) / len(seeds), _over_seeds(seeds, share=share)) for name, seeds in values.items()}
    of_runs = [
        _by_intervals(columns[a].name, figures[a], columns[b].name, figures[b], whole=metric not in ONE_SIDED)
        for a, b in itertools.combinations(figures, 2)
    ]
    of_groups = [
        _by_seeds(a, values[a], b, values[b], better) for a, b in itertools.combinations(values, 2)
    ]  # fmt: skip
    return Row(metric, figures, missing, means, _corrected(of_runs), _corrected(of_groups))


def _over_seeds(seeds: Sequence[float], *, share: bool) -> Interval:
    """Student's t; where few seeds leave it wider than a share can be, what a share can be."""
    interval = seeds_interval(seeds, how=f"Student's t over {len(seeds)} seeds")
    if share and all(0 <= value <= 1 for value in seeds):
        return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
    return interval


def _by_intervals(name_a: str, a: Figure, name_b: str, b: Figure, *, whole: bool) -> Difference:
    spread = math.hypot(*((f.interval.high - f.interval.low) / 2 / NORMAL_QUANTILE for f in (a, b)))
    p = None
    if whole and 0 < spread < math.inf and math.isfinite(a.value - b.value):
        p = math.erfc(abs(a.value - b.value) / spread / math.sqrt(2))  # two-sided
    return _difference(name_a, a.value, name_b, b.value, a.better, NORMAL_QUANTILE * spread, p)


def _by_seeds(name_a: str, a: Sequence[float], name_b: str, b: Sequence[float], better: str) -> Difference:
    """Welch's test: the groups may spread differently."""
    from scipy.stats import t

    squares = [_variance(values) / len(values) for values in (a, b)]
    spread, mean_a, mean_b = math.sqrt(sum(squares)), sum(a) / len(a), sum(b) / len(b)
    if not 0 < spread < math.inf:
        return _difference(name_a, mean_a, name_b, mean_b, better, math.inf, None)
    freedom = sum(squares) ** 2 / sum(
        square**2 / (len(values) - 1) for square, values in zip(squares, (a, b), strict=True)
    )
    p = float(2 * t.sf(abs(mean_a - mean_b) / spread, freedom))
    return _difference(name_a, mean_a, name_b, mean_b, better, float(t.ppf(0.975, freedom)) * spread, p)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _difference(
    name_a: str, a: float, name_b: str, b: float, better: str, reach: float, p: float | None
) -> Difference:  # fmt: skip
    if (a < b) != (better == "lower"):
        name_a, name_b = name_b, name_a
    return Difference(name_a, name_b, abs(a - b), reach, p, "higher" if better == "neither" else "better")


def _corrected(found: Sequence[Difference]) -> list[Difference]:
    """With Holm's correction over all pairs that can be tested; those that are larger than noise first."""
    tested = [difference for difference in found if difference.p is not None]
    adjusted = iter(holm([difference.p for difference in tested if difference.p is not None]))
    corrected = [
        Difference(d.first, d.second, d.difference, d.reach, None if d.p is None else next(adjusted), d.better)
        for d in found
    ]
    return sorted(corrected, key=lambda difference: not difference.larger_than_noise)


# ---- as text and as JSON


def compare_text(runs: Sequence[RunDirectory], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal: under each figure a line a run, then what is larger than noise."""
    found = compare(runs, evaluations)
    width = min(40, max(len(name) for name in [*(c.name for c in found.columns), *(g.name for g in found.groups)]))
    lines = [f"{column.name:<{width}}  {privacy_words(column.evaluation)}" for column in found.columns]
    lines += [f"note: {caution}" for caution in found.cautions]
    if found.aside:
        lines += ["", "compared, and left aside:"]
        for column in found.columns:
            lines.append(f"  {column.name}: evaluation {evaluation_words(column.evaluation)}")
            lines += [f"    left aside: evaluation {words}" for name, words in found.aside if name == column.name]
    for block in found.blocks:
        if block.reason:
            names = _listed([found.columns[place].name for place in block.places])
            lines += ["", f"not comparable with the other runs: {names} ({block.reason})"]
        for row in block.rows:
            lines += ["", f"{figure_label(row.metric, row.any)} ({BETTER[row.any.better]})"]
            for place, figure in row.figures.items():
                lines.append(f"  {found.columns[place].name:<{width}}{number(figure.value):>11}   {span(figure)}")
            lines += [f"  {found.columns[place].name:<{width}}{'-':>11}   {why}" for place, why in row.missing.items()]
            for name, (mean, interval) in row.means.items():
                between = f"{number(interval.low)} to {number(interval.high)}, {interval.how}"
                lines.append(f"  {name:<{width}}{number(mean):>11}   {between}")
            lines += [f"    {words}" for words in [*_words(row.over_seeds), *_words(row.differences)]]
    lines += [f"{names}: {metric} not measured: {why}" for names, metric, why in _absent(found)]
    return "\n".join(printable(line) for line in lines)


def compare_json(runs: Sequence[RunDirectory], evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of it for another program; an infinite number is the text "inf"."""
    found = compare(runs, evaluations)
    columns = found.columns

    def pairs(differences: Sequence[Difference]) -> list[dict[str, Any]]:
        return [
            {"first": d.first, "second": d.second, "direction": d.better, "difference": d.difference, "reach": d.reach,
             "p_holm": d.p, "larger_than_noise": d.larger_than_noise}
            for d in differences
        ]  # fmt: skip

    blocks = [
        {
            "reason": block.reason,
            "runs": [columns[place].name for place in block.places],
            "figures": [
                {
                    "metric": row.metric, "name": row.any.name, "better": row.any.better,
                    "values": {columns[place].name: figure.to_dict() for place, figure in row.figures.items()},
                    "missing": {columns[place].name: why for place, why in row.missing.items()},
                    "means": {name: [mean, between.low, between.high] for name, (mean, between) in row.means.items()},
                    "differences": pairs(row.differences), "differences_over_seeds": pairs(row.over_seeds),
                }
                for row in block.rows
            ],
        }
        for block in found.blocks
    ]  # fmt: skip
    made: dict[str, Any] = plain(
        {
            "format": FORMAT,
            "runs": [
                {"name": column.name, "path": column.run.path, "evaluation": column.evaluation["key"],
                 "privacy": column.evaluation.get("privacy"), "not_measured": dict(_not_measured(column))}
                for column in columns
            ],
            "seeds": {group.name: [columns[place].name for place in group.places] for group in found.groups},
            "cautions": found.cautions,
            "left_aside": [{"run": name, "evaluation": words} for name, words in found.aside],
            "blocks": blocks,
            "settings": {
                key: dict(zip((column.name for column in columns), values, strict=True))
                for key, values in _differing(columns)
            },
        }
    )  # fmt: skip
    return made


# ---- as a page


def compare_html(runs: Sequence[RunDirectory], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One HTML file that needs no network. Raises as `compare` does."""
    found = compare(runs, evaluations)
    title = f"{_listed([column.name for column in found.columns])}, compared"
    return html_page(
        title,
        [
            f"<h1>{escaped(title)}</h1>",
            "<p>Each figure stands with its 95 % interval. Whether a difference is more than noise is said below.</p>",
            *(warning(caution) for caution in found.cautions),
            *_of_runs(found),
            *_figures(found),
            *_differences(found),
            *_charts(found),
            *_settings_that_differ(found),
            *_contact_strips(found),
        ],
    )


def _of_runs(found: Comparison) -> list[str]:
    rows = []
    for column in found.columns:
        config, reference = column.run.config, column.evaluation["reference"]
        about = (
            f"{counted(config.federation.sites, 'site')}, {counted(config.federation.rounds, 'round')},"
            f" {config.federation.published_records:,} {config.privacy.units} as published, seed {config.seed}"
        )
        measured = (f"{int(column.evaluation['n']):,} pictures", Small(f"against {reference.get('name', '?')}"))
        rows.append([column.name, privacy_words(column.evaluation), about, measured])
    grouped = [
        f"{_listed([found.columns[place].name for place in group.places])} differ in the seed alone: they also stand"
        f" together, as a mean over {len(group.places)} seeds."
        for group in found.groups
    ]
    parts = ["<h2>The runs</h2>", table(["", "privacy spent", "training", "measured"], rows, text=4),
             *([bullets(grouped)] if grouped else [])]  # fmt: skip
    if found.aside:
        compared = [[column.name, evaluation_words(column.evaluation)] for column in found.columns]
        parts += [
            "<h3>Further evaluations, left aside</h3>",
            "<p>Of each run one evaluation is compared: of the public set, number of pictures and extractor that most"
            " of these runs share, the one that measured most, then the newest.</p>",
            table(["run", "compared here"], compared, text=2),
            table(["run", "left aside"], [list(pair) for pair in found.aside], text=2),
        ]
    return parts


def _figures(found: Comparison) -> list[str]:
    parts = []
    for block in found.blocks:
        names = [found.columns[place].name for place in block.places]
        if block.reason:
            parts.append(f"<h2>Not comparable with the other runs: {escaped(_listed(names))}</h2>")
            parts.append(warning(f"These figures stand alone, since the runs differ here. {block.reason}."))
        else:
            parts.append("<h2>Figures</h2>")
        groups = list(dict.fromkeys(name for row in block.rows for name in row.means))
        rows = []
        for row in block.rows:
            cells: list[Any] = [(figure_label(row.metric, row.any), Small(BETTER[row.any.better]))]
            for place in block.places:
                if place in row.figures:
                    figure = row.figures[place]
                    cells.append((number(figure.value), Small(span(figure))))
                else:
                    cells.append(Small(row.missing[place].partition(":")[0]))  # the reason stands below
            for name in groups:
                mean = row.means.get(name)
                cells.append("–" if mean is None else (
                    number(mean[0]), Small(f"{number(mean[1].low)} to {number(mean[1].high)}"))
                )  # fmt: skip
            rows.append(cells)
        counted = [f"{name} ({_seeds(found, name)} seeds)" for name in groups]
        parts.append(table(["", *names, *counted], rows))
    if absent := _absent(found):
        parts += ["<h3>Not measured</h3>", table(["run", "metric", "why"], absent, text=3)]
    metrics = dict.fromkeys(row.metric for block in found.blocks for row in block.rows)
    said = [[metric_name(metric), *METRIC_WORDS[metric][1:]] for metric in metrics if metric in METRIC_WORDS]
    if said:
        parts.append(
            "<details><summary>What these figures say, and what not</summary>"
            + table(["", "it says", "it does not say"], said, text=3) + "</details>"
        )  # fmt: skip
    beware = dict.fromkeys(
        f"{figure_label(row.metric, figure)}: {figure.warning}"
        for block in found.blocks for row in block.rows for figure in row.figures.values() if figure.warning
    )  # fmt: skip
    return [*parts, *(warning(words) for words in beware)]


def _differences(found: Comparison) -> list[str]:
    parts = [
        "<h2>What is larger than noise?</h2>",
        "<p>Between two runs, noise is the drawing of pictures and of resamplings: the chance that any statement about"
        " one figure is wrong is held at 5 % (Holm's correction over all its pairs). A single run says nothing of"
        " another training with another seed; where there are several seeds, the lines “over seeds” say that too.</p>",
    ]
    rows: list[list[Any]] = []
    for block in found.blocks:
        for row in block.rows:
            for differences, kind in ((row.over_seeds, "over seeds"), (row.differences, "between runs")):
                if differences:
                    told = tuple(d.words for d in differences if d.larger_than_noise)
                    other = tuple(_words([d for d in differences if not d.larger_than_noise]))
                    label = (figure_label(row.metric, row.any), Small(kind))
                    rows.append([label, told or "none", other or "–"])
    if not rows:
        return [*parts, "<p>No figure stands in two runs that can be compared.</p>"]
    return [*parts, table(["", "larger than noise", "not told apart"], rows, text=3)]


def _charts(found: Comparison) -> list[str]:
    drawn, shown = [], set()
    for block in found.blocks:
        for row in block.rows:
            if len(row.figures) < 2 or (block, row.metric) in shown:  # the first figure stands for its metric
                continue
            shown.add((block, row.metric))
            rows = [
                Point(found.columns[place].name, figure.value, figure.interval.low, figure.interval.high)
                for place, figure in row.figures.items()
                if math.isfinite(figure.value)
            ]
            rows += [Point(name, mean, interval.low, interval.high, kind=1)
                     for name, (mean, interval) in row.means.items() if math.isfinite(mean)]  # fmt: skip
            marks = []
            for name in ("chance", "floor"):
                stated = {getattr(figure, name) for figure in row.figures.values()}
                value = stated.pop() if len(stated) == 1 else None
                if value is not None and math.isfinite(value):
                    marks.append(("guessing" if name == "chance" else "real pictures", value))
            label = figure_label(row.metric, row.any)
            if rows:
                drawn.append(points(label, BETTER[row.any.better], rows, marks=marks))
    if not drawn:
        return []
    return ["<h2>Side by side</h2>", '<div class="curves">', *drawn, "</div>"]


def _settings_that_differ(found: Comparison) -> list[str]:
    rows = [[key, *values] for key, values in _differing(found.columns)]
    if not rows:
        return ["<h2>Settings that differ</h2>", "<p>None: settings, prompts, data and versions are the same.</p>"]
    head = ["setting", *(column.name for column in found.columns)]
    return ["<h2>Settings that differ</h2>", table(head, rows, text=len(head))]


def _differing(columns: Sequence[Column]) -> Iterator[tuple[str, list[str]]]:
    for key in dict.fromkeys(key for column in columns for key in column.settings):
        values = [column.settings.get(key, "unset") for column in columns]
        if len(set(values)) > 1:
            yield key, values


def _contact_strips(found: Comparison) -> list[str]:
    """The sheet of each run: `simulate` draws all of them with the same latents, for prompts chosen in one way."""
    alike = len({column.settings["public prompts"] for column in found.columns}) == 1
    said = "The same prompts with the same latents in every run." if alike else "The runs have different prompts."
    parts = ["<h2>Pictures</h2>", f"<p>{said} They were not chosen.</p>"]
    for column in found.columns:
        parts.append(f"<h3>{escaped(column.name)}</h3>")
        sheet = column.run.path / "sheet.png"
        if sheet.is_file():
            parts.append(image(sheet.read_bytes(), f"Contact sheet of {column.name}: prompts under pictures"))
        else:
            parts.append("<p>This run has no contact sheet.</p>")
    rows = [[column.name, Code(column.evaluation["key"]), Code(column.evaluation.get("command") or "not stated")]
            for column in found.columns]  # fmt: skip
    return [*parts, "<h2>Behind these figures</h2>", table(["", "evaluation", "command"], rows, text=3)]


def _not_measured(column: Column) -> Iterator[tuple[str, str]]:
    for metric, entry in column.evaluation["metrics"].items():
        if "not_measured" in entry:
            hint = f" ({entry['hint']})" if entry.get("hint") else ""
            yield metric, f"{entry['not_measured']}{hint}"


def _absent(found: Comparison) -> list[list[str]]:
    """[runs, metric, why], one entry for all runs that have one reason."""
    runs: dict[tuple[str, str], list[str]] = {}
    for column in found.columns:
        for about in _not_measured(column):
            runs.setdefault(about, []).append(column.name)
    return [[_listed(names), metric, why] for (metric, why), names in runs.items()]


def _seeds(found: Comparison, name: str) -> int:
    return next(len(group.places) for group in found.groups if group.name == name)


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
