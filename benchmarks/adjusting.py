"""What schedules, decay to the start and label smoothing change of a private linear head (docs/transfer.md, Adjust).

    python -m benchmarks.adjusting CACHE [--sets cifar10 sst2 brain_mri] [--splits 10] [--only TEXT] [--test]

Each setting trains the run that `solver: {kind: auto}` chooses, with its centre, offset, clip norm, noise and steps, on
features that are kept in the folder CACHE. By default it trains on four fifths of the training records and is scored on
the last fifth, which is drawn anew for each split; with `--test` it trains on all of them and is scored on the test
records, and the seeds draw the noise alone. All settings of a seed share split and noise; printed is the difference
to no setting, in points of accuracy, with its standard error. Of a setting marked `=`, the run may add as much noise to
a logit as without the setting (`rho`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.feature_store import FeatureStore
from client.data.sources import open_source
from common.model.backbones import open_pretrained
from common.model.moments import CENTRE, MEAN, NoisedSum, fix_heads, list_parts
from common.model.momentum import adjust_step, read_momentum
from common.model.parameters import create_heads, parameters
from common.privacy.shares import plan_moments
from common.run import Adjustment, RunConfig
from common.tasks import LabelPrior, LossGradient, Task, open_tasks
from common.types import Params, Unit
from common.yaml import as_override, load
from simulations.config import SimulationConfig

Array = NDArray[np.float32]

MRI = {
    "run.tasks": {
        "tumour_type": {
            "kind": "classification",
            "labels": ["glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor"],
        }
    },
    "tasks": {"tumour_type": {"source": "slices", "label": "label", "missing": "refuse", "public_size": 80}},
}
SETS: Mapping[str, Mapping[str, Any]] = {"cifar10": {}, "sst2": {}, "brain_mri": MRI}
EPSILONS = (1.0, 3.0, 8.0, None)
ADJUSTMENTS: Mapping[str, Mapping[str, Any]] = {
    "warm_up 5": {"schedule": {"warm_up": 5}},
    "warm_up 12": {"schedule": {"warm_up": 12}},
    "linear to .1": {"schedule": {"shape": "linear"}},
    "cosine to .1": {"schedule": {"shape": "cosine"}},
    "decay .003": {"decay_to_start": 0.003},
    "decay .01": {"decay_to_start": 0.01},
    "decay .03": {"decay_to_start": 0.03},
    "decay .1": {"decay_to_start": 0.1},
    "decay .3": {"decay_to_start": 0.3},
}
SMOOTHINGS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Records:
    """Encoded records of a data set.

    Attributes:
        features_ND: float32 [N, D].
        labels_N: int64 [N].
        is_test_N: bool [N].
    """

    features_ND: Array
    labels_N: NDArray[np.int64]
    is_test_N: NDArray[np.bool_]


def load_config(name: str, epsilon: float | None, changes: Mapping[str, Any]) -> SimulationConfig:
    """Returns the simulation of a data set with some settings.

    Args:
        name: name of the data set and of its file.
        epsilon: requested epsilon; None for none.
        changes: key -> value.
    """
    privacy = {"run.privacy": "non_private"} if epsilon is None else {"run.privacy.target_epsilon": epsilon}
    asked = {**SETS[name], **privacy, **changes}
    file = Path("configs/simulations") / f"{name}.yaml"
    return load(SimulationConfig, file, [as_override(key, value) for key, value in asked.items()])


def encode(name: str, cache: Path) -> Records:
    """Returns the features and labels of a data set.

    Args:
        name: name of the data set.
        cache: folder that keeps the features.
    """
    config = load_config(name, 3.0, {})
    backbone = open_pretrained(config.run.backbone_specs["backbone"], "run.backbone")
    (spec,) = config.sources.values()
    source = open_source(spec, "sources").open()
    features = FeatureStore(cache).open_or_encode(source, backbone, device=torch.device("cpu"))
    ((task_name, data),) = config.tasks.items()
    task = open_tasks(config.run)[task_name]
    rows = source.index()
    labels = torch.stack([task.codec.encode([row.cells[data.label]]) for row in rows])
    tests = np.array([row.split == "test" for row in rows])
    return Records(np.asarray(features.features_ND, np.float32), labels.numpy(), tests)


def train(
    run: RunConfig, features_ND: Array, labels_N: NDArray[np.int64], num_sites: int, rng: np.random.Generator
) -> Params:
    """Returns the head that a run of `head_sum` or `sgd` and `heavy_ball` trains.

    Args:
        run: the run, of one task.
        features_ND: float32 [N, D], the training records of all sites.
        labels_N: int64 [N].
        num_sites: number of sites, each of which adds the whole noise.
        rng: source of the noise.
    """
    tasks = open_tasks(run)
    ((name, task),) = tasks.items()
    momentum, adjustment = read_momentum(run, name), run.aggregation.select_adjustment(name)
    assert momentum is not None and isinstance(task, LossGradient)
    head, rows_ND = fix_head(run, task, features_ND, labels_N, num_sites, rng)
    offset_K, labels = torch.from_numpy(head["fixed.offset"]), torch.from_numpy(labels_N)
    step, kept = momentum.choose_step(len(labels_N), num_sites)
    clip_norm = run.solver.settings().get("clip_norm", math.inf)
    deviation = momentum.noise * math.sqrt(num_sites)
    old: Params = {"weight": head["layers.weight"]}
    start, velocity_KD = old, np.zeros_like(head["layers.weight"])
    for round_ in range(1, run.rounds + 1):
        outputs_NK = torch.from_numpy(rows_ND @ old["weight"].T) + offset_K
        slopes_NK = task.loss_gradient(outputs_NK, labels).numpy()
        # Rows have a length of 1: a unit's gradient is as long as its slope.
        lengths_N1 = np.linalg.norm(slopes_NK, axis=1, keepdims=True)
        slopes_NK = slopes_NK * np.minimum(1.0, clip_norm / np.maximum(lengths_N1, 1e-9))
        noise_KD = deviation * rng.standard_normal(velocity_KD.shape)
        mean_KD = -(slopes_NK.T @ rows_ND + noise_KD) / len(labels_N)
        velocity_KD = (kept * velocity_KD + mean_KD).astype(np.float32)
        new: Params = {"weight": (old["weight"] + step * velocity_KD).astype(np.float32)}
        old = adjust_step(adjustment, old, new, start, round_=round_, rounds=run.rounds)
    return {**head, "layers.weight": old["weight"]}


def fix_head(
    run: RunConfig,
    task: Task,
    features_ND: Array,
    labels_N: NDArray[np.int64],
    num_sites: int,
    rng: np.random.Generator,
) -> tuple[Params, Array]:
    """Returns the head before the first round with its centre and offset, and the rows that it trains on.

    Args:
        run: the run.
        task: its task.
        features_ND: float32 [N, D].
        labels_N: int64 [N].
        num_sites: number of sites.
        rng: source of the noise.
    """
    assert isinstance(task, LabelPrior)
    (name,) = run.tasks
    plan, parts = plan_moments(run, Unit.EXAMPLE), list_parts(run, {name: task})
    assert plan is not None
    counts_C = task.count_labels(torch.from_numpy(labels_N)).double().sum(0).numpy()
    sums = {f"backbone{MEAN}": normalize(features_ND).sum(0, dtype=np.float64), name: counts_C}
    noised = {}
    for part, factor in parts.items():
        deviation = plan.noise_multiplier / factor * math.sqrt(num_sites)
        values = sums[part] + deviation * rng.standard_normal(len(sums[part]))
        noised[part] = NoisedSum(values, deviation, float(len(labels_N)))
    heads = {key: parameters(each) for key, each in create_heads({name: task}, {name: features_ND.shape[1]}, 0).items()}
    head = fix_heads(heads, run, {name: task}, noised)[name]
    return head, normalize(normalize(features_ND) - head[CENTRE])


def normalize(rows_ND: Array) -> Array:
    """Returns the rows divided by their lengths."""
    return (rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def score(head: Params, features_ND: Array, labels_N: NDArray[np.int64]) -> float:
    """Returns the accuracy of a head, in points.

    Args:
        head: what `train` returned.
        features_ND: float32 [N, D].
        labels_N: int64 [N].
    """
    rows_ND = normalize(normalize(features_ND) - head[CENTRE])
    return 100.0 * float(((rows_ND @ head["layers.weight"].T).argmax(1) == labels_N).mean())


def list_settings(name: str, epsilon: float | None, num_units: int, num_sites: int) -> Iterator[tuple[str, RunConfig]]:
    """Yields the name of each setting and its run, the one without any first.

    Args:
        name: name of the data set.
        epsilon: requested epsilon; None for none.
        num_units: declared number of units of all sites.
        num_sites: number of sites.
    """
    plain = load_config(name, epsilon, {}).run
    (task,) = plain.tasks
    yield "none", plain
    for label, adjustment in ADJUSTMENTS.items():
        run = load_config(name, epsilon, {"run.aggregation": adjustment}).run
        yield label, run
        if epsilon is not None:
            yield f"{label} =", keep_noise(run, task, num_units, num_sites)
    for smoothing in SMOOTHINGS:
        yield f"smoothing {smoothing:g}", load_config(name, epsilon, {f"run.tasks.{task}.smoothing": smoothing}).run


def keep_noise(run: RunConfig, task: str, num_units: int, num_sites: int) -> RunConfig:
    """Returns a run with so large a rho that its noise on a logit is what it would be without its adjustment.

    Args:
        run: the run.
        task: name of its task.
        num_units: declared number of units of all sites.
        num_sites: number of sites.
    """
    momentum, adjustment = read_momentum(run, task), run.aggregation.select_adjustment(task)
    assert momentum is not None
    target = momentum.compute_logit_noise(num_units, num_sites, Adjustment())
    low, high = momentum.rho, 100.0 * momentum.rho
    for _ in range(40):
        middle = math.sqrt(low * high)
        noise = momentum.model_copy(update={"rho": middle}).compute_logit_noise(num_units, num_sites, adjustment)
        low, high = (middle, high) if noise < target else (low, middle)
    own = {**run.aggregation.tasks[task], "rho": low}
    return run.model_copy(update={"aggregation": run.aggregation.model_copy(update={"tasks": {task: own}})})


def measure(
    name: str, records: Records, epsilon: float | None, seeds: int, *, only: str = "", on_test: bool = False
) -> None:
    """Prints each setting's difference to none at one epsilon.

    Args:
        name: name of the data set.
        records: its records.
        epsilon: requested epsilon; None for none.
        seeds: number of seeds.
        only: text in the names of the settings that are tried.
        on_test: whether test records are scored.
    """
    num_sites = load_config(name, epsilon, {}).partition.num_sites  # type: ignore[union-attr]
    own = np.flatnonzero(~records.is_test_N)
    cut = len(own) if on_test else 4 * len(own) // 5
    found: dict[str, list[float]] = {}
    for label, run in list_settings(name, epsilon, cut, num_sites):
        if label != "none" and only not in label:
            continue
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(own)
            held_out = np.flatnonzero(records.is_test_N) if on_test else order[cut:]
            fitted, rng = order[:cut], np.random.default_rng(1000 + seed)
            head = train(run, records.features_ND[fitted], records.labels_N[fitted], num_sites, rng)
            found.setdefault(label, []).append(score(head, records.features_ND[held_out], records.labels_N[held_out]))
    base = np.array(found["none"])
    print(f"{name} epsilon {epsilon}: {base.mean():.2f} ({compute_error(base):.2f})", flush=True)
    for label, values in found.items():
        gains = np.array(values) - base
        print(f"  {label:16s} {gains.mean():+.2f} ({compute_error(gains):.2f})", flush=True)


def compute_error(values: NDArray[np.float64]) -> float:
    """Returns the standard error of a mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    parser.add_argument("--test", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.sets:
        records = encode(name, given.cache)
        for epsilon in EPSILONS:
            measure(name, records, epsilon, given.splits, only=given.only, on_test=given.test)


if __name__ == "__main__":
    main()
