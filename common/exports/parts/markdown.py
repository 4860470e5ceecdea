"""Markdown from facts: what a stranger wrote, such as a label, a path or an id, is shown and never interpreted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&$])")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f\u2028\u2029]+")


def escape(text: object) -> str:
    """Returns a text as Markdown that shows it inside a line; links and HTML in it stay text."""
    line = _SPECIAL.sub(r"\\\1", _BLANK.sub(" ", str(text)).strip())
    # GitHub makes links of bare addresses; after an escaped colon it does not.
    return line.replace("://", "\\://").replace("www.", "www\\.").replace("@", "\\@")


def quote(text: object) -> str:
    """Returns a text in a code span."""
    line = _BLANK.sub(" ", str(text)).strip()
    # As many backticks around it as it has nowhere in itself.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    # A bar ends a table's cell inside a code span too.
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table; cells are Markdown already.

    Args:
        columns: the headings.
        rows: one cell for each heading.
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def format_number(value: float | None, digits: int = 3) -> str:
    """Returns a number with so many digits after the point, or "undefined"."""
    return "undefined" if value is None else f"{value:.{digits}f}"
