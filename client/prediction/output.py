"""Predictions as a file: CSV, Parquet or lines of JSON, whole or not there; readable by their owner only."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, final

from client.data.records import RejectedRecord
from client.prediction.records import Part, PredictedRecord, name_file
from common.errors import instead
from common.files import opened_atomic, write_atomic
from common.serving.network import Model
from common.types import BadInput

_DIGITS = ".7g"
"""As many digits as a float32 has."""

_PLACES = ("source", "file", "row", "patient", "split")
"""Columns that say which record a row is of."""

_REJECTED_NAMES = ["file", "row", "task", "reason"]
"""The first line of the list of records that could not be used."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of a cell that a spreadsheet takes for a formula, and would run."""


@dataclass(frozen=True)
class OutputColumn:
    """A column of the output.

    Attributes:
        name: its name in the first line.
        kind: what stands in it.
    """

    name: str
    kind: Literal["text", "whole", "number"]


@dataclass(frozen=True)
class OutputLayout:
    """The columns of the output, and how a record's row is made.

    Attributes:
        tasks: task -> names of what it says besides its label.
        has_source: whether records are of several sources.
        has_patient: whether a source has patients.
        has_side: whether there is a split.
    """

    tasks: dict[str, list[str]]
    has_source: bool
    has_patient: bool
    has_side: bool

    @classmethod
    def of(cls, model: Model, parts: Sequence[Part]) -> OutputLayout:
        """Returns the layout for records of some parts."""
        tasks = [name for name in model.tasks if any(name in part.tasks for part in parts)]
        return cls(
            {name: model.list_columns(name) for name in tasks},
            len(parts) > 1,
            any(record.patient is not None for part in parts for record in part.source.index()),
            any(part.sides is not None for part in parts),
        )

    @property
    def columns(self) -> list[OutputColumn]:
        """All columns in their order."""
        there = (self.has_source, True, True, self.has_patient, self.has_side)
        first = [name for name, is_there in zip(_PLACES, there, strict=True) if is_there]
        found = [OutputColumn(name, "whole" if name == "row" else "text") for name in first]
        for task, names in self.tasks.items():
            shown = f"task.{task}" if task in _PLACES else task
            found.append(OutputColumn(shown, "text"))
            found += [OutputColumn(f"{shown}.{name}", "number") for name in names]
        return found

    def make_row(self, part: Part, each: PredictedRecord) -> list[Any]:
        """Returns a record's row; None where a cell is empty.

        Args:
            part: the part that the record is of.
            each: the record.
        """
        row: list[Any] = [part.name] if self.has_source else []
        row += [name_file(each.record), each.record.row]
        row += [each.record.patient] if self.has_patient else []
        row += [None if part.sides is None else part.sides[each.position] or None] if self.has_side else []
        for task, names in self.tasks.items():
            label, served_C = each.results.get(task, (None, None))
            row += [label, *([None] * len(names) if served_C is None else served_C.tolist())]
        return row


