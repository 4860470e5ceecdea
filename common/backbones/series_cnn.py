"""A small convolutional net for time series of one channel, pre-trained on windows of public ones."""

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
from common.backbones.parts.projection import Projection
from common.backbones.parts.random import random_weights
from common.backbones.parts.weights import load_strict, read_state
from common.backbones.small_cnn import CLASSIFIER, pretrained_tensors
from common.plugins import LocalPath, Plugin
from common.types import BadInput, BadRecord

Channels = Annotated[int, Field(ge=1, le=4096)]
_FIRST_KERNEL, _KERNEL = 7, 5


@final
class SeriesCnn(Plugin):
    """Settings of the net: blocks of convolution, BatchNorm, ReLU and halving, then averages over parts of the time.

    Attributes:
        length: time steps; a series of another length is interpolated to it.
        channels: of each block.
        pool: into how many parts of the time the last block is averaged.
        weights: safetensors file that pre-training wrote.
        projection: what happens to the features before they leave the backbone.
    """

    kind: Literal["series_cnn"] = "series_cnn"
    length: Annotated[int, Field(ge=8, le=65536)] = 96
    channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)] = (32, 64, 64)
    pool: Annotated[int, Field(ge=1, le=64)] = 4
    weights: LocalPath | None = None
    projection: Projection | None = None

    @model_validator(mode="after")
    def _steps_remain(self) -> SeriesCnn:
        last = self.length >> len(self.channels)
        if self.pool > last:
            raise ValueError(f"pool: expected at most {last}, the steps after the last block, got {self.pool}")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """A tiny net with random weights in a file, and waves of different pitch."""
        settings = {"kind": "series_cnn", "length": 16, "channels": [4, 8], "pool": 2}
        path = folder / "series_cnn.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = cls.model_validate(settings).architecture().module
            save_file(pretrained_tensors(encoder, nn.Linear(16, 6)), path)
        waves = [np.sin(np.arange(20) * pitch).astype(np.float32) for pitch in (0.2, 0.5, 1.0, 2.0)]
        return Example({**settings, "weights": str(path), "projection": {"dim": 4, "normalize": True}}, waves)

    def resolved(self) -> SeriesCnn:
        """Without weights."""
        return self.model_copy(update={"weights": None})

    def architecture(self) -> Architecture:
        """Series B x 1 x T -> features B x (channels of the last block x parts of the time)."""
        return Architecture(_encoder(self.channels, self.pool), self.channels[-1] * self.pool)

    def pretrained(self) -> Pretrained:
        """Weights from the file that pre-training wrote."""
        if self.weights is None or not self.weights.exists():
            raise BadInput(f"weights: found no file at {self.weights}; run `headwater simulate pretrain CONFIG` first")
        tensors = read_state(self.weights)
        encoder = self.architecture().module
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
        load_strict(encoder, own, f"weights: {self.weights}")
        return Pretrained(encoder.state_dict(), tensors.get(f"{CLASSIFIER}weight"))

    def random(self) -> Pretrained:
        """Weights and classifier as torch initialises them."""
        encoder = self.architecture()
        classifier = nn.Linear(encoder.feature_dim, encoder.feature_dim + 1)
        return random_weights(encoder, classifier.weight, torch.randn(4, 1, self.length))

    def weights_file(self) -> Path | None:
        """The file that pre-training writes."""
        return self.weights

    def blocks(self, encoder: nn.Module) -> list[str]:
        """The convolutions, by their place in the net."""
        return blocks_of(encoder)

    def divide(self, encoder: nn.Module, block: str) -> Divided:
        """Both sides of a convolution's input."""
        return divide_chain(encoder, block, (1, self.length))

    def preprocess(self, item: Any) -> Tensor:
        """1 x T, interpolated to `length`, with mean 0 and deviation 1; a constant one is zeros. Raises BadRecord."""
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "fiu" or item.size < 2:
            raise BadRecord("expected a series of at least two numbers")
        if item.ndim != 1 and item.shape[1:] != (1,):
            raise BadRecord("expected a series of one channel")
        values_T = item.reshape(-1).astype(np.float64)
        if not np.isfinite(values_T).all():
            raise BadRecord("expected a series of finite numbers")
        places = np.linspace(0, len(values_T) - 1, self.length)
        steps_T = np.interp(places, np.arange(len(values_T)), values_T)
        deviation = steps_T.std()
        standard_T = (steps_T - steps_T.mean()) / (deviation if deviation > 0 else 1.0)
        return torch.from_numpy(standard_T.astype(np.float32)).unsqueeze(0)


def _encoder(channels: Sequence[int], pool: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
        kernel = _FIRST_KERNEL if index == 0 else _KERNEL
        layers += [nn.Conv1d(inner, outer, kernel, padding=kernel // 2), nn.BatchNorm1d(outer), nn.ReLU()]
        layers.append(nn.MaxPool1d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(pool), nn.Flatten())
