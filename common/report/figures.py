"""The figures of a report. Each takes plain numbers and names, and returns a drawing with the words that describe it.

Names are a stranger's: they are shortened, never parsed. Figures are narrow enough for a telephone at a readable size;
wide ones scroll. Series differ by line and marker as well as by colour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from common.report.svg import LINE, SERIES, SOFT, STYLE, TEXT, shorten, write_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDTH_IN = 4.3
"""Width of a figure in inches of 72 points: 413 pixels."""

MOST_SERIES = len(SERIES)
"""Lines in one figure."""

_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Figure:
    """A drawing on a page.

    Attributes:
        svg: the drawing, safe to stand in a page.
        caption: what it shows, in a line.
        wide: whether it takes the page's whole width, and scrolls where that is small.
    """

    svg: str = field(repr=False)
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Estimated:
    """A value with its interval, as a row of a figure.

    Attributes:
        label: text of the row.
        value: the value; None where it is undefined.
        interval: its ends; None where they are not known.
        main: whether the row is the one that others are compared with.
    """

    label: str
    value: float | None
    interval: tuple[float, float] | None = None
    main: bool = False


@dataclass(frozen=True)
class Series:
    """A line of a figure, perhaps with a band.

    Attributes:
        label: name in the legend; empty for none.
        xs: positions.
        ys: values.
        low: lower ends of the band; empty without one.
        high: upper ends.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Frequency:
    """A range of predicted probabilities, and how often what was predicted came true in it.

    Attributes:
        low: lower end of the range.
        high: upper end.
        predicted: mean probability in it, or its middle.
        observed: share of records in it that have the label.
        interval: 95 % interval of that share.
        count: number of records in it.
    """

    low: float
    high: float
    predicted: float
    observed: float
    interval: tuple[float, float]
    count: float


