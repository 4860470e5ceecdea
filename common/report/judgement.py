"""Words for metrics and for their differences, the same in every report.

Nothing is called better or worse whose interval holds zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from common.events import FEDERATED, PERSONAL, Interval

Judgement = Literal["better", "not distinguishable", "worse", "unknown"]

_METRICS = {
    "auroc": "AUROC",
    "brier": "Brier score",
    "c_index": "C-index",
    "eer": "equal error rate",
    "mae": "mean absolute error",
    "r2": "R²",
    "rmse": "root mean squared error",
}


def judge_difference(interval: Interval | None, *, is_error: bool) -> Judgement:
    """Returns how one head compares with another, from the interval of the first's metric minus the second's.

    Args:
        interval: 95 % interval of the difference; None where it is not known.
        is_error: whether the metric is the better the smaller it is.
    """
    if interval is None:
        return "unknown"
    low, high = (-interval[1], -interval[0]) if is_error else interval
    return "better" if low > 0.0 else "worse" if high < 0.0 else "not distinguishable"


def choose_metric(metrics: Mapping[str, float | None]) -> str | None:
    """Returns the first metric that is defined, which is the task's main one where it is; None where none is."""
    return next((name for name, value in metrics.items() if value is not None), None)


def name_metric(metric: str) -> str:
    """Returns a metric's name as a page shows it."""
    return _METRICS.get(metric, metric.replace("_", " "))


def name_heads(kind: str) -> str:
    """Returns the name of a kind of heads at home as a page shows it."""
    return {FEDERATED: "federated", PERSONAL: "personal"}.get(kind, kind)
