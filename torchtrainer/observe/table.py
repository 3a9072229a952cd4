"""Small tables, as aligned text for terminals and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torchtrainer.process.own_files import printable


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lays rows out under their column names, each column as wide as its longest cell.

    Args:
        columns: the column names, in order.
        rows: cells, one sequence per row, each as long as ``columns``.

    Returns:
        Lines joined by newlines, without trailing blanks and without what a terminal would obey.
    """
    lines = [[printable(cell) for cell in line] for line in (columns, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes an HTML table of the same rows; every cell is escaped, so text from user code is shown, not interpreted."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
