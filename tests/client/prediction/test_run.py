"""A simulated run's model predicts what the run's summary reports, and a real network's rows stay alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import headwater
from client.prediction.predict import LoadedModel
from headwater.__main__ import make_app
from tests.client.prediction.conftest import FINDING
from tests.finished import write_finished
from tests.tiny import DIM, TASKS, write_records


def test_the_accuracy_of_a_runs_held_out_records_is_that_of_its_summary(tmp_path: Path) -> None:
    write_records(tmp_path / "records.npz", seed=1, count=80)
    parts = {
        part: {"inputs": f"{part}_x", "labels": {task: f"{part}_{task}" for task in TASKS}}
        for part in ("train", "test")
    }
    simulation = {
        "run": {
            "name": "tiny",
            "seed": 3,
            "rounds": 3,
            "backbone": {"kind": "identity", "dim": DIM},
            "tasks": TASKS,
            "solver": {"kind": "dp_gd", "steps": 2, "clip_norm": 1.0, "learning_rate": 1.0},
            "privacy": {"unit": "example", "delta": 1e-5, "noise_multiplier": 4.0},
            "aggregation": {"kind": "mean"},
        },
        "sources": {"records": {"kind": "npz", "path": "records.npz", "parts": parts}},
        "tasks": {task: {"source": "records", "label": task, "missing": "refuse", "public_size": 40} for task in TASKS},
        "partition": {"kind": "iid", "num_sites": 2, "split": "source", "seed": 1},
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(simulation))
    run = headwater.simulate(tmp_path / "tiny.yaml", out=tmp_path / "run")
    out = tmp_path / "p.csv"
    arguments = ["predict", str(run.folder), "--data", str(tmp_path / "tiny.yaml"), "--out", str(out)]
    result = CliRunner().invoke(make_app(), arguments)
    assert result.exit_code == 0, result.output
    with out.open(encoding="utf-8", newline="") as file:
        held_out = list(csv.DictReader(file))[80:]
    with np.load(tmp_path / "records.npz") as file:
        arrays = dict(file)
    for task in TASKS:
        accuracy = np.mean([row[task] == truth for row, truth in zip(held_out, arrays[f"test_{task}"], strict=True)])
        assert accuracy == run.summary.tasks[task].metrics["accuracy"], "to the last digit"
    loaded = headwater.load(run.folder)
    assert isinstance(loaded, LoadedModel)
    assert loaded.predict(tmp_path / "tiny.yaml")["size"].tolist()[80:] == [row["size"] for row in held_out]


@pytest.mark.slow
def test_a_real_networks_row_does_not_depend_on_the_others(tmp_path: Path, assets: Path) -> None:
    backbone = {
        "kind": "torchvision",
        "model": "mobilenet_v2",
        "weights": str(assets / "backbones" / "mobilenet_v2" / "model.safetensors"),
        "preprocess": {"resize": 64, "crop": None, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "projection": {"dim": 64, "shift": "batch_norm", "normalize": True},
    }
    loaded = headwater.load(write_finished(tmp_path / "model", backbone, {"finding": FINDING}))
    with np.load(assets / "data" / "brain_mri_4class" / "brain_mri_128.npz") as file:
        pictures = file["test_images"][:6]
    (tmp_path / "scans").mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "scans" / f"{number}.png")
    together = loaded.predict(tmp_path / "scans")
    for number in (0, 5):
        alone = loaded.predict([tmp_path / "scans" / f"{number}.png"])
        assert alone.iloc[0, 2:].tolist() == together.iloc[number, 2:].tolist(), "to the bit"
    served = loaded(list(pictures))["finding"].numpy()
    assert np.allclose(together[["finding.normal", "finding.ill"]], served, atol=1e-5)
