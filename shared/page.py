"""The one skeleton of our HTML pages: style, tables, lists, figures; a page loads nothing and runs nothing.

Everything that is given as text is escaped here; what is given as a part of a page is taken as it is, and must come
from here or from `server.charts`. A page reads well on paper, on a phone and aloud: each table can scroll and be
reached by keyboard, each figure has a text alternative. Not here: what a page says, and curves (`server.charts`).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 64rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } h3 { font-size: 1.02rem; margin: 1.4rem 0 .3rem; }
h1 + p { margin-top: 0; color: #444; } p, li { max-width: 52rem; overflow-wrap: anywhere; }
.note { color: #444; margin: .6rem 0 0; }
.wide { overflow-x: auto; margin: .5rem 0; } .wide:focus-visible { outline: 2px solid #1b5e9b; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
thead th { vertical-align: bottom; } tbody th { text-align: left; font-weight: 400; }
th.text, td.text { text-align: left; } thead th:first-child { text-align: left; }
td.text, tbody th { overflow-wrap: break-word; max-width: 26rem; } tbody th { min-width: 6rem; }
td:not(.text) small { white-space: nowrap; } small { font-size: .85rem; color: #444; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .9rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 1.5rem; }
.curves > * { min-width: 0; }
figure svg, figure img { max-width: 100%; height: auto; }
figure.sheet img { border: 1px solid #ddd; }
.warning { border-left: 4px solid #b3541e; padding: .25rem 0 .25rem .8rem; background: #fdf4ee; }
summary { cursor: pointer; } details { margin: .4rem 0; } details table { font-size: .85rem; }
code { font-size: .9em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: .6rem .8rem; }
@media (max-width: 30rem) { body { padding: 1rem; } table { font-size: .9rem; } td.text { min-width: 9rem; }
  figure.sheet { overflow-x: auto; } figure.sheet img { max-width: none; height: auto; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } h2, h3, h2 + p, h3 + p { break-after: avoid; }
  figure, tr { break-inside: avoid; } details.long, details.numbers { display: none; }
  .wide { overflow: visible; } table { font-size: 8.5pt; } th, td { padding-right: .6rem; } small { font-size: 7.5pt; }
  .curves { grid-template-columns: 1fr 1fr; }
  details::details-content { content-visibility: visible; display: block; } }
"""


class Code(str):
    """A text that is set in equal letters and may break anywhere."""


class Small(str):
    """A text that explains the one before it."""


def escaped(value: Any) -> str:
    return html.escape(str(value), quote=True)


def html_page(title: str, parts: Sequence[str], *, style: str = STYLE, images: bool = True) -> str:
    """The whole file.

    Args:
        parts: finished HTML.
        images: whether the page may show pictures, which are then inside of it.
    """
    pictures = " img-src data:;" if images else ""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # Nothing may be fetched and nothing may run, whatever stands in a name or a prompt.
            '<meta http-equiv="Content-Security-Policy"'
            f" content=\"default-src 'none';{pictures} style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escaped(title)}</title><style>{style}</style></head><body><main>",
            *parts,
            "</main></body></html>",
            "",
        ]
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], *, text: int = 1, caption: str = "",
    text_at: Collection[int] = (), kind: str = "wide",
) -> str:  # fmt: skip
    """The first `text` columns and those of `text_at` hold words, the others figures.

    Args:
        rows: cells; a tuple is several lines, and `Code` and `Small` are set as such.
        kind: classes of the box that the table scrolls in.
    """
    kinds = [' class="text"' if place < text or place in text_at else "" for place in range(len(head))]
    heads = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    lines = []
    for first, *cells in rows:
        others = "".join(f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(kinds[1:], cells, strict=True))
        lines.append(f'<tr><th scope="row">{_cell(first)}</th>{others}</tr>')
    # Beside the table, since a browser makes a caption as wide as its table, and that may be wider than a phone.
    note = f'<p class="note">{escaped(caption)}</p>' if caption else ""
    label = escaped(caption or ", ".join(name for name in head if name))
    # It scrolls where it is wider than the page; a keyboard must be able to reach it.
    inner = f'<table aria-label="{label}"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'{note}<div class="{kind}" tabindex="0" role="region" aria-label="{label}">{inner}</div>'


def bullets(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(item)}</li>" for item in items) + "</ul>"


def warning(words: str) -> str:
    return f'<p class="warning">{escaped(words)}</p>'


def svg_figure(svg: str, alternative: str, *, caption: str = "", before_caption: str = "", after: str = "") -> str:
    """A drawing with its text alternative.

    Args:
        svg: of our own making, from `<svg` on; it gets the alternative.
        alternative: says what a reader would take from the drawing, with its numbers.
        caption: what stands under it; default is the alternative.
        before_caption, after: further HTML inside the figure, such as a key and its numbers.
    """
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escaped(alternative)}"', 1)
    words = escaped(caption or alternative)
    return f"<figure>{svg}{before_caption}<figcaption>{words}</figcaption>{after}</figure>"


def image(png: bytes, alternative: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        # It scrolls on a phone, where words on it would be too small.
        f'<figure class="sheet" tabindex="0"><img src="data:image/png;base64,{data}" alt="{escaped(alternative)}">'
        f"<figcaption>{escaped(alternative)}</figcaption></figure>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return "<br>".join(_cell(line) for line in value)
    if isinstance(value, Code):
        return f"<code>{escaped(value)}</code>"
    return f"<small>{escaped(value)}</small>" if isinstance(value, Small) else escaped(value)


def counted(number: int, what: str) -> str:
    """`1 site`, `10 sites`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
