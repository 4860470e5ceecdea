"""DICOM pictures that a table lists: single files, multi-frame files, or a folder that holds a series.

Grey values are rescaled, windowed, and turned where MONOCHROME1 says that high is black; colours are read as they are,
those of a palette by its tables. Compressed files are decoded. What is not understood is refused by its name. A series
or multi-frame file is one record: its slices' features are averaged, and what is no picture in a folder is passed over.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from client.data.sources import Source, SourceExample
from client.data.sources.parts.dicom.files import NoPicture, SeriesFiles, list_series, open_dicom, quiet, read_patient
from client.data.sources.parts.dicom.pixels import count_frames, read_frames
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from common.inputs import Several, spread
from common.types import BadInput, BadRecord


class Dicom(ListedFiles):
    """Settings of listed DICOM files.

    Attributes:
        file: column of paths, of files or of folders that hold the files of one series.
        window: [centre, width] of grey values after rescaling; `file` takes the first one of the file, or of each
            frame, with its function, or the file's table; `full` its lowest to highest value, the padding left out.
        patient_from_tag: whether the patient id is the file's PatientID instead of a column.
        max_slices: of a series, evenly spread; null takes all.
        masks: columns of paths of masks of single pictures, as of a manifest.
    """

    kind: Literal["dicom"]
    file: str = "file"
    window: tuple[float, Annotated[float, Field(gt=0)]] | Literal["file", "full"] = "file"
    patient_from_tag: bool = False
    max_slices: Annotated[int, Field(ge=1)] | None = None
    masks: list[str] = []

    @model_validator(mode="after")
    def _one_patient(self) -> Dicom:
        if self.patient_from_tag and self.patient is not None:
            raise ValueError("patient_from_tag: expected either the tag or a `patient`, got both")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Three pictures and a series of two slices, of three patients."""
        rng = np.random.default_rng(0)
        (folder / "q7-series").mkdir()
        paths = ["q7-a.dcm", "q7-b.dcm", "q7-c.dcm", "q7-series/1.dcm", "q7-series/2.dcm"]
        for number, path in enumerate(paths):
            values = rng.integers(0, 4096, (6, 5), dtype=np.uint16)
            write_dicom(folder / path, values, PatientID=f"q7-pat{number // 2}", PatientName="q7-Doe^Jane")
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [("file", "finding"), *((path, f"z-{n % 2}") for n, path in enumerate([*paths[:3], "q7-series"]))]
            )
        settings = {"kind": "dicom", "path": str(folder / "list.csv"), "window": "full", "patient_from_tag": True}
        return SourceExample(settings, ["q7-", "z-0", "z-1"])

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or pydicom is not installed."""
        require_pydicom()
        settings = f"dicom 2 {self.window} {self.max_slices}"
        patient = read_patient if self.patient_from_tag else None
        return open_listing(self, Reader(self.file, self.read, "DICOM file", settings, patient), self.masks)

    def read(self, path: Path) -> Any:
        """Returns a file's picture, or those of a multi-frame file or a folder's series. Raises BadRecord, OSError."""
        with quiet():
            if not path.is_dir():
                found = open_dicom(path, pixels=True)
                pictures = read_frames(found, self.window, self.max_slices).pictures
                return pictures[0] if count_frames(found) == 1 else Several(pictures)
            return self._read_series(list_series(path))

    def _read_series(self, series: SeriesFiles) -> Several:
        slices: list[Any] = []
        passed_over = series.passed_over
        for at in spread(len(series.paths), self.max_slices):
            try:
                slices += read_frames(open_dicom(series.paths[at], pixels=True), self.window).pictures
            except NoPicture:
                passed_over += 1
        if not slices:
            raise BadRecord("expected a folder with the files of a series, got none with a picture")
        return Several(slices, passed_over)


def require_pydicom() -> None:
    """Raises BadInput where the package that reads DICOM files is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise BadInput("sources: expected the package pydicom; install headwater[dicom]") from error


def write_dicom(path: Path, values: NDArray[Any], **tags: Any) -> None:
    """A DICOM file of grey values, H x W or frames x H x W, for examples and tests."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = "1.2.826.0.1.3680043.8.498.1"
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * values.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.PixelData = np.ascontiguousarray(values).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
