"""Transformers of time series from a local folder: PatchTST (Nie et al. 2023), PatchTSMixer, Chronos-Bolt and MOMENT.

What travels is the configuration as plain values and the encoder's weights as tensors; heads that forecast or classify
stay behind, and so does the masking of pre-training. Where a value was not observed (not a number) the model is told.
PatchTST and PatchTSMixer are of transformers, and read a fixed number of channels together; Chronos-Bolt and MOMENT
(`common.backbones.parts.graphs.patched_t5`) read each channel of any series alone.

# Shapes: B series, C channels, T time steps, P patches, D features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from common.backbones import Architecture, Example, Pretrained, Projection
from common.backbones.parts.graphs.reads import MAX_INPUT
from common.errors import describe
from common.plugins import Frozen, LocalPath, Plugin
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor

    from common.backbones.parts.graphs.patched_t5 import PatchedT5
    from common.backbones.parts.graphs.series_model import SeriesModel

_MODELS: tuple[Literal["patchtst", "patchtsmixer"], ...] = ("patchtst", "patchtsmixer")
_FORECASTERS = ("timesfm", "timesfm2_5", "informer", "autoformer", "time_series_transformer")
_BOLT = "ChronosBoltModelForForecasting"
_PATCHES: dict[str, tuple[str, ...]] = {
    "chronos_bolt": ("context_length", "input_patch_size", "input_patch_stride"),
    "moment": ("seq_len", "patch_len"),
}
"""Numbers that each configuration must have: steps of the longest series, steps of a patch, and between patches."""


class TimeSeriesFiles(Frozen):
    """The settings of a model's folder besides its weights; read by `resolved`, not meant to be written by hand.

    Attributes:
        config: of the architecture.
    """

    config: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> TimeSeriesFiles:
        if self.family in _MODELS:
            self._check_number(self.config, "num_input_channels", 1)
            self._check_number(self.config, "context_length", 2)
            return self
        for key in _PATCHES[self.family]:
            self._check_number(self._numbers, key, 1)
        if not self.patch <= self.longest:
            raise ValueError("expected a context at least as long as a patch in the model's config.json")
        if self.family == "moment" and self.config.get("patch_stride_len", self.patch) != self.patch:
            raise ValueError("patch_stride_len: expected patch_len in the model's config.json")
        if self.family == "moment" and not isinstance(self.config.get("t5_config"), dict):
            raise ValueError("t5_config: expected it in the model's config.json")
        return self

    @staticmethod
    def _check_number(values: dict[str, Any], key: str, least: int) -> None:
        if type(values.get(key)) is not int or not least <= values[key] <= 1 << 20:
            raise ValueError(f"{key}: expected a number from {least} on in the model's config.json")

    @property
    def family(self) -> Literal["patchtst", "patchtsmixer", "chronos_bolt", "moment"]:
        """The model's name. Raises ValueError: another one."""
        name = self.config.get("model_type")
        for each in _MODELS:
            if name == each:
                return each
        if isinstance(self.config.get("chronos_config"), dict):
            return "chronos_bolt"
        if "patch_len" in self.config and "task_name" in self.config:
            return "moment"
        if name in _FORECASTERS:
            raise ValueError(
                f"model_type: {name} only forecasts; use a PatchTST, Chronos-Bolt or MOMENT, or export your model's "
                "encoder and read it with the kind `onnx` or `torch_export`"
            )
        raise ValueError(f"model_type: expected one of {', '.join(_MODELS)}, a Chronos-Bolt or a MOMENT, got {name!r}")

    @property
    def _numbers(self) -> dict[str, Any]:
        inner: dict[str, Any] = self.config["chronos_config"] if self.family == "chronos_bolt" else self.config
        return inner

    @property
    def longest(self) -> int:
        """Time steps of the longest series that the model reads."""
        return int(self._numbers[_PATCHES.get(self.family, ("context_length",))[0]])

    @property
    def patch(self) -> int:
        """Time steps of a patch of a model that reads series of several lengths; 0 of another."""
        return int(self._numbers[_PATCHES[self.family][1]]) if self.family in _PATCHES else 0


