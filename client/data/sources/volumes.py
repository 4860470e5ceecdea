"""Volumes that a table lists, whole: one record each, for networks of three dimensions.

A row names a NIfTI file, a DICOM file of several frames, or a folder with the files of one DICOM series.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import model_validator

from client.data.sources import Source, SourceExample
from client.data.sources.dicom import require_pydicom, write_dicom
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.dicom.files import is_dicom, read_patient
from client.data.sources.parts.dicom.volumes import read_series_volume
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import read_scan, require_nibabel, turn_scan, write_example
from common.inputs import Volume


class Volumes(ListedFiles):
    """Settings of listed volumes. Each keeps its intensities, its spacing and the patient's own axes.

    Attributes:
        file: column of paths: of .nii or .nii.gz files, of DICOM files of several frames, or of folders that each hold
            one DICOM series.
        patient_from_tag: whether the patient id is DICOM's PatientID instead of a column.
    """

    kind: Literal["volumes"]
    file: str = "file"
    patient_from_tag: bool = False

    @model_validator(mode="after")
    def _one_patient(self) -> Volumes:
        if self.patient_from_tag and self.patient is not None:
            raise ValueError("patient_from_tag: expected either the tag or a `patient`, got both")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Returns four small NIfTI volumes of three patients, and a DICOM series of two slices."""
        nifti = write_example(folder, "volumes")
        (folder / "q7-series").mkdir()
        rng = np.random.default_rng(1)
        for number in range(2):
            values = rng.integers(0, 4096, (6, 5), dtype=np.uint16)
            place = {"ImagePositionPatient": [0, 0, 3 * number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
            path = folder / "q7-series" / f"{number}.dcm"
            write_dicom(path, values, PatientName="q7-Doe^Jane", PixelSpacing=[1, 1], **place)
        with (folder / "list.csv").open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(("q7-series", "q7-pat2", "z-0"))
        return nifti

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or a package is not installed."""
        require_nibabel()
        patient = read_patient if self.patient_from_tag else None
        listing = open_listing(self, Reader(self.file, self.read, "volume", "volumes", patient))
        if any(try_record(lambda at=at: is_dicom(listing.locate(at)))[0] for at in range(len(listing.rows))):  # type: ignore[misc]
            require_pydicom()
        return listing

    def read(self, path: Path) -> Volume:
        """Returns a volume. Raises BadRecord, OSError."""
        return turn_scan(*read_series_volume(path)) if is_dicom(path) else read_scan(path)
