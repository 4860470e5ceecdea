"""The fast copy of an encoder: the original's features, under the original's digest, or the original itself."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from common.backbones import Projection
from common.backbones.parts.projection import ProjectionLayer
from common.model.backbones import FrozenBackbone
from common.model.fast import TOLERANCE, FastBackbone, Precision

CPU = torch.device("cpu")


class DependsOnValues(nn.Module):
    """A forward pass that no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, items_B: Tensor) -> Tensor:
        maps = self.norm(self.convolution(items_B))
        return maps.mean(dim=(2, 3)) if bool(maps.sum() < 1e30) else maps.amax(dim=(2, 3))


class SaysItIsTraceable(nn.Module):
    """Traced without an error, and wrongly: what depends on the batch's shape is frozen at another one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.calls = 0

    def forward(self, items_B: Tensor) -> Tensor:
        self.calls += 1  # Tracing is the first call.
        return self.norm(items_B).mean(dim=(2, 3)) * (2.0 if self.calls == 1 else 1.0)


def frozen(encoder: nn.Module, dim: int, *, normalize: bool = True) -> FrozenBackbone:
    generator = torch.Generator().manual_seed(0)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                cast(Tensor, value).copy_(0.5 + torch.rand(value.shape, generator=generator))
    projection = ProjectionLayer(Projection(normalize=normalize), dim)
    return FrozenBackbone(encoder, projection)


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def encoder(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    if name.startswith("resnet"):
        dim = model.fc.in_features
        model.fc = nn.Identity()
    else:
        dim = model.classifier[-1].in_features
        model.classifier[-1] = nn.Identity()
    return model, dim


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "resnet18"])
def test_features_are_the_originals_and_no_batch_norm_is_left(name: str) -> None:
    original = frozen(*encoder(name))
    before = {key: value.clone() for key, value in original.state_dict().items()}
    fast = FastBackbone(original, "float32", CPU)
    with torch.inference_mode():
        expected = original(images())
        assert float((fast(images()) - expected).norm(dim=1).max() / expected.norm(dim=1).min()) < TOLERANCE
    assert fast.error is not None and fast.error < TOLERANCE
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fast._fast.modules())
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())


def test_half_precision_says_how_far_off_it_is() -> None:
    original = frozen(*encoder("mobilenet_v2"))
    fast = FastBackbone(original, "bfloat16", CPU)
    with torch.inference_mode():
        features, expected = fast(images(4)), original(images(4))
    assert features.dtype == torch.float32
    assert fast.error == pytest.approx(float((features - expected).norm(dim=1).max()), rel=1e-3)
    assert TOLERANCE < fast.error < 0.2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_encoder_that_cannot_be_traced_keeps_its_batch_norms(precision: Precision) -> None:
    original = frozen(DependsOnValues(), 8)
    fast = FastBackbone(original, precision, CPU)
    with torch.inference_mode():
        features, expected = fast(images()), original(images())
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 if precision == "float32" else 5e-2)


def test_a_copy_that_computes_something_else_is_not_used() -> None:
    original = frozen(SaysItIsTraceable(), 3, normalize=False)
    fast = FastBackbone(original, "float32", CPU)
    with torch.inference_mode():
        original(images())
        assert torch.equal(fast(images()), original(images()))
