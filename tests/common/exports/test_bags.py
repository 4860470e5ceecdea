"""A model of bags is exported whole: one network from a bag's items, however many, to what the model tells."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.exports import open_format, write_export
from common.inputs import Several
from common.plugins import plugin_class
from common.serving.network import Model, open_model
from common.types import BadInput
from tests.finished import write_finished


def open_bags(folder: Path, pooling: str, **changes: Any) -> tuple[Model, Sequence[Any]]:
    """Returns a model on bags of at most 20 pictures, and pictures."""
    kind: Any = plugin_class("common.backbones", "small_cnn")
    example = kind.example(folder)
    bag = {"kind": "bag", "max_items": 20, "encoder": dict(example.settings), **changes}
    head = {"kind": "classification", "labels": ["no", "yes"], "head": {"pooling": pooling, "hidden": 5}}
    return open_model(write_finished(folder / "model", bag, {"found": head})), example.items


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["attention", "gated_attention", "mean", "max"])
def test_a_program_takes_whole_bags_of_any_number_of_items(pooling: str, tmp_path: Path) -> None:
    model, pictures = open_bags(tmp_path, pooling)
    write_export(model, tmp_path / "out", open_format("torch"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    raw = model.open_raw("backbone")
    for count in (1, 2, 17, 20, 33):
        bags = [Several([pictures[(at + first) % len(pictures)] for at in range(count)]) for first in (0, 1)]
        inputs = (torch.stack([raw.prepare(bag)[0] for bag in bags]),)
        # Of more than 20 items those are read that the model reads.
        assert inputs[0].shape[:2] == (2, min(count, 20))
        torch.testing.assert_close(program(*inputs), model(bags)["found"], rtol=1e-5, atol=1e-5)
    stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert stated["inputs"][0]["shape"] == ["batch", "items", 1, 12, 12]
    assert stated["before"][0] == {"step": "items", "most": 20, "more": "evenly spread"}


@pytest.mark.slow
def test_the_program_beside_an_onnx_file_of_bags_reads_folders(tmp_path: Path) -> None:
    model, pictures = open_bags(tmp_path, "attention", max_items=4)
    write_export(model, tmp_path / "out", open_format("onnx"))
    folders = []
    for count in (1, 3, 4, 7):
        folders.append(tmp_path / f"bag{count}")
        folders[-1].mkdir()
        for at in range(count):
            picture = pictures[at % len(pictures)]
            Image.fromarray(np.asarray(picture)).save(folders[-1] / f"{at}.png")
    done = run_beside(tmp_path / "out", *map(str, folders))
    bags = [Several([pictures[at % len(pictures)] for at in range(count)]) for count in (1, 3, 4, 7)]
    rows = [[float(cell) for cell in line.split(",")[1:]] for line in done.stdout.splitlines()[1:]]
    torch.testing.assert_close(torch.tensor(rows), model(bags)["found"], rtol=1e-5, atol=1e-5)
    (tmp_path / "strict").mkdir()
    refusing, _ = open_bags(tmp_path / "strict", "attention", max_items=4, over="leave_out")
    write_export(refusing, tmp_path / "strict" / "out", open_format("onnx"))
    done = run_beside(tmp_path / "strict" / "out", *map(str, folders))
    assert "expected a folder with one to 4 pictures, got 7" in done.stderr and len(done.stdout.splitlines()) == 4


def run_beside(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "predict.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_a_format_without_bags_says_so(tmp_path: Path) -> None:
    model, _ = open_bags(tmp_path, "mean")
    for name, said in (
        ("huggingface", "no backbone of bags; choose onnx or torch"),
        ("monai", "export another format"),
    ):
        with pytest.raises(BadInput, match=said):
            write_export(model, tmp_path / "out", open_format(name))


@pytest.mark.slow
def test_bags_of_sentences_of_several_lengths_are_one_input(tmp_path: Path) -> None:
    kind: Any = plugin_class("common.backbones", "transformers")
    example = kind.example(tmp_path)
    bag = {"kind": "bag", "max_items": 4, "encoder": dict(example.settings)}
    head = {"kind": "classification", "labels": ["no", "yes"], "head": {"pooling": "attention"}}
    model = open_model(write_finished(tmp_path / "model", bag, {"found": head}))
    write_export(model, tmp_path / "out", open_format("torch"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for count in (1, 3):
        several = Several([example.items[at % len(example.items)] for at in range(count)])
        inputs = [each[None] for each in model.open_raw("backbone").prepare(several)]
        torch.testing.assert_close(program(*inputs), model([several])["found"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_head_of_bags_is_exported_without_the_backbone(tmp_path: Path) -> None:
    bag = {"kind": "bag", "max_items": 4, "encoder": {"kind": "identity", "dim": 3}}
    head = {"kind": "classification", "labels": ["no", "yes"], "head": {"pooling": "attention"}}
    model = open_model(write_finished(tmp_path / "model", bag, {"found": head}))
    write_export(model, tmp_path / "out", open_format("torch"), without=["backbone"])
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    rng = np.random.default_rng(0)
    bags = [Several([rng.normal(size=3).astype(np.float32) for _ in range(count)]) for count in (1, 3, 4)]
    own = program(model.encode("backbone", bags))
    torch.testing.assert_close(own, model(bags)["found"], rtol=1e-5, atol=1e-5)
    (stated,) = json.loads((tmp_path / "out" / "preprocessing.json").read_text())["inputs"]
    assert stated["shape"] == ["batch", 4, 4] and "the last value of a place is above 0" in stated["meaning"]
