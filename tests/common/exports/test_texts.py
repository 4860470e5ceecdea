"""Models that hear or write texts are exported: programs that know nothing of Headwater read the same texts."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.backbones.parts.language.vocabulary import make_vocabulary
from common.exports import open_format, write_export
from common.exports.parts.exported import select
from common.inputs import Audio, Text
from common.plugins import plugin_class
from common.serving.network import Model, open_model
from common.types import BadInput
from tests import spoken
from tests.finished import write_finished

READ = """
import json, sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from written import read_text
with open(sys.argv[1] + "/preprocessing.json", encoding="utf-8") as file:
    (stated,) = json.load(file)["outputs"]
program = torch.export.load(sys.argv[1] + "/model.pt2").module()
for path in sys.argv[2:]:
    with np.load(path) as arrays:
        for told in program(*(torch.from_numpy(arrays[name]) for name in arrays.files)):
            print(json.dumps(read_text(told.numpy(), stated)))
"""


def open_spoken(folder: Path, **changes: Any) -> tuple[Model, list[Audio]]:
    """Returns a model of transcripts and recordings of several lengths."""
    spoken.write_network(folder / "network")
    backbone = {**spoken.BACKBONE, "folder": str(folder / "network")}
    model = open_model(write_finished(folder / "model", backbone, {"finding": {**spoken.TASK, **changes}}))
    rng = np.random.default_rng(0)
    words = [["low"], ["high", "low", "low"], ["low", "high"]]
    return model, [Audio(spoken.say(each, 0.5, rng).astype(np.float32), spoken.RATE) for each in words]


def open_written(folder: Path, **changes: Any) -> tuple[Model, list[Text]]:
    """Returns a model that writes texts, and sources of several lengths."""
    folder.mkdir(exist_ok=True)
    example = plugin_class("common.backbones", "seq2seq").example(folder)
    # A graph holds the loop as often as there are places: few of them take seconds, not minutes.
    settings = {**example.settings, "max_tokens": 5, "weights": str(folder / "short.safetensors")}
    kind: Any = plugin_class("common.backbones", "seq2seq").model_validate(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind.save(kind.build(make_vocabulary(["der Befund ist gut .", "kein Schatten ."], 40)), {})
    task = {"kind": "seq2seq", "max_tokens": 5, **changes}
    model = open_model(write_finished(folder / "model", settings, {"finding": task}))
    return model, [Text(item.first) for item in example.items]


def list_texts(model: Model, items: Sequence[Any]) -> list[tuple[str, float]]:
    """Returns the text and the confidence of each record, as the model itself tells them."""
    outputs = model.heads["finding"].compute_outputs(model.encode("backbone", items))
    cells = model.tasks["finding"].codec.decode(outputs)
    return [(text, float(sure)) for (text,), sure in zip(cells, model(items)["finding"], strict=True)]


def write_inputs(model: Model, items: Sequence[Any], folder: Path) -> list[Path]:
    """Writes the network's inputs of each record, because records of one batch have one length."""
    raw, paths = model.open_raw("backbone"), []
    for number, item in enumerate(items):
        paths.append(folder / f"{number}.npz")
        values = zip(raw.tensors, raw.prepare(item), strict=True)
        np.savez(paths[-1], **{tensor.name: value[None].numpy() for tensor, value in values})
    return paths


def check_same(found: Sequence[Sequence[Any]], expected: Sequence[tuple[str, float]]) -> None:
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert len(set(expected)) > 1
    np.testing.assert_allclose([float(sure) for _, sure in found], [sure for _, sure in expected], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("opened", "changes"),
    [
        (open_spoken, {}),
        (open_spoken, {"beam": 4, "language": {"texts": ["low high"], "weight": 2}}),
        (open_written, {}),
    ],
)
def test_a_program_of_torch_tells_the_models_texts(opened: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model, items = opened(tmp_path, **changes)
    write_export(model, tmp_path / "out", open_format("torch"))
    command = [sys.executable, "-c", READ, str(tmp_path / "out"), *map(str, write_inputs(model, items, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    check_same([json.loads(line) for line in done.stdout.splitlines()], list_texts(model, items))


@pytest.mark.slow
@pytest.mark.parametrize("opened", [open_spoken, open_written])
def test_an_onnx_file_tells_the_models_texts(opened: Any, tmp_path: Path) -> None:
    model, items = opened(tmp_path)
    write_export(model, tmp_path / "out", open_format("onnx"))
    asked = [[item.first] for item in items] if opened is open_written else write_inputs(model, items, tmp_path)
    found = []
    for each in asked:
        arguments = each if isinstance(each, list) else [str(each)]
        command = [sys.executable, "predict.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path / "out")
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        found += [(row["finding"], row["finding: confidence"]) for row in rows]
    check_same(found, list_texts(model, items))


def test_a_format_that_holds_no_texts_says_so(tmp_path: Path) -> None:
    for opened, folder in ((open_spoken, tmp_path / "spoken"), (open_written, tmp_path / "written")):
        model, _ = opened(folder)
        with pytest.raises(BadInput, match="choose onnx or torch"):
            write_export(model, tmp_path / "out", open_format("huggingface"))
    with pytest.raises(BadInput, match="--without-backbone: .* whose decoder writes its texts"):
        select(model, [], ["backbone"], one_task=False, name="torch")
    several, _ = open_written(tmp_path / "several", beam=4)
    with pytest.raises(BadInput, match=r"tasks\.finding\.beam: expected 1"):
        select(several, [], [], one_task=False, name="torch")


def test_what_the_network_tells_is_stated(tmp_path: Path) -> None:
    model, _ = open_spoken(tmp_path)
    exported = select(model, [], [], one_task=False, name="torch")
    (stated,) = exported.describe()["outputs"]
    assert (stated["prediction"], stated["text"]["symbols"]) == ("text", ("low", "high"))
    assert torch.Size(stated["shape"][1:]) == exported.find_shape("finding") == (32, 3)
