"""One self-contained HTML page: the figures as SVG, each mark saying its values under the pointer,
and a table of all runs. It fetches nothing and runs no script."""

# pyright: reportUnknownMemberType=false
# matplotlib types its own signatures in part.

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nfnets_xla.scaling.charts import Chart
from nfnets_xla.scaling.drawing import marks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
       color: #222; background: #fff; }
svg { width: 100%; height: auto; }
g[id*="mark-"]:hover { stroke: #d00; stroke-width: 2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font: 12px/1.4 ui-monospace, monospace; }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #eee; }
td:first-child, th:first-child { text-align: left; }
tr:nth-child(even) { background: #f7f7f7; }
"""


def svg(figure: "Figure", name: str) -> str:
    """The same text for the same figure: no date, no random names."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def titled(drawn: str, chart: Chart) -> str:
    """An SVG for a page: its marks have titles, and its ids are unique in the page."""
    drawn = drawn[drawn.index("<svg") :]
    for number, mark in enumerate(marks_of(chart)):
        group = f'<g id="mark-{number}">'
        if drawn.count(group) != 1:
            raise AssertionError(f"{chart.name} has {drawn.count(group)} groups of mark {number}")
        drawn = drawn.replace(group, f"{group}<title>{html.escape(mark.says)}</title>")
    drawn = re.sub(r'\bid="', f'id="{chart.name}-', drawn)
    return re.sub(r'(url\(|href=")#', rf"\1#{chart.name}-", drawn)


def page(
    title: str,
    figures: Iterable[tuple[Chart, str]],
    rows: Sequence[Mapping[str, str]],
) -> str:
    """`figures` with their SVG; `rows` of the table, which all have the same columns."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    parts = [f"<h1>{html.escape(title)}</h1>", "<p>Point at a mark to see what it stands for.</p>"]
    parts += [
        f'<figure aria-label="{html.escape(chart.title)}">{titled(drawn, chart)}</figure>'
        for chart, drawn in figures
    ]
    parts += ["<h2>Runs</h2>", '<div class="wide"><table>', _row("th", rows[0].keys())]
    parts += [_row("td", row.values()) for row in rows]
    parts.append("</table></div>")
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _row(tag: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"
