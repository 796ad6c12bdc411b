"""Markdown tables, as the results of benchmarks are printed and as the pages show them."""

from __future__ import annotations

import re
from typing import Any

MARKS = "<!-- {0}: {1} -->\n\n", "\n\n<!-- end of {0} -->"


def between_marks(page: str, name: str, text: str, command: str) -> str:
    """The page with the table of this name renewed. Raises ValueError if it does not have the table's marks exactly once."""
    start, end = (mark.format(name, command) for mark in MARKS)
    page, count = re.subn(re.escape(start) + ".*?" + re.escape(end), lambda _: start + text + end, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"The page has the marks of table `{name}` {count} times: expected once, {start.strip()} to {end.strip()}.")
    return page


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _padded(row: list[str], widths: list[int]) -> list[str]:
    return [cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
