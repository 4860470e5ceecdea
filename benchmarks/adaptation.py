"""Accuracy at sites that a run has not seen, before and after their records are aligned at home.

    python -m benchmarks.adaptation CACHE [--epsilons 1 3 8] [--draws 3] [--families fed-heart fsdd cifar10 brain-mri]

The source is a real run with `solver: {kind: auto}` and class moments, noise at each site; where the records of a site
are the world, that site is left out of it. In each world (`benchmarks.worlds`) the rows are the head as it is served,
`none` with the world's exact shares, `mean_std` with those of the run, `mean_std` and `coral_em` with the world's, what
the guard takes with 50 labels, and a head without privacy on the world's own labels, cross-validated. With `--source
moments` nine tenths of the privacy are for the moments, and their linear discriminant is the head.

Features and runs are kept in the folder CACHE. Records whose labels the guard has seen are in no row of that draw.

# Shapes: R records, C classes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import nn

from benchmarks.worlds import (
    PICTURES,
    SLICES,
    World,
    make_fed_heart_worlds,
    make_fsdd_worlds,
    make_picture_worlds,
    shift_labels,
)
from client.aligners import SourceMoments, TargetRecords, open_aligners
from client.aligners.parts.head import AlignedHead, keep_head, place_head
from client.data.units import TaskRecords
from client.personal.align import align_head, make_discriminant_head, read_source
from common.model.parameters import load_parameters
from common.serving.folder import read_config, read_heads, read_moments
from common.tasks import open_task
from common.yaml import as_override
from simulations.experiment import run

FOLDER = Path("configs/simulations")
LABELLED = 50
LABEL_DRAWS = 5
ONE_TASK = (
    "run.tasks={tumour_type: {kind: classification, "
    "labels: [glioma_tumor, meningioma_tumor, no_tumor, pituitary_tumor]}}",
    "tasks={tumour_type: {source: slices, label: label, missing: refuse, public_size: 80}}",
)
MOMENTS_ALONE = (
    "run.rounds=1",
    "run.solver={kind: head_sum, clip_norm: 0.5}",
    "run.aggregation={kind: mean}",
)
ALIGNERS = open_aligners([{"kind": "mean_std"}, {"kind": "coral_em"}], "aligners")
ROWS = {**ALIGNERS, **open_aligners([{"kind": "none"}], "aligners")}


@dataclass(frozen=True)
class Family:
    """A simulation file and the worlds for its runs.

    Attributes:
        file: the simulation file.
        task: the task whose head is adapted.
        worlds: its worlds.
        overrides: settings that replace those of the file.
    """

    file: Path
    task: str
    worlds: Sequence[World]
    overrides: Sequence[str] = ()


def make_families(names: Sequence[str], cache: Path) -> dict[str, Family]:
    """Returns families by name, whose features are computed where the cache has none."""
    families = {}
    if "fed-heart" in names:
        file = FOLDER / "fed_heart.yaml"
        families["fed-heart"] = Family(file, "disease", make_fed_heart_worlds(file))
    if "fsdd" in names:
        file = FOLDER / "fsdd_by_speaker.yaml"
        families["fsdd"] = Family(file, "digit", make_fsdd_worlds(file, cache))
    if "cifar10" in names:
        file = FOLDER / "cifar10.yaml"
        worlds = make_picture_worlds(file, cache, "object", PICTURES)
        rng = np.random.default_rng(0)
        shifted = [shift_labels(each, 0.5, rng) for each in worlds]
        families["cifar10"] = Family(file, "object", [*map(halve, worlds), *shifted])
    if "brain-mri" in names:
        file = FOLDER / "brain_mri.yaml"
        # Eighty test slices are too few: labels that were drawn leave the opposite mix among the others.
        worlds = make_picture_worlds(file, cache, "tumour_type", SLICES, ONE_TASK, left_out="site-4")
        families["brain-mri"] = Family(file, "tumour_type", worlds, ONE_TASK)
    return families


def halve(world: World) -> World:
    """Returns a world with every second of its records."""
    return replace(world, features_RD=world.features_RD[::2], labels_R=world.labels_R[::2])


def open_source(
    family: Family, left_out: str | None, epsilon: float, draw: int, given: argparse.Namespace
) -> tuple[nn.Module, SourceMoments]:
    """Returns the head of a finished run and the moments that it released; it is run where the cache has none.

    Args:
        family: the simulation.
        left_out: site that does not train; None where all do.
        epsilon: privacy of the run.
        draw: seed of the run's noise.
        given: the command's options.
    """
    moments = {"classes": given.classes, "scatter": given.scatter}
    overrides = [*family.overrides, f"run.privacy.target_epsilon={epsilon}", f"noise_seed={draw}", "baselines=[]"]
    if given.source == "moments":
        moments = {"means": 0.05, "counts": 0.05, "classes": 0.6, "scatter": 0.25}
        head = {"bias": False, "centre": True, "prior": True}
        overrides += [*MOMENTS_ALONE, as_override(f"run.tasks.{family.task}.head", head)]
    overrides += [as_override("run.moments", moments), "run.evaluation=null", f"leave_out={left_out or 'null'}"]
    key = zlib.crc32(json.dumps([str(family.file), *overrides]).encode())
    folder = given.cache / "runs" / f"{family.file.stem}-{key:08x}"
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as scratch:
            run(family.file, out=Path(scratch) / "run", overrides=overrides)
            folder.parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / "run" / "model").rename(folder)
    config = read_config(folder)
    released = read_moments(folder, config, family.task)
    source = read_source(released, family.task, released.sums_CD.shape[1])
    if given.source == "moments":
        return make_discriminant_head(source), source
    module = open_task(config.tasks[family.task].settings, "task").head(source.means_CD.shape[1])
    load_parameters(module, read_heads(folder, config)[family.task])
    return module, source


def measure_world(
    head: nn.Module, source: SourceMoments, world: World, ceiling_R: NDArray[np.int64], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Returns for each draw of labels the accuracies of all rows, in points.

    Args:
        head: the run's head.
        source: the moments that the run released.
        world: the world.
        ceiling_R: what a head on the world's own labels says.
        rng: source of the draws.
    """
    num, num_classes = len(world.labels_R), len(source.shares_C)
    records = TaskRecords.of(
        torch.from_numpy(world.features_RD),
        torch.from_numpy(world.labels_R),
        torch.zeros(num, dtype=torch.bool),
        torch.arange(num),
        num,
    )
    target = TargetRecords(normalize(world), np.ones(num))
    counts_C = np.bincount(world.labels_R, minlength=num_classes) + 1e-3
    mix_C = counts_C / counts_C.sum()
    found = {"source": _classify(keep_head(head, source), records)}
    for name, kind, own_C in (
        ("none", "none", mix_C),
        ("mean_std, source mix", "mean_std", source.shares_C),
        ("mean_std", "mean_std", mix_C),
        ("coral_em", "coral_em", mix_C),
    ):
        placed = place_head(head, source, ROWS[kind].align(source, target, own_C), own_C)
        found[name] = _classify(placed, records)
    found["ceiling"] = ceiling_R
    results = []
    for _ in range(LABEL_DRAWS):
        seen_R = np.zeros(num, bool)
        seen_R[rng.choice(num, min(LABELLED, num // 2), replace=False)] = True
        labelled = TaskRecords(
            records.features_RD, records.labels, torch.from_numpy(seen_R), records.unit_R, records.weight_R
        )
        row: dict[str, Any] = {}
        if len(set(world.labels_R[seen_R])) > 1:
            adapted = align_head(head, source, labelled, ALIGNERS)
            found["guarded"] = _classify(adapted.head, records)
            found["guarded, uniform"] = _classify(adapted.head, records, uniform=True)
            row["aligner"] = adapted.aligner
        else:  # A site with labels of one class only is told so, and keeps the head.
            found["guarded"] = found["guarded, uniform"] = found["source"]
            row["aligner"] = "none"
        results.append(
            {**row, "accuracy": {name: _score(each, world.labels_R, ~seen_R) for name, each in found.items()}}
        )
    return results


def _classify(head: AlignedHead, records: TaskRecords, *, uniform: bool = False) -> NDArray[np.int64]:
    with torch.no_grad():
        outputs = head.compute_uniform(records.features_RD) if uniform else head(records.features_RD)
        return outputs.argmax(dim=1).numpy()


def cross_validate(world: World) -> NDArray[np.int64]:
    """Returns each record's class by a head without privacy on the other folds, at the better of two strengths."""
    labels_R = world.labels_R
    counts_C = np.bincount(labels_R)
    rare_R = counts_C[labels_R] < 2  # Of a class with one record no fold has another.
    found_R = np.full(len(labels_R), -1)
    folds = max(2, min(5, int(counts_C[counts_C > 1].min())))
    tried = [
        cross_val_predict(
            LogisticRegression(C=strength, max_iter=500), normalize(world)[~rare_R], labels_R[~rare_R], cv=folds
        )
        for strength in (1.0, 10.0)
    ]
    found_R[~rare_R] = max(tried, key=lambda each: float((each == labels_R[~rare_R]).mean()))
    return found_R


def normalize(world: World) -> NDArray[np.float64]:
    """Returns features_RD of length 1."""
    lengths_R1 = np.linalg.norm(world.features_RD, axis=1, keepdims=True)
    rows_RD: NDArray[np.float64] = (world.features_RD / np.maximum(lengths_R1, 1e-12)).astype(np.float64)
    return rows_RD


def _score(found_R: NDArray[np.int64], labels_R: NDArray[np.int64], taken_R: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns plain and balanced accuracy of some records, in points."""
    hits_R, own_R = (found_R == labels_R)[taken_R], labels_R[taken_R]
    return 100.0 * hits_R.mean(), 100.0 * np.mean([hits_R[own_R == label].mean() for label in np.unique(own_R)])


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints one line for each family of worlds, and the gains of the guard."""
    names = list(rows[0]["accuracy"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["family"], []).append(row)
    for epsilon in sorted({row["epsilon"] for row in rows}):
        for family, all_own in groups.items():
            own = [row for row in all_own if row["epsilon"] == epsilon]
            values = {name: np.mean([row["accuracy"][name] for row in own], axis=0) for name in names}
            said = ", ".join(f"{name} {plain:.1f} / {balanced:.1f}" for name, (plain, balanced) in values.items())
            print(f"epsilon {epsilon:g}, {family}: {said}", flush=True)
    for name in names:
        if name in ("source", "ceiling"):
            continue
        for which, balanced in (("accuracy", 0), ("balanced", 1)):
            gains = np.array([row["accuracy"][name][balanced] - row["accuracy"]["source"][balanced] for row in rows])
            cases: dict[tuple[Any, ...], list[float]] = {}
            for row, gain in zip(rows, gains, strict=True):
                cases.setdefault((row["family"], row["world"], row["epsilon"], row["draw"]), []).append(gain)
            means = np.array([np.mean(each) for each in cases.values()])
            print(
                f"{name}, {which}: gain {gains.mean():+.1f}; over {len(means)} cases worst {means.min():+.1f}, "
                f"harmed by over 2 points {100 * (means < -2).mean():.1f} %; over {len(gains)} draws worst "
                f"{gains.min():+.1f}, harmed {100 * (gains < -2).mean():.1f} %",
                flush=True,
            )


def main() -> None:
    """Prints the tables; `results.json` in the cache has every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder of features and finished runs")
    parser.add_argument("--families", nargs="+", default=["fed-heart", "fsdd", "cifar10", "brain-mri"])
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0, 8.0])
    parser.add_argument("--draws", type=int, default=3, help="runs of each kind, each with noise of its own")
    parser.add_argument("--source", choices=["run", "moments"], default="run")
    parser.add_argument("--classes", type=float, default=0.1, help="part of the run's mu^2 for the classes' features")
    parser.add_argument("--scatter", type=float, default=0.1, help="part of it for products of features")
    given = parser.parse_args()
    rows = []
    for name, family in make_families(given.families, given.cache / "features").items():
        ceilings = [cross_validate(world) for world in family.worlds]
        for epsilon in given.epsilons:
            for draw in range(given.draws):
                opened: dict[str | None, tuple[nn.Module, SourceMoments]] = {}
                for number, world in enumerate(family.worlds):
                    if world.left_out not in opened:
                        opened[world.left_out] = open_source(family, world.left_out, epsilon, draw, given)
                    rng = np.random.default_rng([draw, number, round(10 * epsilon)])
                    for each in measure_world(*opened[world.left_out], world, ceilings[number], rng):
                        about = {"family": world.family, "world": world.name, "epsilon": epsilon, "draw": draw}
                        rows.append({**about, **each})
                # After every draw: what was cut off keeps its rows.
                (given.cache / f"results-{given.source}.json").write_text(json.dumps(rows))
        report([row for row in rows if row["family"].startswith(name)])
    print("all")
    report(rows)


if __name__ == "__main__":
    main()