class RowWriter(Protocol):
    """Writes rows to an open file."""

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Adds rows."""

    def close(self) -> None:
        """Writes what is left; the file stays open."""


@final
class _CsvWriter:
    def __init__(self, file: IO[bytes], columns: Sequence[OutputColumn]) -> None:
        self._text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="", write_through=True)
        self._writer = csv.writer(self._text)
        self._writer.writerow([_disarm(column.name) for column in columns])

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.writerows([[_disarm(_format(value)) for value in row] for row in rows])

    def close(self) -> None:
        self._text.detach()


@final
class _JsonWriter:
    def __init__(self, file: IO[bytes], columns: Sequence[OutputColumn]) -> None:
        self._file = file
        self._names = [column.name for column in columns]

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            values = [float(_format(value)) if isinstance(value, float) else value for value in row]
            line = json.dumps(dict(zip(self._names, values, strict=True)), ensure_ascii=False, allow_nan=False)
            self._file.write(line.encode("utf-8", "backslashreplace") + b"\n")

    def close(self) -> None:
        pass


@final
class _ParquetWriter:
    def __init__(self, file: IO[bytes], columns: Sequence[OutputColumn]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        types = {"text": pa.string(), "whole": pa.int64(), "number": pa.float32()}
        self._schema = pa.schema([(column.name, types[column.kind]) for column in columns])
        self._writer = parquet.ParquetWriter(file, self._schema)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        import pyarrow as pa

        if rows:
            arrays = [pa.array(values, field.type) for values, field in zip(zip(*rows), self._schema)]  # noqa: B905
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        """Leaves a file that failed: the library would write its end, to a file that is closed, and show a trace."""
        self._writer.is_open = False


WRITERS: Mapping[str, Callable[[IO[bytes], Sequence[OutputColumn]], RowWriter]] = {
    ".csv": _CsvWriter,
    ".jsonl": _JsonWriter,
    ".ndjson": _JsonWriter,
    ".parquet": _ParquetWriter,
}


@dataclass(frozen=True)
class Output:
    """The places of the predictions and of the list of records that could not be used.

    Attributes:
        path: the predictions.
        rejected: the list.
    """

    path: Path
    rejected: Path = field(repr=False)


def plan_output(path: Path, *, force: bool) -> Output:
    """Returns where predictions are written; nothing is written yet.

    Args:
        path: their file; its suffix says the format.
        force: whether an earlier file may be replaced.

    Raises:
        BadInput: its suffix is unknown, its folder is missing, or there is one already.
    """
    if path.suffix.lower() not in WRITERS:
        raise BadInput(
            f"--out {path}: expected a name that ends in {', '.join(WRITERS)}, got {path.suffix or 'none'!r}"
        )
    if not path.parent.is_dir():
        raise BadInput(f"--out {path}: expected a folder at {path.parent}, found none")
    output = Output(path, path.with_name(f"{path.stem}.rejected.csv"))
    for each in (output.path, output.rejected):
        if each.exists() and not (each.is_file() and (force or (each == output.rejected and _is_left(output)))):
            raise BadInput(f"--out: expected a new file, but there is {each} already; --force replaces it")
    return output


def _is_left(output: Output) -> bool:
    """Returns true for the list of a try that could use no record: it stands alone, and the next try replaces it."""
    if any(output.path.with_suffix(suffix).exists() for suffix in (output.path.suffix, *WRITERS)):
        return False
    with suppress(OSError), output.rejected.open("rb") as file:
        return file.readline(100).strip() == ",".join(_REJECTED_NAMES).encode()
    return False


@contextmanager
def opened_output(output: Output, columns: Sequence[OutputColumn]) -> Iterator[RowWriter]:
    """Yields a writer of rows; the file takes its place when the block ends, and not at all where it fails."""
    path = output.path
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opened_atomic(path))
        except OSError as error:
            raise BadInput(f"--out {path}: expected a folder that can be written to{instead(error)}") from error
        writer: RowWriter = WRITERS[path.suffix.lower()](file, columns)
        if isinstance(writer, _ParquetWriter):
            stack.callback(writer.abandon)
        yield writer
        writer.close()


def write_rejected(output: Output, rejected: Sequence[RejectedRecord]) -> None:
    """Writes the list of records that could not be used; where there is none, an earlier list is removed."""
    if not rejected:
        output.rejected.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_REJECTED_NAMES)
    writer.writerows([_disarm(each.file), each.row, each.task, each.reason] for each in rejected)
    write_atomic(output.rejected, text.getvalue().encode("utf-8", "backslashreplace"))


def _disarm(value: Any) -> Any:
    """Returns a CSV cell with an apostrophe before a text that a spreadsheet would run; a number stays as it is."""
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _format(value: Any) -> Any:
    return format(value, _DIGITS) if isinstance(value, float) else value
