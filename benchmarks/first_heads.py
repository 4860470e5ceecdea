"""First heads for new sites and new classes beside the ways that others take, with the same records.

    python -m benchmarks.first_heads heart digits names texts --seeds 1 2 3 --cache .cache/first-heads

`heart`: each hospital of Fed-Heart in turn is new, the others train at epsilon 3. `digits`: each speaker of FSDD is
new, and is heard through a low-pass of 1 kHz; the others train on clean recordings at epsilon 1. `names`: five classes
of CIFAR-10 are new, the other five train at epsilon 3 and release the mean of their features. `texts`: SST-2 from
sentences that say what its labels mean.

Each case has k labelled records of each label, drawn at random; all other records of the new site judge (of FSDD and
CIFAR-10 the test sets). Settings are those of the product. Compared are class means of the records; MR-MTL, one fixed
tie to the federated head for all cases; and federated Reptile: a prior whose sites take eight private local steps in
each of six rounds, under the same budget, and steps of the same length on the records.

# Shapes: N records, R labelled records, C labels, D features.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from client.data.feature_store import FeatureStore
from client.data.sources import Source, SourceRecord, open_source
from client.data.units import TaskRecords
from client.personal.adapt import fit_head
from client.start.names import NamesFile, make_rows
from client.start.tied import FEW_STRENGTH, USUAL_STRENGTH, fit_to_shots
from common.inputs import Audio
from common.model.backbones import open_pretrained
from common.plugins import Spec
from common.serving.network import open_model
from common.tasks import Task, open_task
from common.tasks.parts.adjusted import AdjustedHead
from common.yaml import load, parse
from simulations.config import SimulationConfig
from simulations.experiment import run

CONFIGS = Path("configs")
COUNTS = (1, 5, 20)
MR_MTL = (0.1, 0.01)
"""One tie for all cases, as a weight beside the mean loss of features of length 1."""
REPTILE_STEPS = (10, 100)
CPU = torch.device("cpu")
Rows = dict[tuple[str, int], list[float]]


@dataclass(frozen=True)
class Arrays:
    """Encoded records.

    Attributes:
        features_ND: features of length 1.
        labels_N: labels.
        sites_N: names of their sites.
        held_out_N: true where the data set itself holds a record out.
    """

    features_ND: np.ndarray
    labels_N: np.ndarray
    sites_N: np.ndarray
    held_out_N: np.ndarray

    def select(self, chosen_N: np.ndarray) -> Arrays:
        """Returns some of the records."""
        return Arrays(
            self.features_ND[chosen_N], self.labels_N[chosen_N], self.sites_N[chosen_N], self.held_out_N[chosen_N]
        )


@dataclass(frozen=True)
class LowPass:
    """Recordings without what lies above a frequency."""

    whole: Source
    cut_hz: float

    def digest(self) -> str:
        """Returns another digest than that of the whole recordings."""
        return hashlib.sha256(f"{self.whole.digest()} {self.cut_hz}".encode()).hexdigest()

    def index(self) -> list[SourceRecord]:
        """Returns the recordings' entries."""
        return self.whole.index()

    def load(self, position: int) -> Audio:
        """Returns a recording after a Butterworth filter of order 4, forward and backward."""
        from scipy.signal import butter, sosfiltfilt

        audio: Audio = self.whole.load(position)
        sections = butter(4, self.cut_hz, fs=audio.sample_rate, output="sos")
        return Audio(sosfiltfilt(sections, audio.samples_T).astype(np.float32), audio.sample_rate)


def encode(source: Source, spec: Spec, cache: Path, label: str, site: str | None) -> Arrays:
    """Returns a source's records, encoded; kept in the cache.

    Args:
        source: the records.
        spec: settings of the backbone.
        cache: folder of what was encoded before.
        label: column of the labels.
        site: column of the sites; None where all are of one.
    """
    features = FeatureStore(cache).open_or_encode(source, open_pretrained(spec, "backbone"), device=CPU)
    cells = [record.cells for record in source.index()]
    return Arrays(
        features.features_ND,
        np.array([each[label] for each in cells]),
        np.array(["all" if site is None else each[site] for each in cells]),
        np.array([record.split == "test" for record in source.index()]),
    ).select(features.valid_N)


