"""A document of headings, texts, tables and figures, written as Markdown and as one HTML page without links out."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from flexmore_ray.tables import Rows, markdown


@dataclasses.dataclass(frozen=True)
class Heading:
    """A heading; level 2 and 3 are in the contents."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; `lead` stands before it in bold."""

    text: str
    lead: str = ""


@dataclasses.dataclass(frozen=True)
class Items:
    """An unordered list."""

    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose first row is the header and whose first column names the rows."""

    caption: str
    rows: Rows
    note: str = ""
    texts: int = 1
    """Columns from the left that hold words; the others hold numbers and are set to the right."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A figure: a PNG in the folder of the document."""

    file: str
    alt: str
    caption: str


Block = Heading | Text | Items | Table | Image


# --- Markdown ---------------------------------------------------------------------------------------------


def to_markdown(title: str, blocks: Iterable[Block]) -> str:
    """The document as Markdown; figures are linked by their file names."""
    return "\n".join([f"# {_plain(title)}\n", *map(_markdown_block, blocks)])


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}\n"
        case Text(text, lead):
            return f"**{_plain(lead)}** {_plain(text)}\n" if lead else f"{_plain(text)}\n"
        case Items(items):
            return "".join(f"- {_plain(item)}\n" for item in items)
        case Table(caption, rows, note):
            table = markdown([[_plain(cell) for cell in row] for row in rows])
            return f"**{_plain(caption)}**\n\n{table}" + (f"\n{_plain(note)}\n" if note else "")
        case Image(file, alt, caption):
            return f"![{_plain(alt)}]({file})\n\n{_plain(caption)}\n"


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    text = re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


# --- HTML -------------------------------------------------------------------------------------------------

_CSS = """
:root { --ink: #1c2733; --soft: #5b6875; --line: #d5dce2; --tint: #f3f6f8; --accent: #0b5a8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 "Segoe UI", system-ui, -apple-system, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 2px solid var(--accent); }
h3 { font-size: 1.08rem; margin: 1.9rem 0 .4rem; color: var(--accent); }
p, ul { margin: .5rem 0; max-width: 46rem; }
nav { background: var(--tint); border-left: 3px solid var(--accent); padding: .6rem 1rem; margin: 1rem 0; }
nav ul { list-style: none; margin: 0; padding: 0; columns: 20rem; }
nav .sub { padding-left: 1rem; font-size: .92em; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
.wide { overflow-x: auto; margin: 1rem 0 .3rem; }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: .92rem; padding-bottom: .35rem; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; min-width: 7rem; max-width: 18rem; white-space: normal; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--tint); }
.note { font-size: .85rem; color: var(--soft); margin-top: .2rem; }
figure { margin: 1.2rem 0; }
figure img { width: 100%; max-width: 56rem; height: auto; display: block; }
figcaption { font-size: .88rem; color: var(--soft); max-width: 46rem; }
@media (max-width: 40rem) { body { font-size: 15px; } th, td { padding: .2rem .4rem; } }
@media print {
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  h2, h3, caption { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 6.8pt; }
  th, td { padding: .1rem .25rem; white-space: normal; }
  thead { display: table-header-group; }
}
"""


def to_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """The document as one page that needs nothing else: style and figures are in it.

    Args:
        title: Its title.
        blocks: Its content.
        folder: Where the figures' files are.
    """
    contents, body = [], []
    for number, block in enumerate(blocks):
        if isinstance(block, Heading) and block.level in (2, 3):
            sub = ' class="sub"' if block.level == 3 else ""
            contents.append(f'<li{sub}><a href="#h{number}">{html.escape(block.text)}</a></li>')
        body.append(_html_block(block, f"h{number}", folder))
    name = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n<h1>{name}</h1>\n"
        f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>\n' + "\n".join(body) + "\n</main>\n"
        "</body>\n</html>\n"
    )


def _html_block(block: Block, anchor: str, folder: Path) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{anchor}">{html.escape(text)}</h{level}>'
        case Text(text, lead):
            return f"<p>{f'<strong>{html.escape(lead)}</strong> ' if lead else ''}{html.escape(text)}</p>"
        case Items(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Table():
            return _html_table(block)
        case Image(file, alt, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
            return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], head: bool) -> str:
        out = []
        for i, cell in enumerate(cells):
            scope = ' scope="col"' if head else ' scope="row"' if i == 0 else ""
            words = ' class="text"' if i < table.texts else ""
            tag = "th" if scope else "td"
            out.append(f"<{tag}{scope}{words}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(out)}</tr>"

    body = "\n".join(row(cells, False) for cells in table.rows[1:])
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" tabindex="0"><table><caption>{html.escape(table.caption)}</caption>\n'
        f"<thead>{row(table.rows[0], True)}</thead>\n<tbody>\n{body}\n</tbody></table></div>{note}"
    )
