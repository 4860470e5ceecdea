"""Inputs of networks that are handed on: pixels, columns, series and samples as others have them.

What cannot be computed in a network's graph comes before it and is stated in words and numbers: Pillow's resizing,
tokenizers, spectra.

# Shapes: B records, H and W pixels, C columns, F features, T time steps, L samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.backbones import RawInputs, RawTensor
from common.backbones.parts.audio import fit_length, resample
from common.backbones.parts.columns import REFUSE, Column
from common.backbones.parts.images import EIGHT_BIT_MODES, ImagePreprocessing
from common.inputs import find_name, parse_number
from common.types import BadRecord


def open_given(
    name: str,
    shape: tuple[int, ...],
    meaning: str,
    preprocess: Callable[[Any], Tensor],
    before: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, bytes] | None = None,
) -> RawInputs:
    """Returns inputs that are preprocessed items as they are.

    Args:
        name: of the input.
        shape: of one item.
        meaning: one sentence about its numbers.
        preprocess: source item -> float32 input.
        before: steps that `preprocess` takes.
        files: name -> content of files that these steps need.
    """
    tensor = RawTensor(name, "float32", shape, meaning)
    return RawInputs((tensor,), nn.Identity(), before, lambda item: (preprocess(item),), files or {})


# --- pictures --------------------------------------------------------------------------------------------------------

_TURN = {"step": "turn", "by": "EXIF orientation"}


@final
class _Standardise(nn.Module):
    """Pixels B x 3 x H x W from 0 to 255 -> standardised pixels, as `ImagePreprocessing.apply` computes them."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: ImagePreprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(settings.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(settings.std).view(3, 1, 1))

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return (pixels_B3HW.to(torch.float32) / 255.0 - self.mean) / self.std


def open_pixels(settings: ImagePreprocessing) -> RawInputs:
    """Returns uint8 pixels at the network's own size; the graph scales and standardises them."""
    side, both = settings.side, settings.crop is None
    resize = {
        "step": "resize",
        "size": settings.resize,
        "side": "both" if both else "shorter",
        "interpolation": settings.interpolation,
        "antialias": settings.antialias,
        "note": "as Pillow resizes an image, which no graph can compute" if settings.antialias else "without antialias",
    }
    crop = [] if both else [{"step": "center_crop", "size": side}]
    tensor = RawTensor("pixels", "uint8", (3, side, side), "red, green and blue from 0 to 255, rows by columns")
    return RawInputs(
        (tensor,),
        _Standardise(settings),
        [_TURN, {"step": "convert", "mode": "RGB", "modes": sorted(EIGHT_BIT_MODES)}, resize, *crop],
        lambda item: (settings.cut(item),),
    )


def open_grey(side: int, preprocess: Callable[[Any], Tensor]) -> RawInputs:
    """Returns grey values in [0, 1]; a picture of another size is refused, not resized.

    Args:
        side: height and width.
        preprocess: picture -> values.
    """
    before: list[dict[str, Any]] = [
        _TURN,
        {"step": "convert", "mode": "L", "modes": sorted(EIGHT_BIT_MODES)},
        {"step": "expect_size", "size": side},
        {"step": "divide", "by": 255},
    ]
    return open_given("pixels", (1, side, side), "grey values from 0 to 1, rows by columns", preprocess, before)


# --- tables ----------------------------------------------------------------------------------------------------------


@final
class _Columns(nn.Module):
    """Cells B x C in their own units -> features B x F, as `Column.inputs` makes them."""

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.columns = tuple(columns)

    def forward(self, cells_BC: Tensor) -> Tensor:
        parts = [self._read(column, cells_BC[:, index]) for index, column in enumerate(self.columns)]
        return torch.cat(parts, dim=1).to(torch.float32)

    def _read(self, column: Column, cells_B: Tensor) -> Tensor:
        empty_B = torch.isnan(cells_B)
        filled_B = torch.where(empty_B, _read_missing(column), cells_B)
        if column.levels is not None:
            numbers_K = torch.arange(len(column.levels), dtype=torch.float64, device=cells_B.device)
            # A level is refused before it comes here; an empty cell that may not be empty makes everything NaN.
            inputs_BK = (filled_B[:, None] == numbers_K).to(torch.float64)
            inputs_BK = torch.where(torch.isnan(filled_B)[:, None], math.nan, inputs_BK)
        else:
            low, high = column.range or (0.0, 1.0)
            inputs_BK = (2.0 * (filled_B.clamp(low, high) - low) / (high - low) - 1.0)[:, None]
            inputs_BK = torch.where(torch.isnan(filled_B)[:, None], math.nan, inputs_BK)
        return torch.cat([inputs_BK, empty_B[:, None].to(torch.float64)], dim=1) if column.indicator else inputs_BK


