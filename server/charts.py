"""Charts as inline SVG: curves, points with error bars, confusion matrices; readable in print, in grey and aloud.

What tells lines apart is style and marker, never colour alone. Each chart is a `<figure>` with a text alternative that
says its numbers and a table of them to open; letters stay letters. Everything from outside is escaped, and nothing in
it is taken for markup or a formula. Not here: what is drawn, and the page around it (`shared.page`).
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shared.page import svg_figure, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1b5e9b", "#b3541e", "#3a7d44", "#6b3fa0", "#555555", "#9b1b4a")  # of different darkness in grey
STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_LINES = len(COLOURS)
TABLE_ROWS = 40  # of the numbers of a curve
MARKED_POINTS = 16  # up to so many, each is marked
CELL_NUMBERS = 12  # classes of a confusion matrix up to which numbers stand in the cells
SIZE = (4.7, 3.0)  # inches; letters of 9 points are still read when a phone makes it narrower
LETTERS = 24  # of a name beside an axis


@dataclass(frozen=True)
class Line:
    """`values` at `x`, as long as it; with `low` and `high` a band at 95 % is drawn around them."""

    name: str
    x: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Point:
    """A figure of one run; `kind` 1 is drawn in another way, for what stands for several."""

    name: str
    value: float
    low: float
    high: float
    kind: int = 0


def curves(
    title: str, y_label: str, lines: Sequence[Line], *, x_label: str, marks: Sequence[tuple[str, float]] = (),
    from_zero: bool = True, smooth: bool = True,
) -> str:  # fmt: skip
    """Lines over `x_label`, at most `MOST_LINES`; lines without a point are left out.

    Args:
        marks: horizontal lines with their names, such as chance.
        from_zero: whether the axis must show 0.
        smooth: whether what has many points is drawn thin behind its moving average.
    """
    lines = [line for line in lines if len(line.values)][:MOST_LINES]
    assert lines
    alternative = f"{title}. " + " ".join(
        [*(_described(line, x_label) for line in lines), *(f"{name}: {value:.3g}." for name, value in marks)]
    )

    def draw(axes: Axes) -> None:
        handles = []
        for place, line in enumerate(lines):
            colour, window = COLOURS[place], len(line.values) // 40 if smooth and line.low is None else 0
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
            if window > 1:
                axes.plot(line.x, line.values, color=colour, linewidth=0.8, alpha=0.25)
            handles += axes.plot(
                line.x, _smoothed(line.values, window), color=colour, linewidth=1.8, linestyle=STYLES[place],
                marker=MARKERS[place] if len(line.x) <= MARKED_POINTS else None, markersize=3.5,
            )  # fmt: skip
        names = [line.name for line in lines]
        for place, (name, value) in enumerate(marks):
            handles.append(axes.axhline(value, color="#333333", linewidth=1, linestyle=STYLES[(place + 2) % 4]))
            names.append(name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(_printable(y_label))
        if from_zero:
            # An infinite end of a band would leave nothing else to be seen.
            axes.set_ylim(bottom=min(0, *(min(line.values) for line in lines)))
        _fit_to_values(axes, [*(value for line in lines for value in line.values), *(value for _, value in marks)])
        if len(names) > 1:
            axes.legend(handles, [f" {_printable(name)}" for name in names], frameon=False, fontsize=8.5)

    svg = _svg(draw, title, salt=alternative)
    return svg_figure(svg, alternative, after=_numbers(*_curve_rows(lines, x_label)))


def points(
    title: str, x_label: str, rows: Sequence[Point], *, marks: Sequence[tuple[str, float]] = ()
) -> str:  # fmt: skip
    """One line a point, the first on top, each with its interval; `marks` are vertical lines such as chance."""
    assert rows
    shown = [f"{row.name}: {row.value:.4g} ({_span(row.low, row.high)})" for row in rows]
    alternative = f"{title}. " + "; ".join([*shown, *(f"{name}: {value:.4g}" for name, value in marks)]) + "."

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            reach = [[max(0.0, row.value - row.low)], [max(0.0, row.high - row.value)]]
            if not math.isfinite(reach[0][0] + reach[1][0]):  # no interval is known: from edge to edge
                axes.axhline(place, color=COLOURS[row.kind], linewidth=1, linestyle=":")
                reach = [[0.0], [0.0]]
            axes.errorbar(
                [row.value], [place], xerr=reach, fmt="D" if row.kind else "o", color=COLOURS[row.kind],
                markersize=6 if row.kind else 5, capsize=4, linewidth=1.6,
                markerfacecolor="white" if row.kind else COLOURS[0],
            )  # fmt: skip
        handles = [
            axes.axvline(value, color="#333333", linewidth=1, linestyle=STYLES[place % 2 + 1])
            for place, (_, value) in enumerate(marks)
        ]
        axes.set_yticks(range(len(rows)), [_printable(row.name) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(_printable(x_label))
        axes.locator_params(axis="x", nbins=6)
        if marks:
            names = [f" {_printable(name)}" for name, _ in marks]
            axes.figure.legend(handles, names, frameon=False, fontsize=8.5, loc="outside lower center", ncols=2)

    height = 1.3 + 0.3 * len(rows) + (0.3 if marks else 0)
    svg = _svg(draw, title, salt=alternative, size=(SIZE[0], height), grid="x")
    numbers = [[row.name, f"{row.value:.4g}", _span(row.low, row.high)] for row in rows]
    return svg_figure(svg, alternative, after=_numbers(["", "value", "95 % interval"], numbers))


def confusion(title: str, classes: Sequence[str], counts: Sequence[Sequence[float]], *, note: str = "") -> str:
    """A matrix of what it should be (rows) and what was seen (columns), shaded by the share of its row.

    Args:
        counts: `(K, K)`, K as many as `classes`; a row without a picture stays white.
    """
    totals = [sum(row) for row in counts]
    shares = [[n / total if total else 0.0 for n in row] for row, total in zip(counts, totals, strict=True)]
    alternative = f"{title}. " + " ".join(
        _mistaken(name, shares[place], place, classes, totals[place]) for place, name in enumerate(classes)
    )

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="equal")
        if len(classes) <= CELL_NUMBERS:
            for row, column in itertools.product(range(len(classes)), repeat=2):
                if counts[row][column]:
                    axes.text(
                        column, row, f"{counts[row][column]:g}", ha="center", va="center", fontsize=8,
                        color="white" if shares[row][column] > 0.5 else "#1a1a1a",
                    )  # fmt: skip
        names, places = [_printable(name) for name in classes], range(len(classes))
        axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(places, names)
        axes.tick_params(length=0)
        axes.set_xlabel("taken for")
        axes.set_ylabel("should be")

    side = min(max(2.6, 1.6 + 0.32 * len(classes)), 9.0)
    svg = _svg(draw, title, salt=alternative, size=(side + 0.6, side), grid="", font=9 if len(classes) <= 24 else 6)
    rows = [[name, *(f"{n:g}" for n in row)] for name, row in zip(classes, counts, strict=True)]
    caption = ". ".join([title, *([note] if note else []), "Row: what it should be; column: what it was taken for"])
    return svg_figure(svg, alternative, caption=caption, after=_numbers(["", *classes], rows))


# ---- parts of a chart


def _svg(
    draw: Callable[[Any], None], title: str, *, salt: str, size: tuple[float, float] = SIZE,
    grid: Literal["both", "x", ""] = "both", font: float = 9,
) -> str:  # fmt: skip
    from matplotlib.figure import Figure

    with _style(salt, font):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(_printable(title, most=56), fontsize=10.5, loc="left")
        draw(axes)
        if grid:
            axes.grid(alpha=0.3, axis=grid)
            axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML these say nothing; without them a page names no address at all.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)


@contextmanager
def _style(salt: str, font: float) -> Iterator[None]:
    """Letters as paths would be unreadable for a screen reader and large; ids from a salt keep the page stable."""
    from matplotlib import rc_context

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "DejaVu Sans", "font.size": font,
                "text.parse_math": False}  # fmt: skip
    with rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that this font lacks is left to the reader's browser
        yield


def _fit_to_values(axes: Axes, values: Sequence[float]) -> None:
    """A band that is far wider than what it surrounds is cut at the edge."""
    low, high = min(values), max(values)
    span = max(high - low, 0.05 * max(abs(low), abs(high)), 1e-9)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, min(low - 1.5 * span, 0 if bottom <= 0 <= low else low)), min(top, high + 1.5 * span))


def _curve_rows(lines: Sequence[Line], x_label: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the numbers behind curves; of many, some that lie evenly."""
    every = sorted({x for line in lines for x in line.x})
    kept = [every[place] for place in evenly(len(every), TABLE_ROWS)]
    head, columns = [x_label], []
    for line in lines:
        head.append(line.name)
        columns.append(dict(zip(line.x, (f"{value:.4g}" for value in line.values), strict=True)))
        if line.low is not None and line.high is not None:
            head.append(f"{line.name}, 95 %")
            spans = [_span(low, high) for low, high in zip(line.low, line.high, strict=True)]
            columns.append(dict(zip(line.x, spans, strict=True)))
    return head, [[f"{x:g}" if x < 100 else f"{x:,.0f}", *(column.get(x, "") for column in columns)] for x in kept]


