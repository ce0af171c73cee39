"""A self-contained HTML page: no scripts, no outside files, pictures embedded. Shared by every report."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BASE_STYLE = """
:root { --ink: #1f2933; --faint: #616e7c; --line: #e4e7eb; --good: #1b7837; --warn: #b35900; --bad: #b2182b;
  --unknown: #7b8794; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 1120px;
  padding: 24px 20px 60px; }
h1 { font-size: 20px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 2px; }
p { margin: 4px 0 10px; max-width: 78ch; } .faint { color: var(--faint); }
img { width: 100%; height: auto; margin-top: 6px; }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; } th:first-child, td:first-child, th.left, td.left { text-align: left; }
tr.first td { border-top: 2px solid #cbd2d9; }
@media print { img, table { break-inside: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Picture:
    """A section: heading, one or two sentences on how to read it, the PNG."""

    heading: str
    text: str
    name: str
    png: bytes


def picture_section(picture: Picture) -> str:
    """The section of a picture."""
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<h2>{escape(picture.heading)}</h2><p class="faint">{escape(picture.text)}</p>'
        f'<img alt="{escape(picture.heading)}" src="data:image/png;base64,{data}">'
    )


def table_section(heading: str, text: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading, a sentence, a table. Cells: text as it is, whole numbers with separators, others as `format` says."""
    out = [f'<h2>{escape(heading)}</h2><p class="faint">{escape(text)}</p><table><tr>']
    out += [f"<th>{escape(title)}</th>" for title in header]
    for row in rows:
        out += ["</tr><tr>", *(f"<td>{escape(_cell(cell))}</td>" for cell in row)]
    return "".join(out) + "</tr></table>"


def _cell(cell: object) -> str:
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def html_page(title: str, style: str, sections: Sequence[str]) -> str:
    """The whole page. style: rules beside BASE_STYLE."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{BASE_STYLE}{style}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
