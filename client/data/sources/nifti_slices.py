"""NIfTI volumes that a table lists: one record for each slice, with its masks; all slices of a volume are one patient.

Where the unit is the patient, the loss of a volume is the mean over its slices, and its gradient is clipped once.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from client.data.sources import SlicePlace, SourceExample, SourceRecord
from client.data.sources.parts.base import digest
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.listing import ListedFiles, Listing, Reader, open_listing
from client.data.sources.parts.masks import LazyCells
from client.data.sources.parts.scans import (
    Plane,
    Window,
    count_slices,
    cut_slices,
    read_pixels,
    read_volume,
    require_nibabel,
)
from common.inputs import MAX_ITEMS, spread, write_mask
from common.types import BadRecord


class NiftiSlices(ListedFiles):
    """Settings of listed volumes that are read slice by slice.

    Attributes:
        file: column of paths of .nii or .nii.gz files.
        masks: columns of paths of label volumes, NIfTI files of whole numbers as large as the row's volume.
        patient: column of patient ids; without it each volume is a patient.
        plane: across which volumes are sliced, in the patient's own axes whatever way the files store them.
        window: [lowest, highest] intensity; `full` takes each volume's .5 and 99.5 percentiles.
        max_slices: slices of a volume, evenly spread; null takes all.
    """

    kind: Literal["nifti_slices"]
    file: str = "file"
    masks: list[str] = []
    plane: Plane = "axial"
    window: Window = "full"
    max_slices: Annotated[int, Field(ge=1, le=MAX_ITEMS)] | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Two small volumes with label volumes, of three and two slices."""
        import nibabel

        rng = np.random.default_rng(0)
        for name, depth in (("q7-a", 3), ("q7-b", 2)):
            volume = rng.normal(size=(5, 6, depth)).astype(np.float32)
            for end, values in ((".nii", volume), ("-labels.nii.gz", (volume > 1).astype(np.uint8))):
                nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / f"{name}{end}")
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(f"{name}.nii", f"{name}-labels.nii.gz") for name in ("q7-a", "q7-b")]
            csv.writer(file).writerows([("file", "organ"), *rows])
        settings = {"kind": "nifti_slices", "path": str(folder / "list.csv"), "masks": ["organ"]}
        return SourceExample(settings, ["q7-"])

    def open(self) -> Slices:
        """The opened table. Raises BadInput: missing, without a named column, or nibabel is not installed."""
        require_nibabel()
        settings = f"nifti_slices {self.plane} {self.window} {self.max_slices}"

        def open_as(column: str, read: Callable[[Path], Any], what: str) -> Listing:
            return open_listing(self, Reader(column, read, what, settings))

        return Slices(
            self,
            open_as(self.file, partial(count_slices, plane=self.plane), "NIfTI file"),
            open_as(self.file, self._read_slices, "NIfTI file"),
            {column: open_as(column, self._read_masks, "label volume") for column in self.masks},
        )

    def _read_slices(self, path: Path) -> NDArray[np.uint8]:
        return _cut_volume(path, _stamp(path), self.plane, self.window)

    def _read_masks(self, path: Path) -> NDArray[np.integer[Any]]:
        return _cut_labels(path, _stamp(path), self.plane)


@dataclass(frozen=True)
class Slices:
    """An opened table of volumes.

    Attributes:
        settings: the table.
        counts: row -> the number of its volume's slices.
        volumes: row -> its volume's slices.
        labels: column -> row -> slices of the label volume.
    """

    settings: NiftiSlices
    counts: Listing = field(repr=False)
    volumes: Listing = field(repr=False)
    labels: dict[str, Listing] = field(repr=False)

    def digest(self) -> str:
        """Over every file's path, size and time of change."""
        return digest(each.digest().encode() for each in (self.volumes, *self.labels.values()))

    def index(self) -> list[SourceRecord]:
        """Slices volume by volume, in the table's order; a volume that cannot be read is one record."""
        return [record for record, _, _ in self._records]

    def load(self, position: int) -> NDArray[np.uint8]:
        """Returns one slice. Raises BadRecord."""
        record, row, at = self._records[position]
        if record.fault:
            raise BadRecord(record.fault)
        slice_HW: NDArray[np.uint8] = self.volumes.load(row)[at]
        return slice_HW

    def locate_slice(self, position: int) -> SlicePlace:
        """Returns where a record stands in its volume. Raises BadRecord."""
        _, row, at = self._records[position]
        return SlicePlace(self.volumes.locate(row), self.settings.plane, at)

    @cached_property
    def _records(self) -> list[tuple[SourceRecord, int, int]]:
        """Records, each with its volume's row, from 0, and its slice."""
        found: list[tuple[SourceRecord, int, int]] = []
        for row, volume in enumerate(self.volumes.index()):
            count, reason = try_record(partial(self.counts.load, row))
            for at in [0] if count is None else spread(count, self.settings.max_slices):
                found.append((self._make_record(volume, row, at, len(found) + 1, reason or ""), row, at))
        return found

    def _make_record(self, volume: SourceRecord, row: int, at: int, number: int, fault: str) -> SourceRecord:
        own = {column: partial(self._read_mask, column, row, at) for column in self.labels}
        return replace(
            volume,
            row=number,
            key=f"{volume.key} {at}",
            patient=volume.patient if self.settings.patient else volume.key,
            cells=LazyCells(volume.cells, own) if own else volume.cells,
            fault=volume.fault or fault,
        )

    def _read_mask(self, column: str, row: int, at: int) -> str:
        if not self.labels[column].rows[row][column].strip():
            return ""
        labels_SHW: NDArray[np.integer[Any]] = self.labels[column].load(row)
        slices_SHW: NDArray[np.uint8] = self.volumes.load(row)
        if labels_SHW.shape != slices_SHW.shape:
            raise BadRecord("expected a label volume of its volume's size, got one of another")
        return write_mask(labels_SHW[at])


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# The slices of a volume are asked for one after the other, by a few threads.
@lru_cache(maxsize=4)
def _cut_volume(path: Path, stamp: tuple[int, int], plane: Plane, window: Window) -> NDArray[np.uint8]:
    del stamp
    return cut_slices(read_pixels(path, window), plane)


@lru_cache(maxsize=4)
def _cut_labels(path: Path, stamp: tuple[int, int], plane: Plane) -> NDArray[np.integer[Any]]:
    del stamp
    values = read_volume(path)
    # Not a number and infinity are no whole numbers either.
    if not (values == np.trunc(values)).all() or not np.abs(values).max() < 2**24:
        raise BadRecord("expected a label volume of whole numbers")
    # Several are kept, and a byte is enough for most labels.
    kind = np.min_scalar_type(int(values.max())) if values.min() >= 0 else np.int32
    return cut_slices(values.astype(kind), plane)
