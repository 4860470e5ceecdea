"""A CSV or Parquet file that lists images, their labels and, where there are any, patients and splits."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from client.sources import Example, Record
from client.sources._base import SourceSettings, digest
from client.sources._frame import Separator, read_frame, require_columns
from client.sources._pictures import read_picture, write_example_pictures
from common.plugins import LocalPath
from common.types import BadRecord


class Manifest(SourceSettings):
    """Settings of a manifest.

    Attributes:
        image: column of image paths, relative to `root`.
        root: folder of the images; the manifest's own by default. A path that leaves it is refused.
        separator: of a text file: one character, or `whitespace`.
        patient_column: column of patient ids.
        split_column: column of `train`, `test` or nothing.
    """

    kind: Literal["manifest"]
    path: LocalPath
    image: str = "image"
    root: LocalPath | None = None
    separator: Separator = ","
    patient_column: str | None = None
    split_column: str | None = None

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Four pictures of three patients, and one picture that is missing."""
        pictures = ["q7-ann-1.png", "q7-ann-2.png", "q7-bea.png", "q7-cem.png"]
        write_example_pictures(folder, pictures)
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "patient", "finding"])
            for number, name in enumerate([*pictures, "q7-missing.png"]):
                writer.writerow([name, name[:6], ["z-benign", "z-malignant"][number % 2]])
        settings = {"kind": "manifest", "path": str(folder / "list.csv"), "patient_column": "patient"}
        return Example(settings, ["q7-", "z-benign", "z-malignant"])

    def open(self) -> Listing:
        """The opened manifest. Raises BadInput: missing, unreadable, or without a named column."""
        frame = read_frame(self.path, self.separator)
        require_columns(frame, self.path, [self.image, self.patient_column, self.split_column])
        return Listing(self, frame.to_dict("records"), (self.root or self.path.parent).resolve())


@dataclass(frozen=True)
class Listing:
    """An opened manifest."""

    settings: Manifest
    rows: list[dict[str, str]] = field(repr=False)
    root: Path = field(repr=False)

    def digest(self) -> str:
        """Over every image's path, size and time of change: to read them all each time could take hours."""
        return digest(self._stamp(row[self.settings.image]) for row in self.rows)

    def index(self) -> list[Record]:
        """Rows in the manifest's order; the header and blank lines are not counted."""
        own = self.settings
        return [
            Record(
                row=number,
                file=own.path.name,
                key=row[own.image],
                patient=row[own.patient_column] if own.patient_column else None,
                split=row[own.split_column] or None if own.split_column else None,
                cells=row,
                # Rows that name no picture are not one record; they become bad ones.
                identified=row[own.image] != "",
            )
            for number, row in enumerate(self.rows, start=1)
        ]

    def load(self, position: int) -> Image.Image:
        """One image."""
        path = self._inside(self.rows[position][self.settings.image])
        try:
            with path.open("rb") as file:
                return read_picture(file)
        except (OSError, ValueError):
            raise BadRecord("missing image") from None

    def _inside(self, name: str) -> Path:
        try:
            path = (self.root / name).resolve()
        except (OSError, ValueError, RuntimeError):
            # A null character, a loop of links, a name longer than the file system takes.
            raise BadRecord("image path cannot be used") from None
        if not name or not path.is_relative_to(self.root):
            raise BadRecord("image path is empty or leaves the folder")
        return path

    def _stamp(self, name: str) -> bytes:
        try:
            status = self._inside(name).stat()
        except (OSError, ValueError, BadRecord):
            return f"{name}\0missing".encode()
        return f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode()
