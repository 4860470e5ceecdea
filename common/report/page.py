"""A report as one HTML page: sections of sentences, figures and tables, filled into one template.

The template escapes every text (names of tasks, sites and labels are a stranger's); only figures are markup already,
and they come from `common.report.svg`. The page holds no script and asks for nothing from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import plain
from common.process.html import STYLE as PALETTE
from common.report.figures import Figure

if TYPE_CHECKING:
    from markupsafe import Markup

Tone = Literal["good", "attention", "bad", "neutral"]

_LONG = 12
"""Rows above which a table is folded."""

_BRACKETS = re.compile(r"\([^()]{1,40}\)")


@dataclass(frozen=True)
class ReportAnswer:
    """One sentence of the box at the top of a page.

    Attributes:
        tone: how it is marked.
        word: the answer in a word or two.
        sentence: the answer with its numbers.
    """

    tone: Tone
    word: str
    sentence: str


@dataclass(frozen=True)
class ReportTable:
    """A table of texts; the first cell of a row is its heading.

    Attributes:
        caption: what it shows.
        columns: headings of the columns.
        rows: texts of the cells.
        numbers: columns that are aligned right, by their headings.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()

    @property
    def is_long(self) -> bool:
        """True where the rows are shown on demand."""
        return len(self.rows) > _LONG


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: its heading.
        lead: one or two sentences: what is shown, how it is read, what it does not show.
        figures: drawings.
        tables: the same numbers as text, and others.
        remarks: further sentences, below.
    """

    heading: str
    lead: str
    figures: Sequence[Figure] = ()
    tables: Sequence[ReportTable] = ()
    remarks: Sequence[str] = ()

    @property
    def anchor(self) -> str:
        """Name of the section in the page's address: letters, digits and hyphens."""
        return "".join(char if char.isascii() and char.isalnum() else "-" for char in self.heading.lower())


@dataclass(frozen=True)
class ReportPage:
    """A whole report.

    Attributes:
        title: text of the browser's tab and of the first heading.
        notices: sentences that stand first, such as that the page must not leave the site.
        introduction: one paragraph on what the page is about.
        question: heading of the box.
        answers: what the box says.
        sections: the parts.
        footer: how the page was made.
    """

    title: str
    introduction: str
    question: str
    answers: Sequence[ReportAnswer]
    sections: Sequence[Section]
    footer: str
    notices: Sequence[str] = ()


def write_report(page: ReportPage) -> str:
    """Returns the page as HTML."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _clean
    environment.filters["kept_together"] = _keep_together
    environment.filters["marked"] = lambda text: _mark_commands(_clean(text))
    environment.filters["drawing"] = lambda figure: Markup(figure.svg)
    return environment.get_template("page.html").render(page=page, palette=Markup(PALETTE))


def _clean(text: object) -> str:
    """Returns a text without characters that do not print."""
    return plain(str(text), 4000)


def _keep_together(text: object) -> str:
    """Returns the text of a cell in which an interval in brackets stays on one line."""
    return _BRACKETS.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), _clean(text))


def _mark_commands(text: str) -> Markup:
    """Returns an escaped text in which what stands between backticks is marked as code."""
    from markupsafe import Markup, escape

    parts = [f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(escape(text).split("`"))]
    return Markup("").join(map(Markup, parts))


# --- numbers as texts ------------------------------------------------------------------------------------------------


def format_value(value: float | None) -> str:
    """Returns a metric with three digits that matter."""
    if value is None:
        return "undefined"
    return f"{value:.3f}" if abs(value) < 10.0 else f"{value:.3g}" if abs(value) < 1000.0 else f"{value:,.0f}"


def format_interval(interval: tuple[float, float] | None) -> str:
    """Returns an interval as words; an empty text where there is none."""
    return "" if interval is None else f"{format_value(interval[0])} to {format_value(interval[1])}"


def format_estimate(value: float | None, interval: tuple[float, float] | None) -> str:
    """Returns a metric with its interval in brackets."""
    return format_value(value) + (f" ({format_interval(interval)})" if interval is not None else "")


def format_bytes(count: float | None) -> str:
    """Returns a size in a unit that a person reads."""
    if count is None:
        return "none"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def format_seconds(seconds: float) -> str:
    """Returns a duration in one or two units."""
    if seconds < 1.0:
        return f"{seconds:.2f} s"
    if seconds < 100.0:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count_of(number: int, thing: str) -> str:
    """Returns a number with its noun, in the plural where it is not one."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def join_words(words: Sequence[str], most: int = 8) -> str:
    """Returns a list as it is spoken, cut after so many."""
    shown = list(words[:most])
    if len(words) > most:
        return f"{', '.join(shown)} and {len(words) - most} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"
