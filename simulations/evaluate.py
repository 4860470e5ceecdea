"""Metrics on the held-out records of all sites, which only a simulator sees: outside the privacy guarantee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import torch

from client.config import SiteConfig
from client.data.prepare import open_units
from client.data.units import Units
from client.personal.metrics import (
    compute_exact_sums,
    compute_metrics,
    compute_pair_metrics,
    replace_undefined,
)
from common.events import Metrics
from common.tasks import EXACT_BUCKETS, BaselinePrediction, PairMetrics, Task
from common.types import Heads


@dataclass(frozen=True)
class HeadEvaluation:
    """Metrics of one task.

    Attributes:
        pooled: metrics on the held-out records of all sites together.
        per_site: site name -> metrics on its own held-out records; sites without a labelled one are left out.
    """

    pooled: Metrics
    per_site: Mapping[str, Metrics]


def evaluate(heads: Heads, tasks: Mapping[str, Task], held_out: Mapping[str, Units]) -> dict[str, HeadEvaluation]:
    """Returns the metrics of each task's head on held-out units.

    Args:
        heads: task name -> parameters of its head.
        tasks: task name -> task; only those in `heads` are evaluated.
        held_out: site name -> its test units, with the features that the heads read (`Units.passed`).
    """
    results = {}
    for name, task in tasks.items():
        if name not in heads:
            continue
        per_site = {
            site: compute_exact_sums(heads[name], name, task, units)
            for site, units in held_out.items()
            if name in units.tasks
        }
        present = {site: sums for site, sums in per_site.items() if sums is not None}
        own = {site: held_out[site] for site in present}
        results[name] = HeadEvaluation(
            pooled={
                **(compute_metrics(task, reduce(torch.add, present.values())) if present else {}),
                **compute_pair_metrics(heads[name], name, task, list(own.values())),
            },
            per_site={
                site: {**compute_metrics(task, sums), **compute_pair_metrics(heads[name], name, task, [own[site]])}
                for site, sums in present.items()
            },
        )
    return results


def evaluate_baseline_predictions(
    tasks: Mapping[str, Task], train: Mapping[str, Units], held_out: Mapping[str, Units]
) -> dict[str, Metrics]:
    """Returns the metrics of each task's prediction without training; tasks that have none are left out.

    Args:
        tasks: task name -> task.
        train: site name -> its training units.
        held_out: site name -> its test units; those of all sites are evaluated together.
    """
    results: dict[str, Metrics] = {}
    for name, task in tasks.items():
        if not isinstance(task, BaselinePrediction):
            continue
        known_features, known_labels = _pool_records(name, train)
        features, labels = _pool_records(name, held_out)
        outputs = task.predict_baseline(features, known_features, known_labels)
        # Features as embeddings have no side of any training identity: only their pairs can be judged.
        if isinstance(task, PairMetrics):
            results[name] = replace_undefined(task.pair_metrics(outputs, labels))
        else:
            results[name] = compute_metrics(task, task.statistic(EXACT_BUCKETS).sums(outputs, labels))
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
