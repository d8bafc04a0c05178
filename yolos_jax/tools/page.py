"""Builds self-contained HTML pages, which work offline, on a phone, and in dark mode.

All text is escaped here; a page loads nothing from elsewhere.
"""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from yolos_jax import visualize

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --paper: #fff; --faint: #d8dde3; --quiet: #667; --blue: #1f6feb; --stops: #c62828 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171a; --faint: #343a42; --quiet: #9aa3ad; --blue: #6cb0ff;
    --stops: #ff7b72 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 1100px; padding: 0 1em; overflow-wrap: anywhere }
h2 { margin-top: 2em } p { max-width: 46em } .quiet { color: var(--quiet) } .stops { color: var(--stops) }
.wide { overflow-x: auto; margin: 1em 0 } .row { display: flex; flex-wrap: wrap; gap: 1em 3em }
table { border-collapse: collapse } caption { text-align: left; font-weight: 600; white-space: nowrap }
th, td { padding: 2px 10px 2px 0; border-bottom: 1px solid var(--faint); text-align: left;
  white-space: nowrap; font-variant-numeric: tabular-nums } td.number { text-align: right }
td.words { white-space: normal; min-width: 6em; max-width: 28em }
.matrix thead th { vertical-align: bottom } .matrix span { display: inline-block; writing-mode: vertical-rl;
  transform: rotate(180deg); max-height: 12em; overflow: hidden; text-overflow: ellipsis }
.matrix tbody th { position: sticky; left: 0; background: var(--paper); white-space: normal;
  max-width: 14em }
@media print { .wide { overflow: visible } .bar, td.cell { print-color-adjust: exact }
  h1, h2, h2 + p { break-after: avoid } tr, figure { break-inside: avoid } }
th.sorts { cursor: pointer } th[aria-sort=ascending]::after { content: " \\25b2" }
th[aria-sort=descending]::after { content: " \\25bc" }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 100% }
figcaption { font-size: 13px; color: var(--quiet); max-width: 720px }
img, svg { max-width: 100%; height: auto } svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
svg .axis { stroke: var(--faint); fill: none } svg .line { fill: none; stroke-width: 2 }
svg .thin { fill: none; stroke: var(--quiet); opacity: 0.35 }
svg .thin:hover { opacity: 1; stroke-width: 3 }
.bar { display: inline-block; height: 0.8em; background: var(--blue) }
td.cell { text-align: center; padding: 2px 6px; border: 1px solid var(--faint) }
"""
SORT = """
for (const head of document.querySelectorAll('th.sorts')) {
  head.tabIndex = 0
  const sort = () => {
    const table = head.closest('table'), at = [...head.parentNode.children].indexOf(head)
    const rising = head.getAttribute('aria-sort') === 'descending'
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort')
    head.setAttribute('aria-sort', rising ? 'ascending' : 'descending')
    const value = row => row.children[at].dataset.value ?? row.children[at].textContent
    const texts = (a, b) => String(a).localeCompare(b, undefined, {numeric: true})
    const order = (a, b) => isNaN(a) || isNaN(b) ? texts(a, b) : a - b
    const rows = [...table.tBodies[0].rows].sort((a, b) => order(value(a), value(b)) * (rising ? 1 : -1))
    table.tBodies[0].append(...rows)
  }
  head.onclick = sort
  head.onkeydown = event => {
    if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); sort() }
  }
}
"""


class Bar(NamedTuple):
    """A cell with a text and a bar, whose length is a share (0..1) of the longest."""

    text: str
    share: float


def document(title: str, body: str) -> bytes:
    """A whole page."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    )
    body += f'<script>{SORT}</script>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    return page.encode(errors='replace')  # paths may not be UTF-8


def text(words: str, kind: str = '') -> str:
    """A paragraph; kind: a class of the style."""
    return f'<p class="{kind}">{html.escape(words)}</p>'


def heading(words: str, level: int = 2) -> str:
    """A heading."""
    return f'<h{level}>{html.escape(words)}</h{level}>'


def row(*parts: str) -> str:
    """Parts side by side where there is room."""
    return f'<div class="row">{"".join(parts)}</div>'


