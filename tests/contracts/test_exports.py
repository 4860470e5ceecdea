"""Every export format found in the folder: what it writes, and what it refuses before anything is written."""

from __future__ import annotations

import ast
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from typer.testing import CliRunner

from common.exports import PACKAGE, check_packages, open_format, write_export
from common.exports.parts.exported import select
from common.plugins import Plugin, kinds, plugin_class
from common.serving.network import open_model
from common.types import BadInput
from headwater.__main__ import make_app
from tests.finished import write_finished

ROOT = Path(__file__).resolve().parents[2]
FORMATS = kinds(PACKAGE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a small network for grey pictures."""
    folder = tmp_path_factory.mktemp("exports")
    return write_finished(folder / "model", plugin_class("common.backbones", "small_cnn").example(folder).settings)


def run(*arguments: object) -> tuple[int, str]:
    """Returns the exit code and all that the command wrote."""
    result = CliRunner().invoke(make_app(), ["export", *map(str, arguments)])
    return result.exit_code, result.output


def list_imports(path: Path) -> set[str]:
    """Returns the packages that a file names in its imports, wherever they stand."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return named | {
        (node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_states_its_inputs_and_outputs_and_has_a_card(name: str, model: Path, tmp_path: Path) -> None:
    code, output = run(model, tmp_path / "out", "--format", name)
    assert code == 0, output
    stated = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert stated["inputs"] and all(each["shape"][0] == "batch" for each in stated["inputs"])
    assert [each["columns"] for each in stated["outputs"]] == [["none", "glioma", "meningioma"]]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in files), "readable by others before the owner decides so"
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert "run-1" in card.text and card.data.library_name == open_format(name).library
    assert card.data.pipeline_tag == "image-classification"
    command = {
        "huggingface": "pip install transformers torch torchvision pillow",
        "monai": "--dataset_dir PICTURES",
        "onnx": "python predict.py a.png",
        "torch": "python load.py",
    }
    assert command.get(name, "") in card.text
    for path in files:
        if path.suffix == ".py":
            assert not list_imports(path) & {"common", "client", "server", "simulations", "headwater"}, path.name


class Altered(nn.Module):
    """A network of which a program computes something else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs_B: Tensor) -> Tensor:
        """Returns other numbers where it is not traced."""
        served: Tensor = self.inner(*inputs_B)
        return served if torch.compiler.is_exporting() else served * 0.9


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_written_that_gives_other_numbers(name: str, model: Path, tmp_path: Path) -> None:
    opened = open_format(name)
    exported = select(open_model(model), (), (), one_task=opened.one_task, name=name)
    altered = replace(exported, network=Altered(exported.network))
    with pytest.raises(BadInput, match="the exported program computes something else"):
        opened.write(altered, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_with_something_in_it_is_refused_and_stays_as_it_is(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    code, output = run(model, tmp_path, "--format", name)
    assert code == 2 and "expected a new or empty folder" in output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class Unfinished(Plugin):
    """A format that fails after its first file, and needs a package that nobody has."""

    kind: str = "unfinished"
    packages: ClassVar[tuple[str, ...]] = ("json", "no_such_package")
    extra: ClassVar[str | None] = "unfinished"
    one_task: ClassVar[bool] = True
    library: ClassVar[str] = "none"

    def write(self, exported: Any, folder: Path) -> list[str]:
        """Writes a file and a folder, and fails."""
        (folder / "inner").mkdir()
        (folder / "half").write_text("half")
        raise BadInput("refused")


def test_a_failure_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="refused"):
        write_export(open_model(model), tmp_path / "out", Unfinished())
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(BadInput, match=r"package no_such_package, which `pip install 'headwater\[unfinished\]'`"):
        check_packages(Unfinished())


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_names_an_extra_that_is_declared(name: str) -> None:
    opened = open_format(name)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = " ".join(extras.get(opened.extra or "", []))
    assert all(package in declared for package in opened.packages)


def test_an_unknown_format_names_the_nearest(model: Path, tmp_path: Path) -> None:
    code, output = run(model, tmp_path / "out", "--format", "torhc")
    assert code == 2 and "nearest: 'torch'" in output
    assert not (tmp_path / "out").exists()


def test_personal_heads_never_leave(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "personal_heads.private"
    own.write_bytes(b"contains unnoised information: never leaves\nanything")
    code, output = run(own, tmp_path / "out", "--format", "torch")
    assert code == 2 and "never leaves" in output and "federated model" in output
    (renamed := tmp_path / "heads.bin").write_bytes(own.read_bytes())
    code, output = run(renamed, tmp_path / "out", "--format", "torch")
    assert code == 2 and "never leaves" in output


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_text("")
    code, output = run(tmp_path / "run", tmp_path / "out", "--format", "torch")
    assert code == 2 and "it failed, or has not ended yet" in output


def test_a_backbone_that_may_not_be_handed_on_is_left_out(model: Path, tmp_path: Path) -> None:
    digest = open_model(model).config.backbones["backbone"].digest
    for number, wanted in enumerate(("backbone", digest, digest[:12])):
        code, output = run(model, tmp_path / str(number), "--format", "torch", "--without-backbone", wanted)
        assert code == 0 and f"digest {digest}" in output.replace("\n", "")
        assert digest in (tmp_path / str(number) / "README.md").read_text()
    network = torch.export.load(tmp_path / "0" / "model.pt2").module()
    opened = open_model(model)
    features = torch.randn(5, opened.backbones["backbone"].feature_dim)
    assert torch.allclose(network(features), opened.heads["finding"](features), atol=1e-6)
    assert len(list(network.parameters())) + len(list(network.buffers())) <= 4, "weights of the head only"
    code, output = run(model, tmp_path / "other", "--format", "torch", "--without-backbone", "bacbone")
    assert code == 2 and "expected one of backbone (" in output
