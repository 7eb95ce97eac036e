"""Tables as text: aligned columns for a terminal, Markdown for a file. The first row is the header."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def columns(rows: Rows) -> str:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def markdown(rows: Rows) -> str:
    """A Markdown table, ending in a line break."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])
