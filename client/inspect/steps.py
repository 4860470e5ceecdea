"""Tables with a row for each time step, or value, of a series, as monitors and databases export vital signs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from client.data.sources.parts.frame import FAULT, read_frame
from client.data.sources.steps import read_time
from client.inspect.finding import (
    MISSING,
    ColumnFacts,
    Finding,
    choose_label,
    describe_column,
    guess_patient,
    guess_split,
)
from client.inspect.form import TextForm, sniff
from common.inputs import normalise_patient_id
from common.types import BadInput, BadRecord

_FEWEST_STEPS = 8
"""Rows of a series on average, from which a table is one of time steps: visits are fewer."""

_MOST_CELLS = 200_000
_RECORD = re.compile(
    r"stay|admission|hadm|encounter|visit|exam|episode|record|series|case|fall|aufenthalt|patient|subject|person|"
    r"(^|_)p?id$",
    re.IGNORECASE,
)
_TIME = re.compile(r"time|date|datum|zeit|hour|stunde|minute|second|offset|step|^t$|^day$", re.IGNORECASE)
_NAME = re.compile(r"name|sign|param|item|variable|label|code|measure|vital|channel|signal|kind|type", re.IGNORECASE)
_VALUE = re.compile(r"val|wert|result|measurement|number|reading|amount", re.IGNORECASE)
_EVERY = (1, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
"""Usual times between steps, in seconds."""


@dataclass(frozen=True)
class _Table:
    """A table as it was read.

    Attributes:
        path: its file.
        form: its form.
        cells: cells of each column.
        columns: facts about its columns.
    """

    path: Path
    form: TextForm | None
    cells: Mapping[str, Sequence[str]]
    columns: Sequence[ColumnFacts]

    def group(self, name: str) -> dict[str, list[int]]:
        """Returns the rows of each value of a column."""
        found: dict[str, list[int]] = {}
        for at, cell in enumerate(self.cells[name]):
            found.setdefault(normalise_patient_id(cell), []).append(at)
        return {value: rows for value, rows in found.items() if value}


def find_steps(
    path: Path,
    form: TextForm | None,
    cells: Mapping[str, Sequence[str]],
    columns: Sequence[ColumnFacts],
    task: str | None,
) -> Finding | None:
    """Returns what a table of time steps holds; None where it is another.

    Args:
        path: the file.
        form: its form; None of Parquet.
        cells: cells of each column.
        columns: facts about its columns.
        task: the label column; None for a guess.

    Raises:
        BadInput: it is one, and nothing says what is to be predicted of a series.
    """
    table = _Table(path, form, cells, columns)
    times = [column.name for column in columns if _is_time(column)]
    record = _choose_record(table, [column for column in columns if column.name not in times])
    if record is None or not times or (form is not None and form.names is not None):
        return None
    groups = table.group(record)
    constant = [
        c
        for c in columns
        if c.name not in (record, *times) and c.kind != "empty" and _is_constant(table, c.name, groups)
    ]
    channels = _choose_channels(table, [c for c in columns if c.name not in (record, *times) and c not in constant])
    if channels is None or (task is not None and task in channels.get("columns", ())):
        return None
    source: dict[str, Any] = {"kind": "steps", "path": path, **_write_form(form), "record": record, "time": times[0]}
    source |= {**channels, **_choose_every(table, times[0], groups, channels), "gaps": "keep"}
    beside = _find_records(path, record, table)
    if beside is not None:
        source["records"] = beside.path
        own = beside
    else:
        kept = [record, *(column.name for column in constant)]
        stated = {name: [_find_value(cells[name], groups[key]) for key in groups] for name in kept}
        own = replace(table, cells=stated, columns=[describe_column(name, stated[name]) for name in kept])
    patient, split = guess_patient(own.columns, len(groups)), guess_split(own.columns)
    others = [column for column in own.columns if column.name != record]
    label = _choose(own, others, task, (patient, split), record)
    if label is None:
        return None
    if beside is None:
        source["labels"] = [label]
    people = {"patient": patient, "split": split}
    count = len(channels["columns"])
    return Finding(
        path=path,
        what=f"{form.describe() if form else 'Parquet table'}: its rows are time steps of series, one for each value "
        f"of {record}, with {count} channel(s)",
        modality="series",
        records=len(next(iter(own.cells.values()))),
        columns=tuple(own.columns),
        source=source | {key: value for key, value in people.items() if value is not None},
        label=label,
        patient=patient,
        has_split=split is not None,
        dim=count,
        notes=("`record`, `time`, `columns` and `every` are guesses: check them.",),
    )


def is_of_steps(path: Path) -> bool:
    """Returns whether a table's rows look like time steps whose labels are in another table beside it."""
    try:
        form = None if path.suffix.lower() == ".parquet" else sniff(path)
        table = _read(path, form)
    except BadInput:
        return False
    record = _choose_record(table, [column for column in table.columns if not _is_time(column)])
    return record is not None and any(map(_is_time, table.columns)) and _find_records(path, record, table) is not None


def _is_time(column: ColumnFacts) -> bool:
    return column.kind == "date" or (_TIME.search(column.name) is not None and column.observed is not None)


