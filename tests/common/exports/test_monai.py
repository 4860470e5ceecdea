"""A MONAI bundle: MONAI loads and runs it where nothing of Headwater is, and gets the model's numbers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

import headwater
from common.exports import open_format, write_export
from common.plugins import plugin_class
from common.serving.network import Model, open_model
from common.types import BadInput
from tests.finished import MASKS, TASKS, write_finished, write_maps

RUN = """
import sys
from monai.bundle import ConfigWorkflow
for folder in sys.argv[1:]:
    configs = f"{folder}/bundle/configs"
    workflow = ConfigWorkflow(f"{configs}/inference.json", f"{configs}/metadata.json", None, workflow_type="infer")
    places = {"bundle_root": "bundle", "dataset_dir": "pictures", "output": "out.csv", "masks_dir": "masks"}
    places["boxes_file"] = "boxes.json"
    for name, place in places.items():
        workflow.parser[name] = f"{folder}/{place}"
    workflow.initialize()
    assert not workflow.check_properties(), workflow.check_properties()
    workflow.run()
rooms = {"headwater", "common", "client", "server", "simulations"}
assert not rooms & {name.split(".")[0] for name in sys.modules}
"""

TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {"num_channels": {"type": "integer"}, "value_range": {"type": "array", "items": {"type": "number"}}},
}
SCHEMA = {
    "type": "object",
    "required": [
        *("schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"),
        *("task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": {
        **{name: {"type": "string"} for name in ("schema", "version", "monai_version", "pytorch_version", "task")},
        "required_packages_version": {"type": "object"},
        "changelog": {"type": "object"},
        "eval_metrics": {"type": "object"},
        "references": {"type": "array"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                "inputs": {"type": "object", "required": ["image"], "properties": {"image": TENSOR}},
                "outputs": {"type": "object", "required": ["pred"], "properties": {"pred": TENSOR}},
            },
        },
    },
}
"""Requirements of MONAI's schema of 2024-07-25."""


def export(folder: Path, settings: Any, tasks: Any = TASKS) -> Model:
    model = open_model(write_finished(folder / "model", settings, tasks))
    write_export(model, folder / "bundle", open_format("monai"))
    return model


