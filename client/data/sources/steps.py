"""Time series of tables with one time step, or one value, in each row, as monitors and databases export vital signs.

The rows of a series are those with its value in one column; they need not stand together, nor in order.
"""

from __future__ import annotations

import csv
import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import digest, digest_of_texts
from client.data.sources.parts.frame import FAULT, Encoding, Separator, TableFile, read_frame, require_columns
from client.data.sources.parts.series import Gaps, checked, read_cell
from client.data.sources.parts.tables.numbers import Decimal, convert_number
from common.inputs import encode_text, normalise_patient_id, parse_number
from common.plugins import LocalPath
from common.types import BadRecord

if TYPE_CHECKING:
    import pandas as pd

MAX_STEPS = 1 << 20
"""Time steps of a series: one mistyped year among minutes would fill the memory."""


MAX_VALUES = 1 << 25
"""Values of a series, of all channels: half a gigabyte while they are averaged."""


class StepsTable(TableFile):
    """Settings of a table of time steps.

    Attributes:
        path: the file: text, Parquet, or a spreadsheet (.xlsx, .ods).
        separator: of a text file: one character, or `whitespace`.
        encoding: of a text file, by its usual name: `utf-8`, `utf-16`, `cp1252`, `latin-1` and others.
        decimal: the decimal sign of values and times.
        record: column whose value the rows of one series share: the number of a stay, an examination or a patient.
        time: column that orders the rows of a series: numbers, or dates and times such as `2024-01-31 08:15`; without
            it they are in the file's order.
        columns: the channels, in order: columns of values, or beside `name` the values of that column; rows of others
            are left out.
        name: column that says which channel a row's value belongs to, where each row has one value.
        value: column of those values.
        every: time from one step to the next, in the unit of `time` (seconds, where that has dates): values of one step
            are averaged, and a step without any is a gap. Without it every time that occurs is a step.
        gaps: what a step without a value means: `refuse` makes the series a bad record, `hold` takes the value before
            it and `interpolate` a straight line, at the ends the nearest value; `keep` leaves it empty for a backbone
            that reads gaps, such as `time_series`.
        labels: further columns with one value for all rows of a series, such as labels.
        records: another table with one row for each series and the column `record`: its columns are the labels, and
            `patient` and `split` are among them. A series without a row there is left out.
        patient: column of patient ids.
        split: column of `train`, `test` or nothing.
    """

    kind: Literal["steps"]
    path: LocalPath
    separator: Separator = ","
    encoding: Encoding = "utf-8"
    decimal: Decimal = "."
    record: str
    time: str | None = None
    columns: Annotated[list[str], Field(min_length=1, max_length=4096)]
    name: str | None = None
    value: str | None = None
    every: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    gaps: Gaps = "refuse"
    labels: list[str] = []
    records: LocalPath | None = None
    patient: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _check_columns(self) -> StepsTable:
        if (self.name is None) != (self.value is None):
            raise ValueError("name, value: expected both, or none where each channel has a column")
        if self.time is None and (self.name is not None or self.every is not None):
            raise ValueError("time: expected a column beside `name` and `every`")
        if self.records is not None and self.labels:
            raise ValueError("labels: expected none beside `records`, whose columns they are")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("columns: expected each channel once")
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Five stays of three or four hours, one of which has a word among its values."""
        with (folder / "vitals.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["stay", "hour", "pulse", "outcome", "patient"])
            for stay in range(5):
                for hour in range(3 + stay % 2):
                    pulse = "q7-word" if (stay, hour) == (4, 1) else 60 + 7 * stay + hour
                    writer.writerow([f"q7-stay{stay}", hour, pulse, ["z-home", "z-ward"][stay % 2], f"q7-pat{stay}"])
        columns = {"record": "stay", "time": "hour", "columns": ["pulse"], "patient": "patient", "labels": ["outcome"]}
        return SourceExample({"kind": "steps", "path": str(folder / "vitals.csv"), **columns}, ["q7-", "z-"])

    def open(self) -> Steps:
        """The opened tables. Raises BadInput: missing, unreadable, or without a named column."""
        frame = self._read(self.path)
        values = self.columns if self.name is None else [self.name, self.value]
        inputs = [name for name in (self.record, self.time, *values) if name is not None]
        stated = [] if self.records is not None else [*self.labels, self.patient, self.split]
        require_columns(frame, self.path, [*inputs, *stated])
        for name in {self.record, self.patient if self.records is None else None} - {None}:
            frame[name] = frame[name].map(normalise_patient_id)
        if self.records is None:
            people = [name for name in (self.patient,) if name is not None]
            names = [name for name in frame.columns if name in stated]
            return Steps(self, frame, inputs, _group_rows(frame, self.path.name, [self.record, *people], names))
        table = self._read(self.records)
        require_columns(table, self.records, [self.record, self.patient, self.split])
        table[self.record] = table[self.record].map(normalise_patient_id)
        keys = [self.record] if self.patient is None else [self.record, self.patient]
        return Steps(self, frame, inputs, _match_rows(frame, self.path.name, keys, table, self.records.name))

    def _read(self, path: Path) -> pd.DataFrame:
        return read_frame(path, self.separator, encoding=self.encoding, layout=self.layout())


@dataclass(frozen=True)
class StepRows:
    """Rows of one series.

    Attributes:
        row: 1-based row in `file`, for messages.
        file: name of the file.
        name: its value in the column `record`.
        rows: positions of its time steps.
        cells: its labels, patient and split.
        fault: why it cannot be used; "" where it may be.
    """

    row: int
    file: str
    name: str = field(repr=False)
    rows: Sequence[int] = field(repr=False)
    cells: Mapping[str, str] = field(repr=False)
    fault: str = ""


def _group_rows(frame: pd.DataFrame, file: str, keys: Sequence[str], names: Sequence[str]) -> list[StepRows]:
    """Returns the series of a table, in the order of their first rows.

    Args:
        frame: time steps.
        file: name of their file.
        keys: columns whose values the rows of a series share, the record's first. Two patients never share a series:
            one's rows would decide whether the other's can be used.
        names: columns with one value for all rows of a series.
    """
    found = _find_faults(frame, file, names)
    for (name, *_), positions in _find_rows(frame, keys).items():
        cells, fault = {}, "" if name else f"a time step without a value in the column {keys[0]!r}"
        for column in names:
            values = sorted(set(frame[column].iloc[positions]) - {""})
            cells[column] = values[0] if len(values) == 1 else ""
            fault = fault or (f"its rows differ in the column {column!r}" if len(values) > 1 else "")
        found.append(StepRows(positions[0] + 1, file, name, positions, cells, fault))
    return sorted(found, key=lambda series: series.row)


def _match_rows(
    frame: pd.DataFrame, file: str, keys: Sequence[str], table: pd.DataFrame, table_file: str
) -> list[StepRows]:
    """Returns a series for each row of another table, and one without an end for each row that cannot be read.

    Two rows of one patient for one series are bad records; a row of another patient does not make them so.

    Args:
        frame: time steps.
        file: name of their file.
        keys: the record's column, of both tables, and the patient's where there is one, of the table of labels.
        table: labels.
        table_file: name of its file.
    """
    record = keys[0]
    steps = {name: positions for (name, *_), positions in _find_rows(frame, [record]).items()}
    whose = list(zip(*(table[key].map(normalise_patient_id) for key in keys), strict=True))
    counts = Counter(whose)
    names = [str(name) for name in table.columns if name != FAULT]
    found = []
    for row, cells in enumerate(table.to_dict("records"), start=1):
        name, fault = cells[record], cells[FAULT]
        if not fault and not name:
            fault = f"no value in the column {record!r}"
        elif not fault and counts[whose[row - 1]] > 1:
            fault = f"another row has the same value in the column {record!r}"
        elif not fault and name not in steps:
            fault = f"no time step in {file}"
        found.append(StepRows(row, table_file, name, steps.get(name, ()), {each: cells[each] for each in names}, fault))
    return found + _find_faults(frame, file, names, after=len(found))


def _find_rows(frame: pd.DataFrame, keys: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """Returns the positions of the rows that share values in some columns, without rows that cannot be read."""
    found: dict[tuple[str, ...], list[int]] = {}
    columns = [frame[key].tolist() for key in [*keys, FAULT]]
    for at, (*values, fault) in enumerate(zip(*columns, strict=True)):
        if not fault:
            found.setdefault(tuple(values), []).append(at)
    return found


def _find_faults(frame: pd.DataFrame, file: str, names: Sequence[str], after: int = 0) -> list[StepRows]:
    """Returns rows that cannot be read, each as a bad record: nobody knows whose they are."""
    places = np.flatnonzero((frame[FAULT] != "").to_numpy())
    blank = dict.fromkeys(names, "")
    return [StepRows(after + int(at) + 1, file, "", (), blank, str(frame[FAULT].iloc[at])) for at in places]


@dataclass(frozen=True)
class Steps:
    """Opened tables."""

    settings: StepsTable = field(repr=False)
    frame: pd.DataFrame = field(repr=False)
    inputs: Sequence[str] = field(repr=False)
    series: Sequence[StepRows] = field(repr=False)

    def digest(self) -> str:
        """Over all time steps, and how they are read."""
        own = self.settings
        form = [*own.columns, str(own.name), str(own.time), str(own.every), own.gaps, own.decimal]
        states = [text for series in self.series for text in (series.name, series.fault)]
        rows = self.frame[[*self.inputs, FAULT]].to_numpy().tolist()
        return digest_of_texts([form, states, *rows])

    def index(self) -> list[SourceRecord]:
        """One record for each series; `row` is that of its first time step, or of its row in `records`."""
        own = self.settings
        return [
            SourceRecord(
                row=series.row,
                file=series.file,
                key=_make_key(series, own.patient),
                patient=series.cells[own.patient] if own.patient else None,
                split=series.cells[own.split] or None if own.split else None,
                cells=series.cells,
                fault=series.fault,
            )
            for series in self.series
        ]

    def load(self, position: int) -> NDArray[np.float32]:
        """One series, T or T x channels."""
        series, own = self.series[position], self.settings
        if series.fault:
            raise BadRecord(series.fault)
        rows = self.frame.iloc[list(series.rows)]
        times_N = self._read_times(rows)
        values_NC = self._read_values(rows)
        seen_N = ~np.isnan(values_NC).all(axis=1) if own.name is not None else np.ones(len(rows), dtype=bool)
        if not seen_N.any():
            raise BadRecord("expected a value of one of the channels")
        values_TC = _place(times_N[seen_N], values_NC[seen_N], own.every)
        return checked(values_TC[:, 0] if len(own.columns) == 1 else values_TC, own.gaps)

    def _read_times(self, rows: pd.DataFrame) -> NDArray[np.float64]:
        own = self.settings
        if own.time is None:
            return np.arange(float(len(rows)))
        return np.array([read_time(convert_number(cell, own.decimal, None)) for cell in rows[own.time]])

    def _read_values(self, rows: pd.DataFrame) -> NDArray[np.float64]:
        """Returns the rows' values, [N, C]; not a number where a row has none of a channel."""
        own = self.settings
        values_NC = np.full((len(rows), len(own.columns)), np.nan)
        try:
            if own.name is None:
                for channel, name in enumerate(own.columns):
                    values_NC[:, channel] = [read_cell(convert_number(cell, own.decimal, None)) for cell in rows[name]]
                return values_NC
            places = {name: channel for channel, name in enumerate(own.columns)}
            for at, (name, cell) in enumerate(zip(rows[own.name], rows[own.value], strict=True)):
                if name in places:
                    values_NC[at, places[name]] = read_cell(convert_number(cell, own.decimal, None))
        except ValueError:
            raise BadRecord("expected numbers in the columns of values") from None
        return values_NC


