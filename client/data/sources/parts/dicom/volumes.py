"""A DICOM series or enhanced file as one volume: where each picture lies in the patient says how they are stacked.

Pictures lie along the normal of their plane (PS3.3, C.7.6.2), whatever order their files, names or numbers have. They
have to be parallel, of one size and at equal distances: what a network of three dimensions reads would else be bent or
lack a slice. A gantry that was tilted moves each picture against the one before; it is moved back.

Libraries that stack series were read first: MONAI's reader sorts by number and only warns of what does not fit,
dicom2nifti needs scipy, gdcm and files, highdicom a file that fulfils its class. None says which rule a series broke.

# Shapes: S slices of H x W; I, J, K voxels along rows, columns and the normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.sources.parts.dicom.files import NoPicture, list_errors, list_series, open_dicom, quiet
from client.data.sources.parts.dicom.pixels import count_frames, find_group, read_intensities
from client.data.sources.parts.scans import MAX_VALUES
from common.types import BadRecord

_EVEN = 0.1
"""Part of the distance of slices by which one may lie off its place: scanners round what they write."""

_SHIFTED = 0.5
"""Pixels by which a slice may lie beside the others, as rounding moves it."""

_PARALLEL = 1e-3

MAX_FRAMES = 1 << 16
"""Largest number of frames of a file: each takes some time, however small it is."""

_TO_RAS = np.diag([-1.0, -1.0, 1.0])
"""DICOM's axes lead to the patient's left and back."""


@dataclass(frozen=True)
class _Plane:
    """The place of a picture, in DICOM's axes and mm.

    Attributes:
        corner_3: middle of its first pixel.
        along_row_3: unit vector from each pixel to the next one in its row.
        along_column_3: unit vector to the next row.
        spacing: distance of rows, and of columns.
        shape: number of rows, and of columns.
    """

    corner_3: NDArray[np.float64]
    along_row_3: NDArray[np.float64]
    along_column_3: NDArray[np.float64]
    spacing: tuple[float, float]
    shape: tuple[int, int]

    @property
    def normal_3(self) -> NDArray[np.float64]:
        return np.cross(self.along_row_3, self.along_column_3)

    def is_parallel(self, other: _Plane) -> bool:
        """Returns whether both have the same directions."""
        own = np.stack([self.along_row_3, self.along_column_3])
        return bool(np.allclose(own, [other.along_row_3, other.along_column_3], atol=_PARALLEL))


def read_series_volume(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Returns values_IJK and the 4 x 4 matrix from indices to mm to the patient's right, front and top.

    Args:
        path: a folder with the files of one series, or one file of several frames.

    Raises:
        BadRecord: they are no volume; says why.
        OSError: it is missing.
    """
    with quiet():
        planes: list[_Plane] = []
        pictures: list[NDArray[np.float32]] = []
        room = MAX_VALUES
        for file in list_series(path).paths if path.is_dir() else [path]:
            try:
                found = open_dicom(file, pixels=True)
            except NoPicture:
                if not path.is_dir():
                    raise
                continue
            own = _find_planes(found, room)
            room -= len(own) * own[0].shape[0] * own[0].shape[1]
            _check_alike((planes or own)[0], own)
            planes += own
            pictures += list(read_intensities(found))
    return _stack(planes, pictures)


def _find_planes(found: Any, room: int) -> list[_Plane]:
    """Returns the place of each frame of a file. Raises BadRecord: more frames or values than there is room for."""
    try:
        count = count_frames(found)
        # First: a file says how many frames it has, and need not have them.
        if count > MAX_FRAMES or count * int(found.Rows) * int(found.Columns) > room:
            raise BadRecord(
                f"expected a volume of at most {MAX_VALUES >> 20} million values, and at most {MAX_FRAMES} frames"
            )
        return [_find_plane(found, frame) for frame in range(count)]
    except list_errors():
        raise BadRecord(
            "expected slices that say where they lie (ImagePositionPatient, ImageOrientationPatient and PixelSpacing; "
            "for each frame of a file)"
        ) from None


