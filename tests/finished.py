"""Finished models for tests: a run's settings and random heads, written as a run that ended would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torchvision import models

from common.model.backbones import open_backbones
from common.model.parameters import parameters
from common.model.trunks import create_modules
from common.serving.folder import describe_model, write_model
from common.tasks import open_tasks
from tests.tiny import run_config

MASKS = {"kind": "segmentation", "labels": ["ground", "cell"], "side": 16}
TASKS = {"finding": {"kind": "classification", "labels": ["none", "glioma", "meningioma"]}}


def write_finished(
    folder: Path,
    backbone: Mapping[str, Any],
    tasks: Mapping[str, Any] = TASKS,
    temperatures: Mapping[str, float] | None = None,
    trainable: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model of a run with heads and trained parts drawn at random; returns its folder.

    Args:
        folder: the model's folder.
        backbone: settings of the backbone.
        tasks: settings of the tasks.
        temperatures: task -> temperature.
        trainable: the part of the backbone that was trained; None where all is frozen.
    """
    changes: dict[str, Any] = {}
    if trainable is not None:
        solver = {"kind": "dp_sgd", "sampling_rate": 1.0, "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0}
        changes = {
            "trainable": {"backbone": dict(trainable)},
            "solver": {**solver, "trunk": {"learning_rate": 0.1}},
        }
    own = {name: dict(settings) for name, settings in tasks.items()}
    run = run_config(backbone=dict(backbone), tasks=own, **changes)
    opened = open_backbones(run)
    rng = np.random.default_rng(0)
    heads = {}
    for name, module in create_modules(run, open_tasks(run), opened).items():
        shift = 0.1 if name.endswith(".trunk") else 1.0
        heads[name] = {
            key: (value + shift * rng.normal(size=value.shape)).astype(np.float32)
            for key, value in parameters(module).items()
        }
    config = describe_model(
        run,
        "run-1",
        heads,
        {name: (own.digest, own.public_spec()) for name, own in opened.items()},
        digest="0" * 64,
        epsilon={"north": 1.0},
        temperatures=temperatures or {},
    )
    write_model(folder, config, heads, {name: own.blob() for name, own in opened.items()})
    return folder


def write_maps(folder: Path, resize: int = 32, num_classes: int = 4, **maps: Any) -> dict[str, Any]:
    """Returns settings of maps of a MobileNetV2, whose random weights are written to the folder.

    Args:
        folder: the folder.
        resize: side of its pictures.
        num_classes: of its last layer, which no map reads; with another number all weights are other random ones.
        **maps: further settings of the maps.
    """
    path = folder / "mobilenet.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(models.mobilenet_v2(weights=None, num_classes=num_classes).state_dict(), path)
    return {
        "kind": "torchvision",
        "model": "mobilenet_v2",
        "weights": str(path),
        "num_classes": num_classes,
        "preprocess": {"resize": resize, "crop": None, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "maps": {"layers": ["features.1"], "grid": 4, **maps},
    }
