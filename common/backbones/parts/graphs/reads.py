"""Settings of what a network reads that says nothing of it itself: pictures, recordings, series or scans of one shape.

# Shapes: B records, T time steps, C channels, L samples, X, Y, Z voxels of a scan.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from common.backbones.parts.images import ImagePreprocessing
from common.inputs import Volume
from common.plugins import Frozen
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from torch import Tensor


MAX_INPUT = 1 << 29
"""Numbers of one input at most: 2 GiB."""


class RecordingForm(Frozen):
    """Settings of recordings.

    Attributes:
        sample_rate: samples per second.
        samples: every recording is brought to this length: a longer one gives its middle, a shorter one stands between
            two silences.
        window: number of samples of each of the pieces that the network reads one after the other; null reads the
            recording in one piece.
        step: number of samples from one piece to the next.
    """

    sample_rate: Annotated[int, Field(ge=1000, le=192_000)]
    samples: Annotated[int, Field(ge=1, le=1 << 24)]
    window: Annotated[int, Field(ge=1)] | None = None
    step: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_windows(self) -> RecordingForm:
        if (self.window is None) != (self.step is None):
            raise ValueError("window, step: expected both or none")
        if self.window is not None and self.window > self.samples:
            raise ValueError(f"window: expected at most samples ({self.samples}), got {self.window}")
        return self


class SeriesForm(Frozen):
    """Settings of series.

    Attributes:
        length: time steps; a series of another length is interpolated to it.
        channels: values of each time step.
        standardise: whether each channel is brought to mean 0 and deviation 1; a constant one gives zeros.
    """

    length: Annotated[int, Field(ge=2, le=1 << 20)]
    channels: Annotated[int, Field(ge=1, le=4096)] = 1
    standardise: bool = True


Length = Annotated[int, Field(ge=1, le=4096)]
Spacing = Annotated[float, Field(gt=0, le=1000)]
Sides = Annotated[str, StringConstraints(pattern="^[RLAPSI]{3}$")]

_AXIS = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


class VolumeForm(Frozen):
    """Settings of scans.

    Attributes:
        size: voxels along each axis; a larger scan gives its middle, a smaller one stands between two layers of its
            lowest value.
        spacing_mm: distance of voxels along each axis, to which a scan is interpolated; null keeps its own.
        orientation: sides of the patient to which the axes lead: right or left, anterior or posterior, superior or
            inferior, such as `RAS` or `LPS`.
        window: lowest and highest intensity, which become 0 and 1; null brings each scan to mean 0 and deviation 1.
    """

    size: tuple[Length, Length, Length]
    spacing_mm: tuple[Spacing, Spacing, Spacing] | None = None
    orientation: Sides = "RAS"
    window: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> VolumeForm:
        if {_AXIS[side] for side in self.orientation} != {0, 1, 2}:
            raise ValueError("orientation: expected one side of each pair: R or L, A or P, S or I")
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("window: expected a lower and a higher intensity")
        return self


class Reads(Frozen):
    """Settings of a network's input. Exactly one of `pictures`, `recordings`, `series` and `volumes`.

    Attributes:
        pictures: how a picture becomes 3 x H x W values.
        recordings: how a recording becomes samples, L or windows x L.
        series: how a series becomes C x T values.
        volumes: how a scan becomes 1 x X x Y x Z values.
        channels_last: whether channels come last, as in H x W x 3 and T x C.
    """

    pictures: ImagePreprocessing | None = None
    recordings: RecordingForm | None = None
    series: SeriesForm | None = None
    volumes: VolumeForm | None = None
    channels_last: bool = False

    @model_validator(mode="after")
    def _check_one(self) -> Reads:
        if sum(each is not None for each in (self.pictures, self.recordings, self.series, self.volumes)) != 1:
            raise ValueError("expected exactly one of pictures, recordings, series and volumes")
        if self._count() > MAX_INPUT:
            raise ValueError(f"expected inputs of at most {MAX_INPUT:,} numbers, got {self._count():,}")
        return self

    def _count(self) -> int:
        if self.recordings is not None:
            own = self.recordings
            if own.window is None or own.step is None:
                return own.samples
            return own.window * (1 + (own.samples - own.window) // own.step)
        if self.series is not None:
            return self.series.length * self.series.channels
        return math.prod(self.volumes.size) if self.volumes is not None else 0

    @property
    def windows(self) -> bool:
        """True where a record is several pieces, which a network reads one after the other."""
        return self.recordings is not None and self.recordings.window is not None

    def apply(self, item: Any) -> Tensor:
        """Returns one source item as float32 values of the network's input. Raises BadRecord."""
        if self.pictures is not None:
            values = self.pictures.apply(item)
            return values.permute(1, 2, 0).contiguous() if self.channels_last else values
        if self.recordings is not None:
            return _read_recording(self.recordings, item)
        if self.volumes is not None:
            scan = read_volume(self.volumes, item)
            return scan.movedim(0, -1).contiguous() if self.channels_last else scan
        assert self.series is not None  # One of them is set.
        values = read_series(self.series, item)
        return values.T.contiguous() if self.channels_last else values

    def draw(self, count: int) -> Tensor:
        """Returns random inputs of the size and spread of real ones, from torch's current generator."""
        import torch

        shape: tuple[int, ...]
        if self.recordings is not None:
            samples_BL = 0.1 * torch.randn(count, self.recordings.samples)
            if self.recordings.window is None or self.recordings.step is None:
                return samples_BL
            return samples_BL.unfold(1, self.recordings.window, self.recordings.step).contiguous()
        if self.pictures is not None:
            shape = (3, self.pictures.side, self.pictures.side)
        elif self.volumes is not None:
            shape = (1, *self.volumes.size)
        else:
            assert self.series is not None
            shape = (self.series.channels, self.series.length)
        values = torch.randn(count, *shape)
        return values.movedim(1, -1).contiguous() if self.channels_last else values


