"""A small convolutional net for time series of one channel, pre-trained on windows of public ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.backbones import Architecture, Divided, Example, Pretrained, Projection
from common.backbones.small_cnn import CLASSIFIER, collect_tensors
from common.plugins import LocalPath, Plugin
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

Channels = Annotated[int, Field(ge=1, le=4096)]


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
        """Returns a tiny net with random weights in a file, and waves of different pitch."""
        import torch
        from safetensors.torch import save_file

        settings = {"kind": "series_cnn", "length": 16, "channels": [4, 8], "pool": 2}
        path = folder / "series_cnn.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = cls.model_validate(settings).architecture().module
            save_file(collect_tensors(network, torch.nn.Linear(16, 6)), path)
        waves = [np.sin(np.arange(20) * pitch).astype(np.float32) for pitch in (0.2, 0.5, 1.0, 2.0)]
        return Example({**settings, "weights": str(path), "projection": {"dim": 4, "normalize": True}}, waves)

    def architecture(self) -> Architecture:
        """Returns series B x 1 x T -> features B x (channels of the last block x parts of the time)."""
        from common.backbones.parts.nets import build_series_cnn
        from common.backbones.parts.raw import open_series

        network = build_series_cnn(self.channels, self.pool)
        open_raw = partial(open_series, self.length, self.read)
        return Architecture(network, self.channels[-1] * self.pool, open_raw=open_raw)

    def pretrained(self) -> Pretrained:
        """Returns weights from the file that pre-training wrote."""
        from common.backbones.parts.weights import load_strict, read_state

        if self.weights is None or not self.weights.exists():
            raise BadInput(f"weights: found no file at {self.weights}; run `headwater simulate pretrain CONFIG` first")
        tensors = read_state(self.weights)
        network = self.architecture().module
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
        load_strict(network, own, f"weights: {self.weights}")
        return Pretrained(network.state_dict(), tensors.get(f"{CLASSIFIER}weight"))

    def random(self) -> Pretrained:
        """Returns weights and classifier as torch initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture = self.architecture()
        classifier = torch.nn.Linear(architecture.feature_dim, architecture.feature_dim + 1)
        return scale_random_weights(architecture, classifier.weight, torch.randn(4, 1, self.length))

    def blocks(self, network: nn.Module) -> list[str]:
        """Returns the convolutions, by their place in the net."""
        from common.backbones.parts.boundary import list_blocks

        return list_blocks(network)

    def divide(self, network: nn.Module, block: str) -> Divided:
        """Returns both sides of a convolution's input."""
        from common.backbones.parts.boundary import divide_chain

        return divide_chain(network, block, (1, self.length))

    def preprocess(self, item: Any) -> Tensor:
        """Returns 1 x T values, interpolated to `length`, with mean 0 and deviation 1; a constant series gives zeros.

        Raises:
            BadRecord: no series of one channel with at least two finite numbers.
        """
        import torch

        values_T = self.read(item)
        places = np.linspace(0, len(values_T) - 1, self.length)
        steps_T = np.interp(places, np.arange(len(values_T)), values_T)
        deviation = steps_T.std()
        standard_T = (steps_T - steps_T.mean()) / (deviation if deviation > 0 else 1.0)
        return torch.from_numpy(standard_T.astype(np.float32)).unsqueeze(0)

    def read(self, item: Any) -> NDArray[np.float64]:
        """Returns the values of a series in their own unit. Raises BadRecord."""
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "fiu" or item.size < 2:
            raise BadRecord("expected a series of at least two numbers")
        if item.ndim != 1 and item.shape[1:] != (1,):
            raise BadRecord("expected a series of one channel")
        values_T = item.reshape(-1).astype(np.float64)
        if not np.isfinite(values_T).all():
            raise BadRecord("expected a series of finite numbers, without gaps")
        return values_T
