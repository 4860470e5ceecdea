"""DICOM pictures that a table lists: single files, multi-frame files, or a folder that holds a series.

Stored values are rescaled (slope and intercept), windowed, and turned where MONOCHROME1 says that high is black.
Compressed files are decoded. A series or multi-frame file is one record: its slices' features are averaged.

No identifying tag appears in a message or log: pydicom's warnings, which quote values, are not shown.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from client.data.sources import Source, SourceExample
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.scans import MAX_VALUES, UNREADABLE, spread, windowed
from client.data.sources.parts.tree import require_file
from common.inputs import Several
from common.types import BadInput, BadRecord


class Dicom(ListedFiles):
    """Settings of listed DICOM files.

    Attributes:
        file: column of paths, of files or of folders that hold the files of one series.
        window: [centre, width] after rescaling; `file` takes the first one of the file, `full` its lowest to highest
            value.
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
        try:
            import pydicom  # noqa: F401
        except ImportError as error:
            raise BadInput("sources: expected the package pydicom; install headwater[dicom]") from error
        settings = f"dicom {self.window} {self.max_slices}"
        patient = _patient if self.patient_from_tag else None
        return open_listing(self, Reader(self.file, self.read, "DICOM file", settings, patient), self.masks)

    def read(self, path: Path) -> Any:
        """Returns a file's picture, or those of a multi-frame file or a folder's series. Raises BadRecord, OSError."""
        if not path.is_dir():
            frames = self._frames(path)
            chosen = [frames[position] for position in spread(len(frames), self.max_slices)]
            return chosen[0] if len(frames) == 1 else Several(chosen)
        files = _in_order(path)
        slices = [frame for p in spread(len(files), self.max_slices) for frame in self._frames(files[p])]
        return Several(slices)

    def _frames(self, path: Path) -> list[NDArray[np.uint8]]:
        """Pictures of one file: H x W, or H x W x 3."""
        from pydicom.pixels import apply_modality_lut

        with quiet():
            found = _opened(path, pixels=True)
            try:
                colour = int(found.get("SamplesPerPixel", 1)) > 1
                count = max(1, int(found.get("NumberOfFrames", 1) or 1))
                if not 0 < _count_values(found, count) <= MAX_VALUES:
                    raise BadRecord(f"expected at most {MAX_VALUES >> 20} million values")
                stored = found.pixel_array
                frames = stored if count > 1 else stored[np.newaxis]
                if colour:
                    if frames.dtype != np.uint8:
                        raise BadRecord("expected a colour picture of 8 bits per value")
                    return list(frames)
                values = np.asarray(apply_modality_lut(frames, found))
                low, high = self._range(found, values)
                pixels = windowed(values, low, high)
                return list(255 - pixels if found.PhotometricInterpretation == "MONOCHROME1" else pixels)
            except _unreadable():
                # From None: pydicom's own messages quote tags.
                raise BadRecord("DICOM file without pixels that can be decoded") from None

    def _range(self, found: Any, values: NDArray[Any]) -> tuple[float, float]:
        if self.window == "full":
            return float(values.min()), float(values.max())
        if self.window == "file":
            centre, width = (_first(found.get(name)) for name in ("WindowCenter", "WindowWidth"))
            if centre is None or width is None or width <= 0:
                raise BadRecord("DICOM file without a window of its own; write `window: [centre, width]` or `full`")
        else:
            centre, width = self.window
        return centre - width / 2, centre + width / 2


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning and no log of pydicom's or its decoders': they quote the values of tags."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "pylibjpeg", "libjpeg", "openjpeg")]
    before = [(logger.disabled, logger.propagate) for logger in loggers]
    for logger in loggers:
        # Children do not ask whether their parent is disabled; what they say ends at it.
        logger.disabled, logger.propagate = True, False
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, (disabled, propagate) in zip(loggers, before, strict=True):
            logger.disabled, logger.propagate = disabled, propagate


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


def _count_values(found: Any, count: int) -> int:
    """Returns how many values a file says that its pixels are: a damaged header may ask for any amount of memory."""
    return count * int(found.Rows) * int(found.Columns) * int(found.get("SamplesPerPixel", 1))


def _unreadable() -> tuple[type[Exception], ...]:
    # Here: its package need not be installed where no DICOM file is read.
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return *UNREADABLE, BytesLengthException, InvalidDicomError


def _opened(path: Path, *, pixels: bool) -> Any:
    """A dataset. Raises BadRecord: no DICOM file; OSError: missing."""
    import pydicom

    require_file(path, "DICOM file")
    try:
        return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except _unreadable():
        raise BadRecord("not a DICOM file that can be read") from None


def _in_order(folder: Path) -> list[Path]:
    """A series' files by instance number, then by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise BadRecord("expected a folder with the files of a series, got an empty one")
    return sorted(files, key=lambda path: (_instance(path), path.relative_to(folder).as_posix()))


def _instance(path: Path) -> int:
    with quiet():
        try:
            return int(_opened(path, pixels=False).get("InstanceNumber") or 0)
        except _unreadable():
            return 0


def _patient(path: Path) -> str:
    with quiet():
        first = _in_order(path)[0] if path.is_dir() else path
        try:
            return str(_opened(first, pixels=False).get("PatientID") or "").strip()
        except _unreadable():
            return ""


def _first(value: Any) -> float | None:
    """The first of one or several numbers of a tag."""
    try:
        return float(value if isinstance(value, int | float | str) else value[0])
    except UNREADABLE:
        return None
