"""A federation learns from labels of bags what a head of averages cannot, and its model reads bags anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.sources import open_source
from common.serving.network import open_model
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment

DIM, BAGS = 4, 240


def write_bags(path: Path) -> None:
    """Bags of 2 to 6 vectors, of which one in half of the bags is another; as much is added to the rest's opposite."""
    rng = np.random.default_rng(0)
    rows, names, labels = [], [], []
    for bag in range(BAGS):
        count, has_one = int(rng.integers(2, 7)), bool(rng.integers(0, 2))
        items = 0.1 * rng.normal(size=(count, DIM))
        items[:, 2] += 1.0
        if has_one:
            # The mean of the bag's first column stays near zero.
            items[:, 0] -= 1.0 / (count - 1)
            items[int(rng.integers(0, count)), 0] = 1.0
        rows.append(items)
        names += [f"bag {bag}"] * count
        labels += ["yes" if has_one else "no"] * count
    np.savez(path, x=np.concatenate(rows).astype(np.float32), bag=np.array(names), label=np.array(labels))


def simulate(folder: Path, head: dict[str, Any]) -> dict[str, Any]:
    values = {
        "run": {
            "name": "bags",
            "seed": 1,
            "backbone": {"kind": "bag", "max_items": 6, "encoder": {"kind": "identity", "dim": DIM}},
            "tasks": {"found": {"kind": "classification", "labels": ["no", "yes"], "head": head}},
            "solver": {"kind": "auto"},
            "rounds": 20,
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
        },
        "sources": {
            "bags": {
                "kind": "bags",
                "column": "bag",
                "of": {
                    "kind": "npz",
                    "path": "bags.npz",
                    "parts": {"all": {"inputs": "x", "labels": {"bag": "bag", "label": "label"}}},
                },
            }
        },
        "tasks": {"found": {"source": "bags", "label": "label", "missing": "refuse", "public_size": 90}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.25, "seed": 1},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "noise_seed": 1,
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    config = parse(SimulationConfig, values, base=folder)
    summary: dict[str, Any] = json.loads(run_experiment(config).to_json())
    return summary


@pytest.mark.slow
def test_a_pooled_head_learns_from_labels_of_bags_under_privacy(tmp_path: Path) -> None:
    write_bags(tmp_path / "bags.npz")
    found = simulate(tmp_path, {"pooling": "max"})["tasks"]["found"]["metrics"]
    assert found["auroc"] > 0.9
    (model_folder,) = (tmp_path / "runs").glob("*/model")
    model = open_model(model_folder)
    source = open_source(
        {
            "kind": "bags",
            "column": "bag",
            "of": {
                "kind": "npz",
                "path": str(tmp_path / "bags.npz"),
                "parts": {"all": {"inputs": "x", "labels": {"bag": "bag", "label": "label"}}},
            },
        },
        "bags",
    ).open()
    index = source.index()
    served = model([source.load(at) for at in range(len(index))])["found"]
    said = ["yes" if row[1] > row[0] else "no" for row in served.tolist()]
    assert np.mean([each == record.cells["label"] for each, record in zip(said, index, strict=True)]) > 0.8
