"""Bytes of a round beside its head, and what float16 contributions save and change.

    python -m benchmarks.bytes

Bytes are those of Flower's own encoding, as the run's journal has them. The accuracies are the demo's, with the same
noise for both precisions, over several seeds of it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.measure import stated
from benchmarks.sites import simulation
from simulations.experiment import run

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs" / "simulations" / "demo.yaml"
DIM, CLASSES = 576, 8
SEEDS = (1, 2, 3)


def bytes_of_a_round(folder: Path, precision: str) -> tuple[float, float]:
    """Down to a site and up from it."""
    folder.mkdir()
    config = simulation(folder, 3, rounds=2, dim=DIM, classes=CLASSES)
    run_ = config.run.model_copy(update={"delta_precision": precision})
    size = run(config.model_copy(update={"run": run_})).bytes
    down, up = size.down_per_site_round, size.up_per_site_round
    assert down is not None and up is not None
    return down, up


def accuracy_of_demo(weights: Path, folder: Path, precision: str, seed: int) -> float:
    """Mean accuracy of the demo's two tasks on pooled held-out records."""
    overrides = [
        f"run.backbone.weights={weights}",
        f"run.delta_precision={precision}",
        f"noise_seed={seed}",
        "baselines=[]",
        "expect={}",
        f"cache_dir={folder / 'cache'}",
    ]
    summary = run(DEMO, out=folder / f"{precision}-{seed}", overrides=overrides)
    return mean(task.metrics["accuracy"] or 0.0 for task in summary.tasks.values())


def main() -> None:
    """Bytes beside the head's, float16's beside float32's, and the demo's accuracy under both."""
    head = 4 * (DIM * CLASSES + CLASSES)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        down, up = bytes_of_a_round(folder / "a", "float32")
        note = f"Linear({DIM}, {CLASSES}); bytes, not seconds"
        stated("bytes of a round to a site / its head", down, head, target=1.05, repeats=1, note=note)
        stated("bytes of a round from a site / its head", up, head, target=1.05, repeats=1, note=note)
        _, half = bytes_of_a_round(folder / "b", "float16")
        stated("float16 contributions: bytes from a site / float32", half, up, target=0.55, repeats=1, note=note)
        weights = folder / "backbone.safetensors"
        pretrain = ["pretrain", str(DEMO), "--set", f"run.backbone.weights={weights}"]
        subprocess.run([sys.executable, "-m", "simulations", *pretrain], check=True, cwd=ROOT, capture_output=True)
        full, rounded = (
            mean(accuracy_of_demo(weights, folder, precision, seed) for seed in SEEDS)
            for precision in ("float32", "float16")
        )
        name = "float16 contributions: demo's accuracy with float32 / with float16"
        stated(name, full, rounded, target=1.01, repeats=len(SEEDS), note="accuracy, not seconds; the same noise")


if __name__ == "__main__":
    main()
