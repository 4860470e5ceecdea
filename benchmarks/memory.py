"""Largest memory that whole simulations take, each in a process of its own: the demo, brain MRI, a head of 1280 x 1000.

    python -m benchmarks.memory

Brain MRI needs its data and weights (HEADWATER_ASSETS); without them it is left out. Ten thousand sites are part of
`benchmarks.batched`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import stated
from common.yaml import format_yaml

EXAMPLES = Path(__file__).resolve().parents[1] / "configs" / "simulations"
LIMIT_GIB = 3.0
WIDTH, CLASSES, RECORDS = 1280, 1000, 4000


def measure(command: Sequence[str]) -> float:
    """Runs Python with some words; returns its peak of resident memory, GiB. Raises RuntimeError where it fails."""
    process = os.posix_spawn(
        sys.executable,
        [sys.executable, *command],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)],
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"python {command[0]}: exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 2**20


def write_wide(folder: Path) -> Path:
    """Writes a simulation of one site with a wide head on given features, and returns its file."""
    rng = np.random.default_rng(0)
    names = [f"c{number}" for number in range(CLASSES)]
    labels = rng.integers(0, CLASSES, RECORDS)
    np.savez(folder / "rows.npz", x=rng.standard_normal((RECORDS, WIDTH), dtype=np.float32), y=labels)
    values: dict[str, object] = {
        "run": {
            "name": "wide",
            "seed": 1,
            "rounds": 5,
            "backbone": {"kind": "identity", "dim": WIDTH, "projection": {"normalize": True}},
            "tasks": {"class": {"kind": "classification", "labels": names}},
            "solver": {"kind": "auto"},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
        },
        "sources": {
            "rows": {
                "kind": "npz",
                "path": str(folder / "rows.npz"),
                "parts": {"all": {"inputs": "x", "labels": {"class": "y"}}},
            }
        },
        "tasks": {
            "class": {
                "source": "rows",
                "label": "class",
                "values": {str(number): name for number, name in enumerate(names)},
                "missing": "refuse",
                "public_size": 3000,
            }
        },
        "partition": {"kind": "iid", "num_sites": 1, "split": "hash", "test_fraction": 0.2, "seed": 1},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "baselines": [],
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
    }
    (folder / "wide.yaml").write_text(format_yaml(values), encoding="utf-8")
    return folder / "wide.yaml"


def main() -> None:
    """Measure all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "demo": ["-m", "simulations", "run", str(EXAMPLES / "demo.yaml")],
            "brain MRI": ["-m", "simulations", "run", str(EXAMPLES / "brain_mri.yaml")],
            f"a head of {WIDTH} x {CLASSES}": ["-m", "simulations", "run", str(write_wide(folder))],
        }
        own = ["--set", f"cache_dir={folder / 'cache'}", "--set", f"runs_dir={folder / 'runs'}"]
        for what, command in runs.items():
            if what == "brain MRI" and "HEADWATER_ASSETS" not in os.environ:
                print("memory: brain MRI is left out without HEADWATER_ASSETS", file=sys.stderr)
                continue
            peak = measure([*command, *own])
            stated(f"peak memory, {what} / 3 GiB", peak, LIMIT_GIB, target=1.0, repeats=1, note="GiB, not seconds")


if __name__ == "__main__":
    main()
