"""Metrics on the held-out records of all sites, which only a simulator sees: outside the privacy guarantee."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from client.aligners.parts.head import list_alignments, serve_equal_classes
from client.config import SiteConfig
from client.data.prepare import open_units
from client.data.units import Units
from client.personal.adopt import adapt_without_run
from client.personal.align import ReleasedTask, select_adaptable
from client.personal.evaluate import HomePredictions, predict_held_out
from client.personal.intervals import (
    Estimates,
    average_estimates,
    average_heads,
    estimate_metrics,
    list_differences,
    list_intervals,
    list_values,
)
from client.personal.metrics import (
    Predictions,
    compute_metrics,
    compute_pair_metrics,
    open_head,
    predict,
    replace_undefined,
)
from common.events import FEDERATED, PERSONAL, PERSONAL_UNIFORM, HomeMetrics, Metrics, Outcomes
from common.model.class_moments import unpack_class_moments
from common.tasks import EXACT_BUCKETS, BaselinePrediction, CountedOutcomes, PairMetrics, Task, WritesTexts
from common.tasks.parts.outcomes import join_score_ranges
from common.types import Heads
from server.rounds.loop import Outcome
from simulations.config import SimulationConfig

CURVE_POINTS = 50
"""Rounds, at most, after which a simulator evaluates the heads, besides the last one."""

WRITTEN_POINTS = 4
"""Rounds, at most, after which texts are written and judged, besides the last one: writing them takes long."""

MOST_SITES = 50
"""Sites above which only the metrics of all together get intervals: a bootstrap of each would take minutes."""


@dataclass(frozen=True)
class HeadEvaluation:
    """Metrics of one task.

    Attributes:
        pooled: metrics on the held-out records of all sites together.
        per_site: site name -> metrics on its own held-out records; sites without a labelled one are left out.
        estimates: the pooled metrics with their spreads; empty where none were asked for.
        site_estimates: site name -> those of its own metrics; empty above `MOST_SITES`.
        errors: metrics that are the better the smaller they are.
        outcomes: counts of predictions and scores over all sites; None where the task counts none.
    """

    pooled: Metrics
    per_site: Mapping[str, Metrics]
    estimates: Estimates = field(default_factory=dict)
    site_estimates: Mapping[str, Estimates] = field(default_factory=dict)
    errors: frozenset[str] = frozenset()
    outcomes: Outcomes | None = None


def evaluate(
    heads: Heads, tasks: Mapping[str, Task], held_out: Mapping[str, Units], *, intervals: bool = False
) -> dict[str, HeadEvaluation]:
    """Returns the metrics of each task's head on held-out units.

    Args:
        heads: task name -> parameters of its head.
        tasks: task name -> task; only those in `heads` are evaluated.
        held_out: site name -> its test units, with the features that the heads read (`Units.passed`).
        intervals: whether the spreads of the metrics are computed too, which takes some hundred times as long.
    """
    return {
        name: HeadEvaluation(
            pooled=_compute_pooled(task, list(present.values())),
            per_site={site: _compute_pooled(task, [each]) for site, each in present.items()},
            estimates=estimate_metrics(task, list(present.values())) if intervals else {},
            site_estimates={
                site: estimate_metrics(task, [each])
                for site, each in present.items()
                if intervals and len(present) <= MOST_SITES
            },
            errors=task.statistic(EXACT_BUCKETS).errors,
            outcomes=_count_outcomes(task, list(present.values())),
        )
        for name, task, present in _predict_each(heads, tasks, held_out)
    }


def evaluate_pooled(heads: Heads, tasks: Mapping[str, Task], held_out: Mapping[str, Units]) -> dict[str, Metrics]:
    """Returns the metrics of each task's head on the held-out units of all sites together.

    Args:
        heads: task name -> parameters of its head.
        tasks: task name -> task; only those in `heads` are evaluated.
        held_out: site name -> its test units, with the features that the heads read (`Units.passed`).
    """
    return {
        name: _compute_pooled(task, list(present.values()))
        for name, task, present in _predict_each(heads, tasks, held_out)
    }


def is_evaluated_after(round_: int, rounds: int, points: int = CURVE_POINTS) -> bool:
    """Returns whether a simulator evaluates heads after a round: about so many rounds, and the last.

    Args:
        round_: number of the round, from 1.
        rounds: number of rounds of the run.
        points: number of rounds that are evaluated, at most.
    """
    return round_ % math.ceil(rounds / points) == 0 or round_ == rounds


def count_points(task: Task) -> int:
    """Returns the number of rounds, at most, after which a task is evaluated: texts take long to write."""
    return WRITTEN_POINTS if isinstance(task, WritesTexts) else CURVE_POINTS


def _predict_each(
    heads: Heads, tasks: Mapping[str, Task], held_out: Mapping[str, Units]
) -> Iterator[tuple[str, Task, dict[str, Predictions]]]:
    """Yields each task that has a head, with its predictions at the sites that hold out a labelled record."""
    for name, task in tasks.items():
        if name not in heads:
            continue
        found = {
            site: predict(task, open_head(heads[name], name, task, units), name, units)
            for site, units in held_out.items()
            if name in units.tasks
        }
        yield name, task, {site: predictions for site, predictions in found.items() if predictions is not None}


def _compute_pooled(task: Task, predictions: Sequence[Predictions]) -> Metrics:
    """Returns a task's metrics over the records of some sites together; none where there are no records."""
    if not predictions:
        return {}
    return {**compute_metrics(task, _add_up(task, predictions)), **compute_pair_metrics(task, predictions)}


