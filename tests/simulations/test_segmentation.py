"""Places of pictures are labelled through the whole of a simulation, beside a label of the picture, under one clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headwater
from common.inputs import read_mask
from common.serving.folder import read_config
from common.yaml import parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment
from tests.finished import write_maps


def write_pictures(folder: Path, count: int) -> None:
    """Grey noise with one bright square each, large or small."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 90, (count, 32, 32, 3), dtype=np.uint8)
    masks = np.zeros((count, 32, 32), np.uint8)
    large = np.arange(count) % 2
    for picture, mask, is_large in zip(pictures, masks, large, strict=True):
        side = 16 if is_large else 8
        row, column = rng.integers(0, 32 - side, 2)
        mask[row : row + side, column : column + side] = 255
        picture[mask > 0] += 140
    sizes = np.array(["small", "large"])[large]
    np.savez(folder / "pictures.npz", x=pictures, mask=masks, size=sizes)


def make_config(folder: Path, **run: Any) -> SimulationConfig:
    values: dict[str, Any] = {
        "run": {
            "name": "squares",
            "seed": 1,
            "backbone": {
                **write_maps(folder, num_classes=1000, grid=16, colours=True),
                "projection": {"normalize": True},
            },
            "tasks": {
                "square": {"kind": "segmentation", "labels": ["ground", "square"], "side": 32},
                "size": {"kind": "classification", "labels": ["small", "large"]},
            },
            "solver": {"kind": "auto"},
            "rounds": 24,
            "privacy": "non_private",
            **run,
        },
        "sources": {
            "pictures": {
                "kind": "npz",
                "path": "pictures.npz",
                "parts": {"all": {"inputs": "x", "labels": {"mask": "mask", "size": "size"}}},
            }
        },
        "tasks": {
            "square": {"source": "pictures", "label": "mask", "missing": "refuse", "public_size": 20},
            "size": {"source": "pictures", "label": "size", "missing": "refuse", "public_size": 20},
        },
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.2, "seed": 1},
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    return parse(SimulationConfig, values, base=folder)


def simulate(folder: Path, **changes: Any) -> dict[str, Any]:
    summary = run_experiment(make_config(folder, **changes))
    values: dict[str, Any] = json.loads(summary.to_json())
    return values


def test_places_and_pictures_are_labelled_by_heads_on_the_same_maps(tmp_path: Path) -> None:
    write_pictures(tmp_path, 50)
    plain = simulate(tmp_path)["tasks"]
    assert plain["square"]["metrics"]["dice"] > 0.9 and plain["square"]["metrics"]["iou"] > 0.8
    assert plain["size"]["metrics"]["accuracy"] >= 0.9
    private = simulate(tmp_path, privacy={"unit": "example", "delta": 1e-5, "target_epsilon": 50.0})
    assert private["tasks"]["square"]["metrics"]["dice"] > 0.6
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert read_config(folder).backbones["backbone"].spec["maps"]["grid"] == 16
    predicted = predict_again(tmp_path, folder)
    assert predicted["size"] == pytest.approx(private["tasks"]["size"]["metrics"]["accuracy"], abs=0.2)
    assert predicted["square"] == pytest.approx(private["tasks"]["square"]["metrics"]["dice"], abs=0.2)


@pytest.mark.slow
def test_convolutions_train_privately_beside_a_label_on_features_in_8_bits(tmp_path: Path) -> None:
    write_pictures(tmp_path, 40)
    config = make_config(tmp_path, privacy={"unit": "example", "delta": 1e-5, "target_epsilon": 80.0})
    values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    tasks = values["run"]["tasks"]
    tasks["square"]["head"], tasks["size"]["head"] = {"hidden": 8, "kernel": 3}, {}
    values["run"] = {key: values["run"][key] for key in ("name", "seed", "backbone", "tasks", "rounds", "privacy")}
    values["run"]["solver"], values["cache_bits"] = {"kind": "auto"}, 8
    decoded = parse(SimulationConfig, values, base=tmp_path)
    assert decoded.run.solver.kind == "dp_sgd"
    found = json.loads(run_experiment(decoded).to_json())["tasks"]
    assert found["square"]["metrics"]["dice"] > 0.8 and found["size"]["metrics"]["accuracy"] >= 0.8
    (cached,) = (tmp_path / "cache").rglob("features.npy")
    assert np.load(cached, mmap_mode="r").dtype == np.int8
    (folder,) = (tmp_path / "runs").iterdir()
    # Predictions encode anew, and round no feature.
    assert predict_again(tmp_path, folder)["square"] == pytest.approx(found["square"]["metrics"]["dice"], abs=0.2)


def predict_again(folder: Path, run: Path) -> dict[str, float]:
    """Accuracy and Dice of what the run's model says of all pictures."""
    arrays = np.load(folder / "pictures.npz")
    found = headwater.load(run).predict(folder / "pictures.npz", columns=["x"])
    right = np.mean(found["size"].to_numpy() == arrays["size"])
    dice = []
    for cell, mask in zip(found["square"], arrays["mask"], strict=True):
        said, own = read_mask(cell) > 0, mask > 0
        dice.append(2 * (said & own).sum() / (said.sum() + own.sum()))
    shares = found[["square.share ground", "square.share square"]].to_numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=1e-5)
    return {"size": float(right), "square": float(np.mean(dice))}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"maps": None}, "tasks.square: expected a backbone with `maps` for a task of kind segmentation")],
)
def test_a_backbone_without_places_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_pictures(tmp_path, 10)
    config = make_config(tmp_path)
    values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    values["run"]["backbone"].update(changes)
    with pytest.raises(Exception, match=said):
        run_experiment(parse(SimulationConfig, values, base=tmp_path))
