"""Metrics on held-out records, as only a simulator can see them: outside the privacy promise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from client.data import open_units
from client.units import Units
from common.config import SiteConfig
from common.heads import load_parameters
from common.tasks import Task, merge_sums, metric_sums, metric_values
from common.types import Heads

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """One task's metrics: over all sites' held-out records together, and for each site. None is undefined."""

    pooled: Values
    per_site: Mapping[str, Values]


def evaluate(heads: Heads, tasks: Mapping[str, Task], held_out: Mapping[str, Units]) -> dict[str, Evaluation]:
    """Metrics of heads on every site's held-out units.

    Args:
        heads: task -> head.
        tasks: task -> definition; only those in `heads` are evaluated.
        held_out: site -> its test units.
    """
    results = {}
    for name in heads:
        task = tasks[name]
        per_site = {site: _sums(heads, name, task, units) for site, units in held_out.items() if name in units.tasks}
        present = {site: sums for site, sums in per_site.items() if sums is not None}
        pooled: dict[str, torch.Tensor] | None = None
        for sums in present.values():
            pooled = sums if pooled is None else merge_sums(pooled, sums)
        results[name] = Evaluation(
            pooled=_values(task, pooled) if pooled is not None else {},
            per_site={site: _values(task, sums) for site, sums in present.items()},
        )
    return results


def units_of(
    sites: Sequence[SiteConfig], run_id: str, tasks: Mapping[str, Task], split: Literal["train", "test"]
) -> dict[str, Units]:
    """Every site's units of one split as prepared for a run; sites that did not take part are left out."""
    found = {}
    for site in sites:
        folder = run_data(site, run_id)
        if folder.exists():
            own = [name for name in tasks if name in site.tasks]
            found[site.name] = open_units(folder, split, own, torch.device("cpu"))
    return found


def run_data(site: SiteConfig, run_id: str) -> Path:
    """Where a site keeps the arrays it prepared for a run."""
    return site.state_dir / "runs" / run_id / "data"


def _sums(heads: Heads, name: str, task: Task, units: Units) -> dict[str, torch.Tensor] | None:
    records = units.tasks[name].labelled()
    if len(records.features_RD) == 0:
        return None
    module = task.head(records.features_RD.shape[1])
    load_parameters(module, heads[name])
    with torch.inference_mode():
        return metric_sums(task, module(records.features_RD), records.labels)


def _values(task: Task, sums: Mapping[str, torch.Tensor]) -> Values:
    values = metric_values(task, dict(sums))
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
