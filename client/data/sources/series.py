"""Time series of tables with one series in each row, such as the files of the UCR archive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import FilesOfSides, SourceSettings, digest, digest_of_texts, list_files
from client.data.sources.parts.frame import FAULT, Separator, read_frame, read_rows, require_columns
from client.data.sources.parts.series import Gaps, series_of_cells
from common.errors import instead
from common.inputs import encode_text
from common.types import BadInput

Position = Annotated[int, Field(ge=1)]


class SeriesTable(SourceSettings):
    """Settings: the files, and which of their columns are no time steps.

    Attributes:
        path: one file without a split, or `train` and `test` -> its file.
        separator: of a text file: one character, or `whitespace`.
        labels: names of the columns that are no time steps but labels, patient ids or sides, in files with a header;
            name -> 1-based position in files without one.
        channels: values of each time step, side by side.
        gaps: what an empty value within a series means: `refuse` makes it a bad record, `hold` takes the value before
            it and `interpolate` a straight line, at the ends the nearest value; `keep` leaves it empty for a backbone
            that reads gaps, such as `time_series`.
        patient: one of those columns: patient ids.
        split: one of those columns: `train`, `test` or nothing, where `path` is one file.
    """

    former_keys: ClassVar[Mapping[str, str]] = {
        **SourceSettings.former_keys,
        "parts": "path",
        "columns": "labels",
        "names": "labels",
    }
    kind: Literal["series"]
    path: FilesOfSides
    separator: Separator = ","
    labels: list[str] | dict[str, Position]
    channels: Annotated[int, Field(ge=1, le=4096)] = 1
    gaps: Gaps = "refuse"
    patient: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _check_names(self) -> SeriesTable:
        for key, name in (("patient", self.patient), ("split", self.split)):
            if name is not None and name not in self.labels:
                raise ValueError(f"{key}: expected one of the columns that are no time steps, got {name!r}")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four beats to train on, two held out, one of them unreadable."""
        rng = np.random.default_rng(0)
        lines = [
            f"z-label{n % 2},q7-pat{n % 4}," + ",".join(f"{value:.3f}" for value in rng.normal(size=6))
            for n in range(5)
        ]
        (folder / "train.csv").write_text("\n".join(lines[:4]) + "\n")
        (folder / "test.csv").write_text(lines[4].replace("pat0", "pat9") + "\nz-label1,q7-pat8,1,q7-two,3,4,5,6\n")
        settings = {
            "kind": "series",
            "path": {part: str(folder / f"{part}.csv") for part in ("train", "test")},
            "labels": {"beat": 1, "patient": 2},
            "patient": "patient",
        }
        return SourceExample(settings, ["q7-", "z-label"])

    def open(self) -> SeriesRows:
        """The opened files. Raises BadInput: missing, unreadable, or without a named column."""
        rows: list[SeriesRow] = []
        for part, path in list_files(self.path).items():
            rows += [SeriesRow(part, path.name, number, *row) for number, row in enumerate(self._read(path), start=1)]
        return SeriesRows(self, rows)

    def _read(self, path: Path) -> list[tuple[dict[str, str], list[str]]]:
        labels = self.labels
        if not isinstance(labels, dict):
            frame = read_frame(path, self.separator)
            require_columns(frame, path, labels)
            steps = [name for name in frame.columns if name not in labels and name != FAULT]
            return [({name: row[name] for name in labels}, [row[n] for n in steps]) for _, row in frame.iterrows()]
        lines = _lines(path, self.separator)
        width = max(len(line) for line in lines)
        beyond = next((name for name, position in labels.items() if position > width), None)
        if beyond is not None:
            raise BadInput(f"{path}: expected column {beyond!r} at position {labels[beyond]}, got {width} columns")
        chosen = {position - 1 for position in labels.values()}
        return [
            (
                {name: line[position - 1] if position <= len(line) else "" for name, position in labels.items()},
                [cell for position, cell in enumerate(line) if position not in chosen],
            )
            for line in lines
        ]


@dataclass(frozen=True)
class SeriesRow:
    """One row: its part and file, its row in that file, its cells, and its time steps as text."""

    part: str
    file: str
    number: int
    cells: dict[str, str] = field(repr=False)
    steps: list[str] = field(repr=False)


@dataclass(frozen=True)
class SeriesRows:
    """Opened files."""

    settings: SeriesTable = field(repr=False)
    rows: list[SeriesRow] = field(repr=False)

    def digest(self) -> str:
        """Over all series."""
        own = self.settings
        shape = [str(own.channels), *([own.gaps] if own.gaps != "refuse" else [])]
        return digest_of_texts([shape, *(row.steps for row in self.rows)])

    def index(self) -> list[SourceRecord]:
        """Rows part by part, in the files' order; `row` counts on from file to file."""
        return [self._record(number, row) for number, row in enumerate(self.rows, start=1)]

    def load(self, position: int) -> NDArray[np.float32]:
        """One series, T or T x channels."""
        return series_of_cells(self.rows[position].steps, self.settings.channels, self.settings.gaps)

    def _record(self, number: int, row: SeriesRow) -> SourceRecord:
        own = self.settings
        stated = row.cells[own.split] if own.split else ""
        return SourceRecord(
            row=number,
            file=row.file if len(list_files(own.path)) == 1 else f"{row.file} (its row {row.number})",
            key=digest(encode_text(cell) for cell in row.steps),
            patient=row.cells[own.patient] if own.patient else None,
            split=(stated or None) if row.part == "all" else row.part,
            cells=row.cells,
        )


def _lines(path: Path, separator: str) -> list[list[str]]:
    """Stripped cells of every line that holds any; series may differ in length."""
    try:
        lines = read_rows(path, separator)
    except OSError as error:
        raise BadInput(f"{path}: expected a readable table{instead(error)}") from None
    if not lines:
        raise BadInput(f"{path}: expected a series in each line, got an empty file")
    return lines
