"""Files below a folder or in a zip, read by their relative path. No message repeats a path: it may name a patient."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from client.data.sources.parts.base import digest
from common.errors import instead
from common.types import BadInput, BadRecord

_UNREADABLE = (EOFError, KeyError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Tree:
    """An opened folder or zip.

    Attributes:
        stamps: relative path -> size and time of change, or checksum in a zip; in order of the paths.
    """

    path: Path
    stamps: Mapping[str, str] = field(repr=False)
    # Kept open: a zip's directory would otherwise be read again for every file.
    archive: zipfile.ZipFile | None = field(repr=False)

    def chosen(self, wanted: Callable[[PurePosixPath], bool]) -> Tree:
        """Only the files whose path is wanted; what desktops leave behind never is."""
        stamps = {name: self.stamps[name] for name in sorted(self.stamps) if _visible(name)}
        return Tree(
            self.path,
            {name: stamp for name, stamp in stamps.items() if wanted(PurePosixPath(name))},
            self.archive,
        )

    def digest(self) -> str:
        """Over every file's path and stamp."""
        return digest(text.encode() for pair in self.stamps.items() for text in pair)

    def read(self, name: str, what: str) -> bytes:
        """A file's bytes. Raises BadRecord that calls it `what`."""
        try:
            return self.archive.read(name) if self.archive is not None else (self.path / name).read_bytes()
        except _UNREADABLE:
            # From None: these messages name the file, and so perhaps a patient.
            raise BadRecord(f"missing {what}") from None


def open_tree(path: Path, what: str) -> Tree:
    """A folder or zip of files called `what` in messages. Raises BadInput: missing or unreadable."""
    try:
        if path.is_dir():
            return Tree(path, _stamps(path), None)
        archive = zipfile.ZipFile(path)
        return Tree(path, {info.filename: f"{info.file_size} {info.CRC}" for info in archive.infolist()}, archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: expected a folder or zip of {what}{instead(error)}") from None


def _stamps(folder: Path) -> dict[str, str]:
    found = {}
    for file in folder.rglob("*"):
        if file.is_file():
            status = file.stat()
            found[file.relative_to(folder).as_posix()] = f"{status.st_size} {status.st_mtime_ns}"
    return found


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
