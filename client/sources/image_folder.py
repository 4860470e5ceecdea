"""Images in folders named after their label: `<label>/<image>`, or `train|test/<label>/<image>`; a folder or a zip."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from client.sources import Record
from client.sources._base import SourceSettings, digest
from client.sources._pictures import read_picture
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


class ImageFolder(SourceSettings):
    """Settings: where, whether the first level is the split, and how a file's name holds the patient.

    Attributes:
        patient_pattern: regular expression with one group, matched against the file's name. Column: `label`.
    """

    kind: Literal["image_folder"]
    path: LocalPath
    splits: bool = False
    patient_pattern: str | None = None

    def open(self) -> Pictures:
        """The opened folder. Raises BadInput: missing, or without an image at the right depth."""
        depth = 3 if self.splits else 2
        try:
            if self.path.is_dir():
                found = {
                    file.relative_to(self.path).as_posix(): f"{file.stat().st_size} {file.stat().st_mtime_ns}"
                    for file in self.path.rglob("*")
                    if file.is_file()
                }
            else:
                with zipfile.ZipFile(self.path) as archive:
                    found = {info.filename: f"{info.file_size} {info.CRC}" for info in archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise BadInput(f"{self.path}: expected a folder or zip of images, got {type(error).__name__}") from error
        names = sorted(
            name
            for name in found
            if PurePosixPath(name).suffix.lower() in SUFFIXES and len(PurePosixPath(name).parts) == depth
        )
        if not names:
            raise BadInput(f"{self.path}: expected images as {'split/' if self.splits else ''}label/file, got none")
        return Pictures(self, tuple(names), tuple(found[name] for name in names))


@dataclass(frozen=True)
class Pictures:
    """An opened folder or zip."""

    settings: ImageFolder
    names: tuple[str, ...] = field(repr=False)
    stamps: tuple[str, ...] = field(repr=False)

    def digest(self) -> str:
        """Over every image's path and its size and time of change, or its checksum in a zip."""
        return digest(f"{name}\0{stamp}".encode() for name, stamp in zip(self.names, self.stamps, strict=True))

    def index(self) -> list[Record]:
        """Images in the order of their paths."""
        return [self._record(number, name) for number, name in enumerate(self.names, start=1)]

    def _record(self, number: int, name: str) -> Record:
        parts = PurePosixPath(name).parts
        patient = None
        if self.settings.patient_pattern is not None:
            match = re.search(self.settings.patient_pattern, parts[-1])
            patient = match.group(1) if match else ""
        return Record(
            row=number,
            file=self.settings.path.name,
            key="/".join(parts[1:]) if self.settings.splits else name,
            patient=patient,
            split=parts[0] if self.settings.splits else None,
            cells={"label": parts[-2]},
        )

    def load(self, position: int) -> Image.Image:
        """One image."""
        name = self.names[position]
        try:
            if Path(self.settings.path).is_dir():
                with (self.settings.path / name).open("rb") as file:
                    return read_picture(file)
            with zipfile.ZipFile(self.settings.path) as archive:
                return read_picture(io.BytesIO(archive.read(name)))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise BadRecord("missing image") from error
