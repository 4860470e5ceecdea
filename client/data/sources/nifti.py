"""NIfTI volumes that a table lists: one record each, whose slices' features are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import (
    Plane,
    Window,
    cut_slices,
    read_pixels,
    require_nibabel,
    write_example,
)
from common.inputs import Several, spread


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
        """Returns four small volumes of three patients."""
        return write_example(folder, "nifti")

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or nibabel is not installed."""
        require_nibabel()
        settings = f"nifti {self.plane} {self.window} {self.max_slices}"
        return open_listing(self, Reader(self.file, self.read, "NIfTI file", settings))

    def read(self, path: Path) -> Several:
        """Returns a volume's slices. Raises BadRecord, OSError."""
        slices_SHW = cut_slices(read_pixels(path, self.window), self.plane)
        return Several([slices_SHW[at] for at in spread(len(slices_SHW), self.max_slices)])
