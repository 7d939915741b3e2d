"""Tables that a run's report shows, by name: what a later command knows of a run gets its place here.

An entry is a function of the run directory that answers with a table, or `None` where it has nothing to say.
The report shows them in the order of their names, as they are; it has no part in what they say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from shared.metrics import Table
from shared.registry import Registry
from shared.rundir import RunDirectory

MOST_ROWS = 50

REPORT_TABLES: Registry[Callable[[RunDirectory], Table | None]] = Registry(
    "report table",
    {
        "repeated-rounds": "server.report_tables:repeated_rounds",
        "sites": "server.report_tables:sites",
    },
)


def sites(run: RunDirectory) -> Table | None:
    """What each site said of itself: the head of the run in its ledger, and when and why it left."""
    heads, left = run.heads(), run.sites_left()
    names = sorted({*heads, *left})
    if not names:
        return None
    rows = [
        [name, heads.get(name, "none"),
         f"at round {left[name].get('server_round', '?')}: {left[name].get('code', '?')}" if name in left else "no"]
        for name in names[:MOST_ROWS]
    ]  # fmt: skip
    note = (
        "The head is the SHA-256 of the last line about this run in the site's own ledger, as its last reply carried"
        " it: the site can show with it that its account and this run agree"
    )
    more = f"; {len(names) - MOST_ROWS} further sites stand in sites.json" if len(names) > MOST_ROWS else ""
    return Table("What sites said", ["site", "head of its ledger", "left the run"], rows, note + more)


def repeated_rounds(run: RunDirectory) -> Table | None:
    """Rounds that were asked of the sites more than once, each time charged."""
    attempts = Counter(line["server_round"] for line in run.charges())
    repeated = sorted(number for number, count in attempts.items() if count > 1)
    if not repeated:
        return None
    rows = [[f"round {number}", attempts[number]] for number in repeated[:MOST_ROWS]]
    more = f"; {len(repeated) - MOST_ROWS} more are in spent.jsonl" if len(repeated) > MOST_ROWS else ""
    note = f"Every attempt spends privacy, also one whose answer was lost{more}"
    return Table("Rounds that were repeated", ["", "attempts"], rows, note)