def draw_estimates(caption: str, rows: Sequence[Estimated], axis: str) -> Figure:
    """Returns values with their intervals, one below the other; a dashed line marks the main one.

    Args:
        caption: what the figure shows.
        rows: the values, from top to bottom.
        axis: text below the axis.
    """
    with _styled():
        canvas = _new_canvas(WIDTH_IN, 0.75 + 0.34 * len(rows))
        axes = canvas.subplots()
        for place, row in enumerate(reversed(rows)):
            colour = SERIES[0] if row.main else TEXT
            if row.value is None:
                axes.text(0.5, place, "undefined", transform=axes.get_yaxis_transform(), ha="center", va="center")
                continue
            if row.interval is not None:
                axes.plot(row.interval, [place, place], color=colour, linewidth=3.0 if row.main else 1.8, alpha=0.75)
            axes.plot([row.value], [place], "o", color=colour, markersize=7 if row.main else 5)
            if row.main:
                axes.axvline(row.value, color=colour, linewidth=0.9, linestyle=":", alpha=0.8)
        axes.set_yticks(range(len(rows)), [shorten(row.label, 30) for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(shorten(axis, 44))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x")
        axes.margins(x=0.08)
        return Figure(write_svg(canvas, caption), caption)


def draw_series(
    caption: str,
    lines: Sequence[Series],
    axes_labels: tuple[str, str],
    *,
    limit: float | None = None,
    frame: Literal["free", "counts", "unit", "chance"] = "free",
    steps: bool = False,
) -> Figure:
    """Returns lines over an axis, with their bands.

    Args:
        caption: what the figure shows.
        lines: at most `MOST_SERIES` of them.
        axes_labels: text of the lower and of the left axis.
        limit: a value that is marked by a dashed line across.
        frame: `counts` begins both at zero with whole numbers below; `unit` is a square from 0 to 1, `chance` one with
            its diagonal.
        steps: whether a value stays until the next one.
    """
    from matplotlib.ticker import MaxNLocator

    square = frame in ("unit", "chance")
    with _styled():
        canvas = _new_canvas(WIDTH_IN, 3.7 if square else 2.9)
        axes = canvas.subplots()
        if frame == "chance":
            axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.0, linestyle=":")
        for index, line in enumerate(lines[:MOST_SERIES]):
            style: dict[str, Any] = {"color": SERIES[index], "linestyle": _DASHES[index], "label": shorten(line.label)}
            if not square and len(line.xs) <= 30:
                style |= {"marker": _MARKERS[index], "markersize": 4.5}
            axes.plot(line.xs, line.ys, drawstyle="steps-post" if steps else "default", **style)
            if line.low:
                band: dict[str, Any] = {"color": SERIES[index], "step": "post" if steps else None}
                axes.fill_between(line.xs, line.low, line.high, alpha=0.18, linewidth=0, **band)
        if limit is not None:
            axes.axhline(limit, color=TEXT, linewidth=1.0, linestyle="--")
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(shorten(axes_labels[1], 40))
        axes.grid(True)
        if square:
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        if frame == "counts":
            axes.set_ylim(bottom=0.0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(line.label for line in lines):
            # Below the axis, where it hides nothing.
            canvas.legend(loc="outside lower center", ncols=1 if len(lines) <= 2 else 2)
        return Figure(write_svg(canvas, caption), caption)


def draw_calibration(caption: str, points: Sequence[Frequency], label: str) -> Figure:
    """Returns predicted probabilities beside observed frequencies: on the diagonal where they agree.

    Args:
        caption: what the figure shows.
        points: the ranges of probabilities.
        label: what the probability is of.
    """
    with _styled():
        canvas = _new_canvas(WIDTH_IN, 3.7)
        axes = canvas.subplots()
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=1.0, linestyle=":")
        for point in points:
            axes.plot([point.low, point.high], [point.observed] * 2, color=SERIES[0], linewidth=1.2, alpha=0.7)
            axes.plot([point.predicted] * 2, point.interval, color=SERIES[0], linewidth=2.4, alpha=0.7)
        axes.plot(
            [point.predicted for point in points], [point.observed for point in points], "o", color=SERIES[0], zorder=3
        )
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set_xlabel(f"predicted probability of {shorten(label, 24)}")
        axes.set_ylabel("share for which it was true")
        axes.grid(True)
        return Figure(write_svg(canvas, caption), caption)


def draw_matrix(
    caption: str, names: Sequence[str], shares: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]
) -> Figure:
    """Returns a table of truth and prediction whose cells are the darker the larger their share of the row is.

    Args:
        caption: what the figure shows.
        names: names of the classes.
        shares: share of each cell in its row, [truth][prediction].
        texts: what stands in the cells.
    """
    count, cell = len(names), 0.62 if len(names) <= 6 else 0.42
    shown = [shorten(name, 14) for name in names]
    width = max(WIDTH_IN, 1.3 + cell * count)
    with _styled():
        longest = max(map(len, shown))
        is_flat = 0.085 * longest < (width - 1.1) / count
        canvas = _new_canvas(width, 1.05 + min(cell, 0.5) * count + (0.0 if is_flat else 0.05 * longest))
        axes = canvas.subplots()
        places = list(itertools.product(range(count), range(count)))
        looks = [
            (SERIES[0 if row == column else 1], 0.6 * min(1.0, max(0.0, shares[row][column]))) for row, column in places
        ]
        squares = [(column - 0.5, row - 0.5, 1.0) for row, column in places]
        _fill_cells(axes, squares, [(SOFT, 1.0)] * len(squares))
        _fill_cells(axes, squares, looks)
        for row, column in places:
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=10 if count <= 8 else 7)
        ticks: dict[str, Any] = {"rotation": 0 if is_flat else 45, "ha": "center" if is_flat else "right"}
        axes.set_xticks(range(count), shown, **ticks)
        axes.set_yticks(range(count), shown)
        axes.tick_params(length=0)
        axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        return Figure(write_svg(canvas, caption), caption, wide=width > 6.5)


