"""NIfTI volumes that a table lists, whole: one record each, for networks of three dimensions."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import read_scan, require_nibabel
from common.inputs import Volume


class Volumes(ListedFiles):
    """Settings of listed volumes. Each keeps its intensities, its spacing and the patient's own axes.

    Attributes:
        file: column of paths of .nii or .nii.gz files.
    """

    kind: Literal["volumes"]
    file: str = "file"

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four small volumes of three patients."""
        import nibabel

        rng = np.random.default_rng(0)
        names = ["q7-a.nii", "q7-b.nii.gz", "q7-c.nii", "q7-d.nii"]
        for name in names:
            volume = rng.normal(size=(5, 6, 3)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(volume, np.diag([1.0, 1.0, 3.0, 1.0])), folder / name)
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(name, f"q7-pat{number // 2}", f"z-{number % 2}") for number, name in enumerate(names)]
            csv.writer(file).writerows([("file", "patient", "finding"), *rows])
        settings = {"kind": "volumes", "path": str(folder / "list.csv"), "patient": "patient"}
        return SourceExample(settings, ["q7-", "z-0", "z-1"])

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or nibabel is not installed."""
        require_nibabel()
        return open_listing(self, Reader(self.file, self.read, "NIfTI file", "volumes"))

    def read(self, path: Path) -> Volume:
        """Returns a volume. Raises BadRecord, OSError."""
        return read_scan(path)
