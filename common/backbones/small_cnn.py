"""A small convolutional net for small grey images, pre-trained on public records with `simulations pretrain`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from common.backbones import Architecture, Example, Pretrained
from common.backbones.parts.boundary import Divided, blocks_of, divide_chain
from common.backbones.parts.images import grey
from common.backbones.parts.projection import Projection, batch_norm_shift
from common.backbones.parts.random import random_weights
from common.backbones.parts.weights import load_strict, read_state
from common.plugins import LocalPath, Plugin
from common.types import BadInput, BadRecord

CLASSIFIER = "classifier."
"""Prefix of the pre-training classifier's tensors in a weights file; the others are the encoder's."""

Channels = Annotated[int, Field(ge=1, le=4096)]


def pretrained_tensors(encoder: nn.Module, classifier: nn.Linear | None) -> dict[str, Tensor]:
    """What a weights file holds: the encoder's state and, for a projection, the classifier's."""
    state = {name: tensor.detach().contiguous() for name, tensor in encoder.state_dict().items()}
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
        weights: safetensors file with `pretrained_tensors`.
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
        """A tiny net with random weights in a file, and random images."""
        settings = {"kind": "small_cnn", "input_size": 12, "channels": [4, 8], "pool": 2}
        path = folder / "small_cnn.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = cls.model_validate(settings).architecture().module
            save_file(pretrained_tensors(encoder, nn.Linear(32, 6)), path)
        pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 12), dtype=np.uint8)
        projection = {"dim": 4, "shift": "batch_norm", "normalize": True}
        return Example({**settings, "weights": str(path), "projection": projection}, list(pixels))

    def resolved(self) -> SmallCnn:
        """Without weights."""
        return self.model_copy(update={"weights": None})

    def architecture(self) -> Architecture:
        """Grey images B x 1 x H x W -> B x (channels of the last block x places of the pooled map)."""
        return Architecture(_encoder(self.channels, self.pool), self.channels[-1] * self.pool**2)

    def pretrained(self) -> Pretrained:
        """Weights from the file that pre-training wrote."""
        if self.weights is None:
            raise BadInput("weights: expected the file that `headwater simulate pretrain` writes, got nothing")
        if not self.weights.exists():
            raise BadInput(f"weights: found no file at {self.weights}; run `headwater simulate pretrain CONFIG` first")
        tensors = read_state(self.weights)
        encoder = self.architecture()
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
        load_strict(encoder.module, own, f"weights: {self.weights}")
        return self._parts(encoder, tensors.get(f"{CLASSIFIER}weight"))

    def random(self) -> Pretrained:
        """Weights and classifier as torch initialises them."""
        encoder = self.architecture()
        # More classes than features, so that any projection the pre-trained weights allow is possible here too.
        classifier = nn.Linear(encoder.feature_dim, encoder.feature_dim + 1)
        return random_weights(encoder, classifier.weight, torch.rand(4, 1, self.input_size, self.input_size))

    def weights_file(self) -> Path | None:
        """The file that pre-training writes."""
        return self.weights

    def blocks(self, encoder: nn.Module) -> list[str]:
        """The convolutions, by their place in the net."""
        return blocks_of(encoder)

    def divide(self, encoder: nn.Module, block: str) -> Divided:
        """Both sides of a convolution's input."""
        return divide_chain(encoder, block, (1, self.input_size, self.input_size))

    def preprocess(self, item: Any) -> Tensor:
        """1 x H x W in [0, 1] from a grey image of exactly `input_size`. Raises BadRecord."""
        pixels = grey(item)
        if pixels.shape != (self.input_size, self.input_size):
            raise BadRecord(f"expected an image of {self.input_size} x {self.input_size} pixels, got another size")
        return torch.from_numpy(pixels).unsqueeze(0)

    def _parts(self, encoder: Architecture, classifier_KD: Tensor | None) -> Pretrained:
        if classifier_KD is not None and classifier_KD.shape[1:] != (encoder.feature_dim,):
            raise BadInput(f"weights: expected a classifier of {encoder.feature_dim} features, got another shape")
        shift_C = batch_norm_shift(encoder.module)
        # Flattening puts a channel's places side by side.
        shift_D = None if shift_C is None else shift_C.repeat_interleave(self.pool**2)
        return Pretrained(encoder.module.state_dict(), classifier_KD, shift_D)


def _encoder(channels: Sequence[int], pool: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
        if index > 0:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(inner, outer, kernel_size=3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten())
