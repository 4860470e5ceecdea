"""What needs no training, as a baseline: over all sites' records together, and never with a head."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from client.data.units import TaskRecords, Units
from common.events import TaskSummary
from common.tasks import open_task
from server.reports.summary import summarize
from simulations.evaluate import evaluate_baseline_predictions
from simulations.sweep import _aggregate


def units(task: str, features: Sequence[Sequence[float]], labels: Sequence[int], unlabelled: int = 0) -> Units:
    """One record a unit; the last `unlabelled` ones have no label."""
    count = len(features)
    mask = torch.arange(count) < count - unlabelled
    records = TaskRecords.of(torch.tensor(features), torch.tensor(labels), mask, torch.arange(count), count)
    return Units(count, {task: records})


def test_the_majority_is_that_of_all_sites_labelled_training_records() -> None:
    task = open_task({"kind": "classification", "labels": ["a", "b"]}, "t")
    # At site x alone, and with its unlabelled records, most would be a.
    train = {"x": units("t", [[0.0]] * 5, [0, 0, 0, 0, 0], unlabelled=3), "y": units("t", [[0.0]] * 3, [1, 1, 1])}
    test = {"x": units("t", [[0.0]] * 4, [1, 1, 1, 0])}
    assert evaluate_baseline_predictions({"t": task}, train, test)["t"]["accuracy"] == pytest.approx(0.75)


def test_features_themselves_are_judged_by_the_pairs_of_identities_never_seen() -> None:
    task = open_task({"kind": "embedding", "labels": ["ann", "bob"], "unseen": ["eve", "fay"]}, "t")
    train = {"x": units("t", [[1.0, 0.0, 0.0]], [0])}
    # Pairs of one identity at two sites are nearer than any other.
    test = {
        "x": units("t", [[1.0, 0.1, 0.0], [0.0, 1.0, 0.0]], [2, 3]),
        "y": units("t", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.1]], [2, 3]),
    }
    expected = {"eer": 0.0, "tar_at_far_1": 1.0, "tar_at_far_10": 1.0}
    assert evaluate_baseline_predictions({"t": task}, train, test)["t"] == expected


def test_a_task_that_says_nothing_without_training_has_no_such_baseline() -> None:
    task = open_task({"kind": "regression", "range": [0, 1]}, "t")
    assert evaluate_baseline_predictions({"t": task}, {}, {}) == {}


def test_a_sweep_shows_the_first_metric_that_is_defined() -> None:
    task = TaskSummary(
        kind="embedding", status="updated", updates=1, sites=(), metrics={}, per_site={}, evaluation=None, baselines={}
    )
    summaries = []
    for eer in (0.2, 0.4):
        own = task.model_copy(update={"metrics": {"accuracy": None, "eer": eer, "tar": 0.9}})
        summaries.append(summarize([]).model_copy(update={"tasks": {"t": own}}))
    (row,) = _aggregate([{}], [({}, seed, summary) for seed, summary in enumerate(summaries)])
    assert (row.metric, row.runs) == ("eer", 2) and row.mean == pytest.approx(0.3)
