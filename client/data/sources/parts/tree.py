"""Files below a folder or in a zip, read by their relative path. No message repeats a path: it may name a patient.

Names are bytes to the operating system, and need not be UTF-8: Python holds the other bytes as surrogates.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from client.data.sources.parts.base import digest
from common.errors import instead
from common.inputs import encode_text
from common.types import BadInput, BadRecord

_UNREADABLE = (EOFError, KeyError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)


MAX_FILE_BYTES = 1 << 30
"""Largest file of one record that is read into memory."""

_SURROGATE = re.compile("[\ud800-\udfff]")


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

    def group_by_stem(self, folder: str, suffixes: frozenset[str]) -> dict[str, list[str]]:
        """Returns the paths of a folder's files by their path in the folder without suffix.

        Args:
            folder: the folder, or `.` for all of the tree.
            suffixes: in small letters, with the dot.
        """
        found: dict[str, list[str]] = {}
        for name in self.stamps:
            path = PurePosixPath(name)
            if path.suffix.lower() in suffixes and path.is_relative_to(folder):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(name)
        return found

    def digest(self) -> str:
        """Over every file's path and stamp."""
        return digest(encode_text(text) for pair in self.stamps.items() for text in pair)

    def read(self, name: str, what: str) -> bytes:
        """A file's bytes. Raises BadRecord that calls it `what`."""
        try:
            if self.archive is None:
                return read_file(self.path / name, what)
            with self.archive.open(name) as file:
                # What the archive says of the size is not believed.
                data = file.read(MAX_FILE_BYTES + 1)
        except _UNREADABLE:
            # From None: these messages name the file, and so perhaps a patient.
            raise BadRecord(f"missing {what}") from None
        if len(data) > MAX_FILE_BYTES:
            raise BadRecord(f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
        return data

    def read_lines(self, name: str, what: str) -> Iterator[bytes]:
        """Yields a file's lines with their ends, however long it is. Raises BadRecord that calls it `what`."""
        try:
            if self.archive is None:
                require_file(self.path / name, what)
            with (self.path / name).open("rb") if self.archive is None else self.archive.open(name) as file:
                while line := file.readline(MAX_FILE_BYTES):
                    yield line
        except _UNREADABLE:
            # From None: these messages name the file, and so perhaps a patient.
            raise BadRecord(f"missing {what}") from None


def open_tree(path: Path, what: str) -> Tree:
    """A folder or zip of files called `what` in messages. Raises BadInput: missing or unreadable."""
    try:
        if path.is_dir():
            return Tree(path, _stamps(path), None)
        archive = zipfile.ZipFile(path)
        files = [info for info in archive.infolist() if not info.is_dir()]
        return Tree(path, {info.filename: f"{info.file_size} {info.CRC}" for info in files}, archive)
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise BadInput(f"{path}: expected a folder or zip of {what}{instead(error)}") from None


def read_file(path: Path, what: str) -> bytes:
    """Returns the bytes of a regular file. Raises BadRecord where it is too large; OSError.

    Args:
        path: the file. A pipe or a socket, from which a read would wait for ever, is none.
        what: name of such a file in messages.
    """
    if require_file(path, what) > MAX_FILE_BYTES:
        raise BadRecord(f"expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
    return path.read_bytes()


def require_file(path: Path, what: str) -> int:
    """Returns the size of a regular file. Raises BadRecord where it is something else; OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadRecord(f"missing {what}")
    return status.st_size


def make_readable(name: str) -> str:
    """Returns a file's name as text; one that is not UTF-8 is read as Latin-1, so that staff can write it down."""
    if _SURROGATE.search(name) is None:
        return name
    return os.fsencode(name).decode("latin-1")


def _stamps(folder: Path) -> dict[str, str]:
    found = {}
    for file in _walk(folder, frozenset()):
        stamp = _stamp(file)
        if stamp is not None:
            found[file.relative_to(folder).as_posix()] = stamp
    return found


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yields all that is no folder below one, also behind links; a link to a folder above is not followed.

    Args:
        folder: the folder; one that may not be read is empty.
        above: device and number of the folders that it lies in.
    """
    try:
        status = folder.stat()
        inside = sorted(folder.iterdir())
    except OSError:
        return
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    for path in inside:
        if path.is_dir():
            yield from _walk(path, above | {own})
        else:
            yield path


def _stamp(file: Path) -> str | None:
    """Returns size and time of change of a file, None of anything else; one that cannot be asked is a bad record."""
    try:
        status = file.stat()
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else None


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
