"""Transformers of time series from a local folder of Hugging Face: PatchTST (Nie et al. 2023) and PatchTSMixer.

What travels is the configuration as plain values and the encoder's weights as tensors; heads that forecast or classify
stay behind, and so does the masking of pre-training. Where a value was not observed (not a number) the model is told.

# Shapes: B series, C channels, T time steps, P patches, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
from pydantic import model_validator

from common.backbones import Architecture, Example, Pretrained, Projection
from common.backbones.parts.graphs.reads import MAX_INPUT
from common.errors import instead
from common.plugins import Frozen, LocalPath, Plugin
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor

_MODELS = ("patchtst", "patchtsmixer")


class TimeSeriesFiles(Frozen):
    """The settings of a model's folder besides its weights; read by `resolved`, not meant to be written by hand.

    Attributes:
        config: of the architecture.
    """

    config: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> TimeSeriesFiles:
        if self.config.get("model_type") not in _MODELS:
            raise ValueError(f"model_type: expected one of {', '.join(_MODELS)}, got {self.config.get('model_type')!r}")
        for key, least in (("num_input_channels", 1), ("context_length", 2)):
            if not isinstance(self.config.get(key), int) or not least <= self.config[key] <= 1 << 20:
                raise ValueError(f"{key}: expected a number from {least} on in the model's config.json")
        if 2 * self.config["num_input_channels"] * self.config["context_length"] > MAX_INPUT:
            raise ValueError(f"context_length: expected inputs of at most {MAX_INPUT:,} numbers")
        return self


@final
class TimeSeries(Plugin):
    """Settings of a model of time series.

    Attributes:
        folder: a local folder with config.json and model.safetensors, as transformers saves such models.
        channels: `mean` averages features over a series' channels; `apart` keeps those of each, one after the other.
        standardise: whether each channel's observed values are brought to mean 0 and deviation 1 first.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
        files: what the model's folder says besides its weights; filled in for the sites, never written by hand.
    """

    kind: Literal["time_series"] = "time_series"
    folder: LocalPath | None = None
    channels: Literal["mean", "apart"] = "mean"
    standardise: bool = True
    projection: Projection | None = None
    files: TimeSeriesFiles | None = None

    @model_validator(mode="after")
    def _check_places(self) -> TimeSeries:
        if self.folder is None and self.files is None:
            raise ValueError("folder: expected the model's folder, got nothing")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns a tiny PatchTST of two channels with random weights, and random series, one of them with gaps."""
        import torch
        from transformers import PatchTSTConfig, PatchTSTModel

        config = PatchTSTConfig(
            num_input_channels=2,
            context_length=24,
            patch_length=6,
            patch_stride=6,
            d_model=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            PatchTSTModel(config).save_pretrained(folder)
        rng = np.random.default_rng(0)
        items = [rng.normal(size=(30, 2)).cumsum(axis=0).astype(np.float32) for _ in range(5)]
        items[1][4:9, 0] = np.nan
        return Example({"kind": "time_series", "folder": str(folder), "channels": "apart"}, items)

    def resolved(self) -> TimeSeries:
        """Returns settings with the model's configuration and without its folder."""
        return self if self.files is not None else self.model_copy(update={"folder": None, "files": self._read()})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the model's folder."""
        return [] if self.folder is None else [self.folder]

    def architecture(self) -> Architecture:
        """Returns values and marks of observed ones, B x 2 x C x T -> features B x D, or B x (C * D)."""
        from common.backbones.parts.graphs.series_model import SeriesModel

        config = (self.files or self._read()).config
        module = SeriesModel(config, apart=self.channels == "apart")
        return Architecture(module, module.feature_dim)

    def pretrained(self) -> Pretrained:
        """Returns the encoder's weights; those of heads are not read."""
        from common.backbones.parts.graphs.series_model import SeriesModel
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        if self.folder is None:
            raise BadInput("folder: expected the model's folder, got nothing")
        module = SeriesModel(self._read().config, apart=self.channels == "apart")
        source = f"folder: {self.folder}"
        state = fit_names(read_state(self.folder / "model.safetensors", "folder"), module.model, source)
        own = module.model.state_dict()
        load_strict(module.model, {name: tensor for name, tensor in state.items() if name in own}, source)
        return Pretrained(module.state_dict())

    def random(self) -> Pretrained:
        """Returns weights as transformers initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture = self.architecture()
        config = (self.files or self._read()).config
        values_BCT = torch.randn(4, int(config["num_input_channels"]), int(config["context_length"]))
        noise_B = torch.stack([values_BCT, torch.ones_like(values_BCT)], dim=1)
        return scale_random_weights(architecture, torch.empty(1, architecture.feature_dim), noise_B)

    def preprocess(self, item: Any) -> Tensor:
        """Returns 2 x C x T: values, interpolated to the model's length, and 1 where one was observed.

        Raises:
            BadRecord: no series of the model's channels with at least two observed steps of each.
        """
        import torch

        config = (self.files or self._read()).config
        channels, length = int(config["num_input_channels"]), int(config["context_length"])
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "fiu" or item.ndim not in (1, 2) or len(item) < 2:
            raise BadRecord("expected a series of at least two numbers")
        values_TC = item.reshape(len(item), -1).astype(np.float64)
        if values_TC.shape[1] != channels:
            raise BadRecord(f"expected a series of {channels} channels, got {values_TC.shape[1]}")
        if np.isinf(values_TC).any() or (np.isfinite(values_TC).sum(axis=0) < 2).any():
            raise BadRecord("expected a series with at least two finite numbers in each channel")
        places, steps = np.linspace(0, len(values_TC) - 1, length), np.arange(len(values_TC))
        result_2CT = np.empty((2, channels, length), dtype=np.float32)
        for channel, values_T in enumerate(values_TC.T):
            seen_T = np.isfinite(values_T)
            filled_T = np.interp(places, steps[seen_T], values_T[seen_T])
            if self.standardise:
                deviation = values_T[seen_T].std()
                filled_T = (filled_T - values_T[seen_T].mean()) / (deviation if deviation > 0 else 1.0)
            observed_T = seen_T[np.rint(places).astype(int)]
            result_2CT[0, channel], result_2CT[1, channel] = np.where(observed_T, filled_T, 0.0), observed_T
        return torch.from_numpy(result_2CT)

    def _read(self) -> TimeSeriesFiles:
        from common.backbones.parts.hub.huggingface import Location

        assert self.folder is not None  # One of both is set.
        try:
            return TimeSeriesFiles(config=Location(self.folder, None, True).settings("config.json") or {})
        except (ValueError, TypeError) as error:
            raise BadInput(
                f"folder: expected the config.json of a {' or '.join(_MODELS)} in {self.folder}{instead(error)}"
            ) from error