def _add_up(task: Task, predictions: Sequence[Predictions]) -> torch.Tensor:
    """Returns the exact sums of a task's statistic over the records of some sites."""
    statistic = task.statistic(EXACT_BUCKETS)
    return reduce(torch.add, [statistic.sums(each.outputs, each.labels) for each in predictions])


def _count_outcomes(task: Task, predictions: Sequence[Predictions]) -> Outcomes | None:
    if not isinstance(task, CountedOutcomes) or not predictions:
        return None
    return join_score_ranges(task.count_outcomes(_add_up(task, predictions).numpy(), 0.0))


def evaluate_at_home(sites: Mapping[str, HomePredictions]) -> dict[str, dict[str, HomeMetrics]]:
    """Returns task -> kind of heads -> their metrics, where each site's heads are judged on its own held-out units.

    Args:
        sites: site name -> the outputs of all kinds of heads there.
    """
    results: dict[str, dict[str, HomeMetrics]] = {}
    for task_name in dict.fromkeys(name for each in sites.values() for name in each.outputs):
        own = {site: each for site, each in sites.items() if task_name in each.outputs}
        task = next(iter(own.values())).tasks[task_name]
        kinds = dict.fromkeys(kind for each in own.values() for kind in each.outputs[task_name])
        federated = {site: estimate_metrics(task, [each.outputs[task_name][FEDERATED]]) for site, each in own.items()}
        results[task_name] = {
            kind: _compute_home_metrics(
                task, {site: each.outputs[task_name][kind] for site, each in own.items()}, federated
            )
            for kind in kinds
        }
    return results


def predict_left_out(
    config: SimulationConfig, tasks: Mapping[str, Task], site: SiteConfig, outcome: Outcome, run_id: str
) -> HomePredictions:
    """Returns the outputs of the final heads, and of the same as the site that was left out adapts them.

    Args:
        config: the simulation.
        tasks: task name -> task.
        site: the site that was left out; its records were prepared for the run.
        outcome: the end of the run.
        run_id: id of the run.
    """
    tasks = {name: task for name, task in tasks.items() if name in site.tasks}
    train, test = (open_prepared_units([site], run_id, tasks, side)[site.name] for side in ("train", "test"))
    modules = {name: open_head(outcome.heads[name], name, task, train) for name, task in tasks.items()}
    released = {}
    if config.personal == "adapt":
        for name, task in select_adaptable(tasks).items():
            num_classes = len(task.labels)  # type: ignore[attr-defined]
            own = unpack_class_moments(outcome.moments, name, config.run.backbone_of(name), num_classes)
            released[name] = ReleasedTask(task, modules[name], own, None)
    adapted = adapt_without_run(site, modules, tasks, train, released, lenient=True)
    kinds: dict[str, Mapping[str, nn.Module]] = {FEDERATED: modules, PERSONAL: adapted}
    if released:
        kinds[PERSONAL_UNIFORM] = serve_equal_classes(adapted)
    outputs = predict_held_out(kinds, tasks, test)
    return HomePredictions(run_id, config.personal, test.num_units, tasks, outputs, list_alignments(adapted))