def _make_key(series: StepRows, patient: str | None) -> str:
    """Returns what stays the same where rows are sorted anew; a row that cannot be read has only its place."""
    texts = [series.name, series.cells[patient] if patient else ""]
    return digest(map(encode_text, texts if series.name else [*texts, str(series.row)]))


def read_time(cell: str) -> float:
    """Returns a number, or the seconds of a date and time. Raises BadRecord for another text."""
    number = parse_number(cell)
    if number is not None:
        return number
    try:
        time = datetime.datetime.fromisoformat(cell)
        return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadRecord("expected numbers, or dates and times as 2024-01-31 08:15, in the column of times") from None


def _place(times_N: NDArray[np.float64], values_NC: NDArray[np.float64], every: float | None) -> NDArray[np.float64]:
    """Returns the mean of each step's values, [T, C]; not a number where there is none.

    Args:
        times_N: a row's time.
        values_NC: its values.
        every: time between steps; None where each time that occurs is a step.
    """
    if every is None:
        times_T, places_N = np.unique(times_N, return_inverse=True)
        length = len(times_T)
    else:
        # A tenth of an hour three times is a little less than three tenths.
        steps_N = np.floor((times_N - times_N.min()) / every + 1e-6)
        if not steps_N.max() < MAX_STEPS:
            raise BadRecord(f"expected a series of at most {MAX_STEPS:,} steps of `every`")
        places_N, length = steps_N.astype(np.int64), int(steps_N.max()) + 1
    if length * values_NC.shape[1] > MAX_VALUES:
        raise BadRecord(f"expected a series of at most {MAX_VALUES >> 20} million values")
    sums_TC, counts_TC = np.zeros((length, values_NC.shape[1])), np.zeros((length, values_NC.shape[1]))
    np.add.at(sums_TC, places_N, np.nan_to_num(values_NC))
    np.add.at(counts_TC, places_N, ~np.isnan(values_NC))
    return np.where(counts_TC > 0, sums_TC / np.maximum(counts_TC, 1), np.nan)
