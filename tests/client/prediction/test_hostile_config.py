"""A `config.json` from elsewhere names nothing outside its folder, and what is wrong in it is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.serving.folder import read_config
from common.types import BadInput
from headwater.__main__ import make_app
from tests.client.prediction.conftest import FINDING, MakeModel


@pytest.fixture
def model(make_model: MakeModel) -> Path:
    """A whole model."""
    return make_model({"finding": {**FINDING, "backbone": "pictures"}})


def rename_task(values: dict[str, Any]) -> None:
    values["tasks"]["../../evil"] = values["tasks"].pop("finding")


def rename_backbone(values: dict[str, Any]) -> None:
    values["backbones"]["../evil"] = values["backbones"].pop("pictures")
    values["tasks"]["finding"]["backbone"] = "../evil"


def name_trunk_outside(values: dict[str, Any]) -> None:
    values["tasks"]["finding"]["trunk"] = "../../evil.trunk"


def lose_backbone(values: dict[str, Any]) -> None:
    values["tasks"]["finding"]["backbone"] = "another"


def train_nothing(values: dict[str, Any]) -> None:
    values["backbones"]["pictures"]["trainable"] = {"x": 1}


def pay_less_than_nothing(values: dict[str, Any]) -> None:
    values["privacy"] = {"unit": "patient", "delta": 1e-5, "epsilon": {"north": -1e6}}


def halve_a_character(values: dict[str, Any]) -> None:
    values["run"] = "\ud800"


def divide_by_nothing(values: dict[str, Any]) -> None:
    values["tasks"]["finding"]["temperature"] = 1e-300


@pytest.mark.parametrize(
    "change",
    [
        rename_task,
        rename_backbone,
        name_trunk_outside,
        lose_backbone,
        train_nothing,
        pay_less_than_nothing,
        halve_a_character,
        divide_by_nothing,
    ],
)
def test_a_hostile_config_is_refused_in_one_sentence(model: Path, change: Any) -> None:
    path = model / "config.json"
    read_config(model)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(BadInput, match="expected a model's settings") as refused:
        read_config(model)
    assert "\n" not in str(refused.value)


def test_an_export_of_a_changed_model_ends_as_a_prediction_does(model: Path, tmp_path: Path) -> None:
    path = model / "heads" / "finding.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    result = CliRunner().invoke(make_app(), ["export", str(model), str(tmp_path / "out"), "--format", "torch"])
    assert result.exit_code == 2 and "was changed since the model was written" in result.stderr
    assert not (tmp_path / "out").exists()
