"""Small pieces of the status pages: every text is escaped where it enters, and a page has one fixed style.

A page holds no script and asks for nothing from elsewhere; it loads itself again after a while.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NewType

Html = NewType("Html", str)
"""Text that is HTML already: made by the functions of this module, and nowhere else."""

Level = Literal["good", "attention", "bad"]

Verdict = tuple[Level, str, str]
"""Level, what is the matter, and what to do about it, which may be empty."""

LOW_BYTES = 2 << 30
"""Free space below which a page says so."""

STYLE = """
:root { color-scheme: light dark; --line: #767676; --soft: #f2f2f2; --good: #1a7f37; --attention: #8a5a00;
  --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --line: #8c8c8c; --soft: #262626; --good: #57d07a; --attention: #f2b84b;
  --bad: #ff8a80 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem 1.25rem 3rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
header p { margin: .2rem 0 0 }
section.scroll { overflow-x: auto }
table { border-collapse: collapse; min-width: 40rem } caption { text-align: left; padding: .2rem 0 }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
tbody th { font-weight: 500 } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
ul.verdict { list-style: none; padding: 0; margin: 1rem 0 } ul.verdict li { padding: .5rem .8rem; margin: .4rem 0;
  background: var(--soft); border-left: .4rem solid var(--line); overflow-wrap: anywhere }
ul.verdict li.good { border-color: var(--good) } ul.verdict li.attention { border-color: var(--attention) }
ul.verdict li.bad { border-color: var(--bad) }
strong.good { color: var(--good) } strong.attention { color: var(--attention) } strong.bad { color: var(--bad) }
code { font-size: .95em; overflow-wrap: anywhere } footer { margin-top: 2.5rem; font-size: .9rem }
"""

_WORDS: dict[Level, str] = {"good": "All is well", "attention": "Attention", "bad": "Problem"}


def write_page(title: str, heading: str, parts: Iterable[Html], refresh_s: int = 15) -> bytes:
    """Returns a whole page.

    Args:
        title: text of the browser's tab.
        heading: text of the page's first heading.
        parts: the page's content.
        refresh_s: seconds after which the page is loaded again.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{refresh_s:d}"><style>{STYLE}</style></head>\n<body>'
        f"<header><h1>{escape(heading)}</h1></header>\n<main>{''.join(parts)}</main></body></html>\n"
    ).encode("utf-8", errors="replace")


def write_text(text: str) -> Html:
    """Returns a paragraph."""
    return Html(f"<p>{escape(text)}</p>\n")


def describe_state(verdicts: Sequence[Verdict]) -> str:
    """Returns a page's state in a word or two, for its title: the number of problems, `attention` or `well`."""
    problems = sum(level == "bad" for level, _, _ in verdicts)
    return f"{problems} problem(s)" if problems else ("attention" if verdicts else "well")


def write_verdicts(verdicts: Sequence[Verdict]) -> Html:
    """Returns the list of what is wrong, each with what to do first; the level stands there as a word too.

    Args:
        verdicts: level, what is the matter, and what to do about it (may be empty).
    """
    items = []
    for level, matter, remedy in verdicts:
        what_to_do = f" <br>First: {_mark_commands(remedy)}" if remedy else ""
        items.append(
            f'<li class="{level}"><strong class="{level}">{_WORDS[level]}.</strong> {_mark_commands(matter)}'
            f"{what_to_do}</li>"
        )
    return Html(f'<ul class="verdict">{"".join(items)}</ul>\n')


def write_table(
    heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = (), empty: str
) -> Html:
    """Returns a table under a heading; the first cell of a row is its heading.

    Args:
        heading: text above the table.
        columns: headings of the columns.
        rows: texts of the cells.
        numbers: columns that are aligned right.
        empty: sentence that stands there where there is no row.
    """
    kinds = [' class="number"' if column in numbers else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{escape(column)}</th>' for column, kind in zip(columns, kinds, strict=True))
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    if not lines:
        return Html(f"<h2>{escape(heading)}</h2>\n<p>{escape(empty)}</p>\n")
    return Html(
        f'<h2>{escape(heading)}</h2>\n<section class="scroll" tabindex="0" aria-label="{escape(heading)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></section>\n"
    )


def format_time(moment: float) -> str:
    """Returns a time in seconds since 1970 as a person reads it, in UTC."""
    return f"{datetime.datetime.fromtimestamp(moment, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def format_age(now: float, moment: float) -> str:
    """Returns the time since a moment, in one unit; both are in seconds since 1970."""
    age_s = max(0.0, now - moment)
    for unit, length_s in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if age_s >= 2 * length_s:
            return f"{age_s / length_s:.0f} {unit}"
    return f"{age_s:.0f} s"


def _mark_commands(text: str) -> str:
    """Returns an escaped text in which what stands between backticks is marked as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
