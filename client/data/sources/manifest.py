"""A CSV or Parquet file that lists records: pictures, recordings or series by their paths, or texts and pairs of texts.

Labels are its other columns, and where there are any, patients and splits.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from client.data.sources import Source, SourceExample, SourceRecord
from client.data.sources.parts.base import digest, digest_of_texts, list_names
from client.data.sources.parts.frame import FAULT, check_row, read_frame, require_columns
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.pictures import (
    Background,
    Intensities,
    Look,
    read_picture,
    read_pictures,
    write_example_pictures,
)
from client.data.sources.parts.recordings import read_recording, require_soundfile
from client.data.sources.parts.series import Gaps, read_series
from client.data.sources.parts.tree import read_file
from common.inputs import Text, encode_text
from common.types import BadInput


class Manifest(ListedFiles):
    """Settings of a manifest. At most one of `image`, `audio`, `series` and `text`; without any, `image: image`.

    Attributes:
        image: column of image paths, relative to `root`.
        audio: column of paths of recordings (wav, flac, ogg).
        series: column of paths of time series: .npy, or text with one time step a line, channels separated by commas,
            semicolons, tabs or blanks, with or without a first line of names.
        gaps: what an empty value within a series means: `refuse`, the default, makes it a bad record, `hold` takes the
            value before it and `interpolate` a straight line, at the ends the nearest value; `keep` leaves it empty for
            a backbone that reads gaps, such as `time_series`.
        text: column of texts.
        text_pair: column of the texts that are read together with them.
        masks: columns of paths of masks, relative to `root`: pictures or .npy arrays of whole numbers, of the size of
            the row's picture; of arrays also height x width x labels with a single 1 at each place.
        window: lowest and highest intensity of pictures of more than 8 bits per value, or `full`, each one's own;
            without it they are bad records.
        background: what is behind transparent parts, `black` or `white`; without it pictures that have some are bad
            records.
    """

    kind: Literal["manifest"]
    image: str | None = None
    audio: str | None = None
    series: str | None = None
    gaps: Gaps | None = None
    text: str | None = None
    text_pair: str | None = None
    masks: list[str] = []
    window: Intensities | None = None
    background: Background | None = None

    @model_validator(mode="after")
    def _one_content(self) -> Manifest:
        named = [name for name in ("image", "audio", "series", "text") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"expected at most one of image, audio, series and text, got {' and '.join(named)}")
        if self.gaps is not None and self.series is None:
            raise ValueError("gaps: expected it beside `series`")
        if self.text_pair is not None and self.text is None:
            raise ValueError("text_pair: expected it beside `text`")
        if self.masks and named not in ([], ["image"]):
            raise ValueError(f"masks: expected pictures that they are of, got {named[0]}")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four pictures of three patients, and one picture that is missing."""
        pictures = ["q7-ann-1.png", "q7-ann-2.png", "q7-bea.png", "q7-cem.png"]
        write_example_pictures(folder, pictures)
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "patient", "finding"])
            for number, name in enumerate([*pictures, "q7-missing.png"]):
                writer.writerow([name, name[:6], ["z-benign", "z-malignant"][number % 2]])
        settings = {"kind": "manifest", "path": str(folder / "list.csv"), "patient": "patient"}
        return SourceExample(settings, ["q7-", "z-benign", "z-malignant"])

    def open(self) -> Source:
        """The opened manifest. Raises BadInput: missing, unreadable, or without a named column."""
        if self.text is not None:
            names, layout = list_names(self.header), self.layout()
            frame = read_frame(self.path, self.separator, names, encoding=self.encoding, layout=layout)
            require_columns(frame, self.path, [self.text, self.text_pair, self.patient, self.split])
            return ListedTexts(self, frame.to_dict("records"))
        if self.audio is not None:
            require_soundfile()
            return open_listing(self, Reader(self.audio, _recording, "recording"))
        if self.series is not None:
            # As it was where nothing is said of gaps: encoded series keep their place.
            settings = "" if self.gaps in (None, "refuse") else f"gaps {self.gaps}"
            read = partial(_read_series, gaps=self.gaps or "refuse")
            return open_listing(self, Reader(self.series, read, "series", settings))
        settings = f"picture 2 {self.window} {self.background}"
        return open_listing(self, Reader(self.image or "image", self._read, "image", settings), self.masks)

    def _read(self, path: Path) -> Any:
        # A mask is of one picture.
        read = read_picture if self.masks else read_pictures
        return read(io.BytesIO(read_file(path, "image")), Look(self.window, self.background))


@dataclass(frozen=True)
class ListedTexts:
    """An opened manifest of texts."""

    settings: Manifest
    rows: list[dict[str, str]] = field(repr=False)

    def digest(self) -> str:
        """Over all texts."""
        return digest_of_texts([self._texts(row) for row in self.rows])

    def index(self) -> list[SourceRecord]:
        """Rows in the manifest's order. Equal texts have equal keys: they fall on the same side of a split."""
        own = self.settings
        return [
            SourceRecord(
                row=number,
                file=own.path.name,
                key=digest(encode_text(text) for text in self._texts(row)),
                patient=row[own.patient] if own.patient else None,
                split=row[own.split] or None if own.split else None,
                cells=row,
                fault=row[FAULT],
                identified=False,
            )
            for number, row in enumerate(self.rows, start=1)
        ]

    def load(self, position: int) -> Text:
        """One text or pair; the backbone refuses empty ones."""
        check_row(self.rows[position])
        return Text(*self._texts(self.rows[position]))

    def _texts(self, row: dict[str, str]) -> list[str]:
        own = self.settings
        if own.text is None:
            raise BadInput("text: expected a column")
        return [row[own.text], *([row[own.text_pair]] if own.text_pair is not None else [])]


def _recording(path: Path) -> Any:
    return read_recording(read_file(path, "recording"))


def _read_series(path: Path, gaps: Gaps) -> Any:
    return read_series(read_file(path, "series"), path.suffix, gaps)
