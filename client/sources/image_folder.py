"""Images in folders named after their label: `<label>/<image>`, or `train|test/<label>/<image>`; a folder or a zip."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from PIL import Image
from pydantic import AfterValidator

from client.sources import Example, Record
from client.sources._base import SourceSettings, digest
from client.sources._pictures import read_picture, write_example_pictures
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression, got one with an error: {error}") from error
    if groups != 1:
        raise ValueError(f"expected a regular expression with one group, got {groups}")
    return pattern


class ImageFolder(SourceSettings):
    """Settings: where, whether the first level is the split, and how a file's name holds the patient.

    Images have the one column `label`.

    Attributes:
        patient_pattern: regular expression, searched in the file's name; its one group is the patient id.
    """

    kind: Literal["image_folder"]
    path: LocalPath
    splits: bool = False
    patient_pattern: Annotated[str, AfterValidator(_one_group)] | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Four pictures of three patients."""
        names = ["z-benign/q7-ann-1.png", "z-benign/q7-ann-2.png", "z-malignant/q7-bea-1.png", "z-other/q7-cem-1.png"]
        write_example_pictures(folder / "pictures", names)
        settings = {"kind": "image_folder", "path": str(folder / "pictures"), "patient_pattern": r"^(.*)-\d"}
        return Example(settings, ["q7-", "z-benign", "z-malignant", "z-other"])

    def open(self) -> Pictures:
        """The opened folder. Raises BadInput: missing, or without an image at the right depth."""
        depth = 3 if self.splits else 2
        archive = None
        try:
            if self.path.is_dir():
                stamps = _stamps(self.path)
            else:
                archive = zipfile.ZipFile(self.path)
                stamps = {info.filename: f"{info.file_size} {info.CRC}" for info in archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise BadInput(f"{self.path}: expected a folder or zip of images, got {type(error).__name__}") from None
        names = sorted(name for name in stamps if _is_picture(PurePosixPath(name), depth))
        if not names:
            raise BadInput(f"{self.path}: expected images as {'split/' if self.splits else ''}label/file, got none")
        return Pictures(self, tuple(names), tuple(stamps[name] for name in names), archive)


def _stamps(folder: Path) -> dict[str, str]:
    """Relative path -> size and time of change."""
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            status = file.stat()
            found[file.relative_to(folder).as_posix()] = f"{status.st_size} {status.st_mtime_ns}"
    return found


def _is_picture(name: PurePosixPath, depth: int) -> bool:
    # Desktops leave thumbnails and copies under such names.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    return name.suffix.lower() in SUFFIXES and len(name.parts) == depth and not hidden


@dataclass(frozen=True)
class Pictures:
    """An opened folder or zip."""

    settings: ImageFolder
    names: tuple[str, ...] = field(repr=False)
    stamps: tuple[str, ...] = field(repr=False)
    # Kept open: a zip's directory would otherwise be read again for every image.
    archive: zipfile.ZipFile | None = field(repr=False)

    def digest(self) -> str:
        """Over every image's path and its size and time of change, or its checksum in a zip."""
        return digest(text.encode() for pair in zip(self.names, self.stamps, strict=True) for text in pair)

    def index(self) -> list[Record]:
        """Images in the order of their paths; `row` counts in this order."""
        return [self._record(number, name) for number, name in enumerate(self.names, start=1)]

    def _record(self, number: int, name: str) -> Record:
        parts = PurePosixPath(name).parts
        patient = None
        if self.settings.patient_pattern is not None:
            match = re.search(self.settings.patient_pattern, parts[-1])
            patient = (match.group(1) or "") if match else ""
        return Record(
            row=number,
            file=self.settings.path.name,
            key=name,
            patient=patient,
            split=parts[0] if self.settings.splits else None,
            cells={"label": parts[-2]},
        )

    def load(self, position: int) -> Image.Image:
        """One image."""
        name = self.names[position]
        try:
            if self.archive is not None:
                return read_picture(io.BytesIO(self.archive.read(name)))
            with (self.settings.path / name).open("rb") as file:
                return read_picture(file)
        except (EOFError, KeyError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error):
            # From None: these messages name the file, and so perhaps a patient.
            raise BadRecord("missing image") from None
