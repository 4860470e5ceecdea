"""A matplotlib figure as SVG that stands inside a page.

Its colours are the page's CSS variables, so that one drawing is read on white, on black and on paper; its text is text,
in the page's font; its ids do not meet those of another figure of the page; and it scales with the page's width.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any

from common.errors import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

COLOURS = {
    "#0a0a01": "--text",
    "#0a0a02": "--line",
    "#0a0a03": "--soft",
    "#0a0b01": "--series-1",
    "#0a0b02": "--series-2",
    "#0a0b03": "--series-3",
    "#0a0b04": "--series-4",
    "#0a0b05": "--series-5",
    "#0a0b06": "--series-6",
}
"""Colour that a drawing uses -> variable of the page that stands in its place."""

TEXT, LINE, SOFT, *SERIES = COLOURS

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    # Ids follow from the content alone: the same run gives the same page.
    "svg.hashsalt": "headwater",
    # A name with a dollar sign is a name, and no formula.
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "grid.color": LINE,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "axes.unicode_minus": True,
}
"""Settings of matplotlib for every figure."""

_COLOUR = re.compile("|".join(COLOURS))
_FONT = re.compile(r"'DejaVu Sans'[^;\"]*")
_ID = re.compile(r' id="([^"]*)"')
_REFERENCE = re.compile(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"")


def shorten(text: str, limit: int = 28) -> str:
    """Returns a name as one short printable line, for a label."""
    shown = plain(text, 4 * limit)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def write_svg(canvas: Canvas, title: str) -> str:
    """Returns a drawn figure as an SVG element, with what it shows as its title, for those who do not see it."""
    title = plain(title)
    file = io.StringIO()
    with warnings.catch_warnings():
        # The page's font draws them; matplotlib's own is used only to measure.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style.*?</style>"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" style="max-width: {width * 4 / 3:.0f}px" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    coloured = _COLOUR.sub(lambda found: f"var({COLOURS[found[0]]})", _FONT.sub("inherit", text))
    # The same drawing twice on a page may share its ids.
    return _separate_ids(coloured, f"f{hashlib.sha256(coloured.encode()).hexdigest()[:10]}")


def _separate_ids(text: str, name: str) -> str:
    """Returns the same SVG with the ids that it refers to under the figure's name, and without all others."""
    used = {first or second for first, second in _REFERENCE.findall(text)}
    text = _ID.sub(lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)

    def rename(found: re.Match[str]) -> str:
        return f"url(#{name}-{found[1]})" if found[1] is not None else f'href="#{name}-{found[2]}"'

    return _REFERENCE.sub(rename, text)
