"""A small simulation in a file: two tables of vectors, three sites, one task; a second of work."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml


@pytest.fixture
def simulation_file(tmp_path: Path) -> Path:
    """A valid simulation file with its data beside it; tests change it through `--set`."""
    rng = np.random.default_rng(0)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["x", "y", "colour"])
        for _ in range(180):
            colour = int(rng.integers(0, 2))
            x, y = rng.normal(size=2) + (2 * colour - 1)
            writer.writerow([f"{x:.4f}", f"{y:.4f}", ["red", "blue"][colour]])
    values: dict[str, Any] = {
        "run": {
            "name": "small",
            "seed": 1,
            "rounds": 3,
            "backbone": {
                "kind": "identity",
                "columns": [{"name": name, "range": [-5, 5], "missing": "refuse"} for name in ("x", "y")],
            },
            "tasks": {"colour": {"kind": "classification", "labels": ["red", "blue"]}},
            "solver": {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 4.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
            "aggregation": {"kind": "mean"},
            "cohort": {"join_timeout_s": 1},
        },
        "sources": {"rows": {"kind": "table", "path": "rows.csv", "columns": ["x", "y"]}},
        "tasks": {"colour": {"source": "rows", "label": "colour", "missing": "refuse", "public_size": 48}},
        "partition": {"kind": "iid", "num_sites": 3},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
        "device": "cpu",
    }
    path = tmp_path / "simulation.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