def table(
    rows: Iterable[Sequence], head: Sequence[str] = (), caption: str = '', sorts: bool = False
) -> str:
    """A table of texts, numbers (None is blank) and bars; sorts: by a click on a column's head."""
    top = f'<caption>{html.escape(caption)}</caption>' if caption else ''
    if head:
        kind = ' class="sorts"' * sorts
        cells = ''.join(f'<th scope="col"{kind}>{html.escape(name)}</th>' for name in head)
        top += f'<thead><tr>{cells}</tr></thead>'
    body = ''.join(f'<tr>{"".join(map(_cell, row))}</tr>' for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _cell(value: str | float | Bar | None) -> str:
    if isinstance(value, Bar):
        width = 12 * min(max(value.share, 0), 1)
        return f'<td>{html.escape(value.text)} <span class="bar" style="width:{width:.2f}em"></span></td>'
    if isinstance(value, str):
        return f'<td class="words">{html.escape(value)}</td>'
    if value is None:
        return '<td data-value="-1"></td>'
    shown = f'{value:,}' if isinstance(value, int) else f'{value:.3f}'
    return f'<td class="number" data-value="{value}">{shown}</td>'


def matrix(values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Counts [n, m] as a table, each row's cells shaded by their share of it."""
    names = [html.escape(name) for name in columns]
    head = ''.join(f'<th scope="col"><span title="{name}">{name}</span></th>' for name in names)
    body = []
    for name, row in zip(rows, values, strict=True):
        shares = row / max(row.sum(), 1)
        cells = ''.join(
            f'<td class="cell" style="background:rgb(31 111 235/{0.7 * share:.2f})">{count or ""}</td>'
            for count, share in zip(row.tolist(), shares.tolist(), strict=True)
        )
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    head = f'<thead><tr><td></td>{head}</tr></thead>'
    return f'<div class="wide"><table class="matrix">{head}<tbody>{"".join(body)}</tbody></table></div>'


def figure(image: np.ndarray, caption: str, side: int) -> str:
    """A picture, uint8 [height, width, 3], made no longer than `side`."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    data = base64.b64encode(visualize.encoded(picture, 'jpeg', quality=85)).decode()
    words = html.escape(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/jpeg;base64,{data}" width="{picture.width}" '
        f'height="{picture.height}"><figcaption>{words}</figcaption></figure>'
    )


class Line(NamedTuple):
    """A line of a chart, of points (x, y) in 0..1.

    The legend names lines with a colour. Others are thin, and show their name under the pointer.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str = ''


def chart(lines: Sequence[Line], x_name: str, y_name: str) -> str:
    """A chart of lines in the unit square, as SVG."""
    width, height, left, bottom = 460, 330, 50, 40
    place = lambda x, y: (left + x * (width - left - 10), 10 + (1 - y) * (height - bottom - 10))
    parts = []
    for tick in np.linspace(0, 1, 6):
        (x, _), (_, y) = place(tick, 0), place(0, tick)
        parts.append(f'<path class="axis" d="M{left},{y:.1f}H{width - 10}M{x:.1f},10V{height - bottom}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:.1f}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height - 6}" text-anchor="middle">{html.escape(x_name)}</text>'
    )
    parts.append(
        f'<text transform="translate(12,{height / 2}) rotate(-90)" text-anchor="middle">'
        f'{html.escape(y_name)}</text>'
    )
    legend = []
    for line in lines:
        points = ' '.join('{:.1f},{:.1f}'.format(*place(x, y)) for x, y in zip(line.x, line.y, strict=True))
        style = f'class="line" stroke="{line.colour}"' if line.colour else 'class="thin"'
        parts.append(
            f'<polyline {style} points="{points}"><title>{html.escape(line.name)}</title></polyline>'
        )
        if line.colour:
            legend.append(
                f'<span style="color:{line.colour}">&#9644;</span> {html.escape(line.name)} &ensp;'
            )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    name = html.escape(f'{y_name} by {x_name}')
    svg = f'<svg {size} role="img" aria-label="{name}">{"".join(parts)}</svg>'
    return f'<figure>{svg}<figcaption>{"".join(legend)}</figcaption></figure>'
