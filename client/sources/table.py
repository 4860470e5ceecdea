"""Rows of a CSV, Parquet or headerless text file: features and labels as columns. Cells stay text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from client.sources import Record
from client.sources._base import SourceSettings, digest
from common.plugins import LocalPath
from common.types import BadInput


class Table(SourceSettings):
    """Settings of a table.

    Attributes:
        columns: names of the columns of a file without a header.
        inputs: columns given to the backbone; labels never are by accident.
        missing_values: texts that mean "nothing"; they are read as "".
        complete: columns that must not be missing: rows that lack one are no records at all.
    """

    kind: Literal["table"]
    path: LocalPath
    separator: str = ","
    header: bool = True
    columns: list[str] | None = None
    inputs: list[str]
    patient_column: str | None = None
    split_column: str | None = None
    missing_values: list[str] = [""]
    complete: list[str] = []

    def open(self) -> Rows:
        """The opened table. Raises BadInput: missing, unreadable, or without a named column."""
        frame = read_frame(self.path, self.separator, self.columns if not self.header else None)
        named = [*self.inputs, *self.complete, *filter(None, (self.patient_column, self.split_column))]
        for name in named:
            if name not in frame.columns:
                raise BadInput(f"{self.path}: expected a column {name!r}; it has {', '.join(map(str, frame.columns))}")
        frame = frame.replace(dict.fromkeys(self.missing_values, ""))
        lines = list(range(1, len(frame) + 1))
        if self.complete:
            whole = (frame[self.complete] != "").all(axis=1)
            lines = [line for line, keep in zip(lines, whole, strict=True) if keep]
            frame = frame[whole]
        return Rows(self, frame.to_dict("records"), tuple(lines))


def read_frame(path: LocalPath, separator: str = ",", columns: list[str] | None = None) -> pd.DataFrame:
    """A table with every cell as stripped text; "" where a cell is empty.

    Args:
        path: .parquet, or text in any other case.
        separator: between the cells of a text file.
        columns: names for a file without a header.
    """
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path).astype("string").fillna("")
        else:
            frame = pd.read_csv(
                path,
                sep=separator,
                dtype=str,
                keep_default_na=False,
                skipinitialspace=True,
                header=None if columns else "infer",
                names=columns,
            )
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise BadInput(f"{path}: expected a readable table, got {type(error).__name__}") from error
    return frame.map(str.strip)


@dataclass(frozen=True)
class Rows:
    """An opened table."""

    settings: Table
    rows: list[dict[str, str]] = field(repr=False)
    lines: tuple[int, ...] = field(repr=False)

    def digest(self) -> str:
        """Over the input columns of all rows."""
        return digest("\0".join([name, *(row[name] for row in self.rows)]).encode() for name in self.settings.inputs)

    def index(self) -> list[Record]:
        """Rows in the file's order; `row` counts the file's data rows."""
        own = self.settings
        return [
            Record(
                row=line,
                file=own.path.name,
                key=hashlib.sha256("\0".join(row[name] for name in own.inputs).encode()).hexdigest(),
                patient=row[own.patient_column] if own.patient_column else None,
                split=row[own.split_column] or None if own.split_column else None,
                cells=row,
            )
            for line, row in zip(self.lines, self.rows, strict=True)
        ]

    def load(self, position: int) -> Mapping[str, Any]:
        """The input cells of one row."""
        return {name: self.rows[position][name] for name in self.settings.inputs}
