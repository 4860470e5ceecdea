"""A small convolutional net for small grey images, pre-trained on public records with `simulations pretrain`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, model_validator

from common.backbones import Architecture, Divided, Example, Pretrained, Projection
from common.backbones.parts.images import convert_to_grey
from common.plugins import LocalPath, Plugin
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSIFIER = "classifier."
"""Prefix of the pre-training classifier's tensors in a weights file; the others are the network's."""

Channels = Annotated[int, Field(ge=1, le=4096)]


def collect_tensors(network: nn.Module, classifier: nn.Linear | None) -> dict[str, Tensor]:
    """Returns the tensors of a weights file: the network's state and, for a projection, the classifier's."""
    state = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    if classifier is not None:
        state[f"{CLASSIFIER}weight"] = classifier.weight.detach().contiguous()
    return state


@final
class SmallCnn(Plugin):
    """Settings of the net: blocks of 3x3 convolution, BatchNorm and ReLU, halved between blocks, then averaged.

    Attributes:
        input_size: side of the grey images.
        channels: of each block.
        pool: side of the map that the last block is averaged to and that is flattened. A 2 x 2 map keeps some of the
            place of a stroke; on scattered digits it transfers better than one average (seen: .83 against .71).
        weights: safetensors file with `collect_tensors`.
        projection: what happens to the features before they leave the backbone.
    """

    kind: Literal["small_cnn"] = "small_cnn"
    input_size: Annotated[int, Field(ge=4, le=512)] = 20
    channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)] = (16, 32, 64)
    pool: Annotated[int, Field(ge=1, le=64)] = 2
    weights: LocalPath | None = None
    projection: Projection | None = None

    @model_validator(mode="after")
    def _map_remains(self) -> SmallCnn:
        last = self.input_size >> (len(self.channels) - 1)
        if self.pool > last:
            raise ValueError(f"pool: expected at most {last}, the side of the last block's map, got {self.pool}")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny net with random weights in a file, and random images."""
        import torch
        from safetensors.torch import save_file

        settings = {"kind": "small_cnn", "input_size": 12, "channels": [4, 8], "pool": 2}
        path = folder / "small_cnn.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = cls.model_validate(settings).architecture().module
            save_file(collect_tensors(network, torch.nn.Linear(32, 6)), path)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 12), dtype=np.uint8)
        projection = {"dim": 4, "shift": "batch_norm", "normalize": True}
        return Example({**settings, "weights": str(path), "projection": projection}, list(pixels))

    def architecture(self) -> Architecture:
        """Returns grey images B x 1 x H x W -> B x (channels of the last block x places of the pooled map)."""
        from common.backbones.parts.nets import build_small_cnn
        from common.backbones.parts.raw import open_grey

        network = build_small_cnn(self.channels, self.pool)
        open_raw = partial(open_grey, self.input_size, self.preprocess)
        return Architecture(network, self.channels[-1] * self.pool**2, open_raw=open_raw)

    def pretrained(self) -> Pretrained:
        """Returns weights from the file that pre-training wrote."""
        from common.backbones.parts.weights import load_strict, read_state

        if self.weights is None:
            raise BadInput("weights: expected the file that `headwater simulate pretrain` writes, got nothing")
        if not self.weights.exists():
            raise BadInput(f"weights: found no file at {self.weights}; run `headwater simulate pretrain CONFIG` first")
        tensors = read_state(self.weights)
        architecture = self.architecture()
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
        load_strict(architecture.module, own, f"weights: {self.weights}")
        return self._read_parts(architecture, tensors.get(f"{CLASSIFIER}weight"))

    def random(self) -> Pretrained:
        """Returns weights and classifier as torch initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture = self.architecture()
        # More classes than features, so that any projection the pre-trained weights allow is possible here too.
        classifier = torch.nn.Linear(architecture.feature_dim, architecture.feature_dim + 1)
        noise_B = torch.rand(4, 1, self.input_size, self.input_size)
        return scale_random_weights(architecture, classifier.weight, noise_B)

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns the convolutions, by their place in the net."""
        from common.backbones.parts.boundary import list_blocks

        return list_blocks(network)

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a convolution's input."""
        from common.backbones.parts.boundary import divide_chain

        return divide_chain(network, block, (1, self.input_size, self.input_size))

    def preprocess(self, item: Any) -> Tensor:
        """Returns 1 x H x W values in [0, 1] of a grey image of exactly `input_size`. Raises BadRecord."""
        import torch

        pixels = convert_to_grey(item)
        if pixels.shape != (self.input_size, self.input_size):
            raise BadRecord(f"expected an image of {self.input_size} x {self.input_size} pixels, got another size")
        return torch.from_numpy(pixels).unsqueeze(0)

    def _read_parts(self, architecture: Architecture, classifier_KD: Tensor | None) -> Pretrained:
        from common.backbones.parts.projection import predict_shift

        if classifier_KD is not None and classifier_KD.shape[1:] != (architecture.feature_dim,):
            raise BadInput(f"weights: expected a classifier of {architecture.feature_dim} features, got another shape")
        shift_C = predict_shift(architecture.module)
        # Flattening puts a channel's places side by side.
        shift_D = None if shift_C is None else shift_C.repeat_interleave(self.pool**2)
        return Pretrained(architecture.module.state_dict(), classifier_KD, shift_D)
