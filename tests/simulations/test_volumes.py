"""Volumes are labelled slice by slice; a volume is one unit, whether its slices are NIfTI files or rows of arrays."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from client.data.prepare import open_units
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment
from tests.finished import write_maps

VOLUMES, DEPTHS = 10, (2, 3, 4)


def write_volumes(folder: Path) -> None:
    """Dark noise with a bright block that goes through some slices of each volume, as files and as arrays."""
    rng = np.random.default_rng(0)
    rows, pictures, masks, ids = [], [], [], []
    for number in range(VOLUMES):
        shape = (16, 16, DEPTHS[number % len(DEPTHS)])
        volume, labels = rng.integers(0, 90, shape).astype(np.float32), np.zeros(shape, np.uint8)
        at = rng.integers(0, 8, 2)
        labels[at[0] : at[0] + 8, at[1] : at[1] + 8, : shape[2] - number % 2] = 1
        volume[labels > 0] += 150
        for end, values in (("", volume), ("-organ", labels)):
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / f"v{number}{end}.nii")
        rows.append((f"v{number}.nii", f"v{number}-organ.nii", f"p{number}"))
        pictures += [volume[:, :, at].T[::-1] for at in range(shape[2])]
        masks += [labels[:, :, at].T[::-1] for at in range(shape[2])]
        ids += [f"p{number}"] * shape[2]
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "organ", "patient"), *rows])
    np.savez(folder / "slices.npz", x=np.stack(pictures).astype(np.uint8), organ=np.stack(masks), patient=np.array(ids))


ARRAYS = {"inputs": "x", "labels": {"organ": "organ"}, "patient": "patient"}
SOURCES: dict[str, dict[str, Any]] = {
    "nifti_slices": {"path": "list.csv", "masks": ["organ"], "patient": "patient", "window": [0, 255]},
    "npz": {
        "path": "slices.npz",
        "parts": {"all": ARRAYS},
    },
}


def simulate(folder: Path, kind: str) -> tuple[dict[str, Any], Path]:
    values: dict[str, Any] = {
        "run": {
            "name": "organs",
            "seed": 1,
            "backbone": {
                **write_maps(folder, num_classes=1000, grid=8, colours=True),
                "projection": {"normalize": True},
            },
            "tasks": {"organ": {"kind": "segmentation", "labels": ["ground", "organ"], "side": 16}},
            "solver": {"kind": "auto"},
            "rounds": 12,
            "privacy": {"unit": "patient", "delta": 1e-5, "target_epsilon": 9_000.0},
        },
        "sources": {"volumes": {"kind": kind, **SOURCES[kind]}},
        "tasks": {"organ": {"source": "volumes", "label": "organ", "missing": "refuse", "public_size": 4}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.3, "seed": 1},
        "unit": "patient",
        "budget": {"epsilon": 10_000.0, "delta": 1e-5},
        "noise_seed": 1,
        "cache_dir": "cache",
        "runs_dir": f"runs-{kind}",
    }
    summary = run_experiment(parse(SimulationConfig, values, base=folder))
    found: dict[str, Any] = json.loads(summary.to_json())
    return found["tasks"]["organ"]["metrics"], folder / f"runs-{kind}"


@pytest.mark.slow
def test_a_volumes_slices_are_one_unit_and_their_source_does_not_matter(tmp_path: Path) -> None:
    write_volumes(tmp_path)
    of_files, runs = simulate(tmp_path, "nifti_slices")
    of_arrays, _ = simulate(tmp_path, "npz")
    assert of_files["dice"] > 0.8
    assert of_files == pytest.approx(of_arrays, abs=1e-6)
    sides = [
        open_units(path.parent, side, ["organ"], torch.device("cpu"))
        for path in runs.rglob("arrays.safetensors")
        for side in ("train", "test")
    ]
    assert sum(units.num_units for units in sides) == VOLUMES
    for units in sides:
        # The loss of a volume is the mean over its slices.
        records = units.tasks["organ"]
        weight_U = torch.zeros(units.num_units).index_add_(0, records.unit_R, records.weight_R)
        torch.testing.assert_close(weight_U, torch.ones(units.num_units))
