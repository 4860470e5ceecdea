"""A whole private run in one process beside its floor: one backbone pass and non-private head gradient descent.

    python -m benchmarks.workload

Ten sites, 1000 images each, 3 x 96 x 96, mobilenet_v3_small, a linear head of 8 classes, 10 rounds of 16 steps,
features not cached before; Poisson samples of 125, and full batches, each beside its own floor. The floor scales all
pixels of a batch at once, encodes with the best pass there is (channels last, folded, every core a batch of its own)
and trains in closed form on one thread; it has no file of features, no ledger, no message, no check, no clip, no noise.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torchvision import models

from benchmarks.heads import RATE, closed_form
from benchmarks.measure import Work, compare
from common.model.backbones import Backbone, open_backbones
from common.process.threads import one_thread
from common.yaml import load
from simulations.config import SimulationConfig
from simulations.experiment import run

SITES, SIDE, CLASSES, ROUNDS, STEPS = 10, 96, 8, 10, 16
POISSON, FULL_BATCH = 0.125, 1.0


def simulation(folder: Path, images: int, sampling_rate: float = FULL_BATCH) -> SimulationConfig:
    """The workload as a simulation file; each run gives it other folders."""
    count = SITES * images
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    names = np.array([f"c{number}" for number in range(CLASSES)])
    # One test image a site: the floor evaluates nothing.
    parts = {part: {"inputs": f"{part}_x", "labels": {"y": f"{part}_y"}} for part in ("train", "test")}
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
            "solver": {
                "kind": "dp_gd",
                "sampling_rate": sampling_rate,
                "steps": STEPS,
                "clip_norm": 1.0,
                "learning_rate": 0.5,
            },
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
            "aggregation": {"kind": "mean"},
        },
        "sources": {"images": {"kind": "npz", "path": str(folder / "images.npz"), "parts": parts}},
        "tasks": {"task": {"source": "images", "label": "y", "missing": "refuse", "public_size": images}},
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
        # Left for `main` to remove: deleting files is no part of a run.
        place = Path(tempfile.mkdtemp(dir=folder))
        run(config.model_copy(update={"cache_dir": place / "cache", "runs_dir": place / "runs"}))

    return work


def floor(folder: Path, config: SimulationConfig, images: int, sampling_rate: float) -> Work:
    """Encode every image once, then every site's steps without privacy."""
    batch = round(images * sampling_rate)

    def work() -> None:
        backbone: Backbone = open_backbones(config.run)["backbone"]
        with np.load(folder / "images.npz") as arrays:
            pixels, labels = torch.from_numpy(arrays["train_x"]), arrays["train_y"]

        def encoded(part: Tensor) -> Tensor:
            return backbone.encode(part.permute(0, 3, 1, 2).float().div_(255.0).sub_(0.5).div_(0.25))

        cores = torch.get_num_threads()
        with one_thread(), ThreadPoolExecutor(cores) as pool:
            encoded(pixels[:1])
            features_ND = torch.cat(list(pool.map(encoded, pixels.split(100 // cores))))
            label_N = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
            for site in range(SITES):
                own = slice(site * images, (site + 1) * images)
                for _ in range(ROUNDS):
                    descend(features_ND[own], label_N[own], batch)

    return work


def descend(features_ND: Tensor, label_N: Tensor, batch: int) -> Tensor:
    """One round of a site: steps of non-private softmax regression on shuffled batches, without autograd."""
    count = len(label_N)
    if batch >= count:
        return closed_form(features_ND, label_N, CLASSES)()
    onehot_NK = torch.nn.functional.one_hot(label_N, CLASSES).float()
    weight_KD, bias_K = torch.zeros(CLASSES, features_ND.shape[1]), torch.zeros(CLASSES)
    order = torch.cat([torch.randperm(count) for _ in range(-(-STEPS * batch // count))])
    for rows in order.split(batch)[:STEPS]:
        x_BD = features_ND[rows]
        delta_BK = torch.softmax(torch.addmm(bias_K, x_BD, weight_KD.T), 1).sub_(onehot_NK[rows])
        weight_KD.addmm_(delta_BK.T, x_BD, alpha=-RATE / batch)
        bias_K.sub_(delta_BK.sum(dim=0), alpha=RATE / batch)
    return weight_KD


def main() -> None:
    """Both samplings, each beside its floor, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="of each site")
    images = parser.parse_args().images
    for what, rate in (("Poisson samples", POISSON), ("full batches", FULL_BATCH)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = simulation(folder, images, rate)
            note = f"10 sites x {images} images, 10 rounds x 16 steps"
            ways = private(folder, config), floor(folder, config, images, rate)
            compare(
                f"private run / backbone pass + non-private heads, {what}", *ways, target=1.15, repeats=3, note=note
            )


if __name__ == "__main__":
    main()