def train_prior(known: Arrays, labels: list[str], epsilon: float, seed: int, size: int, *, reptile: bool) -> nn.Module:
    """Returns the head of a run over the sites of some records.

    Args:
        known: training records.
        labels: the labels.
        epsilon: epsilon of each site.
        seed: seed of the run; its noise is new each time.
        size: declared size of each site.
        reptile: whether sites take eight steps a round, in six rounds.
    """
    task: dict[str, Any] = {"kind": "classification", "labels": labels}
    training: dict[str, Any] = {"solver": {"kind": "auto"}}
    if reptile:
        task["head"] = {"bias": False, "centre": True, "prior": True}
        steps = {"sampling_rate": 1.0, "steps": 8, "clip_norm": 0.6, "learning_rate": 1.0}
        training = {
            "solver": {"kind": "dp_gd", **steps},
            "rounds": 6,
            "aggregation": {"kind": "mean"},
            "moments": {"means": 0.05, "counts": 0.05},
        }
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        np.savez(arrays, x=known.features_ND, y=known.labels_N, s=known.sites_N)
        parts = {
            "train": {"inputs": "x", "labels": {"y": "y", "s": "s"}},
            "test": {"inputs": "x", "labels": {"y": "y", "s": "s"}},
        }
        values = {
            "run": {
                "name": "prior",
                "seed": seed,
                "backbone": {"kind": "identity", "dim": known.features_ND.shape[1], "projection": {"normalize": True}},
                "tasks": {"task": task},
                "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": epsilon},
                **training,
            },
            "sources": {"records": {"kind": "npz", "path": str(arrays), "parts": parts}},
            "tasks": {"task": {"source": "records", "label": "y", "missing": "refuse", "public_size": size}},
            "partition": {"kind": "column", "by": "s", "split": "source"},
            "unit": "example",
            "budget": {"epsilon": 10.0, "delta": 1e-5},
            "baselines": [],
            "cache_dir": str(Path(folder) / "cache"),
            "runs_dir": str(Path(folder) / "runs"),
        }
        run(parse(SimulationConfig, values, base=Path(folder)), out=Path(folder) / "run")
        return open_model(Path(folder) / "run").heads["task"].head


def compare(rows: Rows, task: Task, heads: dict[str, nn.Module], own: Arrays, seed: int, prefer_held_out: bool) -> None:
    """Adds the accuracy at a new site of each way to make a head from k records of each label.

    Args:
        rows: (way, k) -> accuracies so far.
        task: the task.
        heads: `prior`, and `reptile` where there is one; a prior without is one of names.
        own: the new site's records.
        seed: seed of the draws.
        prefer_held_out: judges by the data set's own test records.
    """
    labels = list(getattr(task, "labels", ()))
    features_ND = torch.from_numpy(own.features_ND)
    labels_N = torch.tensor([labels.index(each) for each in own.labels_N])
    for count in COUNTS:
        rng = np.random.default_rng(1000 * seed + count)
        chosen = _draw(labels_N.numpy(), count, rng, ~own.held_out_N)
        if chosen is None:
            continue
        judged_N = own.held_out_N.copy() if prefer_held_out else np.ones(len(labels_N), dtype=bool)
        judged_N[chosen] = False
        records = _make_records(features_ND[chosen], labels_N[chosen])
        few = FEW_STRENGTH if "reptile" in heads else USUAL_STRENGTH
        fitted = fit_to_shots("task", heads["prior"], task, records, few_strength=few)
        made = {"federated head": heads["prior"], "start-from": fitted.head}
        for tie in MR_MTL:
            made[f"MR-MTL, tie {tie:g}"] = fit_head(_open(heads["prior"]), task, records, tie, tolerance=1e-5)
        made["class means"] = _make_class_means(heads["prior"], task, records)
        if "reptile" in heads:
            for steps in REPTILE_STEPS:
                made[f"Reptile, {steps} steps"] = _take_steps(_open(heads["reptile"]), task, records, steps)
        for way, head in made.items():
            with torch.no_grad():
                outputs = head(features_ND[judged_N])
            truth = labels_N[judged_N]
            rows[way, count].append(float((outputs.argmax(1) == truth).double().mean()))
            if way in ("federated head", "start-from") and not prefer_held_out:
                shares = torch.bincount(labels_N, minlength=len(labels)) / len(labels_N)
                mixed = outputs + shares.log()
                rows[f"{way}, declared shares", count].append(float((mixed.argmax(1) == truth).double().mean()))


