"""Exported networks give a model's own numbers: every kind of backbone, task and head, for any number of records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from common.exports import open_format, write_export
from common.plugins import kinds, plugin_class
from common.serving.network import Model, open_model
from common.types import BadInput
from tests.finished import write_finished

KINDS = kinds("common.backbones")
QUICK = ("identity", "small_cnn", "series_cnn", "log_mel")
# Tracing its three recurrent layers over 160 frames takes a minute.
TRACED = [kind for kind in KINDS if kind != "speaker_encoder"]


def stack_inputs(model: Model, items: Any) -> tuple[Tensor, ...]:
    """Returns the raw inputs of records; shorter ones are padded, as a text may be."""
    prepared = [model.open_raw("backbone").prepare(item) for item in items]
    return tuple(nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*prepared, strict=True))


def mark_slow(kinds: Sequence[str], quick: Sequence[str]) -> list[Any]:
    return [pytest.param(kind, marks=[] if kind in quick else [pytest.mark.slow]) for kind in kinds]


@pytest.mark.parametrize("kind", KINDS)
def test_one_module_from_raw_inputs_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    example = plugin_class("common.backbones", kind).example(tmp_path)
    model = open_model(write_finished(tmp_path / "model", example.settings))
    inputs = stack_inputs(model, example.items)
    torch.testing.assert_close(model.torch()(*inputs), model(example.items)["finding"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", mark_slow(TRACED, QUICK))
def test_a_program_of_torch_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    example = plugin_class("common.backbones", kind).example(tmp_path)
    model = open_model(write_finished(tmp_path / "model", example.settings))
    write_export(model, tmp_path / "out", open_format("torch"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for items in (example.items[:1], list(example.items) * 2):
        inputs = stack_inputs(model, items)
        torch.testing.assert_close(program(*inputs), model(items)["finding"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", mark_slow(TRACED, ["identity"]))
def test_an_onnx_file_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    example = plugin_class("common.backbones", kind).example(tmp_path)
    model = open_model(write_finished(tmp_path / "model", example.settings))
    write_export(model, tmp_path / "out", open_format("onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for items in (example.items[:1], list(example.items) * 2):
        inputs = {
            own.name: each.numpy() for own, each in zip(session.get_inputs(), stack_inputs(model, items), strict=True)
        }
        (served,) = session.run(["finding"], inputs)
        torch.testing.assert_close(torch.from_numpy(served), model(items)["finding"], rtol=1e-5, atol=1e-5)


SURE = ["none", "glioma", "meningioma"]
HEADS = {
    "centred, with a prior": {"kind": "classification", "labels": SURE, "head": {"centre": True, "prior": True}},
    "hidden": {"kind": "classification", "labels": SURE, "head": {"hidden": 5}},
    **{kind: plugin_class("common.tasks", kind).example().settings for kind in kinds("common.tasks")},
}


@pytest.mark.parametrize("name", HEADS)
def test_every_task_and_head_is_exported_as_it_is_served(name: str, tmp_path: Path) -> None:
    tasks = {"first": HEADS[name], "second": HEADS["hidden"]}
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}, tasks, {"first": 2.5}))
    write_export(model, tmp_path / "out", open_format("torch"))
    vectors = torch.randn(7, 6)
    served = torch.export.load(tmp_path / "out" / "model.pt2").module()(vectors)
    for own, expected in zip(served, model(list(vectors.numpy())).values(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
    stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert [len(each["columns"]) for each in stated["outputs"]] == [part.shape[1] for part in served]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_every_task_and_head_is_an_output_of_one_onnx_file(name: str, tmp_path: Path) -> None:
    tasks = {"first": HEADS[name], "second": HEADS["hidden"]}
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}, tasks, {"first": 2.5}))
    write_export(model, tmp_path / "out", open_format("onnx"))
    vectors = torch.randn(7, 6).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    served = dict(zip(tasks, session.run(list(tasks), {"vector": vectors}), strict=True))
    for task, expected in model(list(vectors)).items():
        torch.testing.assert_close(torch.from_numpy(served[task]), expected, rtol=1e-5, atol=1e-5)


def test_a_program_takes_the_tasks_that_are_named(tmp_path: Path) -> None:
    tasks = {name: HEADS["hidden"] for name in ("a", "b", "c")}
    model = open_model(write_finished(tmp_path / "model", {"kind": "identity", "dim": 6}, tasks))
    write_export(model, tmp_path / "out", open_format("torch"), tasks=["c"])
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    vectors = torch.randn(4, 6)
    torch.testing.assert_close(program(vectors), model(list(vectors.numpy()))["c"])
    with pytest.raises(BadInput, match="task: expected one of a, b, c, got 'd'"):
        write_export(model, tmp_path / "other", open_format("torch"), tasks=["d"])
    assert not (tmp_path / "other").exists()