def _read_missing(column: Column) -> float:
    """Returns the number that stands for an empty cell; NaN where it may not be empty."""
    return math.nan if column.missing == REFUSE else _read_cell(column, column.missing)


def _read_cell(column: Column, text: str) -> float:
    """Returns a cell as a number: its value, or the number of its level. Raises BadRecord."""
    column.inputs(text)
    value = parse_number(text) if column.levels is None else find_name(text, column.levels)
    assert value is not None
    return float(value)


def open_columns(
    columns: Sequence[Column],
    missing_values: Sequence[str],
    read_cell: Callable[[Mapping[str, Any], Column], str | None],
) -> RawInputs:
    """Returns cells of a row in the columns' order, as numbers; the graph scales them and fills what is missing.

    Args:
        columns: the declared columns.
        missing_values: texts of an empty cell.
        read_cell: row and column -> text, None of an empty cell; raises BadRecord.
    """

    def prepare(item: Any) -> tuple[Tensor, ...]:
        if not isinstance(item, Mapping):
            raise BadRecord("expected a row with named columns")
        cells = [(column, read_cell(item, column)) for column in columns]
        for column, text in cells:
            column.inputs(text)
        values = [math.nan if text is None else _read_cell(column, text) for column, text in cells]
        return (torch.tensor(values, dtype=torch.float64),)

    meaning = "one row: values in their own units, levels as their number from 0, empty cells as NaN"
    tensor = RawTensor("columns", "float64", (len(columns),), meaning)
    step = {
        "step": "columns",
        "columns": [column.model_dump(mode="json") for column in columns],
        "missing_values": list(missing_values),
    }
    return RawInputs((tensor,), _Columns(columns), [step], prepare)


# --- series and recordings -------------------------------------------------------------------------------------------


@final
class _Series(nn.Module):
    """Values B x T -> B x 1 x length, interpolated, with mean 0 and deviation 1; a constant series gives zeros."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, values_BT: Tensor) -> Tensor:
        # The last index as a tensor: T is any length in a graph.
        last = torch.ones_like(values_BT[0]).sum() - 1.0
        places = torch.arange(self.length, dtype=torch.float64, device=values_BT.device) * (last / (self.length - 1))
        below = torch.minimum(places.floor(), last - 1.0)
        lower = below.to(torch.int64)
        low_BS, high_BS = values_BT[:, lower], values_BT[:, lower + 1]
        steps_BS = low_BS + (high_BS - low_BS) * (places - below)
        centred_BS = steps_BS - steps_BS.mean(dim=1, keepdim=True)
        deviation_B1 = (centred_BS * centred_BS).mean(dim=1, keepdim=True).sqrt()
        standard_BS = centred_BS / torch.where(deviation_B1 > 0, deviation_B1, 1.0)
        return standard_BS.to(torch.float32).unsqueeze(1)


def open_series(length: int, read: Callable[[Any], NDArray[np.float64]]) -> RawInputs:
    """Returns series of one channel and any length; the graph interpolates and standardises them.

    Args:
        length: time steps of the network.
        read: item -> values; raises BadRecord.
    """
    tensor = RawTensor("series", "float64", ("time",), "values of series of one length, at least 2, in their own unit")
    before = [{"step": "channels", "channels": 1}]
    return RawInputs((tensor,), _Series(length), before, lambda item: (torch.from_numpy(read(item).copy()),))


@final
class _Scale(nn.Module):
    """Numbers times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values_BL: Tensor) -> Tensor:
        return values_BL * self.factor


def open_samples(sample_rate: int, length: int, factor: float) -> RawInputs:
    """Returns samples in [-1, 1]; the graph multiplies them.

    Args:
        sample_rate: samples per second.
        length: samples of every recording.
        factor: range of the network's own samples.
    """
    before = [
        {"step": "resample", "sample_rate": sample_rate, "channels": 1, "range": [-1, 1]},
        {"step": "fit_length", "samples": length, "longer": "middle", "shorter": "between two silences"},
    ]
    tensor = RawTensor("samples", "float32", (length,), f"samples from -1 to 1, {sample_rate} in a second")

    def prepare(item: Any) -> tuple[Tensor, ...]:
        return (torch.from_numpy(np.ascontiguousarray(fit_length(resample(item, sample_rate), length))),)

    return RawInputs((tensor,), _Scale(factor), before, prepare)
