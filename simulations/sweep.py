"""Several runs of one simulation: every combination of the listed values, once for each seed.

All runs share one cache of features.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.events import ALONE, ALONE_ADAPTED, ALONE_NOT_PRIVATE, FEDERATED, PERSONAL, PERSONAL_UNIFORM, Summary
from common.types import BadInput
from common.yaml import as_override, load
from server.reports.results import new_run_folder
from server.rounds.messenger import Observe
from simulations.check import check_simulation
from simulations.config import SimulationConfig
from simulations.experiment import Watch, run, watch_nothing


@dataclass(frozen=True)
class Row:
    """The main metric of one task under one combination of values.

    Attributes:
        values: key path -> value.
        task: name of the task.
        metric: name of the metric.
        mean: mean over the seeds.
        std: standard deviation over the seeds; 0 for a single seed.
        runs: number of seeds for which the metric is defined.
    """

    values: dict[str, Any]
    task: str
    metric: str
    mean: float
    std: float
    runs: int


def sweep(
    path: Path, overrides: Sequence[str], out: Path | None, observe: Observe, watch: Watch = watch_nothing
) -> tuple[Path, list[Row]]:
    """Runs every combination, and returns the path of a CSV with all results and one row for each combination and task.

    Args:
        path: simulation file with a `sweep` section.
        overrides: settings that replace those of the file in every run, each as "key.path=value".
        out: folder of the runs and of `sweep.csv`; by default a new one under the simulation's `runs_dir`.
        observe: receives the progress in runs.
        watch: entered with each run's folder while it goes on.

    Raises:
        BadInput: there is no `sweep` section, or a combination is not valid; nothing has run then.
    """
    config = load(SimulationConfig, path, overrides)
    if config.sweep is None:
        raise BadInput("sweep: expected a section with seeds and values, got nothing")
    keys = list(config.sweep.values)
    combinations = [dict(zip(keys, values, strict=True)) for values in itertools.product(*config.sweep.values.values())]
    plans = []
    for values in combinations:
        for seed in config.sweep.seeds:
            chosen = {**values, "run.seed": seed, "partition.seed": seed}
            texts = [as_override(key, value) for key, value in chosen.items()]
            one = load(SimulationConfig, path, [*overrides, *texts])
            check_simulation(one)
            plans.append((values, seed, one))
    folder = out or new_run_folder(config.runs_dir, f"{config.run.name}-sweep")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for position, (values, seed, one) in enumerate(plans):
        observe("sweep", position, len(plans))
        summary = run(one, out=folder / f"{position:03d}", watch=watch)
        results.append((values, seed, summary))
        _write_csv(folder / "sweep.csv", keys, results)  # After every run: an interrupted sweep keeps its rows.
    observe("sweep", len(plans), len(plans))
    return folder / "sweep.csv", _aggregate(combinations, results)


def _write_csv(path: Path, keys: list[str], results: list[tuple[dict[str, Any], int, Summary]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, "seed", "task", "metric", "value", *_BASELINE_COLUMNS, *_HOME_COLUMNS.values()])
        for values, seed, summary in results:
            for task, result in summary.tasks.items():
                for metric, value in result.metrics.items():
                    others = [result.baselines.get(name, {}).get(metric) for name in _BASELINE_COLUMNS]
                    home = [
                        result.at_home[kind].mean.get(metric) if kind in result.at_home else None
                        for kind in _HOME_COLUMNS
                    ]
                    writer.writerow([*values.values(), seed, task, metric, value, *others, *home])


_BASELINE_COLUMNS = ("baseline_prediction", "local", "non_private", "central", "random_backbone")

_HOME_COLUMNS = {
    kind: f"at home: {kind}"
    for kind in (FEDERATED, PERSONAL, PERSONAL_UNIFORM, ALONE, ALONE_NOT_PRIVATE, ALONE_ADAPTED)
}
"""Kind of heads -> column of the mean over sites, each on its own held-out records."""


def _aggregate(combinations: list[dict[str, Any]], results: list[tuple[dict[str, Any], int, Summary]]) -> list[Row]:
    rows = []
    for values in combinations:
        own = [summary for combination, _, summary in results if combination == values]
        for task, result in own[0].tasks.items():
            for metric in result.metrics:
                numbers = [summary.tasks[task].metrics.get(metric) for summary in own]
                defined = [number for number in numbers if number is not None]
                if defined:  # The main metric; of an embedding without held-out training identities, the next one.
                    std = statistics.stdev(defined) if len(defined) > 1 else 0.0
                    rows.append(Row(values, task, metric, statistics.mean(defined), std, len(defined)))
                    break
    return rows
