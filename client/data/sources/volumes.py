"""NIfTI volumes that a table lists, whole: one record each, for networks of three dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import read_scan, require_nibabel, write_example
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
        """Returns four small volumes of three patients."""
        return write_example(folder, "volumes")

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or nibabel is not installed."""
        require_nibabel()
        return open_listing(self, Reader(self.file, self.read, "NIfTI file", "volumes"))

    def read(self, path: Path) -> Volume:
        """Returns a volume. Raises BadRecord, OSError."""
        return read_scan(path)
