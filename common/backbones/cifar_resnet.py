"""The CIFAR ResNets (He et al. 2015, Section 4.2): pictures of 32 x 32, three stages of basic blocks.

Its layout is not torchvision's. The network itself is in `common.backbones.parts.nets`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import AfterValidator

from common.backbones import Architecture, Divided, Example, Pretrained, Projection
from common.backbones.parts.images import ImagePreprocessing
from common.plugins import LocalPath, Plugin
from common.types import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

_CLASSIFIER = "linear."
_PIXELS = ImagePreprocessing(resize=32, crop=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _check_depth(depth: int) -> int:
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
    depth: Annotated[int, AfterValidator(_check_depth)] = 20
    weights: LocalPath | None = None
    projection: Projection | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns the smallest one with random weights in a file, and random pictures."""
        import torch
        from safetensors.torch import save_file

        from common.backbones.parts.nets import CifarNet

        path = folder / "resnet8.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = CifarNet(num_blocks=1).state_dict()
            save_file({**state, "linear.weight": torch.randn(10, 64), "linear.bias": torch.randn(10)}, path)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        projection = {"dim": 8, "normalize": True}
        settings = {"kind": "cifar_resnet", "depth": 8, "weights": str(path), "projection": projection}
        return Example(settings, list(pixels))

    def architecture(self) -> Architecture:
        """Returns pictures B x 3 x 32 x 32 -> features B x 64."""
        from common.backbones.parts.nets import CifarNet
        from common.backbones.parts.raw import open_pixels

        return Architecture(CifarNet((self.depth - 2) // 6), 64, open_raw=lambda: open_pixels(_PIXELS))

    def pretrained(self) -> Pretrained:
        """Returns the network's weights, and the classifier's for a projection."""
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        if self.weights is None:
            raise BadInput("weights: expected a file with a CIFAR ResNet's weights, got nothing")
        network = self.architecture().module
        tensors = fit_names(read_state(self.weights), network, f"weights: {self.weights}")
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_CLASSIFIER)}
        load_strict(network, own, f"weights: {self.weights}")
        return Pretrained(network.state_dict(), tensors.get("linear.weight"))

    def random(self) -> Pretrained:
        """Returns weights as torch initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        return scale_random_weights(self.architecture(), torch.nn.Linear(64, 65).weight, torch.randn(4, 3, 32, 32))

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns the first convolution and the three stages."""
        from common.backbones.parts.boundary import list_blocks

        return list_blocks(network)

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a block."""
        from common.backbones.parts.boundary import divide_chain

        return divide_chain(network, block, (3, 32, 32))

    def preprocess(self, item: Any) -> Tensor:
        """Returns 3 x 32 x 32 standardised pixels of a picture, resized where it has another size. Raises BadRecord."""
        return _PIXELS.apply(item)
