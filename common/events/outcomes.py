"""Counts of a head's predictions and scores on held-out records: what confusion matrices and curves are drawn from.

They follow from a statistic's sums (`common.tasks.CountedOutcomes`): exact ones in a simulation, those that sites
released with noise at a coordinator.
"""

from __future__ import annotations

from pydantic import Field

from common.events.facts import Facts


class ConfusionCounts(Facts):
    """Numbers of held-out records by truth and prediction."""

    label: str | None = Field(None, description="Label that is absent or present; null where the names are classes.")
    names: tuple[str, ...] = Field(description="Names of the classes, in the order of rows and columns.")
    counts: tuple[tuple[float, ...], ...] = Field(
        description="A row for each true class, in it a number for each predicted one; negative where noise made it so."
    )
    deviation: float = Field(0.0, description="Standard deviation of the noise in each number; 0 where exact.")


class ScoreCounts(Facts):
    """Numbers of held-out records by truth and by the range that their score fell into, for one label."""

    label: str = Field(description="Label that the score is of.")
    edges: tuple[float, ...] = Field(
        description="Rising ends of the ranges of scores from 0 to 1, without the first, 0, and the last, 1."
    )
    positives: tuple[float, ...] = Field(description="Number of records with the label for each range.")
    negatives: tuple[float, ...] = Field(description="Number of records without the label for each range.")
    deviation: float = Field(0.0, description="Standard deviation of the noise in each number; 0 where exact.")
    means: tuple[float, ...] = Field((), description="Mean score in each range; empty where it is not known.")


class Outcomes(Facts):
    """Counts of one head's predictions and scores."""

    confusions: tuple[ConfusionCounts, ...] = Field(
        (), description="One table of all classes, or one for each label; none where there are too many."
    )
    scores: tuple[ScoreCounts, ...] = Field((), description="One for each label that is scored.")
    probabilities: bool = Field(
        False, description="Whether the scores are probabilities, which can be compared with frequencies."
    )
