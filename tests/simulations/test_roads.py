"""Road scenes in the layouts of COCO and Cityscapes are learned from as their files lie, by both kinds of heads."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.types import BadInput
from common.yaml import load, parse
from simulations.config import SimulationConfig
from simulations.experiment import run as run_experiment
from tests.finished import write_maps

PICTURES = 40
ROAD, CAR, SKY = 7, 26, 23


def write_scenes(folder: Path) -> None:
    """Grey roads with one bright car each, with labelIds beside them and a list of objects.

    The first list holds a box without area and one picture of another size, and the last picture has no labelIds.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(PICTURES):
        scene = rng.integers(60, 120, (32, 32, 3), dtype=np.uint8)
        ids = np.full((32, 32), ROAD, np.uint8)
        ids[:4] = SKY
        row, column = rng.integers(6, 20, 2).tolist()
        scene[row : row + 10, column : column + 10] += 120
        ids[row : row + 10, column : column + 10] = CAR
        name = f"town_{number:06d}"
        for path, values in (
            (f"leftImg8bit/train/town/{name}_leftImg8bit.png", scene),
            (f"gtFine/train/town/{name}_gtFine_labelIds.png", ids),
        ):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if number < PICTURES - 1 or "gtFine" not in path:
                Image.fromarray(values).save(folder / path)
        images.append(
            {"id": number, "file_name": f"town/{name}_leftImg8bit.png", "width": 32 + (number == 3), "height": 32}
        )
        corners = [column, row, column + 10, row, column + 10, row + 10, column, row + 10]
        annotations.append(
            {"image_id": number, "category_id": 3, "bbox": [column, row, 10, 10], "segmentation": [corners]}
        )
    annotations.append({"image_id": 0, "category_id": 3, "bbox": [5, 5, 0, 0], "segmentation": [[5, 5, 5, 5, 5, 5]]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "car"}]}
    (folder / "objects.json").write_text(json.dumps(content))


def simulate(folder: Path, tasks: dict[str, Any], source: dict[str, Any], places: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": {
            "name": "roads",
            "seed": 1,
            "backbone": {
                **write_maps(folder, num_classes=1000, grid=16, colours=True),
                "projection": {"normalize": True},
            },
            "tasks": tasks,
            "solver": {"kind": "auto"},
            "rounds": 16,
            "privacy": "non_private",
        },
        "sources": {"roads": source},
        "tasks": {
            name: {"source": "roads", "missing": "skip", "public_size": 15, **own} for name, own in places.items()
        },
        "partition": {"kind": "iid", "num_sites": 2, "split": "hash", "test_fraction": 0.25, "seed": 1},
        "unit": "example",
        "budget": {"epsilon": 100.0, "delta": 1e-5},
        "cache_dir": "cache",
        "runs_dir": "runs",
    }
    summary: dict[str, Any] = json.loads(run_experiment(parse(SimulationConfig, values, base=folder)).to_json())
    return summary


def list_problems(folder: Path) -> list[tuple[str, str, str]]:
    """Returns row, task and reason of each entry of the sites' lists of problems."""
    found = []
    for path in sorted(folder.glob("runs/*/**/problems.csv")):
        with path.open(newline="") as file:
            found += [(line["row"], line["task"], line["reason"]) for line in csv.DictReader(file)]
    return sorted(found)


