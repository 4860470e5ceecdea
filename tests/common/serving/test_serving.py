"""A finished model as files: it gives what the run gave, anywhere, and refuses what was changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_torch
from typer.testing import CliRunner

import headwater
from common.messages import FinishRequest, decode, from_bytes
from common.serving.folder import read_config
from common.serving.network import open_model
from common.types import BadInput, DigestMismatch
from headwater.__main__ import make_app
from tests.server.rounds.test_loop import federate
from tests.tiny import DIM, backbone, run_config, site_config

CORNERS = [np.eye(DIM, dtype=np.float32)[index] for index in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's folder of a run that ended."""
    root = tmp_path_factory.mktemp("serving")
    federate(root / "run", [site_config(root, "north", budget={"epsilon": 1e4, "delta": 1e-5})])
    (path,) = root.glob("**/runs/run-1")
    return path


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, without the run."""
    return Path(shutil.copytree(folder / "model", tmp_path / "handed on"))


def rewrite_config(model: Path, change: Any) -> None:
    path = model / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_copy_of_the_model_gives_what_the_final_heads_give(folder: Path, model: Path) -> None:
    sent = decode(from_bytes((folder / "final_heads.bin").read_bytes()), FinishRequest)
    served = headwater.load(model)(CORNERS)
    frozen = backbone()
    features = frozen.encode([frozen.preprocess(corner) for corner in CORNERS]).numpy()
    for task, columns in (("colour", ["red", "green", "blue"]), ("size", ["small", "large"])):
        outputs = features @ sent.heads[task]["weight"].T + sent.heads[task]["bias"]
        expected = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        assert np.allclose(served[task].numpy(), expected, atol=1e-6)
        assert headwater.load(model).list_columns(task) == columns


def test_one_task_is_one_module(model: Path) -> None:
    opened = open_model(model)
    module = opened.torch("size")
    inputs = torch.stack([opened.backbones["backbone"].preprocess(corner) for corner in CORNERS])
    assert torch.allclose(module(inputs), opened(CORNERS)["size"], atol=1e-6)
    with pytest.raises(BadInput, match="task: expected one of colour, size, got none"):
        opened.torch()


def test_a_temperature_divides_what_the_head_learnt_and_keeps_the_prior_that_it_is_served_for(tmp_path: Path) -> None:
    declared = {"kind": "classification", "labels": ["a", "b"], "prior": {"a": 0.8, "b": 0.2}}
    tasks = {"colour": {**run_config().tasks["colour"].settings()}, "size": declared | {"head": {"prior": True}}}
    del tasks["colour"]
    tasks["size"]["labels"], tasks["size"]["prior"] = ["small", "large"], {"small": 0.8, "large": 0.2}
    federate(tmp_path / "run", [site_config(tmp_path, "north", budget={"epsilon": 1e4, "delta": 1e-5})], tasks=tasks)
    (model,) = tmp_path.glob("**/runs/run-1/model")
    plain = open_model(model)(CORNERS)["size"].double().logit()
    rewrite_config(model, lambda values: values["tasks"]["size"].update(temperature=4.0))
    divided = open_model(model)(CORNERS)["size"].double().logit()
    prior = np.log(4.0)
    assert torch.allclose(divided[:, 0] - prior, (plain[:, 0] - prior) / 4.0, atol=1e-4)
    assert not torch.allclose(plain[:, 0], torch.full((3,), prior, dtype=torch.float64), atol=1e-2)


def break_head(model: Path) -> None:
    path = model / "heads" / "size.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


def use_other_numbers(model: Path) -> None:
    content = save_torch({"weight": torch.zeros(2, DIM, dtype=torch.bfloat16)})
    (model / "heads" / "size.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite_config(model, lambda values: values["files"].update({"heads/size.safetensors": digest}))


def lose_head(model: Path) -> None:
    (model / "heads" / "size.safetensors").unlink()


def lose_backbone(model: Path) -> None:
    (model / "backbones" / "backbone.safetensors").unlink()


def change_preprocessing(model: Path) -> None:
    rewrite_config(model, lambda values: values["backbones"]["backbone"]["spec"].update(dim=DIM + 1))


def change_version(model: Path) -> None:
    rewrite_config(model, lambda values: values.update(version=9))


def lose_key(model: Path) -> None:
    rewrite_config(model, lambda values: values.pop("tasks"))


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def half_written(model: Path) -> None:
    empty(model)
    (model / "journal.jsonl").write_text("")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_head, "size.safetensors: the file was changed since the model was written"),
        (use_other_numbers, "size.safetensors: expected safetensors, got a damaged file"),
        (lose_head, "size.safetensors: expected a file of the model, found none"),
        (lose_backbone, "expected the weights of backbone backbone, found no file; name its safetensors file"),
        (change_preprocessing, "backbone backbone: its weights, preprocessing or other settings are not those"),
        (change_version, "config.json: expected version 1 of the format, got 9"),
        (lose_key, "config.json: expected a model's settings, got 1 wrong or missing key"),
        (empty, "expected a model's folder, which has a config.json"),
        (half_written, "it failed, or has not ended yet"),
    ],
)
def test_a_damaged_model_is_refused_in_one_sentence(model: Path, damage: Any, sentence: str) -> None:
    damage(model)
    with pytest.raises((BadInput, DigestMismatch), match=sentence) as refused:
        open_model(model)
    assert "\n" not in str(refused.value)


def test_a_model_without_its_backbone_takes_the_weights_from_elsewhere(model: Path, tmp_path: Path) -> None:
    before = open_model(model)(CORNERS)["size"]
    digest = read_config(model).backbones["backbone"].digest
    elsewhere = tmp_path / "own"
    elsewhere.mkdir()
    shutil.move(model / "backbones" / "backbone.safetensors", elsewhere / f"{digest}.safetensors")
    assert torch.equal(open_model(model, backbones=elsewhere)(CORNERS)["size"], before)


def rename_task(values: dict[str, Any]) -> None:
    values["tasks"]["../../evil"] = values["tasks"].pop("size")


def rename_backbone(values: dict[str, Any]) -> None:
    values["backbones"]["../evil"] = values["backbones"].pop("backbone")
    values["tasks"]["size"]["backbone"] = "../evil"


def name_trunk_outside(values: dict[str, Any]) -> None:
    values["tasks"]["size"]["trunk"] = "../../evil.trunk"


def name_no_backbone(values: dict[str, Any]) -> None:
    values["tasks"]["size"]["backbone"] = "another"


def train_nothing(values: dict[str, Any]) -> None:
    values["backbones"]["backbone"]["trainable"] = {"x": 1}


def pay_less_than_nothing(values: dict[str, Any]) -> None:
    values["privacy"] = {"unit": "patient", "delta": 1e-5, "epsilon": {"north": -1e6}}


def halve_a_character(values: dict[str, Any]) -> None:
    values["run"] = "\ud800"


def divide_by_nothing(values: dict[str, Any]) -> None:
    values["tasks"]["size"]["temperature"] = 1e-300


@pytest.mark.parametrize(
    "change",
    [
        rename_task,
        rename_backbone,
        name_trunk_outside,
        name_no_backbone,
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
    path = model / "heads" / "size.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    result = CliRunner().invoke(make_app(), ["export", str(model), str(tmp_path / "out"), "--format", "torch"])
    assert result.exit_code == 2 and "was changed since the model was written" in result.stderr
    assert not (tmp_path / "out").exists()
