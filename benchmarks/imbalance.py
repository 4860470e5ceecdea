"""Balanced accuracy where one label is rare, with `solver: {kind: auto}`, beside a balanced head without privacy.

    python -m benchmarks.imbalance [FILE ...]

Each file is run at each of its `sweep`'s epsilons and seeds, which deal the records anew. The reference has the same
records in one place: logistic regression without privacy whose classes are weighted so that both count the same, its
regularisation chosen by cross-validation on training records. It prints means with standard errors over the seeds, and
how many points a private head lies below the reference of its own seed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import balanced_accuracy_score

from common.tasks import open_task
from common.yaml import as_override, load
from simulations.baselines import pool_units
from simulations.config import SimulationConfig
from simulations.evaluate import open_prepared_units
from simulations.experiment import run
from simulations.partition import read_sites

FILES = tuple(
    Path("configs/simulations") / f"{name}.yaml"
    for name in ("cifar10_one", "brain_mri_few_normal", "brain_mri_finding")
)
_METRICS = ("balanced_accuracy", "sensitivity", "specificity", "auroc")
_STRENGTHS = [10.0**exponent for exponent in range(-1, 4)]


def compute_reference(folder: Path, config: SimulationConfig) -> float:
    """Returns the balanced accuracy of a balanced head without privacy on the records of a finished run.

    Args:
        folder: the run's folder, whose name is its id.
        config: the simulation, of one task.
    """
    tasks = {name: open_task(spec, name) for name, spec in config.run.tasks.items()}
    (name,) = tasks
    arrays = {}
    for side in ("train", "test"):
        records = pool_units(open_prepared_units(read_sites(folder / "sites"), folder.name, tasks, side), tasks).tasks
        part = records[name]
        arrays[side] = part.features_RD[part.mask_R].numpy(), part.labels[part.mask_R].numpy()
    (features_RD, labels_R), (held_out_RD, truth_R) = arrays["train"], arrays["test"]
    model = LogisticRegressionCV(
        Cs=_STRENGTHS,
        l1_ratios=(0.0,),
        class_weight="balanced",
        scoring="balanced_accuracy",
        max_iter=5000,
        cv=4,
        use_legacy_attributes=False,
    ).fit(features_RD, labels_R)
    return float(balanced_accuracy_score(truth_R, model.predict(held_out_RD)))


def main() -> None:
    """Prints one row for each file and epsilon, and a JSON line of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    parser.add_argument("--set", action="append", default=[], help="override a key, as in `headwater simulate`")
    given = parser.parse_args()
    for file in given.files:
        base = load(SimulationConfig, file, given.set)
        assert base.sweep is not None, "expected a file with a sweep"
        references: dict[int, float] = {}
        for epsilon in base.sweep.values["run.privacy.target_epsilon"]:
            rows = [_measure(file, given.set, epsilon, seed, references) for seed in base.sweep.seeds]
            _report(file.stem, epsilon, rows)


def _measure(
    file: Path, overrides: Sequence[str], epsilon: float, seed: int, references: dict[int, float]
) -> dict[str, float]:
    """Returns one run's metrics; `references` keeps the reference of each seed, whose records are always the same."""
    chosen = {"run.privacy.target_epsilon": epsilon, "run.seed": seed, "partition.seed": seed}
    config = load(SimulationConfig, file, [*overrides, *(as_override(key, value) for key, value in chosen.items())])
    with tempfile.TemporaryDirectory() as folder:
        summary = run(config, out=Path(folder) / "run")
        (task,) = summary.tasks.values()
        metrics = {name: task.metrics[name] for name in _METRICS}
        row = {name: math.nan if value is None else value for name, value in metrics.items()}
        if seed not in references:
            references[seed] = compute_reference(Path(folder) / "run", config)
    row["reference"] = references[seed]
    row["below"] = row["reference"] - row["balanced_accuracy"]
    return row


def _report(name: str, epsilon: float, rows: Sequence[dict[str, float]]) -> None:
    values = {key: [row[key] for row in rows] for key in rows[0]}
    means = {key: float(np.mean(each)) for key, each in values.items()}
    errors = (
        {key: float(np.std(each, ddof=1)) / math.sqrt(len(each)) for key, each in values.items()} if rows[1:] else {}
    )
    said = ", ".join(f"{key} {means[key]:.3f} ({errors.get(key, math.nan):.3f})" for key in means)
    print(f"{name} epsilon {epsilon:g}: {said}", flush=True)
    print(json.dumps({"name": name, "epsilon": epsilon, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