@final
class TimeSeries(Plugin):
    """Settings of a model of time series.

    Attributes:
        folder: a local folder with config.json and model.safetensors, as such models are published.
        channels: `mean` averages features over a series' channels; `apart` keeps those of each, one after the other.
        num_channels: values of each time step; a PatchTST and a PatchTSMixer have their own, Chronos-Bolt and MOMENT
            read one without it.
        length: time steps that the model reads; those of its training without it. Chronos-Bolt and MOMENT read fewer
            where this says so, in whole patches, and are the faster for it.
        fit: how another series is brought to `length`: `stretch` interpolates, which PatchTST and PatchTSMixer do
            without it; `pad` keeps the time steps, of a longer series the last ones, and begins a shorter one with
            steps that were not observed, which Chronos-Bolt and MOMENT do without it.
        standardise: whether each channel's observed values are brought to mean 0 and deviation 1 first; Chronos-Bolt
            and MOMENT do so themselves as well.
        projection: what happens to the features before they leave the backbone; `dim` is not possible here.
        files: what the model's folder says besides its weights; filled in for the sites, never written by hand.
    """

    kind: Literal["time_series"] = "time_series"
    folder: LocalPath | None = None
    channels: Literal["mean", "apart"] = "mean"
    num_channels: Annotated[int, Field(ge=1, le=4096)] | None = None
    length: Annotated[int, Field(ge=2, le=1 << 20)] | None = None
    fit: Literal["stretch", "pad"] | None = None
    standardise: bool = True
    projection: Projection | None = None
    files: TimeSeriesFiles | None = None

    @model_validator(mode="after")
    def _check_places(self) -> TimeSeries:
        if self.folder is None and self.files is None:
            raise ValueError("folder: expected the model's folder, got nothing")
        if self.files is not None:
            self._check_form(self.files)
        return self

    def _check_form(self, files: TimeSeriesFiles) -> None:
        own = {"num_channels": files.config.get("num_input_channels"), "length": files.longest}
        for key in own if files.family in _MODELS else ():
            written = getattr(self, key)
            if written not in (None, own[key]):
                raise ValueError(f"{key}: expected {own[key]}, that of the model, or nothing, got {written}")
        length = self.length or files.longest
        if length > files.longest or (files.patch and length % files.patch):
            raise ValueError(
                f"length: expected at most {files.longest} time steps in whole patches of {files.patch}, got {length}"
            )
        if 2 * (self.num_channels or own["num_channels"] or 1) * length > MAX_INPUT:
            raise ValueError(f"length: expected inputs of at most {MAX_INPUT:,} numbers")

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
        """Returns settings with the model's configuration and its own form of series, and without its folder."""
        files = self.files or self._read()
        fixed = files.family in _MODELS
        form = {
            "num_channels": self.num_channels or (int(files.config["num_input_channels"]) if fixed else 1),
            "length": self.length or files.longest,
            "fit": self.fit or ("stretch" if fixed else "pad"),
        }
        return self.model_copy(update={"folder": None, "files": files, **form})

    def list_weights_paths(self) -> list[Path] | None:
        """Returns the model's folder."""
        return [] if self.folder is None else [self.folder]

    def architecture(self) -> Architecture:
        """Returns values and marks of observed ones, B x 2 x C x T -> features B x D, or B x (C * D)."""
        module = self._build()
        return Architecture(module, int(module.feature_dim))

    def _build(self) -> SeriesModel | PatchedT5:
        from common.backbones.parts.graphs.patched_t5 import PatchedT5
        from common.backbones.parts.graphs.series_model import SeriesModel

        own = self.resolved()
        assert own.files is not None and own.num_channels is not None  # They are resolved.
        apart, family = self.channels == "apart", own.files.family
        if family in ("chronos_bolt", "moment"):
            return PatchedT5(own.files.config, family, num_channels=own.num_channels, apart=apart)
        return SeriesModel(own.files.config, apart=apart)

    def pretrained(self) -> Pretrained:
        """Returns the encoder's weights; those of heads are not read."""
        from common.backbones.parts.graphs.patched_t5 import name_published
        from common.backbones.parts.weights import fit_names, load_strict, read_state

        if self.folder is None:
            raise BadInput("folder: expected the model's folder, got nothing")
        module = self._build()
        source = f"folder: {self.folder}"
        state = name_published(fit_names(read_state(self.folder / "model.safetensors", "folder"), module.model, source))
        own = module.model.state_dict()
        load_strict(module.model, {name: tensor for name, tensor in state.items() if name in own}, source)
        return Pretrained(module.state_dict())

    def random(self) -> Pretrained:
        """Returns weights as transformers initialises them."""
        import torch

        from common.backbones.parts.weights import scale_random_weights

        architecture, own = self.architecture(), self.resolved()
        assert own.num_channels is not None and own.length is not None  # They are resolved.
        values_BCT = torch.randn(4, own.num_channels, own.length)
        noise_B = torch.stack([values_BCT, torch.ones_like(values_BCT)], dim=1)
        return scale_random_weights(architecture, torch.empty(1, architecture.feature_dim), noise_B)

    def preprocess(self, item: Any) -> Tensor:
        """Returns 2 x C x T: values, brought to the model's length, and 1 where one was observed.

        Raises:
            BadRecord: no series of the model's channels with at least two observed steps of one of them.
        """
        import torch

        own = self.resolved()
        channels, length = own.num_channels, own.length
        assert channels is not None and length is not None  # They are resolved.
        if not isinstance(item, np.ndarray) or item.dtype.kind not in "fiu" or item.ndim not in (1, 2) or len(item) < 2:
            raise BadRecord("expected a series of at least two numbers")
        values_TC = item.reshape(len(item), -1).astype(np.float64)
        if values_TC.shape[1] != channels:
            raise BadRecord(f"expected a series of {channels} channels, got {values_TC.shape[1]}")
        if own.fit == "pad":
            values_TC = values_TC[-length:]
        if np.isinf(values_TC).any() or (np.isfinite(values_TC).sum(axis=0) < 2).all():
            raise BadRecord("expected a series with at least two finite numbers in one of its channels, and no other")
        columns = [_place(values_T, length, own.fit == "pad", self.standardise) for values_T in values_TC.T]
        return torch.from_numpy(np.stack(columns, axis=1, dtype=np.float32))

    def _read(self) -> TimeSeriesFiles:
        from common.backbones.parts.hub.huggingface import Location

        assert self.folder is not None  # One of both is set.
        location = Location(self.folder, None, True)
        try:
            files = TimeSeriesFiles(config=location.settings("config.json") or {})
            if files.family == "chronos_bolt":
                _check_bolt(self.folder / "config.json")
        except ValidationError as error:
            raise BadInput(f"folder: {self.folder}: {describe(error, TimeSeriesFiles)}") from error
        try:
            self._check_form(files)
        except ValueError as error:
            raise BadInput(str(error)) from error
        return files


