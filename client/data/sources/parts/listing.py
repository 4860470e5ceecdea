"""Files that a table lists, one row for each record, with labels and, where there are any, patients and splits."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from client.data.sources import SourceRecord
from client.data.sources.parts.base import Header, digest, list_names
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.frame import (
    FAULT,
    Encoding,
    Separator,
    TableFile,
    check_row,
    read_frame,
    require_columns,
)
from client.data.sources.parts.masks import LazyCells, read_mask_file
from common.inputs import encode_text
from common.plugins import LocalPath
from common.types import BadRecord

_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
"""Beginnings of paths that no other system has."""


class ListedFiles(TableFile):
    """Settings that every listing has.

    Attributes:
        path: the table: CSV, Parquet, or a spreadsheet (.xlsx, .ods).
        root: folder of the files; the table's own by default. A path that leaves it is refused.
        separator: of a text file: one character, or `whitespace`.
        encoding: of a text file, by its usual name: `utf-8`, `utf-16`, `cp1252`, `latin-1` and others.
        header: true where the first line of a text file names the columns; else their names.
        patient: column of patient ids.
        split: column of `train`, `test` or nothing.
    """

    path: LocalPath
    root: LocalPath | None = None
    separator: Separator = ","
    encoding: Encoding = "utf-8"
    header: Header = True
    patient: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads the file that a row names as an item.

    Attributes:
        column: that names the file.
        read: the item of a file or folder. Raises BadRecord, or OSError where it is missing.
        what: it is called in messages.
        settings: everything that shapes items besides the files; part of the digest.
        patient: a patient id from the file itself, "" where it has none; None takes it from the table.
        parts: all files of the record that a row names; None means the one file or folder.
    """

    column: str
    read: Callable[[Path], Any]
    what: str
    settings: str = ""
    patient: Callable[[Path], str] | None = None
    parts: Callable[[Path], list[Path]] | None = None


def open_listing(settings: ListedFiles, reader: Reader, masks: Sequence[str] = ()) -> Listing:
    """Returns the opened table.

    Args:
        settings: the table.
        reader: reads a record's file.
        masks: columns whose cells are paths of masks.

    Raises:
        BadInput: missing, unreadable, or without a named column.
    """
    names, layout = list_names(settings.header), settings.layout()
    frame = read_frame(settings.path, settings.separator, names, encoding=settings.encoding, layout=layout)
    require_columns(frame, settings.path, [reader.column, settings.patient, settings.split, *masks])
    root = (settings.root or settings.path.parent).resolve()
    return Listing(settings, reader, frame.to_dict("records"), root, tuple(masks))


@dataclass(frozen=True)
class Listing:
    """An opened table of files."""

    settings: ListedFiles
    reader: Reader = field(repr=False)
    rows: list[dict[str, str]] = field(repr=False)
    root: Path = field(repr=False)
    masks: tuple[str, ...] = ()

    def digest(self) -> str:
        """Over every file's path, size and time of change: to read them all each time could take hours."""
        stamps = (self._stamp(row[column]) for row in self.rows for column in (self.reader.column, *self.masks))
        # As many stamps may be those of more rows without masks.
        layout = [encode_text("\0".join(("masks", *self.masks)))] if self.masks else []
        return digest([self.reader.settings.encode(), *layout, *stamps])

    def index(self) -> list[SourceRecord]:
        """Rows in the table's order; the header and blank lines are not counted."""
        own, column = self.settings, self.reader.column
        return [
            SourceRecord(
                row=number,
                file=own.path.name,
                key=row[column],
                patient=self._patient(row),
                split=row[own.split] or None if own.split else None,
                cells=self._cells(number - 1, row),
                fault=row[FAULT],
                path=row[column],
                # Rows that name no file are not one record; they become bad ones.
                identified=row[column] != "",
            )
            for number, row in enumerate(self.rows, start=1)
        ]

    def load(self, position: int) -> Any:
        """One record's item."""
        check_row(self.rows[position])
        path = self._inside(self.rows[position][self.reader.column])
        try:
            parts = [] if self.reader.parts is None else self.reader.parts(path)
            if not all(part.resolve().is_relative_to(self.root) for part in parts):
                raise BadRecord(f"{self.reader.what} has a file that is a link out of the folder")
            return self.reader.read(path)
        except (OSError, ValueError):
            # From None: these messages name the file, and so perhaps a patient.
            raise BadRecord(f"missing {self.reader.what}") from None

    def locate(self, position: int) -> Path:
        """Returns the path of one record's file. Raises BadRecord."""
        return self._inside(self.rows[position][self.reader.column])

    def _cells(self, position: int, row: Mapping[str, str]) -> Mapping[str, str]:
        own = {column: partial(self._read_mask, position, row[column]) for column in self.masks if row[column].strip()}
        return LazyCells(row, own) if own else row

    def _read_mask(self, position: int, name: str) -> str:
        return read_mask_file(self._inside(name), self.load(position))

    def _patient(self, row: Mapping[str, str]) -> str | None:
        if self.reader.patient is not None:
            of_file = self.reader.patient
            patient, _ = try_record(lambda: of_file(self._inside(row[self.reader.column])))
            # Blank: refused where the unit is the patient.
            return patient or ""
        return row[self.settings.patient] if self.settings.patient else None

    def _inside(self, name: str) -> Path:
        if _OF_WINDOWS.match(name) and os.name != "nt":
            raise BadRecord(
                f"{self.reader.what} path begins with a drive or server of Windows; write it relative to `root`"
            )
        try:
            path = self._find(name).resolve()
        except (OSError, ValueError, RuntimeError):
            # A null character, a loop of links, a name longer than the file system takes.
            raise BadRecord(f"{self.reader.what} path cannot be used") from None
        if not name or not path.is_relative_to(self.root):
            raise BadRecord(f"{self.reader.what} path is empty or leaves the folder (`root`, or the table's own)")
        return path

    def _find(self, name: str) -> Path:
        """Returns a file's path, which another system may write as `scans\\a.png`, or with an accent by itself."""
        path = self.root / name
        if path.exists():
            return path
        others = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
        others += [other.replace("\\", "/") for other in (name, *others)]
        return next((self.root / other for other in others if (self.root / other).exists()), path)

    def _stamp(self, name: str) -> bytes:
        try:
            path = self._inside(name)
            if self.reader.parts is not None:
                stamps = [(file.name, file.stat()) for file in self.reader.parts(path)]
            else:
                files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
                stamps = [(file.relative_to(path).as_posix(), file.stat()) for file in files]
        except (OSError, ValueError, BadRecord):
            return encode_text(f"{name}\0missing")
        listed = "\0".join(f"{inner}\0{status.st_size}\0{status.st_mtime_ns}" for inner, status in stamps)
        return encode_text(f"{name}\0{listed}")
