"""Small models as folders: pictures, texts and rows of tables, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.backbones.transformers import Transformers
from common.model.backbones import Backbone, open_pretrained, open_random
from common.model.parameters import parameters
from common.serving.folder import describe_model, write_model
from common.tasks import open_task
from common.types import heads_digest
from tests.tiny import run_config

SIDE = 12
FINDING = {"kind": "classification", "labels": ["normal", "ill"]}
MakeModel = Callable[..., Path]
"""Backbone -> settings, and task -> settings -> the model's folder."""


def make_backbones(folder: Path, names: tuple[str, ...]) -> dict[str, Backbone]:
    """Returns the named backbones of those that there are."""
    made: dict[str, Callable[[], Backbone]] = {
        "pictures": lambda: open_random({"kind": "small_cnn", "input_size": SIDE}, "b", 1),
        "texts": lambda: open_pretrained(Transformers.example(folder).settings, "b"),
        "sounds": lambda: open_pretrained({"kind": "log_mel", "sample_rate": 8000, "range_hz": [60.0, 3800.0]}, "b"),
        "rows": lambda: open_pretrained(
            {
                "kind": "identity",
                "columns": [
                    {"name": "age", "range": [0, 100], "missing": "refuse"},
                    {"name": "sex", "levels": ["f", "m"], "missing": "refuse"},
                ],
            },
            "b",
        ),
    }
    made["ages"] = lambda: open_pretrained(
        {"kind": "identity", "columns": [{"name": "age", "range": [0, 100], "missing": "refuse"}]}, "b"
    )
    return {name: made[name]() for name in names}


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Writes a model whose heads are random."""

    def make(tasks: Mapping[str, Mapping[str, Any]], temperature: float | None = None) -> Path:
        weights = tmp_path / "weights"
        weights.mkdir(exist_ok=True)
        own = {name: dict(task) for name, task in tasks.items()}
        backbones = make_backbones(weights, tuple(dict.fromkeys(str(task["backbone"]) for task in own.values())))
        specs = {name: backbone.public_spec() for name, backbone in backbones.items()}
        run = run_config(backbone=None, backbones=specs, tasks=own)
        heads = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            for name in own:
                head = open_task(run.tasks[name], name).head(backbones[run.backbone_of(name)].feature_dim)
                for parameter in head.parameters():
                    torch.nn.init.normal_(parameter)
                heads[name] = parameters(head)
        config = describe_model(
            run,
            "run-1",
            heads,
            {name: (backbone.digest, backbone.public_spec()) for name, backbone in backbones.items()},
            digest=heads_digest(heads),
            epsilon={},
            temperatures={} if temperature is None else dict.fromkeys(own, temperature),
        )
        folder = tmp_path / "model"
        write_model(folder, config, heads, {name: backbone.blob() for name, backbone in backbones.items()})
        return folder

    return make


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Writes different grey pictures."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"scan{number:03}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(path)
    return paths
