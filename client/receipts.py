"""One HTML page about what left a site and what it cost, for a person who answers for data protection.

It needs no network, runs no script, reads well on paper, on a phone, in the dark and aloud. Every figure comes from
the ledger (`client.spending`) when the page is written. Everything from outside is escaped.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from client.settings import SiteConfig
from client.spending import (
    Receipt,
    Refusals,
    RunFigures,
    Totals,
    best_guess,
    charged_and_not_sent,
    percent,
    receipts,
    refusals,
    run_figures,
    spent_over_time,
    totals,
)
from shared import __version__
from shared.page import Code as Hash
from shared.page import bullets as _list
from shared.page import escaped as _text
from shared.page import html_page, svg_figure
from shared.page import table as _table
from shared.privacy.accounting import ADJACENCY
from shared.privacy.budget import Lifetime
from shared.privacy.ledger import BODY, HEAD, Ledger

MOST_MESSAGES = 500  # beyond these, a run shows its first and last
SHOWN_OF_RUN = 3
CHART_POINTS = 400

KINDS = {
    "gradient": "noised sum of clipped gradients, of one training step",
    "update": "noised change of the model, after several training steps",
    "moments": "noised sum of statistics of pictures and captions, once before the first round",
    "query": "noised answer to one question, which a person at the site asked about its records",
}
CODES = {
    "message": "the request was malformed, of another version, or out of place",
    "config": "the settings were not valid, or not those that were agreed",
    "plan": "the settings cannot give the privacy that was asked for",
    "policy": "the site's policy does not allow it",
    "approval": "no person at the site had approved the run yet",
    "denied": "a person at the site had denied the run, or ended it",
    "release": "the software was not the release that the site accepts",
    "site": "everything that depends on the data or on what is left, and every fault; which of them is not told",
    "unreadable": "a line of the site's own list that cannot be read",
}

STYLE = """
:root { color-scheme: light dark; --ink: #17202a; --soft: #52606d; --paper: #ffffff; --panel: #f4f6f8; --line: #d5dbe1;
  --spent: #b3541e; --reserved: #e7b48f; --left: #a9cfb6; --ceiling: #3a4654; --accent: #1b5e9b; --warn: #fdf1e7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a5b0ba; --paper: #14181c; --panel: #1d2329;
  --line: #38424c; --spent: #f0935a; --reserved: #8a5431; --left: #35614f; --ceiling: #c3ccd5; --accent: #7fb8ec;
  --warn: #33261b; } }
* { box-sizing: border-box; }
body { font: 17px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
  max-width: 57rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .6rem 0; max-width: 44rem; } li { margin: .35rem 0; }
.about { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1.5rem 0; }
.fact { background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; }
.fact b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.fact span { color: var(--soft); font-size: .9rem; }
.warning { border-left: 4px solid var(--spent); background: var(--warn); padding: .6rem 1rem;
  border-radius: 0 .4rem .4rem 0; }
figure { margin: 1.2rem 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
figure svg { display: block; width: 100%; }
.axis { display: flex; justify-content: space-between; gap: 1rem; color: var(--soft); font-size: .85rem;
  margin-top: .2rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0 0; padding: 0; list-style: none;
  font-size: .9rem; }
.key li { margin: 0; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .45em; border-radius: .15em; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
.note { color: var(--soft); font-size: .9rem; margin: 1rem 0 0; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } tbody th { font-weight: 400; text-align: left; }
th.text, td.text { text-align: left; }
.log table { font-size: .82rem; line-height: 1.4; } .log th, .log td { white-space: nowrap; padding-right: .7rem; }
.log thead th { white-space: normal; vertical-align: bottom; } .log code { white-space: normal; font-size: .9em; }
code { font: .85em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
td code { display: inline-block; min-width: 14.6rem; }
pre { background: var(--panel); padding: .7rem .9rem; border-radius: .4rem; white-space: pre-wrap; margin: .5rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); padding: .25rem 0; }
summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
footer { margin-top: 3rem; color: var(--soft); font-size: .9rem; }
@media (max-width: 30rem) { body { font-size: 16px; padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.45rem; }
  .facts { grid-template-columns: 1fr 1fr; } .fact b { font-size: 1.3rem; } }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --panel: #f2f2f2; --line: #bbb; --spent: #9a4415;
  --reserved: #e3b592; --left: #d9e8de; --ceiling: #333; --accent: #000; --warn: #f7f0ea; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } h2, h3 { break-after: avoid; }
  figure, tr, .fact { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 8.5pt; } td code { min-width: 0; }
  details::details-content { content-visibility: visible; display: block; } }
"""


def receipts_page(folder: Path, config: SiteConfig, ledger: Ledger, ceiling: Lifetime) -> str:
    """The whole page.

    Args:
        folder: of the site, as a person would type it.
        ceiling: the ledger's or the policy's, the lower one.
    """
    messages, runs = receipts(ledger), run_figures(ledger)
    counted, refused = totals(ledger, ceiling), refusals(folder)
    unit = ledger.lineage.unit
    now = datetime.now(UTC).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC")
    parts = [
        f"<h1>What left site {_text(config.site_id)}, and what it cost</h1>",
        f'<p class="about">Privacy receipts of the records “{_text(config.lineage)}”, written on {now} from the'
        f" {len(ledger.entries):,} lines of their ledger.</p>",
        *_simulation(ledger),
        _facts(messages, counted),
        *_what_left(messages, runs),
        *_what_it_cost(ledger, counted, runs, messages, unit),
        *_what_it_reveals(counted, unit),
        *_how_to_check(folder, config, ledger),
        *_each_message(folder, ledger, messages, runs),
        *_single_words(folder, ledger, refused),
        f"<footer>Written by fedcanvas {_text(__version__)}. The last line of the ledger has the hash"
        f" <code>{_text(ledger.head)}</code>. This page loads nothing and runs nothing.</footer>",
    ]
    return html_page(f"What left site {config.site_id}", parts, style=STYLE, images=False)


def _simulation(ledger: Ledger) -> list[str]:
    if not ledger.lineage.simulated:
        return []
    return [
        '<p class="warning"><strong>This is a simulated site.</strong> Its noise comes from a seed that is written'
        " down, so that runs can be repeated. The figures are those of the same run with unpredictable noise; nobody is"
        " protected by this one.</p>"
    ]


def _facts(messages: Sequence[Receipt], counted: Totals) -> str:
    facts = [
        (f"{len(messages):,}", "messages left"),
        (_bytes(sum(message.bytes for message in messages)), "in all"),
        (_epsilon(counted.spent), "epsilon spent"),
        ("no limit", "is set")
        if math.isinf(counted.ceiling.max_epsilon)
        else (_epsilon(counted.left.epsilon), f"left of {_epsilon(counted.ceiling.max_epsilon)} for ever"),
    ]
    return '<div class="facts">' + "".join(f'<div class="fact"><b>{_text(f)}</b><span>{_text(w)}</span></div>'
                                           for f, w in facts) + "</div>"  # fmt: skip


# ---- 1


def _what_left(messages: Sequence[Receipt], runs: Sequence[RunFigures]) -> list[str]:
    parts = ["<h2>1. What left this site</h2>"]
    if not messages:
        parts.append("<p>Nothing has left this site yet, except for single words (section 6).</p>")
    else:
        noised = "with random noise added before it leaves"
        if any(math.isinf(run.epsilon_reserved) for run in runs):
            noised = "in runs with privacy, and in no others, with random noise added before it leaves"
        parts.append(
            f"<p>Nothing but {_count(len(messages), 'message')} of the kinds below, and single words (section 6). A"
            " message is one block of whole numbers of a size that was fixed beforehand, and 32 bytes that name its"
            f" place in the ledger. It is made from many records at once, each limited in its influence, {noised}. With"
            " it go the names of run, round and site.</p>"
        )
        rows = []
        for kind in sorted({message.kind for message in messages}):
            of_kind = [message for message in messages if message.kind == kind and not message.again]
            again = sum(message.kind == kind and message.again for message in messages)
            size = sum(message.bytes for message in messages if message.kind == kind)
            rows.append([kind, KINDS.get(kind, "not known from the ledger"), f"{len(of_kind):,}", f"{again:,}",
                         _bytes(size)])  # fmt: skip
        parts.append(
            _table(["kind", "what it is", "messages", "sent again", "size"], rows, text=2,
                   caption="“Sent again” are the very same bytes after a lost connection: nothing new, at no cost.")
        )  # fmt: skip
    asked = any(message.kind == "query" for message in messages)
    but = " But for the noised answers to questions in the table, that means every number." if asked else ""
    parts.append(
        "<p><strong>What did not leave:</strong> pictures, captions, file names, names of people, thumbnails or"
        " features of pictures, the number of records, and any measurement of how training went (losses, accuracy,"
        f" time).{but} The software has one single place that builds messages, and a fixed list of what that place lets"
        " through.</p>"
    )
    parts.append(
        "<p>A message counts here from the moment just before it is handed over, also when it is lost on the way."
        " Whoever watches the network sees, besides, that this machine is connected.</p>"
    )
    if through := [run for run in runs if run.through]:
        names = ", ".join(sorted({run.through for run in through}))
        parts.append(
            f"<p>{_count(len(through), 'run')} took place on other records that overlap with these ({_text(names)})."
            " What they cost is charged here too; their messages are on the receipts of those records.</p>"
        )
    return parts


# ---- 2


def _what_it_cost(
    ledger: Ledger, counted: Totals, runs: Sequence[RunFigures], messages: Sequence[Receipt], unit: str
) -> list[str]:  # fmt: skip
    limit = counted.ceiling.max_epsilon
    parts = ["<h2>2. What it cost</h2>"]
    if math.isinf(counted.reserved):
        return [*parts, '<p class="warning">There was no privacy in at least one run: epsilon is infinite, and nothing'
                " limits what its messages reveal.</p>", *_runs_table(runs, messages)]  # fmt: skip
    one, bounded = _one(unit), not math.isinf(limit)
    lifetime = f"This site's records may cost {_epsilon(limit)} in their lifetime." if bounded else "No limit is set."
    parts.append(
        f"<p>The cost of a message is counted in <strong>epsilon</strong>: how much more can be known about {one} after"
        " the message than before, at most. 0 is nothing; costs add up over the years and are never given back."
        f" {lifetime} A run is set aside whole before it begins, so what is reserved counts as gone even where it is"
        " not spent.</p>"
    )
    if bounded:
        parts += [_bar(counted), _chart(ledger, counted)]
    parts.append("<h3>In words</h3>")
    parts.append(
        f"<p>Suppose someone knows everything about these data except whether {one} is in them, and would otherwise"
        " toss a coin. After seeing every message, that person guesses right at most so often:</p>"
    )
    delta = counted.ceiling.delta
    rows = [["before anything left", "0", "50 %"]]
    rows += [
        [what, _epsilon(epsilon), percent(best_guess(epsilon, delta))]
        for what, epsilon in (
            ("what was spent so far", counted.spent), ("when all that is reserved is spent", counted.reserved),
            ("when the whole lifetime is spent", limit),
        )
        if not math.isinf(epsilon)
    ]  # fmt: skip
    parts.append(_table(["", "epsilon", "right at most"], rows, caption="50 % is a coin; 100 % would be certainty."))
    if bounded and limit > 3:
        parts.append(
            f"<p>To be honest: at epsilon {_epsilon(limit)} this promise alone is weak"
            f" ({percent(best_guess(limit, delta))} is next to certainty). It is what can be proven for the worst"
            " case: the most unusual record, and an attacker who knows all others and sees every message. What protects"
            " beyond it is likely and not proven: a real attacker does not know all other records, one message alone"
            " says very little under its noise, and attacks that researchers try on models trained in this way usually"
            " find far less than the limit allows. Who wants a stronger promise sets a lower limit: at 1 it is"
            f" {percent(best_guess(1.0, delta))}.</p>"
        )
    parts.append(
        f"<p>The promise has a second number, delta = {delta:.0e}: the part of all cases in which it may fail."
        f"{'' if ledger.lineage.simulated else ' It was chosen below one divided by the number of records.'}"
        f" What is compared is always the data with and without one {_text(unit)}, that is {one}"
        f" (“{_text(ADJACENCY)}”).</p>"
    )
    how = ("their epsilon and delta add up" if counted.ceiling.order is None else
           f"their Rényi divergences of order {counted.ceiling.order:g} add up")  # fmt: skip
    parts.append(
        f"<p>Between runs, {how}, which holds also when the federation chooses each run after it saw the last one. Had"
        " everything that was charged been fixed beforehand, all of it together would be epsilon"
        f" {_epsilon(counted.composed.epsilon)}; this lower figure is shown and never used to allow anything.</p>"
    )
    if ledger.lineage.lifetime.max_epsilon > limit:
        parts.append(
            f"<p>The ledger itself would allow {_epsilon(ledger.lineage.lifetime.max_epsilon)}; the site's policy sets"
            " the lower limit that is used here.</p>"
        )
    raised = [entry for entry in ledger.entries if entry["kind"] == "ceiling"]
    for entry in raised:
        parts.append(
            f'<p class="warning">On {_text(entry["time"][:10])} the lifetime limit was raised to'
            f" {_epsilon(float(entry['max_epsilon']))}. Reason given: {_text(entry.get('reason', 'none'))}.</p>"
        )
    return [*parts, *_runs_table(runs, messages)]


def _runs_table(runs: Sequence[RunFigures], messages: Sequence[Receipt]) -> list[str]:
    if not runs:
        return []
    left = Counter(message.run for message in messages)
    rows = [
        [run.run, run.federation or "none: asked here", run.state, _epsilon(run.epsilon_reserved),
         _epsilon(run.epsilon_spent), f"{run.delta:.1e}", f"{run.steps:,} of {run.steps_reserved:,}",
         f"{left[run.run]:,}"]
        for run in runs
    ]  # fmt: skip
    caption = "“Closed” runs were ended here and stay ended; “complete” ones may only repeat a lost round."
    return [
        "<h3>Run by run</h3>",
        _table(["run", "federation", "state", "reserved", "spent", "at delta", "steps charged", "messages"], rows,
               text=3, caption=caption),
    ]  # fmt: skip


def _bar(counted: Totals) -> str:
    limit = counted.ceiling.max_epsilon
    spent = min(counted.spent, limit)
    reserved = max(0.0, min(counted.reserved, limit) - spent)
    left = max(0.0, limit - spent - reserved)
    shares = [("spent", spent), ("reserved", reserved), ("left", left)]
    start, drawn = 0.0, []
    for name, value in shares:
        width = 100 * value / limit
        drawn.append(f'<rect x="{start:.3f}" y="0" width="{width:.3f}" height="10" style="fill:var(--{name})"/>')
        start += width
    alternative = (
        f"Of a lifetime epsilon of {_epsilon(limit)}, {_epsilon(counted.spent)} is spent,"
        f" {_epsilon(counted.reserved)} is reserved in all, and {_epsilon(counted.left.epsilon)} is left."
    )
    key = [
        ("spent", f"spent: {_epsilon(spent)}"), ("reserved", f"reserved and not yet spent: {_epsilon(reserved)}"),
        ("left", f"left: {_epsilon(counted.left.epsilon)}"),
    ]  # fmt: skip
    svg = f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" height="28">{"".join(drawn)}</svg>'
    return svg_figure(svg, alternative, before_caption=_key(key))


def _chart(ledger: Ledger, counted: Totals) -> str:
    """Spent and reserved over time, as steps; all letters stand outside the drawing, so that they keep their size."""
    points = spent_over_time(ledger)
    if len(points) < 3:
        return ""
    times = [_seconds(time) for time, _, _ in points]
    first, span = times[0], max(times[-1] - times[0], 1.0)
    limit = counted.ceiling.max_epsilon
    top = 1.08 * max(limit, counted.reserved, counted.spent)
    keep = range(0, len(points), max(1, len(points) // CHART_POINTS))
    places = sorted({*keep, len(points) - 1})

    def drawn(which: int, *, closed: bool) -> str:
        path, before = "M0,40", 40.0
        for place in places:
            x, y = 100 * (times[place] - first) / span, 40 - 40 * points[place][which] / top
            path += f"L{x:.2f},{before:.2f}L{x:.2f},{y:.2f}"
            before = y
        return path + (f"L100,{before:.2f}L100,40Z" if closed else f"L100,{before:.2f}")

    y = 40 - 40 * limit / top
    start, end = points[0][0][:16].replace("T", " "), points[-1][0][:16].replace("T", " ")
    alternative = (
        f"From {start} to {end} UTC: epsilon spent rose from 0 to {_epsilon(counted.spent)}, epsilon reserved to"
        f" {_epsilon(counted.reserved)}; the limit is {_epsilon(limit)}."
    )
    line = 'vector-effect="non-scaling-stroke" fill="none"'
    svg = (
        '<svg viewBox="0 0 100 40" preserveAspectRatio="none" height="220">'
        f'<path d="{drawn(2, closed=True)}" style="fill:var(--reserved)"/>'
        f'<path d="{drawn(1, closed=True)}" style="fill:var(--spent)"/>'
        f'<path d="M0,{y:.2f}H100" {line} style="stroke:var(--ceiling);stroke-width:2;stroke-dasharray:6 4"/>'
        f'<path d="M0,40H100" {line} style="stroke:var(--line);stroke-width:1"/></svg>'
    )
    axis = f'<div class="axis"><span>{_text(start)}</span><span>{_text(end)} UTC</span></div>'
    key = _key([("spent", "spent"), ("reserved", "reserved"), ("ceiling", f"limit of {_epsilon(limit)} (dashed)")])
    return svg_figure(svg, alternative, caption=f"Epsilon over time. {alternative}", before_caption=axis + key)


# ---- 3


def _what_it_reveals(counted: Totals, unit: str) -> list[str]:
    one = _one(unit)
    persons = (
        "A person with several pictures here is one subject, and all of them are protected together. That rests on the"
        " list of who is who: one person under two names counts as two."
        if unit == "subject"
        else "Protected is one picture with its captions, not one person: with five pictures here, a person has about"
        " five times the epsilon."
    )
    yes = [
        "What is common to many records, such as what these pictures usually show: to learn that is the purpose of"
        " the training. If a conclusion about a whole group can hurt its members, noise does not prevent it.",
        "That this site takes part, in which runs, and when it answered or refused.",
        "What was public from the start: the settings, the prompts, and the rounded number of records that the site"
        " publishes.",
    ]
    hardly = [
        f"Whether {one} was in the data, within the limits of section 2.",
        f"What {one} looks like or says. Someone who cannot tell whether a record is there cannot copy it either,"
        " within the same limits.",
        "That holds whatever is done with the messages later, by whomever, and whatever else is known to them.",
    ]
    limits = [
        persons,
        "A person whose records also lie at another institution is protected at each of them on its own account; the"
        " costs add up.",
        "A picture that is here twice, or nearly so, is protected about half as well.",
        "The server sees this site's noised messages one by one; they are not summed up secretly with those of others.",
        "The promise rests on this machine: on software that does what it says, on the operating system's random"
        " numbers, and on nobody else reading its disk or watching it work.",
    ]
    if math.isinf(counted.reserved):
        hardly = ["Nothing is excluded where a run had no privacy."]
    return [
        "<h2>3. What it could have revealed, and what not</h2>",
        "<h3>It can reveal</h3>", _list(yes),
        "<h3>It hardly reveals</h3>", _list(hardly),
        "<h3>The limits of this promise</h3>", _list(limits),
    ]  # fmt: skip


# ---- 4


def _how_to_check(folder: Path, config: SiteConfig, ledger: Ledger) -> list[str]:
    site, file = shlex.quote(str(folder)), shlex.quote(str(ledger.path))
    replies = shlex.quote(str(folder / "replies"))
    return [
        "<h2>4. How to check this</h2>",
        "<p>Every figure of sections 1 to 5 is computed from one file, the ledger, in which each line states the"
        " SHA-256 of itself and of the line before it. A changed, missing or added line breaks the chain from there on."
        " The site also keeps, apart from the ledger, the hash of the last line that it has seen.</p>",
        "<p>Read the whole chain again, and compare the last hash with the one at the end of this page:</p>",
        f"<pre><code>fedcanvas client ledger {site} --verify</code></pre>",
        "<p>The same for the last line without this software; both commands print the same hash:</p>",
        f"<pre><code>tail -n 1 {file} | cut -c {len(HEAD) + 1}-{len(HEAD) + 64}\n"
        f"tail -n 1 {file} | cut -c {BODY + 1}- | tr -d '\\n' | sha256sum</code></pre>",
        "<p>The last reply of each run is kept as it left. Its SHA-256 stands in the list of section 5:</p>",
        f"<pre><code>tail -n +2 {replies}/RUN.reply | sha256sum</code></pre>",
        "<p>All messages with all their details, for another program:</p>",
        f"<pre><code>fedcanvas client receipts {site} --json</code></pre>",
        "<h3>What cannot be noticed from here</h3>",
        _list([
            "The ledger and the site's note of its last line put back together to an older state, for example from a"
            " backup of the whole machine. Only while a run lasts it shows: the server remembers the site's last"
            " release and shows it back, and a site that does not know it stops.",
            "A copy of the whole machine that answers beside it.",
            "The same records under another name on another machine, or on this one in another format or size.",
            "A message that other software on this machine sends.",
        ]),
        f"<p>So keep a copy of the ledger elsewhere after each run (<code>fedcanvas client ledger {site} --export"
        " FILE</code>), and never put an older one back.</p>",
    ]  # fmt: skip


# ---- 5


def _each_message(
    folder: Path, ledger: Ledger, messages: Sequence[Receipt], runs: Sequence[RunFigures]
) -> list[str]:  # fmt: skip
    parts = ["<h2>5. Each message</h2>"]
    if not messages:
        return [*parts, "<p>None has left.</p>"]
    short = len(messages) > MOST_MESSAGES
    if short:
        command = f"fedcanvas client receipts {shlex.quote(str(folder))} --json"
        parts.append(
            f"<p>These are {len(messages):,} messages: of each run the first and the last {SHOWN_OF_RUN} are shown. All"
            f" of them: <code>{_text(command)}</code>.</p>"
        )
    for run in runs:
        of_run = [message for message in messages if message.run == run.run]
        if not of_run:
            continue
        shown = of_run
        if short and len(of_run) > 2 * SHOWN_OF_RUN:
            shown = [*of_run[:SHOWN_OF_RUN], *of_run[-SHOWN_OF_RUN:]]
        rows = [
            [(message.time[:10], message.time[11:19]), f"{message.server_round}",
             (message.kind, "again") if message.again else message.kind, f"{message.bytes:,}", _fields(message),
             f"{message.steps:,}", _epsilon(message.charge),
             (f"from {_epsilon(message.epsilon_before)}", f"to {_epsilon(message.epsilon_after)}"),
             Hash(message.sha256)]
            for message in shown
        ]  # fmt: skip
        head = ["charged (UTC)", "round", "kind", "bytes", "fields", "steps", "charge", "epsilon of the run", "SHA-256"]
        about = f"Run {run.run} of federation {run.federation}" if run.federation else f"Question {run.run}, asked here"
        caption = about + (
            f": {len(shown):,} of {len(of_run):,} messages" if len(shown) < len(of_run) else ""
        )
        parts.append(
            f"<details><summary>{_text(about)}:"
            f" {_count(len(of_run), 'message')}, {_text(_bytes(sum(message.bytes for message in of_run)))}</summary>"
            + _table(head, rows, text=1, caption=caption, text_at=(2, 4, 8), kind="wide log") + "</details>"
        )  # fmt: skip
    parts.append(
        '<p class="about">The epsilon of a run is read from a table of prices that was made when it was reserved, and'
        " always at the next row; so it rises in steps, and never stands too low.</p>"
    )
    return parts


# ---- 6


def _single_words(folder: Path, ledger: Ledger, refused: Refusals) -> list[str]:
    parts = ["<h2>6. Refusals, confirmations and incidents</h2>"]
    if refused.by_code:
        rows = [[code, CODES.get(code, "not known to this release"), f"{count:,}"]
                for code, count in sorted(refused.by_code.items(), key=lambda item: -item[1])]  # fmt: skip
        parts.append(
            f"<p>{_count(sum(refused.by_code.values()), 'request')} got a refusal. A refusal is one word of the list"
            " below and nothing else; everything that could tell of the data shares the word “site”.</p>"
        )
        parts.append(_table(["word", "what it means", "times"], rows, text=2))
    else:
        parts.append("<p>No request was refused.</p>")
    if refused.received:
        parts.append(
            f"<p>{_count(len(refused.received), 'delivery', 'deliveries')} of a run's trained model got the word"
            " “received” and nothing else. It says that the model is on this machine, and nothing of the data: every"
            " site that took part is sent the same.</p>"
        )
        rows = [[str(entry["run"]), str(entry["time"])[:19].replace("T", " ")] for entry in refused.received]
        parts.append(_table(["run", "received (UTC)"], rows, text=2))
    unsent = charged_and_not_sent(ledger)
    repaired = [entry for entry in ledger.entries if entry["kind"] == "repaired"]
    behind = [entry for entry in ledger.entries if "clock_behind" in entry]
    rows = [
        ["charged, and no message left", "the work broke off, or goes on right now; the charge stands",
         f"{len(unsent):,}"],
        ["unfinished line cut off", "a crash or a power cut while the ledger was written; it cost nothing",
         f"{len(repaired):,}"],
        ["clock stood behind", "the machine's clock was set back; the order of the lines is what counts",
         f"{len(behind):,}"],
        ["incidents in the site's log", f"see {folder / 'site.log'}", f"{refused.incidents:,}"],
    ]  # fmt: skip
    parts.append(_table(["what", "meaning", "times"], rows, text=2, caption="Incidents"))
    return parts


# ---- parts of a page


def _key(entries: Sequence[tuple[str, str]]) -> str:
    items = [f'<li><i style="background:var(--{name})"></i>{_text(words)}</li>' for name, words in entries]
    return f'<ul class="key">{"".join(items)}</ul>'


def _fields(message: Receipt) -> tuple[str, ...]:
    return tuple(f"{name}: {kind} [{', '.join(map(str, shape))}]" for name, kind, shape in message.fields) or ("-",)


def _count(number: int, word: str, words: str = "") -> str:
    return f"{number:,} {word if number == 1 else words or f'{word}s'}"


def _one(unit: str) -> str:
    return "one person with all their pictures" if unit == "subject" else "one picture with its captions"


def _bytes(size: int) -> str:
    for power, name in ((3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.3g} {name}"
    return f"{size} bytes"


def _epsilon(value: float) -> str:
    if math.isinf(value):
        return "infinite"
    return f"{value:.4g}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