@pytest.mark.slow
def test_a_list_of_coco_trains_boxes_and_masks_and_its_bad_ones_are_listed(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    source = {"kind": "coco", "path": "objects.json", "root": "leftImg8bit/train"}
    summary = simulate(
        tmp_path,
        {
            "cars": {"kind": "detection", "labels": ["vehicle"], "sizes": {"vehicle": [0.3, 0.3]}, "most_boxes": 3},
            "places": {"kind": "segmentation", "labels": ["background", "vehicle"], "side": 32},
        },
        source,
        {
            name: {"label": column, "values": {"car": "vehicle"}}
            for name, column in (("cars", "boxes"), ("places", "mask"))
        },
    )
    assert summary["tasks"]["cars"]["metrics"]["ap_50"] > 0.8
    assert summary["tasks"]["places"]["metrics"]["dice"] > 0.8
    assert list_problems(tmp_path) == [
        ("1", "cars", "1 of its 2 boxes have no area on the picture and are left out"),
        ("4", "cars", "expected boxes of a picture of its size, got those of another size"),
        ("4", "places", "expected objects of a picture of its size, got those of another size"),
    ]


@pytest.mark.slow
def test_a_folder_of_cityscapes_trains_the_labels_that_are_mapped(tmp_path: Path) -> None:
    write_scenes(tmp_path)
    source = {
        "kind": "image_folder",
        "path": ".",
        "pattern": r"^leftImg8bit/(?P<path>.+)_leftImg8bit\.png$",
        "masks": {"mask": "gtFine/{path}_gtFine_labelIds.png"},
    }
    summary = simulate(
        tmp_path,
        {"places": {"kind": "segmentation", "labels": ["road", "car"], "side": 32}},
        source,
        {"places": {"label": "mask", "values": {ROAD: "road", CAR: "car"}, "unmapped": "skip"}},
    )
    assert summary["tasks"]["places"]["metrics"]["dice"] > 0.8
    assert list_problems(tmp_path) == []


def load_own(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SimulationConfig:
    """Returns configs/simulations/autonomous.yaml for scenes in a folder, smaller, with changes beside them."""
    write_scenes(folder)
    listed = json.loads((folder / "objects.json").read_text())
    listed["categories"] += [{"id": 4, "name": "road"}, {"id": 5, "name": "person"}, {"id": 6, "name": "sky"}]
    ground, above = [[0, 4, 32, 4, 32, 32, 0, 32]], [[0, 0, 32, 0, 32, 4, 0, 4]]
    under = [
        {"image_id": each["id"], "category_id": category, "bbox": [0, 0, 32, 28], "segmentation": polygon}
        for each in listed["images"]
        for category, polygon in ((4, ground), (6, above))
    ]
    # The car is the later object.
    listed["annotations"] = under + listed["annotations"]
    for side, first, last in (("train", 0, 30), ("val", 30, PICTURES)):
        for name in ("annotations", "images"):
            (folder / name).mkdir(exist_ok=True)
        part = {**listed, "images": listed["images"][first:last]}
        (folder / "annotations" / f"{side}.json").write_text(json.dumps(part))
        (folder / "images" / side).symlink_to(folder / "leftImg8bit" / "train")
    monkeypatch.setenv("ROADS", str(folder))
    smaller: dict[str, Any] = {
        "run.backbone.weights": write_maps(folder, num_classes=1000)["weights"],
        "run.backbone.preprocess": "{resize: 32, crop: null, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}",
        "run.backbone.maps": "{layers: [features.1], grid: 16, colours: true}",
        "run.tasks.places.side": 32,
        "run.tasks.objects.sizes": "{car: [0.3, 0.3]}",
        "run.tasks.objects.counts": "{car: 1, person: 1}",
        "run.rounds": 24,
        "run.privacy.target_epsilon": 100,
        "budget.epsilon": 200,
        "partition.num_sites": 2,
        "tasks.places.public_size": 15,
        "tasks.objects.public_size": 15,
        "cache_dir": folder / "cache",
        "runs_dir": folder / "runs",
        **changes,
    }
    path = Path(__file__).parents[2] / "configs" / "simulations" / "autonomous.yaml"
    return load(SimulationConfig, path, [f"{key}={value}" for key, value in smaller.items()])


def read_scores(values: dict[str, Any]) -> dict[str, float]:
    """Returns what each head is judged by, of a car."""
    return {"places": values["places"]["dice car"], "objects": values["objects"]["ap_50 car"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run.trust": "secure_sum", "run.colluding": 0, "run.cohort.min_sites": 2, "personal": "fit"},
        {"personal": "prior"},
    ],
    ids=["noise at sites", "secure sum, fitted at home", "prior at home"],
)
def test_both_heads_learn_the_roads_of_ones_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    summary = json.loads(run_experiment(load_own(tmp_path, monkeypatch, **changes)).to_json())["tasks"]
    scores = read_scores({name: task["metrics"] for name, task in summary.items()})
    assert min(scores.values()) > 0.8, scores
    if "personal" in changes:
        at_home = read_scores({name: task["at_home"]["personal"]["mean"] for name, task in summary.items()})
        assert min(at_home.values()) > 0.8, at_home


def test_adapting_at_home_needs_a_task_with_classes_and_says_so_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="personal: expected a task of kind classification for `adapt`; `fit` takes any"):
        run_experiment(load_own(tmp_path, monkeypatch, personal="adapt"))
    assert not list(tmp_path.glob("runs/*/sites/*/state/ledgers/*"))