def _find_plane(found: Any, frame: int) -> _Plane:
    if "MOSAIC" in (found.get("ImageType") or ()):
        raise BadRecord("expected single slices, got a mosaic of them; export it as an enhanced file, or as NIfTI")
    corner, directions, spacing = (
        _read_numbers(found, frame, group, name, count)
        for group, name, count in (
            ("PlanePositionSequence", "ImagePositionPatient", 3),
            ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
            ("PixelMeasuresSequence", "PixelSpacing", 2),
        )
    )
    row, column = directions[:3], directions[3:]
    square = np.allclose([row @ row, column @ column, row @ column], [1.0, 1.0, 0.0], atol=1e-2)
    if not square or not (spacing > 0).all():
        raise BadRecord("expected rows and columns at right angles, with a spacing above 0")
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    shape = (int(found.Rows), int(found.Columns))
    return _Plane(corner, row, column / np.linalg.norm(column), (float(spacing[0]), float(spacing[1])), shape)


def _read_numbers(found: Any, frame: int, group: str, name: str, count: int) -> NDArray[np.float64]:
    """Returns the numbers of a tag that a frame, all frames together, or a file of one picture has."""
    own = find_group(found, frame, group)
    if own is None and count_frames(found) > 1:
        # A tag beside the frames is that of the first one, if of any.
        raise ValueError
    numbers = np.array([float(number) for number in (found if own is None else own)[name].value])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError
    return numbers


def _check_alike(first: _Plane, planes: Sequence[_Plane]) -> None:
    """Raises BadRecord where pictures do not fit on the first one."""
    if any(plane.shape != first.shape for plane in planes):
        raise BadRecord("expected slices of one size, got several; list each size in a folder of its own")
    if not all(first.is_parallel(plane) for plane in planes):
        raise BadRecord(
            "expected slices of one orientation, got several (a scout among them, or more than one plane); list each "
            "in a folder of its own"
        )
    if not all(np.allclose(plane.spacing, first.spacing, rtol=1e-2) for plane in planes):
        raise BadRecord("expected slices with pixels of one size in mm, got several")


def _stack(
    planes: Sequence[_Plane], pictures: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    if len(planes) < 2:
        raise BadRecord(f"expected the slices of a volume, got {len(planes)} picture(s)")
    normal_3 = planes[0].normal_3
    heights_S = np.array([plane.corner_3 @ normal_3 for plane in planes])
    order = np.argsort(heights_S, kind="stable")
    step = _find_step(heights_S[order])
    # In the middle, so that pictures which are moved back keep as much as they can.
    anchor = planes[order[len(order) // 2]].corner_3 - len(order) // 2 * step * normal_3
    slices = []
    for place, number in enumerate(order):
        beside_3 = planes[number].corner_3 - anchor - place * step * normal_3
        slices.append(_move_back(pictures[number], beside_3, planes[number]))
    row_mm, column_mm = planes[0].spacing
    to_mm = np.eye(4)
    to_mm[:3, 0] = planes[0].along_row_3 * column_mm
    to_mm[:3, 1] = planes[0].along_column_3 * row_mm
    to_mm[:3, 2] = normal_3 * step
    to_mm[:3, 3] = anchor
    to_mm[:3] = _TO_RAS @ to_mm[:3]
    return np.stack(slices).transpose(2, 1, 0), to_mm


def _find_step(heights_S: NDArray[np.float64]) -> float:
    """Returns the distance of slices from their places along the normal, in ascending order. Raises BadRecord."""
    steps = np.diff(heights_S)
    usual = float(np.median(steps))
    if steps.min() <= max(1e-3, _EVEN * usual):
        raise BadRecord(
            "expected one slice at each place, got several at one (times, echoes, directions or copies); list each "
            "volume in a folder of its own"
        )
    even = float(heights_S[-1] - heights_S[0]) / len(steps)
    if np.abs(heights_S - (heights_S[0] + even * np.arange(len(heights_S)))).max() > _EVEN * even:
        raise BadRecord("expected slices at equal distances, got gaps or uneven ones; export the whole series")
    return even


def _move_back(picture_HW: NDArray[np.float32], beside_3: NDArray[np.float64], plane: _Plane) -> NDArray[np.float32]:
    """Returns a picture over the place where the others lie; what it does not cover is not a number."""
    from scipy.ndimage import shift

    moved = (
        float(beside_3 @ plane.along_column_3) / plane.spacing[0],
        float(beside_3 @ plane.along_row_3) / plane.spacing[1],
    )
    if max(map(abs, moved)) <= _SHIFTED:
        return picture_HW
    if any(abs(by) > length / 2 for by, length in zip(moved, picture_HW.shape, strict=True)):
        raise BadRecord("expected slices that lie above one another, got some that lie beside the others")
    return np.asarray(shift(picture_HW, moved, order=1, mode="constant", cval=np.nan), dtype=np.float32)
