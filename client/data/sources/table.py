"""Rows of a CSV, Parquet or headerless text file: features and labels as columns. Cells stay text."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import Header, SourceSettings, digest, list_names
from client.data.sources.parts.frame import (
    FAULT,
    Encoding,
    Separator,
    TableFile,
    check_row,
    read_frame,
    require_columns,
)
from client.data.sources.parts.tables.numbers import Decimal, Thousands, convert_number, find_fault
from common.inputs import encode_text
from common.plugins import LocalPath

if TYPE_CHECKING:
    import pandas as pd


class Table(TableFile):
    """Settings of a table.

    Attributes:
        path: the file: text, Parquet, or a spreadsheet (.xlsx, .ods).
        header: true where the first line of a text file names the columns; else their names.
        separator: of a text file: one character, or `whitespace`.
        encoding: of a text file, by its usual name: `utf-8`, `utf-16`, `cp1252`, `latin-1` and others.
        decimal: the decimal sign; with "," a cell 1,5 of a text file is read as 1.5.
        thousands: the mark between thousands: `.`, `,`, a blank or `'`; `none` says that points are decimal ones
            wherever they stand. Without it a cell such as 1.234 of a column of inputs among decimal commas is a bad
            record.
        columns: columns given to the backbone; labels never are by accident.
        patient: column of patient ids.
        split: column of `train`, `test` or nothing.
        missing_values: texts that mean "nothing"; they are read as "".
        complete: columns that must not be missing: rows that lack one are no records at all.
    """

    former_keys: ClassVar[Mapping[str, str]] = {**SourceSettings.former_keys, "inputs": "columns"}
    kind: Literal["table"]
    path: LocalPath
    separator: Separator = ","
    encoding: Encoding = "utf-8"
    decimal: Decimal = "."
    thousands: Thousands | None = None
    header: Header = True
    columns: Annotated[list[str], Field(min_length=1)]
    patient: str | None = None
    split: str | None = None
    missing_values: list[str] = [""]
    complete: list[str] = []

    @model_validator(mode="after")
    def _check_marks(self) -> Table:
        if self.thousands == self.decimal:
            raise ValueError("thousands: expected another mark than the decimal sign")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Five rows, one incomplete, two equal but for the patient."""
        lines = [
            ["age", "dose", "patient", "finding"],
            ["41", "1.0", "q7-ann", "z-benign"],
            ["52", "", "q7-bea", "z-malignant"],
            ["63", "0.5", "q7-cem", "z-benign"],
            ["74", "2", "q7-dan", "z-malignant"],
            ["41", "1.0", "q7-eve", "z-malignant"],
            ["85", "3", "q7-fay", "z-benign"],
        ]
        with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        settings = {
            "kind": "table",
            "path": str(folder / "rows.csv"),
            "columns": ["age", "dose"],
            "patient": "patient",
            "complete": ["dose"],
        }
        return SourceExample(settings, ["q7-", "z-benign", "z-malignant"])

    def open(self) -> TableRows:
        """The opened table. Raises BadInput: missing, unreadable, or without a named column."""
        names = list_names(self.header)
        frame = read_frame(self.path, self.separator, names, encoding=self.encoding, layout=self.layout())
        require_columns(frame, self.path, [*self.columns, *self.complete, self.patient, self.split])
        frame = frame.replace(dict.fromkeys(self.missing_values, ""))
        if self.decimal == "," or self.thousands is not None:
            self._convert_numbers(frame)
        if self.complete:
            frame = frame[(frame[self.complete] != "").all(axis=1) | (frame[FAULT] != "")]
        return TableRows(self, frame.to_dict("records"), tuple(int(number) + 1 for number in frame.index))

    def _convert_numbers(self, frame: pd.DataFrame) -> None:
        """Writes numbers with a decimal point; a row with an input of which that cannot be said is a fault."""
        for name in self.columns:
            reasons = frame[name].map(lambda cell: find_fault(cell, self.decimal, self.thousands))
            frame[FAULT] = frame[FAULT].where(frame[FAULT] != "", reasons)
        # Ids are no numbers: those of another table of the site are written alike.
        for name in frame.columns.difference([FAULT, self.patient, self.split], sort=False):
            frame[name] = frame[name].map(lambda cell: convert_number(cell, self.decimal, self.thousands))


@dataclass(frozen=True)
class TableRows:
    """An opened table.

    Attributes:
        rows: its records.
        numbers: where each stands among the file's rows, the header and blank lines not counted.
    """

    settings: Table
    rows: list[dict[str, str]] = field(repr=False)
    numbers: tuple[int, ...] = field(repr=False)

    def digest(self) -> str:
        """Over the input columns of all rows."""
        columns = self.settings.columns
        return digest(text.encode() for texts in (columns, *map(self._inputs, self.rows)) for text in texts)

    def _inputs(self, row: Mapping[str, str]) -> list[str]:
        return [row[name] for name in self.settings.columns]

    def index(self) -> list[SourceRecord]:
        """Returns the rows in the file's order. Equal inputs have equal keys: they are on one side of a split."""
        own = self.settings
        return [
            SourceRecord(
                row=number,
                file=own.path.name,
                key=digest(encode_text(text) for text in self._inputs(row)),
                patient=row[own.patient] if own.patient else None,
                split=row[own.split] or None if own.split else None,
                cells=row,
                fault=row[FAULT],
                identified=False,
            )
            for number, row in zip(self.numbers, self.rows, strict=True)
        ]

    def load(self, position: int) -> Mapping[str, Any]:
        """The input cells of one row."""
        check_row(self.rows[position])
        return {name: self.rows[position][name] for name in self.settings.columns}
