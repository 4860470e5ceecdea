"""A simulator evaluates baselines without training, and the heads after each round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from client.app import make_app
from client.data.units import TaskRecords, Units
from client.protocol.site import Site
from common.events import FileJournal, RoundEnded, RoundEvaluated, TaskSummary, read_run_journal, select_events
from common.model.backbones import open_backbones
from common.privacy.noise import SeededEntropy, os_entropy
from common.tasks import open_task
from common.yaml import load
from server.reports.summary import summarize
from server.rounds.loop import run_federation
from simulations.config import SimulationConfig
from simulations.evaluate import evaluate_baseline_predictions, is_evaluated_after
from simulations.executors.in_process import InProcessGrid
from simulations.experiment import run
from simulations.partition import build_sites, read_sites
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
    assert evaluate_baseline_predictions({"t": task}, train, test)["t"].pooled["accuracy"] == pytest.approx(0.75)


def test_features_themselves_are_judged_by_the_pairs_of_identities_never_seen() -> None:
    task = open_task({"kind": "embedding", "labels": ["ann", "bob"], "unseen": ["eve", "fay"]}, "t")
    train = {"x": units("t", [[1.0, 0.0, 0.0]], [0])}
    # Pairs of one identity at two sites are nearer than any other.
    test = {
        "x": units("t", [[1.0, 0.1, 0.0], [0.0, 1.0, 0.0]], [2, 3]),
        "y": units("t", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.1]], [2, 3]),
    }
    expected = {"eer": 0.0, "tar_at_far_1": 1.0, "tar_at_far_10": 1.0}
    assert evaluate_baseline_predictions({"t": task}, train, test)["t"].pooled == expected


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


def test_a_simulation_journals_the_metrics_of_each_round(simulation_file: Path, tmp_path: Path) -> None:
    summary = run(simulation_file, out=tmp_path / "run", overrides=["noise_seed=2"])
    curve = select_events(read_run_journal(tmp_path / "run" / "journal.jsonl"), RoundEvaluated)
    assert [(event.round, event.task) for event in curve] == [(1, "colour"), (2, "colour"), (3, "colour")]
    assert curve[-1].pooled == summary.tasks["colour"].metrics, "the last round's heads are the final ones"
    assert len({tuple(event.pooled.items()) for event in curve}) > 1, "the heads of each round, not always the same"


def test_evaluating_after_a_round_changes_neither_heads_nor_ledgers(simulation_file: Path, tmp_path: Path) -> None:
    evaluated, plain = tmp_path / "a" / "run", tmp_path / "b" / "run"
    run(simulation_file, out=evaluated, entropy=SeededEntropy(1))
    config = load(SimulationConfig, simulation_file)
    plain.mkdir(parents=True)
    sites = build_sites(config, plain / "sites", non_private=False)
    app = make_app(lambda context: sites[int(context.node_config["partition-id"])], SeededEntropy(1))
    run_federation(
        InProcessGrid(app, len(sites)),
        config.run,
        open_backbones(config.run),
        run_id="run",
        folder=plain,
        journal=FileJournal(plain / "journal.jsonl"),
        executor="in_process",
    )
    heads, spent = [], []
    for folder, num_evaluations in ((evaluated, 3), (plain, 0)):
        events = read_run_journal(folder / "journal.jsonl")
        assert len(select_events(events, RoundEvaluated)) == num_evaluations
        heads.append([event.heads for event in select_events(events, RoundEnded)])
        own = [Site(site, os_entropy) for site in read_sites(folder / "sites")]
        spent.append([(len(site.ledger().charges()), site.ledger().spent()) for site in own])
    assert heads[0] == heads[1] and len(heads[0]) == 3
    assert spent[0] == spent[1]


@pytest.mark.parametrize("rounds", [1, 2, 49, 50, 51, 99, 100, 101, 777, 10_000])
def test_a_learning_curve_has_few_points_and_the_last_round(rounds: int) -> None:
    points = [round_ for round_ in range(1, rounds + 1) if is_evaluated_after(round_, rounds)]
    assert points[-1] == rounds
    assert len(points) == rounds if rounds <= 50 else 25 <= len(points) <= 51
