"""NIfTI volumes that a table lists: one record each, whose slices' features are averaged."""

from __future__ import annotations

import csv
import struct
import warnings
import zlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import MAX_VALUES, spread, windowed
from client.data.sources.parts.tree import require_file
from common.inputs import Several
from common.types import BadInput, BadRecord

_UNREADABLE = (
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


class Nifti(ListedFiles):
    """Settings of listed volumes.

    Attributes:
        file: column of paths of .nii or .nii.gz files.
        plane: across which the volume is sliced, in the patient's own axes whatever way the file stores them.
        window: [lowest, highest] intensity; `full` takes the volume's .5 and 99.5 percentiles.
        max_slices: evenly spread; null takes all.
    """

    kind: Literal["nifti"]
    file: str = "file"
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    window: tuple[float, float] | Literal["full"] = "full"
    max_slices: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four small volumes of three patients."""
        import nibabel

        rng = np.random.default_rng(0)
        names = ["q7-a.nii", "q7-b.nii.gz", "q7-c.nii", "q7-d.nii"]
        for name in names:
            volume = rng.normal(size=(5, 6, 3)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / name)
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(name, f"q7-pat{number // 2}", f"z-{number % 2}") for number, name in enumerate(names)]
            csv.writer(file).writerows([("file", "patient", "finding"), *rows])
        settings = {"kind": "nifti", "path": str(folder / "list.csv"), "patient": "patient"}
        return SourceExample(settings, ["q7-", "z-0", "z-1"])

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or nibabel is not installed."""
        try:
            import nibabel  # noqa: F401
        except ImportError as error:
            raise BadInput("sources: expected the package nibabel; install headwater[nifti]") from error
        settings = f"nifti {self.plane} {self.window} {self.max_slices}"
        return open_listing(self, Reader(self.file, self.read, "NIfTI file", settings))

    def read(self, path: Path) -> Several:
        """Returns a volume's slices. Raises BadRecord, OSError."""
        import nibabel
        from nibabel.filebasedimages import ImageFileError

        # Opened here first: a missing file is an OSError, and nibabel's own would name it.
        require_file(path, "NIfTI file")
        path.open("rb").close()
        try:
            with warnings.catch_warnings(action="ignore"):
                found = nibabel.load(path)
                if len(found.shape) != 3 or not 0 < int(np.prod(found.shape, dtype=np.float64)) <= MAX_VALUES:
                    raise BadRecord("expected a volume of three dimensions")
                volume = np.asarray(nibabel.as_closest_canonical(found).dataobj, dtype=np.float32)
        except (*_UNREADABLE, OSError, ImageFileError):
            # From None: nibabel's messages name the file.
            raise BadRecord("not a NIfTI volume that can be read") from None
        return Several(self._slices(volume))

    def _slices(self, volume: np.ndarray) -> list[Any]:
        if not np.isfinite(volume).all():
            raise BadRecord("expected finite intensities")
        low, high = np.percentile(volume, (0.5, 99.5)) if self.window == "full" else self.window
        pixels = windowed(volume, float(low), float(high))
        axis = {"sagittal": 0, "coronal": 1, "axial": 2}[self.plane]
        # Canonical axes run to the right, front and top; a picture's first row is its top, and its front or head.
        slices = np.moveaxis(pixels, axis, 0)
        return [np.ascontiguousarray(slices[p].T[::-1]) for p in spread(len(slices), self.max_slices)]
