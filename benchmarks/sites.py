"""Rounds of many sites in one process: what one site costs in a round, and Flower's own engine with clients that do nothing.

    python -m benchmarks.sites

Sites are real: a file, a ledger, an offer, prepared arrays, forty vectors and a private solver. The reference is
Flower's simulation on Ray with a client that answers with the arrays it got.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.config import SimulationConfig, load

ROUNDS, RECORDS, DIM = 3, 40, 64


def simulation(folder: Path, num_sites: int, rounds: int = ROUNDS) -> SimulationConfig:
    """A simulation of vectors that come as features."""
    rng = np.random.default_rng(0)
    count = num_sites * RECORDS * 5 // 4
    np.savez(
        folder / "rows.npz",
        x=rng.normal(size=(count, DIM)).astype(np.float32),
        y=np.where(rng.integers(0, 2, count), "a", "b"),
    )
    parts = {"all": {"inputs": "x", "columns": {"y": "y"}}}
    values: dict[str, Any] = {
        "run": {
            "name": "many",
            "seed": 1,
            "rounds": rounds,
            "backbone": {"kind": "identity", "dim": DIM},
            "tasks": {"task": {"kind": "classification", "labels": ["a", "b"]}},
            "solver": {"kind": "dp_gd", "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
            "aggregation": {"kind": "mean"},
        },
        "sources": {"rows": {"kind": "npz", "path": str(folder / "rows.npz"), "parts": parts}},
        "tasks": {"task": {"source": "rows", "column": "y", "missing": "refuse", "public_size": RECORDS}},
        "partition": {"kind": "iid", "num_sites": num_sites, "split": "hash", "test_fraction": 0.2},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
    }
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(values))
    return load(SimulationConfig, path)
