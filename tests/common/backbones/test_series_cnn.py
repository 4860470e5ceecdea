"""The series net and the windows it is pre-trained on."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from client.data.sources import open_source
from common.backbones.series_cnn import SeriesCnn
from common.model.backbones import open_pretrained
from common.types import BadInput, BadRecord
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.public.pretrain import pretrain


def windows(path: Path, **settings: Any) -> Any:
    return open_source({"kind": "windows", "path": str(path), "length": 32, **settings}, "s").open()


def waves(path: Path, count: int = 60) -> None:
    """Saw teeth: what is turned or inverted can be told."""
    rng = np.random.default_rng(0)
    rows = [",".join(f"{value:.4f}" for value in (np.arange(64) / rng.uniform(9, 17)) % 1.0) for _ in range(count)]
    path.write_text("# a comment\n@problemName saw\n@data\n" + "\n".join(f"{row}:1" for row in rows) + "\n")


def test_length_offset_and_size_of_a_series_do_not_matter(tmp_path: Path) -> None:
    settings = SeriesCnn.example(tmp_path).settings
    backbone = open_pretrained(settings, "b")
    wave = np.sin(np.linspace(0, 6, 16))
    fine = np.sin(np.linspace(0, 6, 160))
    first = backbone.preprocess(wave)
    torch.testing.assert_close(backbone.preprocess(300 + 7 * wave[:, None]), first, atol=1e-5, rtol=0)
    torch.testing.assert_close(backbone.preprocess(fine), first, atol=0.02, rtol=0)
    assert first.mean().abs() < 1e-6 and not backbone.preprocess(np.full(9, 5.0)).any()
    for bad in (np.ones((9, 2)), np.array([1.0, np.nan]), np.array([1.0])):
        with pytest.raises(BadRecord):
            backbone.preprocess(bad)
    with pytest.raises(BadInput, match="expected at most 2, the steps after the last block, got 3"):
        open_pretrained({**settings, "length": 8, "pool": 3}, "b")


def test_windows_are_the_same_every_time_and_files_can_be_left_out(tmp_path: Path) -> None:
    waves(tmp_path / "saw.ts", 4)
    waves(tmp_path / "saw_eq.ts", 4)
    with zipfile.ZipFile(tmp_path / "series.whl", "w") as archive:
        archive.write(tmp_path / "saw.ts", "data/saw.ts")
    first, again = windows(tmp_path, per_series=2), windows(tmp_path, per_series=2)
    assert len(first.index()) == 16 and first.digest() == again.digest()
    chosen, packed = windows(tmp_path, per_series=2, exclude="_eq"), windows(tmp_path / "series.whl", per_series=2)
    assert len(chosen.index()) == 8 and chosen.digest() == packed.digest()
    assert windows(tmp_path, per_series=2, seed=1).digest() != first.digest()
    with pytest.raises(BadInput, match=r"expected \.ts files with series"):
        windows(tmp_path, exclude="saw")


@pytest.mark.slow
def test_pre_training_learns_what_was_done_to_windows(tmp_path: Path) -> None:
    waves(tmp_path / "saw.ts")
    weights = tmp_path / "series_cnn.safetensors"
    values = {
        "run": {
            "name": "series",
            "seed": 1,
            "rounds": 1,
            "backbone": {"kind": "series_cnn", "length": 32, "channels": [16, 32], "weights": str(weights)},
            "tasks": {"beat": {"kind": "classification", "labels": ["a", "b"]}},
            "solver": {"kind": "dp_gd", "steps": 1, "clip_norm": 1.0, "learning_rate": 1.0},
            "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 8.0},
            "aggregation": {"kind": "mean"},
        },
        "tasks": {"beat": {"source": "none", "label": "c", "missing": "refuse", "public_size": 1}},
        "partition": {"kind": "iid", "num_sites": 1},
        "unit": "example",
        "budget": {"epsilon": 10.0, "delta": 1e-5},
        "pretrain": {
            "sources": [{"kind": "windows", "path": str(tmp_path), "length": 32, "per_series": 6}],
            "label": "change",
            "labels": ["none", "inverted", "reversed", "permuted", "noisy", "smoothed"],
            "epochs": 15,
            "batch_size": 32,
            "learning_rate": 0.003,
            "seed": 0,
        },
        "cache_dir": str(tmp_path),
        "runs_dir": str(tmp_path),
    }
    done = pretrain(parse(SimulationConfig, values, base=tmp_path), lambda phase, now, total: None)
    assert done.train_accuracy is not None and done.train_accuracy > 0.6, "one in six by chance"
    assert "classifier.weight" in load_file(weights)
    assert open_pretrained(values["run"]["backbone"], "b").feature_dim == 32 * 4
