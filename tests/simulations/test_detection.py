"""Objects on pictures are found through the whole of a simulation, and by the model that it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headwater
from common.inputs import Box, read_boxes, write_boxes
from common.yaml import parse
from simulations.check import check_simulation, check_sources
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment
from tests.finished import write_maps


def write_pictures(folder: Path, count: int) -> None:
    """Grey noise with a bright square each, and a dark one on every second."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(60, 120, (count, 32, 32, 3), dtype=np.uint8)
    cells = []
    for index, picture in enumerate(pictures):
        boxes = []
        for name, value in (("bright", 120), ("dark", -55))[: 1 + index % 2]:
            row, column = rng.integers(0, 24, 2).tolist()
            picture[row : row + 8, column : column + 8] += np.uint8(value % 256)
            boxes.append(Box(name, column, row, column + 8, row + 8))
        cells.append(write_boxes(boxes, 32, 32))
    np.savez(folder / "pictures.npz", x=pictures, boxes=np.array(cells))


def make_config(folder: Path, **run: Any) -> SimulationConfig:
    values: dict[str, Any] = {
        "run": {
            "name": "squares",
            "seed": 1,
            "backbone": {
                **write_maps(folder, num_classes=1000, grid=16, colours=True, context=3),
                "projection": {"normalize": True},
            },
            "tasks": {
                "squares": {
                    "kind": "detection",
                    "labels": ["bright", "dark"],
                    "sizes": {"bright": [0.25, 0.25], "dark": [0.25, 0.25]},
                    "most_boxes": 4,
                }
            },
            "solver": {"kind": "auto"},
            "rounds": 48,
            "privacy": "non_private",
            **run,
        },
        "sources": {
            "pictures": {
                "kind": "npz",
                "path": "pictures.npz",
                "parts": {"all": {"inputs": "x", "labels": {"boxes": "boxes"}}},
            }
        },
        "tasks": {"squares": {"source": "pictures", "label": "boxes", "missing": "refuse", "public_size": 20}},
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.2, "seed": 1},
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    return parse(SimulationConfig, values, base=folder)


def simulate(folder: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run_experiment(make_config(folder, **changes)).to_json())
    metrics: dict[str, Any] = values["tasks"]["squares"]["metrics"]
    return metrics


def test_check_counts_what_may_be_wrong_with_boxes(tmp_path: Path) -> None:
    write_pictures(tmp_path, 6)
    config = make_config(tmp_path)
    tasks = check_simulation(config)
    assert list(check_sources(config, tasks)) == []
    bright = Box("bright", 8, 8, 16, 16)
    cells = [
        [Box("bright", 0.25, 0.25, 0.5, 0.5)],  # Fractions.
        [Box("pale", 8, 8, 16, 16)],
        [],
        [replace(bright, right=8)],
        None,
        [bright],
    ]
    written = ["" if boxes is None else write_boxes(boxes, 32, 32) for boxes in cells]
    pictures = dict(np.load(tmp_path / "pictures.npz"))
    np.savez(tmp_path / "pictures.npz", **{**pictures, "boxes": np.array(written)})
    said = [line.removeprefix("sources.pictures: tasks.squares: boxes: ") for line in check_sources(config, tasks)]
    assert [line.partition(";")[0].partition(":")[0] for line in said] == [
        "5 drawn, 1 of them without an object",
        "boxes without area on their picture, which are left out while the pictures are used",
        "boxes that look like fractions of the picture where pixels are expected",
        "1 unusable",
        "1 of 6 records are without a label",
    ]
    assert "not in `values` and the offered task: pale 1" in said[0] and "used: 1 (row 4)" in said[1]
    assert "in 1 record(s) (row 1)" in said[2]
    assert (
        said[3] == "1 unusable: expected boxes of the task's labels, got one of another name (row 2); mend these files"
    )


@pytest.mark.slow
def test_objects_are_found_at_their_places_with_noise_and_without(tmp_path: Path) -> None:
    write_pictures(tmp_path, 50)
    plain = simulate(tmp_path)
    assert plain["ap_50"] > 0.9 and plain["map_50"] == pytest.approx(plain["ap_50"], abs=0.02)
    assert 0.3 < plain["map"] < plain["map_50"]
    private = simulate(tmp_path, privacy={"unit": "example", "delta": 1e-5, "target_epsilon": 50.0})
    assert private["ap_50"] > 0.6
    folder = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    found = headwater.load(folder).predict(tmp_path / "pictures.npz", columns=["x"])
    assert count_found(tmp_path, found["squares"].tolist()) > 0.6
    highest = found[["squares.highest bright", "squares.highest dark"]].to_numpy()
    assert ((highest > 0) & (highest < 1)).all() and highest[1::2, 1].mean() > highest[::2, 1].mean() + 0.1


def count_found(folder: Path, cells: list[str]) -> float:
    """Ratio of objects of which a predicted box of the same name has its centre within a tenth of the picture."""
    found, number = 0, 0
    for said, true in zip(cells, np.load(folder / "pictures.npz")["boxes"].tolist(), strict=True):
        for own in read_boxes(true):
            near = (
                box.name == own.name
                and abs(box.left + box.right - own.left - own.right) < 0.2
                and abs(box.top + box.bottom - own.top - own.bottom) < 0.2
                for box in read_boxes(said)
            )
            found, number = found + any(near), number + 1
    return found / number