def _compute_home_metrics(
    task: Task, predictions: Mapping[str, Predictions], federated: Mapping[str, Estimates]
) -> HomeMetrics:
    per_site = {site: estimate_metrics(task, [each]) for site, each in predictions.items()}
    mean, pooled = average_estimates(list(per_site.values())), estimate_metrics(task, list(predictions.values()))
    return HomeMetrics(
        mean=list_values(mean),
        mean_intervals=list_intervals(mean),
        pooled=list_values(pooled),
        pooled_intervals=list_intervals(pooled),
        per_site={site: list_values(each) for site, each in per_site.items()},
        per_site_intervals={site: list_intervals(each) for site, each in per_site.items()},
        differences={site: list_differences(federated[site], each) for site, each in per_site.items()},
    )


def average_evaluations(evaluations: Sequence[HeadEvaluation]) -> HeadEvaluation:
    """Returns the mean of each metric over several heads that are judged on the same units, where it is defined."""
    means: dict[str, float | None] = {}
    for name in evaluations[0].pooled:
        defined = [value for each in evaluations if (value := each.pooled[name]) is not None]
        means[name] = sum(defined) / len(defined) if defined else None
    return HeadEvaluation(means, {}, average_heads([each.estimates for each in evaluations]))


def evaluate_baseline_predictions(
    tasks: Mapping[str, Task], train: Mapping[str, Units], held_out: Mapping[str, Units]
) -> dict[str, HeadEvaluation]:
    """Returns the metrics of each task's prediction without training; tasks that have none are left out.

    Args:
        tasks: task name -> task.
        train: site name -> its training units.
        held_out: site name -> its test units; those of all sites are evaluated together.
    """
    results: dict[str, HeadEvaluation] = {}
    for name, task in tasks.items():
        if not isinstance(task, BaselinePrediction):
            continue
        known_features, known_labels = _pool_records(name, train)
        features, labels = _pool_records(name, held_out)
        outputs = task.predict_baseline(features, known_features, known_labels)
        # Features as embeddings have no side of any training identity: only their pairs can be judged.
        if isinstance(task, PairMetrics):
            results[name] = HeadEvaluation(replace_undefined(task.pair_metrics(outputs, labels)), {})
            continue
        units = [own.tasks[name].labelled().unit_R for own in held_out.values() if name in own.tasks]
        # One part for each site, as heads are judged: the draws are then the same.
        parts = zip(
            *(torch.split(part, [len(each) for each in units]) for part in (outputs, labels)), units, strict=True
        )
        estimates = estimate_metrics(task, [Predictions(*part) for part in parts])
        results[name] = HeadEvaluation(list_values(estimates), {}, estimates)
    return results


def _pool_records(name: str, units: Mapping[str, Units]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the flattened features of all labelled records of a task, and their labels."""
    records = [own.tasks[name].labelled() for own in units.values() if name in own.tasks]
    return (
        torch.cat([each.features_RD for each in records]).flatten(1),
        torch.cat([each.labels for each in records]),
    )


def open_prepared_units(
    sites: Sequence[SiteConfig], run_id: str, tasks: Mapping[str, Task], split: Literal["train", "test"]
) -> dict[str, Units]:
    """Returns each site's units of one split as it prepared them; sites that prepared none are left out.

    Args:
        sites: the sites.
        run_id: id of the run for which they were prepared.
        tasks: tasks to open, by name.
        split: the split of the records.
    """
    found = {}
    for site in sites:
        folder = locate_prepared_data(site, run_id)
        if folder.exists():
            own = [name for name in tasks if name in site.tasks]
            found[site.name] = open_units(folder, split, own, torch.device("cpu"))
    return found


def locate_prepared_data(site: SiteConfig, run_id: str) -> Path:
    """Returns the folder in which a site keeps the arrays that it prepared for a run."""
    return site.state_dir / "runs" / run_id / "data"
