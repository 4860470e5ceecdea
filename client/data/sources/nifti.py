"""NIfTI volumes that a table lists: one record each, whose slices' features are averaged."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import Plane, Window, cut_slices, read_pixels, require_nibabel, spread
from common.inputs import Several


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
    plane: Plane = "axial"
    window: Window = "full"
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
        require_nibabel()
        settings = f"nifti {self.plane} {self.window} {self.max_slices}"
        return open_listing(self, Reader(self.file, self.read, "NIfTI file", settings))

    def read(self, path: Path) -> Several:
        """Returns a volume's slices. Raises BadRecord, OSError."""
        slices_SHW = cut_slices(read_pixels(path, self.window), self.plane)
        return Several([slices_SHW[at] for at in spread(len(slices_SHW), self.max_slices)])