def _draw(labels_N: np.ndarray, count: int, rng: np.random.Generator, allowed_N: np.ndarray) -> np.ndarray | None:
    """Returns k records of each label at random, or half of a label's records where it has fewer than twice k."""
    drawn = []
    for label in np.unique(labels_N):
        own = np.flatnonzero((labels_N == label) & allowed_N)
        drawn.append(rng.choice(own, min(count, max(1, len(own) // 2)), replace=False))
    return np.concatenate(drawn)


def _make_records(features_RD: Tensor, labels_R: Tensor) -> TaskRecords:
    number = len(labels_R)
    return TaskRecords.of(features_RD, labels_R, torch.ones(number, dtype=torch.bool), torch.arange(number), number)


def _open(head: nn.Module) -> nn.Module:
    return copy.deepcopy(head).requires_grad_(True)


def _make_class_means(prior: nn.Module, task: Task, records: TaskRecords) -> nn.Module:
    head = _open(prior)
    read_RD = head.adjust(records.features_RD) if isinstance(head, AdjustedHead) else records.features_RD
    weight_CD = next(head.parameters())
    with torch.no_grad():
        for label in range(len(weight_CD)):
            weight_CD[label] = nn.functional.normalize(read_RD[records.labels == label].mean(0), dim=0)
    return head


def _take_steps(head: nn.Module, task: Task, records: TaskRecords, steps: int) -> nn.Module:
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(head(records.features_RD), records.labels).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return head


def measure_heart(cache: Path, seeds: list[int]) -> Rows:
    """Returns the accuracies at each hospital as a new one."""
    config = load(SimulationConfig, CONFIGS / "simulations" / "fed_heart.yaml")
    parts = []
    partition = config.partition.model_dump()["sites"]
    for name, spec in partition.items():
        source = open_source(spec["rows"] | {"kind": spec["rows"]["kind"]}, "rows").open()
        part = encode(source, config.run.backbone_specs["backbone"], cache, "diagnosis", None)
        labels_N = np.where(part.labels_N == "0", "absent", "disease")
        parts.append(Arrays(part.features_ND, labels_N, np.full(len(labels_N), name), part.held_out_N))
    return _leave_one_out(_join(parts), None, ["absent", "disease"], 3.0, seeds, 130)


def measure_digits(cache: Path, seeds: list[int]) -> Rows:
    """Returns the accuracies for each speaker as a new one, through a low-pass."""
    config = load(SimulationConfig, CONFIGS / "simulations" / "fsdd_by_speaker.yaml")
    source = open_source(config.sources["recordings"], "recordings").open()
    backbone = config.run.backbone_specs["backbone"]
    clean, low = (encode(each, backbone, cache, "digit", "speaker") for each in (source, LowPass(source, 1000.0)))
    return _leave_one_out(clean, low, [str(digit) for digit in range(10)], 1.0, seeds, 450)


def _join(parts: list[Arrays]) -> Arrays:
    names = ("features_ND", "labels_N", "sites_N", "held_out_N")
    return Arrays(*(np.concatenate([getattr(each, name) for each in parts]) for name in names))


def _leave_one_out(
    clean: Arrays, changed: Arrays | None, labels: list[str], epsilon: float, seeds: list[int], size: int
) -> Rows:
    rows: Rows = defaultdict(list)
    task = open_task(
        {"kind": "classification", "labels": labels, "head": {"bias": False, "centre": True, "prior": True}}, "t"
    )
    own = clean if changed is None else changed
    for site in np.unique(clean.sites_N):
        known = clean.select((clean.sites_N != site) & ~clean.held_out_N)
        new = own.select(own.sites_N == site)
        for seed in seeds:
            heads = {
                name: train_prior(known, labels, epsilon, seed, size, reptile=name == "reptile")
                for name in ("prior", "reptile")
            }
            compare(rows, task, heads, new, seed, changed is not None)
            print(site, seed, {f"{way} {count}": round(each[-1], 3) for (way, count), each in rows.items()}, flush=True)
    return rows


def measure_names(cache: Path, seeds: list[int]) -> Rows:
    """Returns the accuracies on five new classes of CIFAR-10; a seed chooses them, and deals the others to sites."""
    rows: Rows = defaultdict(list)
    config = load(SimulationConfig, CONFIGS / "simulations" / "cifar10.yaml")
    spec = config.run.backbone_specs["backbone"]
    images = encode(open_source(config.sources["images"], "images").open(), spec, cache, "label", None)
    backbone = open_pretrained(spec, "backbone")
    animals = load(NamesFile, CONFIGS / "start" / "animals.yaml")
    for seed in seeds:
        rng = np.random.default_rng(seed)
        order = rng.permutation(np.unique(images.labels_N))
        new, old = sorted(order[:5].tolist()), sorted(order[5:].tolist())
        known = images.select(np.isin(images.labels_N, old) & ~images.held_out_N)
        sites_N = np.array([f"site{number % 5}" for number in rng.permutation(len(known.labels_N))])
        known = Arrays(known.features_ND, known.labels_N, sites_N, known.held_out_N)
        prior = train_prior(known, old, 3.0, seed, 500, reptile=False)
        assert isinstance(prior, AdjustedHead)
        task = open_task({"kind": "classification", "labels": new, "head": {"bias": False, "centre": True}}, "t")
        head = task.head(backbone.feature_dim)
        assert isinstance(head, AdjustedHead)
        with torch.no_grad():
            head.fixed.centre.copy_(prior.fixed.centre)
            next(head.parameters()).copy_(make_rows(animals.model_copy(update={"labels": new}), backbone))
        compare(rows, task, {"prior": head}, images.select(np.isin(images.labels_N, new)), seed, prefer_held_out=True)
        print(new, {f"{way} {count}": round(each[-1], 3) for (way, count), each in rows.items()}, flush=True)
    return rows


def measure_texts(cache: Path, seeds: list[int]) -> Rows:
    """Returns the accuracies on SST-2 from sentences that say what its labels mean."""
    rows: Rows = defaultdict(list)
    config = load(SimulationConfig, CONFIGS / "simulations" / "sst2.yaml")
    spec = config.run.backbone_specs["backbone"]
    reviews = encode(open_source(config.sources["reviews"], "reviews").open(), spec, cache, "label", None)
    task = open_task({"kind": "classification", "labels": ["0", "1"], "head": {"bias": False}}, "t")
    backbone = open_pretrained(spec, "backbone")
    head = task.head(backbone.feature_dim)
    with torch.no_grad():
        next(head.parameters()).copy_(make_rows(load(NamesFile, CONFIGS / "start" / "sentiment.yaml"), backbone))
    for seed in seeds:
        compare(rows, task, {"prior": head}, reviews, seed, prefer_held_out=True)
    return rows


MEASURES = {"heart": measure_heart, "digits": measure_digits, "names": measure_names, "texts": measure_texts}


def list_lines(rows: Rows) -> Iterator[str]:
    """Yields a line of Markdown for each way: mean and standard error over cases in points, for each k."""
    for way in dict.fromkeys(way for way, _ in rows):
        cells = []
        for count in COUNTS:
            values = 100.0 * np.array(rows[way, count])
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
            cells.append(f"{values.mean():.1f} ({error:.1f})" if len(values) else "")
        yield f"| {way} | {' | '.join(cells)} |"


def main() -> None:
    """Prints one table for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=MEASURES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--cache", type=Path, default=Path(".cache/first-heads"))
    given = parser.parse_args()
    for name in given.sets:
        rows = MEASURES[name](given.cache, given.seeds)
        print(f"\n{name}, k = {', '.join(map(str, COUNTS))}", *list_lines(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
