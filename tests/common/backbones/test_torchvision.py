"""Torchvision models: features are the classifier's input, settings are checked, real weights load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from common.backbones import find_weights_file
from common.backbones.parts.weights import compute_digest, load_strict
from common.backbones.torchvision import Torchvision
from common.model.backbones import load_blob, open_pretrained, open_random
from common.types import BackboneBlob, BadInput

PREPROCESS = {"resize": 32, "crop": None, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def settings(**changes: Any) -> dict[str, Any]:
    return {"kind": "torchvision", "model": "shufflenet_v2_x0_5", "preprocess": PREPROCESS, **changes}


@pytest.mark.parametrize(
    ("model", "dim"),
    [
        ("resnet18", 512),
        ("mobilenet_v3_small", 1024),
        ("efficientnet_b0", 1280),
        ("densenet121", 1024),
        ("convnext_tiny", 768),
        ("swin_t", 768),
        ("mnasnet0_5", 1280),
        ("googlenet", 1024),
    ],
)
def test_features_are_what_the_last_linear_layer_sees(model: str, dim: int) -> None:
    kind = Torchvision.model_validate(settings(model=model))
    full = kind._build().eval()
    classifier = [module for module in full.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder = kind.architecture()
    images = torch.randn(2, 3, 32, 32)
    own = encoder.module.eval().state_dict()
    load_strict(encoder.module, {name: tensor for name, tensor in full.state_dict().items() if name in own}, "full")
    with torch.no_grad():
        full(images)
        features = encoder.module(images)
    assert encoder.feature_dim == dim
    torch.testing.assert_close(features, seen[0])


def test_a_vision_transformer_is_built_for_the_preprocessing_it_gets() -> None:
    kind = Torchvision.model_validate(settings(model="vit_b_32", preprocess={**PREPROCESS, "resize": 64}))
    with torch.device("meta"):
        encoder = kind.architecture()
        assert encoder.module(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.feature_dim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "mobilnet_v2"}, r"backbone\.model: .*nearest: 'mobilenet_v2'"),
        ({"weights": "IMAGENET1K_V9"}, r"backbone: weights: .*nearest: 'IMAGENET1K_V1'"),
        ({"preprocess": None}, r"backbone: preprocess: expected settings"),
        ({"preprocess": {**PREPROCESS, "resiz": 3}}, r"backbone\.preprocess\.resiz: unknown key \(nearest: 'resize'\)"),
        ({"projection": {"dims": 8, "normalize": True}}, r"backbone\.projection\.dims: .*nearest: 'dim'"),
        ({"weight": "x"}, r"backbone\.weight: unknown key"),
        ({}, r"backbone\.weights: expected a name of torchvision's or a local file, got nothing"),
        ({"weights": "absent.pth"}, r"backbone\.weights: expected a weights file, found none"),
    ],
)
def test_wrong_settings_are_one_sentence_with_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        open_pretrained(settings(**changes), "backbone")


def test_a_model_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(BadInput, match=r"backbone\.model: expected one that ends in a linear classifier"):
        open_random(settings(model="squeezenet1_0"), "backbone", seed=0)


def test_weights_of_another_model_are_refused_by_file(tmp_path: Path) -> None:
    save_file(models.shufflenet_v2_x1_0(weights=None).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"backbone\.weights: .*other\.safetensors does not fit the architecture"):
        open_pretrained(settings(weights=str(tmp_path / "other.safetensors")), "backbone")


def test_pickled_and_safe_weights_give_the_same_backbone_whatever_the_classifiers_size(tmp_path: Path) -> None:
    state = models.shufflenet_v2_x0_5(weights=None).state_dict()
    torch.save(state, tmp_path / "full.pth")
    own = {**state, "fc.weight": state["fc.weight"][:7].clone(), "fc.bias": state["fc.bias"][:7].clone()}
    save_file(own, tmp_path / "own.safetensors")
    full = open_pretrained(settings(weights=str(tmp_path / "full.pth")), "backbone")
    seven = open_pretrained(settings(weights=str(tmp_path / "own.safetensors"), num_classes=7), "backbone")
    assert full.digest == seven.digest


def test_a_relative_weights_path_is_relative_to_its_file(tmp_path: Path) -> None:
    kind = Torchvision.model_validate(settings(weights="weights/a.pth"), context={"base": tmp_path})
    assert find_weights_file(kind) == tmp_path / "weights" / "a.pth"


def test_named_weights_bring_their_preprocessing_into_the_digest() -> None:
    named = Torchvision.model_validate({"kind": "torchvision", "model": "mobilenet_v2", "weights": "IMAGENET1K_V2"})
    resolved = named.resolved()
    assert resolved.weights is None
    assert resolved.preprocess_settings is not None
    assert (resolved.preprocess_settings.resize, resolved.preprocess_settings.crop) == (232, 224)


def test_changed_preprocessing_is_another_backbone() -> None:
    first = open_random(settings(), "backbone", seed=0)
    other = open_random(settings(preprocess={**PREPROCESS, "antialias": False}), "backbone", seed=0)
    assert first.digest != other.digest


def test_unresolved_settings_are_refused_although_their_digest_is_right() -> None:
    backbone = open_random(settings(), "backbone", seed=0)
    spec = backbone.spec.replace('"weights":null', '"weights":"/etc/model.pth"')
    digest = compute_digest(spec, backbone.module.state_dict().items())
    with pytest.raises(BadInput, match="without any location of weights"):
        load_blob(BackboneBlob(spec, backbone.blob().weights, digest))


def test_the_real_mobilenet_gives_its_features_and_their_projection(assets: Path) -> None:
    weights = assets / "backbones" / "mobilenet_v2" / "model.safetensors"
    real = settings(model="mobilenet_v2", weights=str(weights), preprocess={**PREPROCESS, "resize": 64})
    whole = open_pretrained(real, "backbone")
    projection = {"dim": 128, "shift": "batch_norm", "normalize": True}
    projected = open_pretrained({**real, "projection": projection}, "backbone")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 90, 80, 3), dtype=np.uint8)
    inputs = torch.stack([whole.preprocess(item) for item in pixels])

    model = models.mobilenet_v2(weights=None)
    model.load_state_dict(load_file(weights))
    with torch.no_grad():
        expected = model.eval().features(inputs).mean((2, 3))
    features = whole.encode(inputs)
    assert (whole.feature_dim, projected.feature_dim) == (1280, 128)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    state = projected.module.projection
    shifted = (expected - state.shift) @ state.matrix
    torch.testing.assert_close(
        projected.encode(inputs), shifted / shifted.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(state.matrix.T @ state.matrix, torch.eye(128), rtol=0, atol=1e-5)
