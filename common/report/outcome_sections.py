"""The sections of a report that are drawn from counts of predictions and scores: mistakes, ranking, probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.events import ConfusionCounts, Outcomes
from common.report.curves import ScoreCurves, judge_calibration, trace_curves
from common.report.figures import MOST_SERIES, Figure, Series, draw_calibration, draw_matrix, draw_series
from common.report.page import ReportTable, Section, count_of, format_estimate

_MOST_TABLES = 12
_MOST_APART = 4
"""Labels with figures of their own; the table has all."""

_NO_COUNTS = (
    "There are no counts of predictions to draw this from: the tasks have none (as a regression), nothing was "
    "evaluated on held-out records, or an earlier version wrote the journal."
)


@dataclass(frozen=True)
class ShownOutcomes:
    """Counts of one head, and what they are.

    Attributes:
        title: name of the task, and of the heads where there are several.
        outcomes: the counts.
    """

    title: str
    outcomes: Outcomes


def show_outcomes(shown: Sequence[ShownOutcomes], remarks: Sequence[str] = ()) -> list[Section]:
    """Returns the sections on mistakes, ranking and probabilities; one that says why where there is nothing to draw.

    Args:
        shown: counts of heads.
        remarks: further sentences on probabilities, such as on a temperature.
    """
    if not shown and not remarks:
        return [Section("Mistakes, ranking and probabilities", _NO_COUNTS)]
    return [show_mistakes(shown), show_ranking(shown), show_probabilities(shown, remarks)]


def show_mistakes(shown: Sequence[ShownOutcomes]) -> Section:
    """Returns the section with the confusion matrices."""
    heading = "Which mistakes were made"
    figures, tables, remarks = [], [], []
    for each in shown:
        for confusion in each.outcomes.confusions[:_MOST_TABLES]:
            title = each.title + (f", label {confusion.label}" if confusion.label else "")
            figures.append(_draw_confusion(title, confusion))
            tables.append(
                ReportTable(
                    f"{title}: number of records of each true class (row) by prediction (column)",
                    ("true", *(f"predicted {name}" for name in confusion.names)),
                    [
                        (true, *(f"{count:.0f}" for count in row))
                        for true, row in zip(confusion.names, confusion.counts, strict=True)
                    ],
                    tuple(f"predicted {name}" for name in confusion.names),
                )
            )
        if each.outcomes.confusions and each.outcomes.confusions[0].deviation > 0.0:
            deviation = each.outcomes.confusions[0].deviation
            remarks.append(
                f"{each.title}: every number has noise with a standard deviation of {deviation:.1f} records. Numbers "
                f"below {2 * deviation:.0f} tell little, and negative ones are noise."
            )
        if len(each.outcomes.confusions) > _MOST_TABLES:
            remarks.append(f"{each.title}: only the first {_MOST_TABLES} labels are shown.")
    if not figures:
        return Section(heading, _NO_COUNTS)
    lead = (
        "Each row is a true class, each column what the final head predicted; the stronger the colour, the larger the "
        "cell's share of its row. Right predictions are on the diagonal. It does not show how sure the head was."
    )
    return Section(heading, lead, figures, tables, remarks)


def show_ranking(shown: Sequence[ShownOutcomes]) -> Section:
    """Returns the section with the receiver operating characteristic and with precision over recall."""
    heading = "How well records are ranked"
    figures: list[Figure] = []
    tables, remarks = [], []
    for each in shown:
        scores = sorted(each.outcomes.scores, key=lambda one: -sum(one.positives))
        traced = [curves for one in scores[:MOST_SERIES] if (curves := trace_curves(one)) is not None]
        if scores and scores[0].deviation > 0.0:
            remarks.append(
                f"{each.title}: drawn from {len(scores[0].positives)} ranges of scores, whose every count has noise "
                f"with a standard deviation of {scores[0].deviation:.1f} records. The band holds 95 % of the curves "
                "that such noise makes."
            )
        if len(traced) < len(scores):
            remarks.append(
                f"{each.title}: {count_of(len(scores) - len(traced), 'label')} not drawn: too few records have it or "
                "lack it, the noise hides it, or there are more labels than lines that can be told apart."
            )
        if traced:
            # A curve through noise is not to be read without its band.
            figures += _draw_curves(each.title, traced, apart=scores[0].deviation > 0.0)
            tables.append(_tabulate_curves(each.title, traced))
    if not figures:
        return Section(heading, " ".join(remarks) or _NO_COUNTS)
    lead = (
        "ROC: how many of the records with a label are found (up) at the price of how many others that are wrongly "
        "taken along (right); the dotted diagonal is guessing. Precision: the share of the found records that truly "
        "have the label; the dashed line is guessing. A band is a 95 % interval: over the choice of held-out records "
        "where counts are exact, for the privacy noise where they were released with noise."
    )
    return Section(heading, lead, figures, tables, remarks)


def show_probabilities(shown: Sequence[ShownOutcomes], remarks: Sequence[str] = ()) -> Section:
    """Returns the section with predicted probabilities beside observed frequencies.

    Args:
        shown: counts of heads.
        remarks: further sentences, such as on a temperature.
    """
    heading = "Can the probabilities be believed?"
    figures, tables, hidden = [], [], []
    for each in shown:
        if not each.outcomes.probabilities:
            continue
        points = judge_calibration(each.outcomes.scores)
        if len(points) < 2:
            hidden.append(f"{each.title}: the noise, or too few records, hide it.")
            continue
        label = each.outcomes.scores[0].label if len(each.outcomes.scores) == 1 else "a label"
        figures.append(draw_calibration(each.title, points, label))
        columns = ("predicted", "mean", "true share (95 %)", "predictions")
        rows = [
            (
                f"{point.low:.2f} to {point.high:.2f}",
                f"{point.predicted:.2f}",
                f"{point.observed:.2f} ({point.interval[0]:.2f} to {point.interval[1]:.2f})",
                f"{point.count:.0f}",
            )
            for point in points
        ]
        caption = f"{each.title}: predicted probability of {label}, and how often it was true"
        tables.append(ReportTable(caption, columns, rows, ("mean", "predictions")))
    if not figures:
        return Section(heading, " ".join([*hidden, *remarks]) or _NO_COUNTS)
    lead = (
        "Points on the diagonal mean: of the records to which the head gives a probability of 30 %, about 30 % have "
        "the label. Below the diagonal a label is less frequent than predicted, above it more. The upright bar is a "
        "point's 95 % interval, a flat one the range of probabilities that it stands for. The probabilities are those "
        "of the head itself, before a temperature mends them."
    )
    return Section(heading, lead, figures, tables, [*hidden, *remarks])


def _draw_confusion(title: str, confusion: ConfusionCounts) -> Figure:
    totals = [sum(row) for row in confusion.counts]
    shares = [
        [count / total if total > 0.0 else 0.0 for count in row]
        for row, total in zip(confusion.counts, totals, strict=True)
    ]
    texts = [[f"{count:.0f}" for count in row] for row in confusion.counts]
    return draw_matrix(title, confusion.names, shares, texts)


def _draw_curves(title: str, traced: Sequence[ScoreCurves], *, apart: bool) -> list[Figure]:
    """Returns the curves of some labels.

    Args:
        title: what they are of.
        traced: the labels' curves.
        apart: whether each label has figures of its own, with its bands; otherwise more than two labels have no bands.
    """
    if apart and len(traced) > 1:
        return [
            figure
            for each in traced[:_MOST_APART]
            for figure in _draw_curves(f"{title}, label {each.roc.label}", [each], apart=False)
        ]
    roc, precision = [each.roc for each in traced], [each.precision for each in traced]
    if len(traced) > 2:  # Bands of more hide each other; the table has them.
        roc, precision = ([Series(line.label, line.xs, line.ys) for line in lines] for lines in (roc, precision))
    guessing = traced[0].prevalence if len(traced) == 1 else None
    return [
        draw_series(f"{title}: ROC", roc, ("false positive rate", "true positive rate"), frame="chance"),
        draw_series(f"{title}: precision", precision, ("recall", "precision"), limit=guessing, frame="unit"),
    ]


def _tabulate_curves(title: str, traced: Sequence[ScoreCurves]) -> ReportTable:
    """Returns each label's curves at a few points."""
    columns = ("label", "true positive rate at false positive rate 0.1", "precision at recall 0.5", "at recall 0.8")
    rows = [
        (
            each.roc.label,
            _read_off(each.roc, 0.1),
            _read_off(each.precision, 0.5),
            _read_off(each.precision, 0.8),
        )
        for each in traced
    ]
    return ReportTable(f"{title}: points of the curves, with their 95 % intervals", columns, rows)


def _read_off(line: Series, at: float) -> str:
    index = int(np.abs(np.subtract(line.xs, at)).argmin())
    return format_estimate(line.ys[index], (line.low[index], line.high[index]))
