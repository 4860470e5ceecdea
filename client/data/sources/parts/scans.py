"""From stored values of a scan to 8-bit pictures: a window of intensities becomes black to white.

# Shapes: X, Y, Z of a volume along the patient's axes to the right, front and top; S slices of H x W.
"""

from __future__ import annotations

import csv
import gzip
import struct
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from client.data.sources import SourceExample
from client.data.sources.parts.tree import require_file
from common.inputs import Volume
from common.types import BadInput, BadRecord

MAX_VALUES = 1 << 30
"""Pixels or voxels of one record."""

_PART = 1 << 22
"""Values that are in double precision at once."""

Plane = Literal["axial", "coronal", "sagittal"]
Window = tuple[float, float] | Literal["full"]

_Read = TypeVar("_Read")
_AXES: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}

UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Errors that libraries of scans raise on arbitrary bytes, their own exceptions aside."""


def windowed(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Returns values between `low` and `high` as 0 to 255, values beyond at the ends.

    Args:
        values: intensities of any shape.
        low: intensity that becomes 0.
        high: intensity that becomes 255.

    Raises:
        BadRecord: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise BadRecord("expected finite intensities")
    if not high > low:
        # A picture of one value: black, not a division by zero.
        return np.zeros(values.shape, dtype=np.uint8)
    pixels = np.empty(values.shape, dtype=np.uint8)
    flat, pixels_N = values.reshape(-1), pixels.reshape(-1)
    # In parts: a volume in double precision may not fit into memory.
    for start in range(0, flat.size, _PART):
        scaled = (flat[start : start + _PART].astype(np.float64) - low) / (high - low)
        pixels_N[start : start + _PART] = (255.0 * scaled.clip(0.0, 1.0)).round()
    return pixels


def require_nibabel() -> None:
    """Raises BadInput where the package that reads NIfTI files is not installed."""
    try:
        import nibabel  # noqa: F401
    except ImportError as error:
        raise BadInput("sources: expected the package nibabel; install headwater[nifti]") from error


def count_slices(path: Path, plane: Plane) -> int:
    """Returns the number of a NIfTI volume's slices from its header.

    Raises:
        BadRecord: it is none that can be read.
        OSError: it is missing.
    """
    return _read_nifti(path, lambda image: int(image.shape[_AXES[plane]]))


def read_volume(path: Path) -> NDArray[np.float32]:
    """Returns a NIfTI volume along the patient's axes, X x Y x Z.

    Raises:
        BadRecord: it is none that can be read.
        OSError: it is missing.
    """
    return _read_nifti(path, lambda image: np.asarray(image.dataobj, dtype=np.float32))


def read_scan(path: Path) -> Volume:
    """Returns a NIfTI volume with its spacing, in the patient's own axes. Raises BadRecord, OSError."""
    return _read_nifti(path, _make_scan)


def turn_scan(values_IJK: NDArray[np.float32], to_mm: NDArray[np.float64]) -> Volume:
    """Returns values as a scan in the patient's own axes.

    Args:
        values_IJK: the values.
        to_mm: the 4 x 4 matrix from indices to mm to the patient's right, front and top.
    """
    import nibabel

    return _make_scan(nibabel.as_closest_canonical(nibabel.Nifti1Image(values_IJK, to_mm)))


def _make_scan(canonical: Any) -> Volume:
    from nibabel.affines import voxel_sizes

    x_mm, y_mm, z_mm = (float(size) for size in voxel_sizes(canonical.affine))
    return Volume(np.asarray(canonical.dataobj, dtype=np.float32), (x_mm, y_mm, z_mm))


def read_pixels(path: Path, window: Window) -> NDArray[np.uint8]:
    """Returns a NIfTI volume as X x Y x Z values from black to white; what is not a number is black.

    Args:
        path: the file.
        window: lowest and highest intensity; `full` takes the volume's .5 and 99.5 percentiles.

    Raises:
        BadRecord: it is none that can be read.
        OSError: it is missing.
    """
    volume = read_volume(path)
    # Brain extraction and statistics leave what is not the organ as not a number.
    outside = np.isnan(volume)
    inside = volume[~outside]
    if not inside.size or not np.isfinite(inside).all():
        raise BadRecord("expected finite intensities")
    low, high = np.percentile(inside, (0.5, 99.5)) if window == "full" else window
    return windowed(np.where(outside, low, volume) if outside.any() else volume, float(low), float(high))


