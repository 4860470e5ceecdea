"""The CIFAR ResNets (He et al. 2015, Section 4.2): pictures of 32 x 32, three stages of basic blocks.

No torchvision layout: shows what bringing one's own architecture takes: this one file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from pydantic import AfterValidator
from safetensors.torch import save_file
from torch import Tensor, nn

from common.backbones import Architecture, Example, Pretrained
from common.backbones.parts.boundary import Divided, blocks_of, divide_chain
from common.backbones.parts.image_preprocessing import ImagePreprocessing
from common.backbones.parts.projection import Projection
from common.backbones.parts.random import random_weights
from common.backbones.parts.weights import load_strict, read_state
from common.plugins import LocalPath, Plugin
from common.types import BadInput

_CLASSIFIER = "linear."
_PIXELS = ImagePreprocessing(resize=32, crop=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _six_n_and_two(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"expected 6n + 2 layers, such as 20, 32, 44, 56 or 110, got {depth}")
    return depth


@final
class CifarResnet(Plugin):
    """Settings of a CIFAR ResNet; features are the 64 averages after its last stage.

    Attributes:
        depth: 6n + 2 layers.
        weights: the whole model, with its classifier `linear`, as safetensors or a state dict of torch.
        projection: what happens to the features before they leave the backbone.
    """

    kind: Literal["cifar_resnet"] = "cifar_resnet"
    depth: Annotated[int, AfterValidator(_six_n_and_two)] = 20
    weights: LocalPath | None = None
    projection: Projection | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """The smallest one with random weights in a file, and random pictures."""
        path = folder / "resnet8.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = _Encoder(num_blocks=1).state_dict()
            save_file({**state, "linear.weight": torch.randn(10, 64), "linear.bias": torch.randn(10)}, path)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        projection = {"dim": 8, "normalize": True}
        settings = {"kind": "cifar_resnet", "depth": 8, "weights": str(path), "projection": projection}
        return Example(settings, list(pixels))

    def resolved(self) -> CifarResnet:
        """Without weights."""
        return self.model_copy(update={"weights": None})

    def architecture(self) -> Architecture:
        """Pictures B x 3 x 32 x 32 -> features B x 64."""
        return Architecture(_Encoder((self.depth - 2) // 6), 64)

    def pretrained(self) -> Pretrained:
        """The encoder, and the classifier for a projection."""
        if self.weights is None:
            raise BadInput("weights: expected a file with a CIFAR ResNet's weights, got nothing")
        tensors = read_state(self.weights)
        encoder = self.architecture().module
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_CLASSIFIER)}
        load_strict(encoder, own, f"weights: {self.weights}")
        return Pretrained(encoder.state_dict(), tensors.get("linear.weight"))

    def random(self) -> Pretrained:
        """Weights as torch initialises them."""
        return random_weights(self.architecture(), nn.Linear(64, 65).weight, torch.randn(4, 3, 32, 32))

    def weights_file(self) -> Path | None:
        """The local weights."""
        return self.weights

    def blocks(self, encoder: nn.Module) -> list[str]:
        """The first convolution and the three stages."""
        return blocks_of(encoder)

    def divide(self, encoder: nn.Module, block: str) -> Divided:
        """Both sides of a block."""
        return divide_chain(encoder, block, (3, 32, 32))

    def preprocess(self, item: Any) -> Tensor:
        """3 x 32 x 32 from a picture, resized where it has another size. Raises BadRecord."""
        return _PIXELS.apply(item)


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.added = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut without parameters (option A): every other pixel, and channels of zeros on both sides.
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        inside = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inside)) + shortcut)


class _Encoder(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, num_blocks)
        self.layer2 = _stage(16, 32, 2, num_blocks)
        self.layer3 = _stage(32, 64, 2, num_blocks)

    def forward(self, pixels_B: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(pixels_B)))
        pooled_B64: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return pooled_B64


def _stage(inner: int, outer: int, stride: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(inner, outer, stride), *(_Block(outer, outer, 1) for _ in range(num_blocks - 1)))
