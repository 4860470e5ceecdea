"""Open DICOM files, and tell the pictures of a folder from what archives and viewers leave beside them.

No identifying tag appears in a message or log: pydicom's warnings, which quote values, are not shown. A name that a
message repeats is one that the standard knows.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.data.sources.parts.scans import UNREADABLE
from client.data.sources.parts.tree import MAX_FILE_BYTES, require_file
from common.types import BadRecord

_DEFLATED = b"1.2.840.10008.1.2.1.99"
"""The transfer syntax of a file that is deflated as a whole; pydicom inflates it whatever comes out."""

_MOST_INFLATED = 1024
"""So many bytes become of one at most, by how deflating works."""

_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})


class NoPicture(BadRecord):
    """A file that is whole and holds no picture: a report, a plan, a directory, or no DICOM file at all."""


@dataclass(frozen=True)
class SeriesFiles:
    """The files of a folder.

    Attributes:
        paths: those with a picture, by instance number, then by name.
        passed_over: number of the others.
    """

    paths: tuple[Path, ...] = field(repr=False)
    passed_over: int


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


def list_errors() -> tuple[type[Exception], ...]:
    """Returns what pydicom raises on arbitrary bytes."""
    # Here: its package need not be installed where no DICOM file is read.
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return *UNREADABLE, BytesLengthException, InvalidDicomError


def open_dicom(path: Path, *, pixels: bool) -> Any:
    """Returns a file's dataset, whose transfer syntax is stated.

    A file may lack the 128 bytes in front and the letters behind them, and the part that names its transfer syntax:
    it is one where its tags say what it is.

    Args:
        path: the file.
        pixels: whether its pixels are read too.

    Raises:
        NoPicture: it is no DICOM file, or has no picture.
        BadRecord: it is a damaged one.
        OSError: it is missing.
    """
    import pydicom

    _check_size(path)
    has_mark = is_marked(path)
    try:
        found = pydicom.dcmread(path, stop_before_pixels=not pixels, force=not has_mark)
        if not has_mark and "SOPClassUID" not in found and "Modality" not in found:
            raise NoPicture("not a DICOM file that can be read")
        has_size = "Rows" in found and "Columns" in found
        has_pixels = any(name in found for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData"))
        if not has_size or (pixels and not has_pixels):
            raise NoPicture(f"DICOM file without a picture{_name_class(found)}")
        _state_syntax(found)
    except NoPicture:
        raise
    except list_errors():
        raise BadRecord("not a DICOM file that can be read") from None
    return found


def _check_size(path: Path) -> None:
    """Raises BadRecord where a file takes too much memory, inflated where it says that it is deflated; OSError."""
    size = require_file(path, "DICOM file")
    if size > MAX_FILE_BYTES:
        raise BadRecord(f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
    if size > MAX_FILE_BYTES // _MOST_INFLATED:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(_DEFLATED) >= 0:
                raise BadRecord("expected a deflated DICOM file of less than 1 MiB; inflate larger ones")


def list_series(folder: Path) -> SeriesFiles:
    """Returns the pictures of a folder that holds one series; the files of no picture are counted.

    Raises:
        BadRecord: it holds no picture, several series, or a DICOM file that is damaged.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise BadRecord("expected a folder with the files of a series, got an empty one")
    numbered: list[tuple[int, str, Path]] = []
    series = set()
    for path in files:
        try:
            found = open_dicom(path, pixels=False)
            numbered.append((_read_instance(found), path.relative_to(folder).as_posix(), path))
            series.add(str(found.get("SeriesInstanceUID") or ""))
        except NoPicture:
            if path.suffix.lower() in _SUFFIXES and not is_marked(path):
                # It may have been one of the slices.
                raise BadRecord("a file of the series is not a DICOM file that can be read") from None
    if not numbered:
        raise BadRecord("expected a folder with the files of a series, got none with a picture")
    if len(series) > 1:
        raise BadRecord(
            f"expected the files of one series, got those of {len(series)}; list each series' files in a folder of "
            "their own"
        )
    return SeriesFiles(tuple(path for *_, path in sorted(numbered)), len(files) - len(numbered))


def has_frames(path: Path) -> bool:
    """Returns whether a file says that it has several pictures."""
    with quiet():
        try:
            return int(open_dicom(path, pixels=False).get("NumberOfFrames", 1) or 1) > 1
        except (BadRecord, OSError, ValueError, TypeError):
            return False


def read_patient(path: Path) -> str:
    """Returns the PatientID of a file, or of the first of a folder's series; "" where it has none."""
    with quiet():
        try:
            first = list_series(path).paths[0] if path.is_dir() else path
            return str(open_dicom(first, pixels=False).get("PatientID") or "").strip()
        except list_errors():
            return ""


def _state_syntax(found: Any) -> None:
    """Names the transfer syntax of a dataset whose file does not: pydicom found it by trying."""
    from pydicom import uid
    from pydicom.dataset import FileMetaDataset

    if getattr(found, "file_meta", None) is None:
        found.file_meta = FileMetaDataset()
    if found.file_meta.get("TransferSyntaxUID"):
        return
    is_implicit, is_little = found.original_encoding
    explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
    found.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if is_implicit else explicit


def _name_class(found: Any) -> str:
    """Returns the standard's name of what a file is, in brackets; "" where it has none."""
    from pydicom.uid import UID_dictionary

    meta = getattr(found, "file_meta", None) or {}
    known = UID_dictionary.get(str(found.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or ""))
    return f" ({known[0]})" if known else ""


def is_dicom(path: Path) -> bool:
    """Returns whether a path is a folder, or a file that by its name or first bytes is DICOM. Raises OSError."""
    return path.is_dir() or path.suffix.lower() in _SUFFIXES or is_marked(path)


def is_marked(path: Path) -> bool:
    """Returns whether a file has the letters DICM behind its first 128 bytes. Raises OSError."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_instance(found: Any) -> int:
    try:
        return int(found.get("InstanceNumber") or 0)
    except list_errors():
        return 0