def _check_bolt(path: Path) -> None:
    """Refuses another Chronos: the first one reads tokens, and the second has layers across series."""
    names = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    if names != [_BOLT]:
        raise BadInput(f"folder: {path}: expected the architecture {_BOLT}, got another; take an amazon/chronos-bolt")


def _place(values_T: NDArray[np.float64], length: int, pad: bool, standardise: bool) -> NDArray[np.float64]:
    """Returns 2 x T: a channel's values at the model's time steps, 0 where there is none, and 1 where one was observed.

    Args:
        values_T: the channel, at most `length` of it where it is padded.
        length: number of the model's time steps.
        pad: whether its time steps are kept; else it is interpolated.
        standardise: whether its observed values are brought to mean 0 and deviation 1.
    """
    seen_T = np.isfinite(values_T)
    placed_2T = np.zeros((2, length))
    if not seen_T.any():
        return placed_2T
    mean, deviation = (values_T[seen_T].mean(), values_T[seen_T].std()) if standardise else (0.0, 1.0)
    scaled_T = (values_T - mean) / (deviation if deviation > 0 else 1.0)
    if pad:
        placed_2T[0, length - len(values_T) :] = np.where(seen_T, scaled_T, 0.0)
        placed_2T[1, length - len(values_T) :] = seen_T
        return placed_2T
    places, steps = np.linspace(0, len(values_T) - 1, length), np.arange(len(values_T))
    observed_T = seen_T[np.rint(places).astype(int)]
    placed_2T[0] = np.where(observed_T, np.interp(places, steps[seen_T], scaled_T[seen_T]), 0.0)
    placed_2T[1] = observed_T
    return placed_2T