def draw_grid(
    caption: str,
    rows: Sequence[str],
    columns: Sequence[int],
    cells: Sequence[Sequence[str]],
    marks: Sequence[tuple[str, str, int]],
) -> Figure:
    """Returns one coloured cell for each row and column, with a letter where there is room.

    Args:
        caption: what the figure shows.
        rows: names of the rows.
        columns: numbers of the columns.
        cells: state of each cell, [row][column].
        marks: state, its letter, and the number of its colour from 0; other states stay empty.
    """
    looks = {state: (letter, SERIES[colour]) for state, letter, colour in marks}
    cell = 0.3 if len(columns) <= 24 else max(0.06, 7.2 / len(columns))
    width = max(WIDTH_IN, 2.0 + cell * len(columns))
    with _styled():
        canvas = _new_canvas(width, 1.25 + 0.27 * len(rows))
        axes = canvas.subplots()
        has_letters = cell >= 0.12
        for state in dict.fromkeys(state for states in cells for state in states):
            letter, colour = looks.get(state, ("", SOFT))
            runs = [
                (at, row, length)
                for row, states in enumerate(cells)
                for at, length in _list_runs(states, state, 1 if has_letters else len(columns))
            ]
            _fill_cells(axes, runs, [(colour, 0.55)] * len(runs), gap=0.06)
            for at, row, _ in runs if letter and has_letters else []:
                size = 8 if cell >= 0.2 else 6.5
                axes.text(at + 0.5, row + 0.52, letter, ha="center", va="center", fontsize=size)
        step = math.ceil(len(columns) / 24)
        places = range(0, len(columns), step)
        axes.set_xticks([place + 0.5 for place in places], [str(columns[place]) for place in places])
        axes.set_yticks([place + 0.5 for place in range(len(rows))], [shorten(row, 26) for row in rows])
        axes.tick_params(length=0)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel="round")
        axes.spines[:].set_visible(False)
        present = [state for state in looks if any(state in states for states in cells)]
        for state in present:
            letter, colour = looks[state]
            axes.plot([], [], "s", color=colour, alpha=0.55, markersize=9, label=f"{letter}  {state}")
        if present:
            # Below the figure, outside the axes: cells keep their size.
            canvas.legend(loc="outside lower left", ncols=min(len(present), 2 if width < 6 else 4))
        return Figure(write_svg(canvas, caption), caption, wide=width > 6.5)


def _list_runs(states: Sequence[str], state: str, longest: int) -> list[tuple[int, int]]:
    """Returns the places where a state stands, and for how long it does: neighbours are one, up to a length.

    Args:
        states: the states in order.
        state: the one that is looked for.
        longest: largest length of one.
    """
    runs: list[tuple[int, int]] = []
    for place, each in enumerate(states):
        if each != state:
            continue
        if runs and sum(runs[-1]) == place and runs[-1][1] < longest:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((place, 1))
    return runs


def _fill_cells(
    axes: Axes, cells: Sequence[tuple[float, float, float]], looks: Sequence[tuple[str, float]], *, gap: float = 0.0
) -> None:
    """Draws rectangles of height 1 as one artist: thousands of artists take minutes.

    Args:
        axes: the axes.
        cells: left end, upper end and width of each.
        looks: colour and opacity of each.
        gap: space between a rectangle and its neighbours, on each side.
    """
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    corners = [
        [(left + gap, top + gap), (right - gap, top + gap), (right - gap, top + 1 - gap), (left + gap, top + 1 - gap)]
        for left, top, right in ((left, top, left + width) for left, top, width in cells)
    ]
    axes.add_collection(PolyCollection(corners, facecolors=[to_rgba(*look) for look in looks], linewidths=0))


def _new_canvas(width_in: float, height_in: float) -> Canvas:
    """Returns an empty figure, without a display."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(width_in, height_in), layout="constrained")
    # The last number below an axis may stand out of it by half its width.
    canvas.get_layout_engine().set(w_pad=0.09, h_pad=0.04)  # type: ignore[union-attr,call-arg]
    return canvas


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield
