"""Finished models for tests: a run's settings and random heads, written as a run that ended would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.model.backbones import open_backbones
from common.model.parameters import parameters
from common.serving.folder import describe_model, write_model
from common.tasks import open_tasks
from tests.tiny import run_config

TASKS = {"finding": {"kind": "classification", "labels": ["none", "glioma", "meningioma"]}}


def write_finished(
    folder: Path,
    backbone: Mapping[str, Any],
    tasks: Mapping[str, Any] = TASKS,
    temperatures: Mapping[str, float] | None = None,
) -> Path:
    """Writes the model of a run with heads drawn at random; returns its folder.

    Args:
        folder: the model's folder.
        backbone: settings of the backbone.
        tasks: settings of the tasks.
        temperatures: task -> temperature.
    """
    run = run_config(backbone=dict(backbone), tasks={name: dict(own) for name, own in tasks.items()})
    opened = open_backbones(run)
    rng = np.random.default_rng(0)
    heads = {}
    for name, task in open_tasks(run).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shapes = parameters(task.head(opened[run.backbone_of(name)].feature_dim))
        heads[name] = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in shapes.items()}
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
