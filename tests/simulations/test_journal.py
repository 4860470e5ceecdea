"""A simulation's journal holds what a report shows: intervals, differences on the same units, counts of outcomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.events import BaselineEvaluated, HomeEvaluated, MetricsEvaluated, read_run_journal, select_events
from simulations.experiment import run


def test_results_and_baselines_come_with_intervals_and_their_differences(simulation_file: Path, tmp_path: Path) -> None:
    names = "baselines=[local, central, baseline_prediction]"
    summary = run(simulation_file, overrides=[names, "personal=prior", "noise_seed=1"], out=tmp_path / "out")
    events = read_run_journal(tmp_path / "out" / "journal.jsonl")
    (metrics,) = select_events(events, MetricsEvaluated)
    accuracy = summary.tasks["colour"].metrics["accuracy"] or 0.0
    low, high = metrics.pooled_intervals["accuracy"] or (1.0, 0.0)
    assert low < accuracy < high
    assert set(metrics.per_site_intervals) == set(metrics.per_site) and metrics.errors == ()
    for baseline in select_events(events, BaselineEvaluated):
        value = baseline.metrics["colour"]["accuracy"] or 0.0
        low, high = baseline.intervals["colour"]["accuracy"] or (1.0, 0.0)
        assert low < value < high, baseline.name
        low, high = baseline.differences["colour"]["accuracy"] or (1.0, 0.0)
        assert low < accuracy - value < high, baseline.name
    (home,) = select_events(events, HomeEvaluated)
    assert all(set(heads.differences) == set(heads.per_site) for heads in home.heads.values())


def test_the_counts_of_a_simulation_are_whole_and_give_its_metrics(simulation_file: Path, tmp_path: Path) -> None:
    run(simulation_file, overrides=["noise_seed=1"], out=tmp_path / "out")
    (metrics,) = select_events(read_run_journal(tmp_path / "out" / "journal.jsonl"), MetricsEvaluated)
    assert metrics.outcomes is not None and metrics.outcomes.probabilities
    (table,) = metrics.outcomes.confusions
    right, everything = sum(row[index] for index, row in enumerate(table.counts)), sum(map(sum, table.counts))
    assert table.names == ("red", "blue") and table.deviation == 0.0
    assert right / everything == pytest.approx(metrics.pooled["accuracy"])
    (scores,) = metrics.outcomes.scores
    assert sum(scores.positives) + sum(scores.negatives) == pytest.approx(everything)