def _read_recording(settings: RecordingForm, item: Any) -> Tensor:
    import torch

    from common.backbones.parts.audio import fit_length, resample

    samples_L = fit_length(resample(item, settings.sample_rate), settings.samples)
    values = torch.from_numpy(np.ascontiguousarray(samples_L))
    if settings.window is None or settings.step is None:
        return values
    return values.unfold(0, settings.window, settings.step).contiguous()


def read_series(settings: SeriesForm, item: Any) -> Tensor:
    """Returns C x T values of a series, T or T x C.

    Args:
        settings: length, channels and scale.
        item: the series.

    Raises:
        BadRecord: no series of so many channels with at least two steps of finite numbers.
    """
    import torch

    if not isinstance(item, np.ndarray) or item.dtype.kind not in "fiu" or item.ndim not in (1, 2) or len(item) < 2:
        raise BadRecord("expected a series of at least two numbers")
    values_TC = item.reshape(len(item), -1).astype(np.float64)
    if values_TC.shape[1] != settings.channels:
        raise BadRecord(f"expected a series of {settings.channels} channels, got {values_TC.shape[1]}")
    if not np.isfinite(values_TC).all():
        raise BadRecord("expected a series of finite numbers, without gaps")
    places = np.linspace(0, len(values_TC) - 1, settings.length)
    steps_CT = np.stack([np.interp(places, np.arange(len(values_TC)), channel_T) for channel_T in values_TC.T])
    if settings.standardise:
        deviation_C1 = steps_CT.std(axis=1, keepdims=True)
        steps_CT = (steps_CT - steps_CT.mean(axis=1, keepdims=True)) / np.where(deviation_C1 > 0, deviation_C1, 1.0)
    return torch.from_numpy(steps_CT.astype(np.float32))


def read_volume(settings: VolumeForm, item: Any) -> Tensor:
    """Returns 1 x X x Y x Z values of a scan. Raises BadRecord where it is none, or has no finite values."""
    import torch

    if not isinstance(item, Volume) or item.values_XYZ.ndim != 3 or not item.values_XYZ.size:
        raise BadRecord("expected a scan of three dimensions")
    outside = np.isnan(item.values_XYZ)
    inside = item.values_XYZ[~outside]
    if not inside.size or not np.isfinite(inside).all() or not all(0 < size < math.inf for size in item.spacing_mm):
        raise BadRecord("expected finite intensities and a spacing in mm")
    # Brain extraction leaves what is not the organ as not a number.
    values = torch.from_numpy(np.where(outside, inside.min(), item.values_XYZ).astype(np.float32))
    axes = [_AXIS[side] for side in settings.orientation]
    values = values.permute(axes).flip([at for at, side in enumerate(settings.orientation) if side in "LPI"])
    if settings.spacing_mm is not None:
        own = [item.spacing_mm[axis] for axis in axes]
        lengths = [
            max(1, round(length * size / wanted))
            for length, size, wanted in zip(values.shape, own, settings.spacing_mm, strict=True)
        ]
        if math.prod(lengths) > 1 << 30:
            raise BadRecord("expected a scan of less than a thousand million voxels at this spacing")
        values = torch.nn.functional.interpolate(values[None, None], lengths, mode="trilinear", align_corners=False)[
            0, 0
        ]
    if settings.window is not None:
        low, high = settings.window
        values = ((values - low) / (high - low)).clamp(0.0, 1.0)
    else:
        deviation = values.std(correction=0)
        values = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    return _fit_size(values, settings.size)[None].contiguous()


def _fit_size(values: Tensor, size: tuple[int, int, int]) -> Tensor:
    import torch

    padding: list[int] = []
    for axis, wanted in enumerate(size):
        if values.shape[axis] > wanted:
            values = values.narrow(axis, (values.shape[axis] - wanted) // 2, wanted)
        missing = wanted - values.shape[axis]
        # Padding is named from the last axis on.
        padding = [missing // 2, missing - missing // 2, *padding]
    return torch.nn.functional.pad(values, padding, value=float(values.min()))


def average_axes(values_B: Tensor, axis: int | None) -> Tensor:
    """Returns features_BD: means over all axes but the first and one, or all numbers one after the other.

    Args:
        values_B: what a network gives, [B, ...].
        axis: the axis of features, counted with that of records; None keeps all numbers.

    Raises:
        BadInput: there is no such axis.
    """
    if axis is None or values_B.ndim < 3:
        return values_B.flatten(1) if values_B.ndim > 1 else values_B[:, None]
    if not -values_B.ndim < axis < values_B.ndim or axis % values_B.ndim == 0:
        raise BadInput(f"axis: expected an axis of the output from 1 to {values_B.ndim - 1}, got {axis}")
    return values_B.movedim(axis, -1).flatten(1, -2).mean(dim=1)