def _numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f'<details class="numbers"><summary>Numbers</summary>{table(head, rows)}</details>'


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to `count` - 1, evenly, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of `window` values before and after each; fewer at the ends."""
    totals = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, place - window), min(len(values), place + window + 1)) for place in range(len(values))]
    return [(totals[end] - totals[start]) / (end - start) for start, end in spans]


def _described(line: Line, x_label: str) -> str:
    def at(place: int) -> str:
        if line.low is None or line.high is None:
            return f"{line.values[place]:.3g}"
        return f"{line.values[place]:.3g} ({_span(line.low[place], line.high[place])})"

    return (
        f"{line.name}: {at(0)} at {x_label} {line.x[0]:.4g}, {at(-1)} at {line.x[-1]:.4g},"
        f" between {min(line.values):.3g} and {max(line.values):.3g}."
    )


def _span(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}" if math.isfinite(high - low) else "no interval"


def _mistaken(name: str, shares: Sequence[float], place: int, classes: Sequence[str], total: float) -> str:
    if not total:
        return f"{name}: none."
    others = [(share, classes[other]) for other, share in enumerate(shares) if other != place]
    share, other = max(others, default=(0.0, ""))
    mostly = f", most often mistaken for {other} ({share:.0%})" if share > 0 else ""
    return f"{name}: {shares[place]:.0%} of {total:g} right{mostly}."


def _printable(text: str, *, most: int = LETTERS) -> str:
    shown = "".join(character if character.isprintable() else "�" for character in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"