def _read(path: Path, form: TextForm | None) -> _Table:
    frame = read_frame(path) if form is None else read_frame(path, form.separator, form.names, encoding=form.encoding)
    frame = frame[frame[FAULT] == ""]
    cells = {str(name): list(map(str, frame[name])) for name in frame.columns if name != FAULT}
    return _Table(path, form, cells, [describe_column(name, cells[name]) for name in cells])


def _choose_record(table: _Table, columns: Sequence[ColumnFacts]) -> str | None:
    """Returns the column by whose name and repetitions rows belong together: of several the finest."""
    rows = len(table.cells[table.columns[0].name])
    able = [c for c in columns if _RECORD.search(c.name) and 2 <= c.distinct <= rows / _FEWEST_STEPS and not c.missing]
    return max(able, key=lambda column: column.distinct).name if able else None


def _is_constant(table: _Table, name: str, groups: Mapping[str, Sequence[int]]) -> bool:
    cells = table.cells[name]
    return all(len({cells[at] for at in rows} - {"", *MISSING}) <= 1 for rows in groups.values())


def _find_value(cells: Sequence[str], rows: Sequence[int]) -> str:
    return next((cells[at] for at in rows if cells[at] and cells[at] not in MISSING), "")


def _choose_channels(table: _Table, columns: Sequence[ColumnFacts]) -> dict[str, Any] | None:
    """Returns the settings of channels: the names in one column and the values of another, or columns of values."""
    words = [c for c in columns if c.kind == "category" and c.observed is None and _NAME.search(c.name)]
    values = [c.name for c in columns if c.observed is not None]
    named = [name for name in values if _VALUE.search(name)]
    if words and named:
        return {"name": words[0].name, "value": named[0], "columns": list(words[0].values)}
    return {"columns": values} if values else None


def _choose_every(
    table: _Table, time: str, groups: Mapping[str, Sequence[int]], channels: Mapping[str, Any]
) -> dict[str, float]:
    """Returns the usual time between values of a channel, rounded, where it is not always the same; else nothing."""
    is_date = next(column for column in table.columns if column.name == time).kind == "date"
    names = table.cells[channels["name"]] if "name" in channels else None
    gaps: list[float] = []
    left = _MOST_CELLS
    for rows in groups.values():
        times: dict[str, list[float]] = {}
        for at in rows[:left]:
            try:
                times.setdefault(names[at] if names else "", []).append(read_time(table.cells[time][at]))
            except BadRecord:
                continue
        gaps += [gap for each in times.values() for gap in np.diff(np.unique(each)).tolist()]
        left -= len(rows)
        if left <= 0:
            break
    if not gaps:
        return {}
    usual = float(np.median(gaps))
    if names is None and np.mean(np.abs(np.array(gaps) - usual) <= usual / 100) > 0.9:
        return {}
    if is_date:
        return {"every": min(_EVERY, key=lambda each: abs(np.log(each / usual)))}
    return {"every": float(f"{usual:.1g}")}


def _find_records(path: Path, record: str, table: _Table) -> _Table | None:
    """Returns the table beside a file that has a row for each series; None where there is not just one."""
    found, groups = [], table.group(record)
    for other in sorted(path.parent.iterdir()):
        if other == path or other.suffix.lower() not in (".csv", ".tsv", ".parquet") or not other.is_file():
            continue
        try:
            form = None if other.suffix.lower() == ".parquet" else sniff(other)
            if form is not None and form.names is not None:
                continue
            own = _read(other, form)
        except BadInput:
            continue
        ids = [normalise_patient_id(cell) for cell in own.cells.get(record, ())]
        if len(set(ids)) == len(ids) and 2 * len(groups.keys() & set(ids)) > len(groups):
            found.append(own)
    return found[0] if len(found) == 1 else None


def _choose(
    own: _Table, columns: Sequence[ColumnFacts], task: str | None, taken: tuple[str | None, ...], record: str
) -> str | None:
    """Returns the label column of series; None where a task is asked for that is none of theirs.

    Args:
        own: the table of labels.
        columns: columns that may hold them.
        task: the column that was asked for; None for a guess.
        taken: columns that hold something else.
        record: column that tells series apart.

    Raises:
        BadInput: there is none.
    """
    if task is not None and task not in [column.name for column in columns]:
        return None
    try:
        return choose_label(columns, task, taken, own.path)
    except BadInput as error:
        if task is not None:
            raise
        raise BadInput(
            f"{own.path}: expected something to predict of each series: a column with one value in all rows of one "
            f"{record}, named with --task, or one other table in the same folder with a column {record!r} and a row "
            "for each of them"
        ) from error


def _write_form(form: TextForm | None) -> dict[str, Any]:
    if form is None:
        return {}
    if form.is_sheet:
        return {"sheet": form.sheet}
    shape = {"separator": form.separator, "encoding": form.encoding, "decimal": form.decimal}
    usual = {"separator": ",", "encoding": "utf-8", "decimal": "."}
    more = {"comment": form.comment, "skip_lines": form.skip_lines or None}
    return {key: value for key, value in (shape | more).items() if value != usual.get(key)}
