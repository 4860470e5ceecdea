"""A backbone divided at a block: both sides are the whole, what trains is separable, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.backbones import Backbone, open_pretrained
from common.backbones._boundary import Divisible
from common.config import Trainable
from common.plugins import kinds, plugin_class
from common.trunks import cut

KINDS = [kind for kind in kinds("common.backbones") if issubclass(plugin_class("common.backbones", kind), Divisible)]
IMAGE = {"resize": 36, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def opened(kind: str, folder: Path) -> tuple[Backbone, Tensor]:
    """A kind's own example with its inputs."""
    example = plugin_class("common.backbones", kind).example(folder)
    backbone = open_pretrained(example.settings, "backbone")
    return backbone, torch.stack([backbone.preprocess(item) for item in example.items])


def torchvision_model(model: str, folder: Path) -> Backbone:
    from safetensors.torch import save_file
    from torchvision import models

    torch.manual_seed(0)
    path = folder / f"{model}.safetensors"
    module = models.get_model(model, weights=None, num_classes=5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.02, 0.1)
    save_file(module.state_dict(), path)
    settings = {"kind": "torchvision", "model": model, "weights": str(path), "num_classes": 5, "preprocess": IMAGE}
    return open_pretrained({**settings, "projection": {"normalize": True}}, "backbone")


def check_every_block(backbone: Backbone, inputs: Tensor) -> None:
    with torch.no_grad():
        # The modules themselves: `encode` may fold BatchNorms, which rounds in another way.
        whole = backbone.module(inputs)
    blocks = backbone.kind.blocks(backbone.module.encoder)
    for block in ["input", *blocks]:
        parts = cut(backbone, Trainable(**{"from": block}), "backbone.trunk", "trainable", seed=0)
        with torch.no_grad():
            again = parts.trunk(parts.below.module(inputs))
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
        assert parts.below.feature_dim == parts.below.encode(inputs[:1]).shape[1]
    with torch.no_grad():
        assert torch.equal(backbone.module(inputs), whole), "dividing must leave the backbone as it is"


@pytest.mark.parametrize("kind", KINDS)
def test_below_and_above_are_the_whole_at_every_block(kind: str, tmp_path: Path) -> None:
    check_every_block(*opened(kind, tmp_path))


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2", "efficientnet_b0", "mobilenet_v3_small", "densenet121"])
def test_usual_torchvision_models_are_divided_at_every_block(model: str, tmp_path: Path) -> None:
    check_every_block(torchvision_model(model, tmp_path), torch.randn(3, 3, 32, 32))
