"""A whole private run in one process beside its floor: one backbone pass and non-private head gradient descent.

    python -m benchmarks.workload

Ten sites, 100 images each (a tenth of the claim's; `--images 1000` for all), 3 x 96 x 96, mobilenet_v3_small, a linear
head of 8 classes, 10 rounds of 16 steps, features not cached before. The floor encodes with the best pass there is,
channels last and folded, and trains in closed form; it has no ledger, no message, no check, no noise. Subject and floor
read inputs from the same array. The third way, Flower on Ray with Opacus, is not timed here yet.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torchvision import models

from benchmarks.heads import closed_form
from benchmarks.measure import Work, compare
from common.backbones import Backbone
from common.config import SimulationConfig, load
from common.encoders import open_encoders
from simulations.experiment import run

SITES, SIDE, CLASSES, ROUNDS, STEPS = 10, 96, 8, 10, 16


def simulation(folder: Path, images: int) -> SimulationConfig:
    """The workload as a simulation file; its caches are under a folder that each run replaces."""
    count = SITES * images
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    names = np.array([f"c{number}" for number in range(CLASSES)])
    # One test image a site: the floor evaluates nothing.
    parts = {part: {"inputs": f"{part}_x", "columns": {"y": f"{part}_y"}} for part in ("train", "test")}
    labels = names[rng.integers(0, CLASSES, count)]
    arrays = {"train_x": pixels, "train_y": labels, "test_x": pixels[:SITES], "test_y": labels[:SITES]}
    np.savez(folder / "images.npz", **arrays)
    weights = folder / "net.safetensors"
    torch.manual_seed(0)
    save_file(models.mobilenet_v3_small(weights=None).state_dict(), weights)
    preprocess = {"resize": SIDE, "crop": None, "mean": [0.5] * 3, "std": [0.25] * 3}
    values: dict[str, Any] = {
        "run": {
            "name": "workload",
            "seed": 1,
            "rounds": ROUNDS,
            "backbone": {
                "kind": "torchvision",
                "model": "mobilenet_v3_small",
                "weights": str(weights),
                "preprocess": preprocess,
            },
            "tasks": {"task": {"kind": "classification", "labels": names.tolist()}},
            "solver": {"kind": "dp_gd", "steps": STEPS, "clip_norm": 1.0, "learning_rate": 0.5},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
            "aggregation": {"kind": "mean"},
        },
        "sources": {"images": {"kind": "npz", "path": str(folder / "images.npz"), "parts": parts}},
        "tasks": {"task": {"source": "images", "column": "y", "missing": "refuse", "public_size": images}},
        "partition": {"kind": "iid", "num_sites": SITES, "split": "source"},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "cache_dir": str(folder / "cache"),
        "runs_dir": str(folder / "runs"),
    }
    path = folder / "simulation.yaml"
    path.write_text(yaml.safe_dump(values))
    return load(SimulationConfig, path)


def private(folder: Path, config: SimulationConfig) -> Work:
    """The whole run, its features cached nowhere before."""

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            changed = {"cache_dir": Path(place) / "cache", "runs_dir": Path(place) / "runs"}
            run(config.model_copy(update=changed))

    return work


def floor(folder: Path, config: SimulationConfig, images: int) -> Work:
    """Preprocess and encode every image once, then every site's steps without privacy."""

    def work() -> None:
        backbone: Backbone = open_encoders(config.run)["backbone"]
        with np.load(folder / "images.npz") as arrays:
            pixels, labels = arrays["train_x"], arrays["train_y"]
        parts = [
            backbone.encode(torch.stack([backbone.preprocess(pixels[index]) for index in range(start, start + 100)]))
            for start in range(0, len(pixels), 100)
        ]
        features_ND = torch.cat(parts)
        label_N = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
        for site in range(SITES):
            own = slice(site * images, (site + 1) * images)
            for _ in range(ROUNDS):
                closed_form(features_ND[own], label_N[own], CLASSES)()

    return work


def main() -> None:
    """Both, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100, help="of each site")
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = simulation(folder, images)
        note = f"10 sites x {images} images, 10 rounds x 16 steps"
        ways = private(folder, config), floor(folder, config, images)
        compare("private run / backbone pass + non-private heads", *ways, target=1.15, repeats=3, note=note)


if __name__ == "__main__":
    main()
