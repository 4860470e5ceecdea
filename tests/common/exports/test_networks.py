"""Exported networks give a model's own numbers: every kind of backbone, task and head, for any number of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import headwater
from common.exports import open_format, write_export
from common.plugins import kinds, plugin_class
from common.serving.network import Model
from tests.finished import write_finished

QUICK = {"identity", "small_cnn", "series_cnn", "log_mel", "cifar_resnet"}
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in kinds("common.backbones")]


def stack_inputs(model: Model, items: Any) -> tuple[Tensor, ...]:
    """Returns the raw inputs of records; shorter ones are padded, as a text may be."""
    prepared = [model.open_raw("backbone").prepare(item) for item in items]
    return tuple(nn.utils.rnn.pad_sequence(list(column), batch_first=True) for column in zip(*prepared, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_torch_gives_the_models_numbers(kind: str, tmp_path: Path) -> None:
    example = plugin_class("common.backbones", kind).example(tmp_path)
    model = headwater.load(write_finished(tmp_path / "model", example.settings))
    write_export(model, tmp_path / "out", open_format("torch"))
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for items in (example.items[:1], list(example.items) * 2):
        inputs = stack_inputs(model, items)
        torch.testing.assert_close(program(*inputs), model(items)["finding"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.torch()(*inputs), model(items)["finding"], rtol=1e-5, atol=1e-5)