def predict_with_monai(folders: list[Path], elsewhere: Path) -> None:
    """Has MONAI run the bundle of each folder, in a process in a folder where Headwater is not."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", RUN, *map(str, folders)],
        cwd=elsewhere,
        env={"PATH": "", "HOME": str(elsewhere)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def write_pictures(folder: Path, sizes: list[tuple[int, int]], mode: str) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number, (width, height) in enumerate(sizes):
        channels = (height, width) if mode == "L" else (height, width, 3)
        picture = Image.fromarray(rng.integers(0, 256, channels, dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 0 else 1  # The first lies on its side.
        picture.save(folder / f"{number}.png", exif=exif)


@pytest.mark.slow
def test_monai_gets_the_models_numbers(tmp_path: Path) -> None:
    folders = {}
    for kind in ("small_cnn", "torchvision", "cifar_resnet"):
        folders[kind] = tmp_path / kind
        folders[kind].mkdir()
        channels, side, _ = (
            export(folders[kind], plugin_class("common.backbones", kind).example(folders[kind]).settings)
            .open_raw("backbone")
            .tensors[0]
            .shape
        )
        sizes = [(side, side)] * 3 if channels == 1 else [(71, 40), (33, 90), (side, side), (64, 65)]
        write_pictures(folders[kind] / "pictures", sizes, "L" if channels == 1 else "RGB")
    predict_with_monai(list(folders.values()), tmp_path)
    for folder in folders.values():
        with (folder / "out.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        pictures = sorted((folder / "pictures").iterdir())
        assert header == ["file", "none", "glioma", "meningioma"]
        assert [row[0] for row in rows] == list(map(str, pictures))
        expected = headwater.load(folder / "model").predict(pictures)
        columns = [name for name in expected.columns if str(name).endswith(("none", "glioma", "meningioma"))]
        found = np.array([row[1:] for row in rows], dtype=float)
        assert np.allclose(found, expected[columns].to_numpy(dtype=float), atol=1e-5)


@pytest.mark.slow
def test_monai_gets_the_models_masks(tmp_path: Path) -> None:
    model = export(tmp_path, write_maps(tmp_path, colours=True), {"cells": MASKS})
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    jsonschema.validate(metadata, SCHEMA)
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert (output["num_channels"], output["spatial_shape"], output["format"]) == (2, [16, 16], "segmentation")
    write_pictures(tmp_path / "pictures", [(71, 40), (33, 90), (32, 32)], "RGB")
    predict_with_monai([tmp_path], tmp_path)
    pictures = sorted((tmp_path / "pictures").iterdir())
    expected = headwater.load(tmp_path / "model").predict(pictures, masks=tmp_path / "own")
    with (tmp_path / "out.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[1:] == model.list_columns("cells")
    found = np.array([row[1:] for row in rows], dtype=float)
    assert np.allclose(found, expected[[f"cells.{name}" for name in header[1:]]].to_numpy(dtype=float), atol=1e-5)
    for path in pictures:
        own, theirs = (np.asarray(Image.open(tmp_path / folder / path.name)) for folder in ("own", "masks"))
        assert np.array_equal(own, theirs), path.name


@pytest.mark.slow
def test_monai_gets_the_models_boxes(tmp_path: Path) -> None:
    task = {**plugin_class("common.tasks", "detection").example().settings, "threshold": 0.0, "most_detections": 6}
    export(tmp_path, write_maps(tmp_path, grid=12, colours=True), {"cells": task})
    jsonschema.validate(json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text()), SCHEMA)
    write_pictures(tmp_path / "pictures", [(71, 40), (33, 90), (32, 32)], "RGB")
    predict_with_monai([tmp_path], tmp_path)
    pictures = sorted((tmp_path / "pictures").iterdir())
    headwater.load(tmp_path / "model").predict(pictures, boxes=tmp_path / "own.json")
    own = json.loads((tmp_path / "own.json").read_text())
    names = {each["id"]: each["name"] for each in own["categories"]}
    found = json.loads((tmp_path / "boxes.json").read_text())
    assert [each["image"] for each in found] == list(map(str, pictures)) and len(own["annotations"]) > 3
    for number, each in enumerate(found, start=1):
        expected = [one for one in own["annotations"] if one["image_id"] == number]
        assert each["label"] == [names[one["category_id"]] for one in expected]
        for box, score, one in zip(each["box"], each["label_scores"], expected, strict=True):
            left, top, width, height = one["bbox"]
            assert box == pytest.approx([left, top, left + width, top + height], abs=0.03)
            assert score == pytest.approx(one["score"], abs=1e-5)


def test_the_metadata_fulfils_monais_schema(tmp_path: Path) -> None:
    export(tmp_path, plugin_class("common.backbones", "small_cnn").example(tmp_path).settings)
    bundle = tmp_path / "bundle"
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    jsonschema.validate(metadata, SCHEMA)
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {
        "0": "none",
        "1": "glioma",
        "2": "meningioma",
    }
    assert (bundle / "docs" / "README.md").read_text() == (bundle / "README.md").read_text()
    assert "not known: check before you publish" in (bundle / "LICENSE").read_text()


def test_what_is_no_picture_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for kind in ("identity", "series_cnn", "log_mel"):
        (tmp_path / kind).mkdir()
        settings = plugin_class("common.backbones", kind).example(tmp_path / kind).settings
        with pytest.raises(BadInput, match="--format monai: expected a network for pictures"):
            export(tmp_path / kind, settings)
        assert not (tmp_path / kind / "bundle").exists()


@pytest.mark.parametrize("label", ["$__import__('os').abort()", " %b", "a@b", "%#a"])
def test_a_label_that_monai_would_evaluate_is_refused(label: str, tmp_path: Path) -> None:
    tasks = {"finding": {"kind": "classification", "labels": ["none", label]}}
    with pytest.raises(BadInput, match="which MONAI interprets"):
        export(tmp_path, plugin_class("common.backbones", "small_cnn").example(tmp_path).settings, tasks)
