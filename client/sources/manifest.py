"""A CSV or Parquet file that lists images, their labels and, where there are any, patients and splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from client.sources import Record
from client.sources._base import SourceSettings, digest
from client.sources._pictures import read_picture
from client.sources.table import read_frame
from common.plugins import LocalPath
from common.types import BadInput, BadRecord


class Manifest(SourceSettings):
    """Settings of a manifest.

    Attributes:
        image: column of image paths, relative to `root`.
        root: folder of the images; the manifest's own by default. A path that leaves it is refused.
    """

    kind: Literal["manifest"]
    path: LocalPath
    image: str = "image"
    root: LocalPath | None = None
    separator: str = ","
    patient_column: str | None = None
    split_column: str | None = None

    def open(self) -> Listing:
        """The opened manifest. Raises BadInput: missing, unreadable, or without a named column."""
        frame = read_frame(self.path, self.separator)
        for name in filter(None, (self.image, self.patient_column, self.split_column)):
            if name not in frame.columns:
                raise BadInput(f"{self.path}: expected a column {name!r}; it has {', '.join(map(str, frame.columns))}")
        return Listing(self, frame.to_dict("records"), self.root or self.path.parent)


@dataclass(frozen=True)
class Listing:
    """An opened manifest."""

    settings: Manifest
    rows: list[dict[str, str]] = field(repr=False)
    root: Path = field(repr=False)

    def digest(self) -> str:
        """Over every image's path, size and time of change: reading all of them would cost as much as encoding."""
        return digest(self._stamp(row[self.settings.image]) for row in self.rows)

    def index(self) -> list[Record]:
        """Rows in the manifest's order."""
        own = self.settings
        return [
            Record(
                row=number,
                file=own.path.name,
                key=row[own.image],
                patient=row[own.patient_column] if own.patient_column else None,
                split=row[own.split_column] or None if own.split_column else None,
                cells=row,
            )
            for number, row in enumerate(self.rows, start=1)
        ]

    def load(self, position: int) -> Image.Image:
        """One image."""
        path = self._inside(self.rows[position][self.settings.image])
        try:
            with path.open("rb") as file:
                return read_picture(file)
        except OSError as error:
            raise BadRecord("missing image") from error

    def _inside(self, name: str) -> Path:
        path = (self.root / name).resolve()
        if not name or not path.is_relative_to(self.root.resolve()):
            raise BadRecord("image path is empty or leaves the folder")
        return path

    def _stamp(self, name: str) -> bytes:
        try:
            status = self._inside(name).stat()
        except (OSError, BadRecord):
            return f"{name}\0missing".encode()
        return f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode()
