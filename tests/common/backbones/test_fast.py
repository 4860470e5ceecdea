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


class NormAndActivation(nn.BatchNorm2d):
    """A library's own BatchNorm, which holds the activation that follows."""

    def __init__(self, channels: int, factor: float = 1.0) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act(nn.BatchNorm2d.forward(self, input)) * self.factor
        return output


class ReadTwice(nn.Module):
    """A convolution whose output is also read beside the BatchNorm; all that comes before is called twice."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.shared = NormAndActivation(3, factor)
        self.convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, items_B: Tensor) -> Tensor:
        items_B = self.shared(self.first(self.shared(self.first(items_B))))
        maps = self.convolution(items_B)
        both: Tensor = (self.norm(maps) + maps).mean(dim=(2, 3))
        return both


class RefusesChannelsLast(nn.Module):
    """A network of which no kernel takes what the fast copy is given."""

    def forward(self, items_B: Tensor) -> Tensor:
        if items_B.is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError("expected another order")
        return items_B.mean(dim=(2, 3))


def compare(network: nn.Module, dim: int, items: Tensor) -> FastBackbone:
    """Checks that the fast copy gives the original's features, and returns it."""
    original = frozen(network, dim, normalize=False)
    fast = FastBackbone(original, "float32", CPU)
    with torch.inference_mode():
        torch.testing.assert_close(fast(items), original(items), rtol=1e-5, atol=1e-5)
    return fast


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_librarys_norm_is_folded_where_it_is_a_norm_and_what_it_holds(factor: float) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), NormAndActivation(8, factor), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fast = compare(network, 8, images())
    assert fast.error, "the copy is used"
    assert any(isinstance(part, nn.BatchNorm2d) for part in fast._fast.modules()) == (factor != 1.0)


def test_a_norm_is_folded_only_where_nothing_else_reads_its_convolution() -> None:
    fast = compare(ReadTwice(1.0), 8, images())
    assert fast.error, "the copy is used"
    assert sum(isinstance(part, nn.BatchNorm2d) for part in fast._fast.modules()) == 2


def test_layers_that_libraries_hang_things_on_give_the_originals_features() -> None:
    linear = nn.Linear(6, 6)
    linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3.0,))
    attention = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    convolution = nn.Conv2d(1, 4, 3, padding="same", groups=1)
    mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", dilation=1, groups=2)
    network = nn.Sequential(linear, attention, nn.Unflatten(1, (1, 5)), convolution, mirrored, nn.Flatten())
    fast = compare(network, 4 * 5 * 6, torch.rand(6, 5, 6, generator=torch.Generator().manual_seed(2)))
    assert fast.error, "the copy is used"


def test_where_a_kernel_is_missing_the_original_encodes() -> None:
    network = nn.Sequential(RefusesChannelsLast(), nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 5, 1), nn.Flatten())
    assert compare(network, 5, images()).error == 0.0


@pytest.mark.parametrize("name", ["mobilenet_v2", "vision_transformer"])
def test_a_records_features_do_not_depend_on_the_records_beside_it(name: str) -> None:
    torch.manual_seed(0)
    if name == "mobilenet_v2":
        network = models.get_model(name, weights=None)
    else:
        sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
        network = models.VisionTransformer(image_size=48, patch_size=16, **sizes)
    fast = FastBackbone(frozen(network, 1000), "float32", CPU)
    items = images(8)
    with torch.inference_mode():
        together = fast(items)
        for position in range(3):
            others = torch.full_like(items, 1e4)
            others[-1 - position] = items[position]
            assert torch.equal(fast(others)[-1 - position], together[position])