def cut_slices(volume_XYZ: NDArray[Any], plane: Plane) -> NDArray[Any]:
    """Returns a volume's slices, S x H x W: the first row of each is its top, or its front."""
    return np.ascontiguousarray(np.moveaxis(volume_XYZ, _AXES[plane], 0).transpose(0, 2, 1)[:, ::-1])


def write_slices(path: Path, slices: Mapping[int, NDArray[np.uint8]], plane: Plane, missing: int) -> bytes:
    """Returns slices as a compressed NIfTI file with the axes and the place in the body of the volume they are of.

    Args:
        path: the volume's file.
        slices: number of the slice -> its values, H x W, as `cut_slices` cuts a volume.
        plane: across which the volume is sliced.
        missing: value of all places of a slice that is not there.

    Raises:
        BadRecord: the volume cannot be read, or its slices have another size.
        OSError: it is missing.
    """
    import nibabel

    def join(canonical: Any) -> bytes:
        volume_XYZ = np.full(canonical.shape, missing, np.uint8)
        # A view, into which slices are written as they are cut.
        cut_SHW = np.moveaxis(volume_XYZ, _AXES[plane], 0).transpose(0, 2, 1)[:, ::-1]
        for at, values_HW in slices.items():
            cut_SHW[at] = values_HW
        own = nibabel.io_orientation(nibabel.load(path).affine)
        turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), own)
        mask = nibabel.Nifti1Image(volume_XYZ, canonical.affine).as_reoriented(turn)
        return gzip.compress(mask.to_bytes(), mtime=0)

    return _read_nifti(path, join)


def _read_nifti(path: Path, read: Callable[[Any], _Read]) -> _Read:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    # Opened here first: a missing file is an OSError, and nibabel's own would name it.
    require_file(path, "NIfTI file")
    path.open("rb").close()
    try:
        with warnings.catch_warnings(action="ignore"):
            found = _make_volume(nibabel.load(path))
            return read(nibabel.as_closest_canonical(found))
    except (*UNREADABLE, OSError, ImageFileError):
        # From None: nibabel's messages name the file.
        raise BadRecord("not a NIfTI volume that can be read") from None


def _make_volume(found: Any) -> Any:
    """Returns an image of three dimensions: further axes of length 1 are dropped, a single slice has a third.

    Raises:
        BadRecord: it has more than one volume, colours or complex numbers, or says no direction of its axes.
    """
    import nibabel

    shape = tuple(int(length) for length in found.shape)
    more = [length for length in shape[3:] if length != 1]
    if more:
        raise BadRecord(
            f"expected one volume of three dimensions, got a fourth axis of {more[0]} (moments, channels or "
            "directions); save each as a file of its own"
        )
    if len(shape) < 2 or not 0 < int(np.prod(shape, dtype=np.float64)) <= MAX_VALUES:
        raise BadRecord("expected a volume of three dimensions")
    if found.get_data_dtype().kind not in "biuf":
        raise BadRecord("expected a volume of intensities, got one of colours or complex numbers")
    if found.affine is None or np.isnan(nibabel.io_orientation(found.affine)).any():
        raise BadRecord("expected a volume that says where its axes point")
    if len(shape) == 3:
        return found
    flat = (*shape, 1)[:3]
    return nibabel.Nifti1Image(_Reshaped(found.dataobj, flat), found.affine, dtype=found.get_data_dtype())


def write_example(folder: Path, kind: str) -> SourceExample:
    """Writes four small volumes of three patients with a list of them; returns settings of a kind that reads it."""
    import nibabel

    rng = np.random.default_rng(0)
    names = ["q7-a.nii", "q7-b.nii.gz", "q7-c.nii", "q7-d.nii"]
    for name in names:
        volume = rng.normal(size=(5, 6, 3)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), folder / name)
    with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(name, f"q7-pat{number // 2}", f"z-{number % 2}") for number, name in enumerate(names)]
        csv.writer(file).writerows([("file", "patient", "finding"), *rows])
    settings = {"kind": kind, "path": str(folder / "list.csv"), "patient": "patient"}
    return SourceExample(settings, ["q7-", "z-0", "z-1"])


class _Reshaped:
    """Values of a file that are read when they are asked for, in another shape."""

    def __init__(self, values: Any, shape: tuple[int, ...]) -> None:
        self.values, self.shape, self.ndim = values, shape, len(shape)
        self.dtype = np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.values, dtype=dtype or np.float32).reshape(self.shape)
