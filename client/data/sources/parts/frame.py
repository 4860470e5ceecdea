"""Read a table with every cell as text. A row of a text file that cannot be read is a fault of that row alone.

No message repeats a cell, and none a column name that the file holds: where a file has no header, its first record
would be taken for one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from client.data.sources.parts.base import SourceSettings
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.tables.sheets import SUFFIXES as SHEETS
from client.data.sources.parts.tables.sheets import read_sheet
from common.errors import instead, nearest
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

WHITESPACE = "whitespace"
FAULT = "\0fault"
"""Column that says why a row cannot be read, "" where it can; no file holds one of that name."""

_SURROGATE = re.compile("[\udc80-\udcff]")
_UNREADABLE = "\udcff"
_STATED = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)
_NO_TIME = re.compile(r"( 00:00:00)?(\.0+)?$")
_NO_TEXT = "the row is not UTF-8 text; save the table as CSV UTF-8, or set `encoding`"
_MOST_CELL = 1 << 24
"""Characters of a cell."""
_MOST_LINES = 10_000
"""Lines of a row."""


def _one_character(value: str) -> str:
    if len(value) != 1 and value != WHITESPACE:
        raise ValueError(f"expected one character or {WHITESPACE!r}, got {value!r}")
    return value


Separator = Annotated[str, AfterValidator(_one_character)]
"""The separator of the cells of a text file: one character, or any amount of white space."""


def _known_encoding(value: str) -> str:
    try:
        "a,1".encode(value)
    except (LookupError, UnicodeError):
        usual = ("utf-8", "utf-16", "cp1252", "cp1250", "cp1251", "latin-1", "iso8859-15", "shift_jis", "gb18030")
        raise ValueError(
            f"expected an encoding such as {', '.join(usual)}, got {value!r}{nearest(value, usual)}"
        ) from None
    return value


Encoding = Annotated[str, AfterValidator(_known_encoding)]
"""Characters of a text file, by Python's name: UTF-8, Windows' Western European ones (cp1252), and others."""


@dataclass(frozen=True)
class Surroundings:
    """The parts of a file that are not the table.

    Attributes:
        comment: a line that begins with it is none of the table's; None where there are no such lines.
        skip_lines: number of lines above the table.
        sheet: name or 1-based number of a spreadsheet's sheet; None where only one holds anything.
    """

    comment: str | None = None
    skip_lines: int = 0
    sheet: int | str | None = None


class TableFile(SourceSettings):
    """Settings of every source that reads a table.

    Attributes:
        comment: beginning of lines that are no rows, such as `#`.
        skip_lines: lines above the table, such as a title.
        sheet: name or number, from 1, of the sheet of a spreadsheet (.xlsx, .ods) that has several.
    """

    comment: Annotated[str, Field(min_length=1)] | None = None
    skip_lines: Annotated[int, Field(ge=0)] = 0
    sheet: Annotated[int, Field(ge=1)] | str | None = None

    def layout(self) -> Surroundings:
        """Returns the parts of the file that are not the table."""
        return Surroundings(self.comment, self.skip_lines, self.sheet)


def read_frame(
    path: Path,
    separator: str = ",",
    columns: Sequence[str] | None = None,
    *,
    quotes: bool = True,
    encoding: Encoding = "utf-8",
    layout: Surroundings | None = None,
) -> pd.DataFrame:
    """A table of stripped texts; "" where a cell is empty or a row ends early, or all of a row with a `FAULT`.

    Args:
        path: .parquet, a spreadsheet (.xlsx, .ods), or text in any other case.
        separator: see `Separator`.
        columns: names for a text file without a header.
        quotes: whether a quote may enclose a cell of a text file.
        encoding: of a text file.
        layout: see `Surroundings`.

    Returns:
        The table, without columns whose name occurs twice: to ask for one of them is an error.

    Raises:
        BadInput: missing, unreadable, or no row has as many cells as `columns` names.
    """
    import pandas as pd
    import pyarrow

    try:
        if path.suffix.lower() == ".parquet":
            frame, faults = _read_parquet(path)
            names = list(frame.columns)
        else:
            found = layout or Surroundings()
            if path.suffix.lower() in SHEETS:
                rows, faults = _leave_out_rows(*read_sheet(path, found.sheet), found)
            else:
                lines = _read_lines(path, separator, encoding, found)
                rows, faults = _split_rows(lines, separator, quotes, len(columns or ()))
            names, cells, faults = _align_rows(path, rows, faults, columns)
            frame = pd.DataFrame(cells, columns=range(len(names)), dtype="string")
    except (OSError, ValueError, OverflowError, TypeError, pyarrow.ArrowException) as error:
        # From None: a parser's own message may quote the file.
        raise BadInput(f"{path}: expected a readable table{instead(error)}") from None
    return _strip_cells(frame, names, faults)


def convert_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns a table that is in memory as `read_frame` returns one that is written as Parquet. Raises BadInput."""
    import pyarrow as pa

    try:
        found, faults = _read_arrow(pa.Table.from_pandas(frame, preserve_index=False))
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
        raise BadInput(f"data: expected a table of numbers, dates and texts{instead(error)}") from None
    return _strip_cells(found, list(found.columns), faults)


def _strip_cells(frame: pd.DataFrame, names: Sequence[str], faults: list[str]) -> pd.DataFrame:
    import pandas as pd

    frame.columns = pd.Index(names)
    frame = frame.loc[:, ~frame.columns.duplicated(keep=False)].reset_index(drop=True)
    frame = frame.fillna("").map(str.strip)
    frame[FAULT] = faults
    return frame


def read_rows(path: Path, separator: str) -> list[list[str]]:
    """Returns stripped cells of every line that holds any, of a text file without header and quotes.

    A row that cannot be read has no cells. Raises OSError; BadInput: UTF-16.
    """
    rows, faults = _split_rows(_read_lines(path, separator), separator, quotes=False, width=0)
    return [[] if fault else [cell.strip() for cell in row] for row, fault in zip(rows, faults, strict=True)]


def check_row(row: Mapping[str, str]) -> None:
    """Raises BadRecord where a row of a table could not be read."""
    if row.get(FAULT):
        raise BadRecord(row[FAULT])


def _read_lines(
    path: Path, separator: str, encoding: Encoding = "utf-8", layout: Surroundings | None = None
) -> list[str]:
    """Returns the lines of a text file's table with their ends; bytes that are no characters become surrogates.

    A line `sep=;` in front, by which some programs open a file, is none of the table's. Raises BadInput where it, or
    the mark in front of UTF-16, says otherwise than the settings.
    """
    data, found = path.read_bytes(), layout or Surroundings()
    is_wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and not is_wide:
        raise BadInput(
            f"{path}: expected text in {'UTF-8' if encoding == 'utf-8' else encoding}, got UTF-16; save it as CSV "
            "UTF-8, or write `encoding: utf-16`"
        )
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding, "strict" if is_wide else "surrogateescape")
    except UnicodeError:
        raise BadInput(f"{path}: expected text in {encoding}, got another encoding") from None
    # Only these ends: cells may hold other characters that Python takes for the end of a line.
    lines = list(io.StringIO(text, newline=""))
    stated = _STATED.fullmatch(lines[0]) if lines else None
    if stated and stated[1] != separator:
        raise BadInput(
            f"{path}: its first line says that the separator is {stated[1]!r}, got {separator!r}; write "
            f"`separator: {stated[1]!r}`"
        )
    lines = lines[1 if stated else 0 :][found.skip_lines :]
    return lines if found.comment is None else [line for line in lines if not line.startswith(found.comment)]


def _leave_out_rows(
    rows: list[list[str]], faults: list[str], layout: Surroundings
) -> tuple[list[list[str]], list[str]]:
    """Returns a sheet's rows of the table alone."""
    kept = [
        at
        for at in range(layout.skip_lines, len(rows))
        if not (layout.comment and rows[at][0].startswith(layout.comment))
    ]
    return [rows[at] for at in kept], [faults[at] for at in kept]


def _split_rows(lines: Sequence[str], separator: str, quotes: bool, width: int) -> tuple[list[list[str]], list[str]]:
    """Returns the cells of every row that is not blank, and why each cannot be read, "" where it can.

    A quote that is never closed would take the rows behind it into its cell. Where a cell goes on over several lines
    and the row does not have as many cells as there are columns, its first line alone is a fault.

    Args:
        lines: lines of the file with their ends.
        separator: see `Separator`.
        quotes: whether a quote may enclose a cell.
        width: number of columns of a file without a header, 0 where the first row is the header.
    """
    rows: list[list[str]] = []
    faults: list[str] = []
    blank = " \t\r\n".replace(separator, "")
    at = 0
    while at < len(lines):
        cells, used = _split_row(lines, at, separator, quotes)
        # The last line's open quote ends with the file.
        goes_on = used > 1 or (
            quotes and separator != WHITESPACE and at + 1 == len(lines) and lines[at].count('"') % 2 == 1
        )
        is_whole = not goes_on or _is_strict(lines[at : at + used], separator)
        if not is_whole or (used > 1 and (width or rows) and len(cells) != (width or len(rows[0]))):
            cells, used, fault = [""], 1, "a quote in the row is not closed"
            text = ""
        else:
            text = "".join(lines[at : at + used])
            fault = _NO_TEXT if _SURROGATE.search(text) else ""
            fault = "the row holds a null character" if "\0" in text else fault
        at += used
        if fault or text.strip(blank):
            rows.append([] if fault and rows else cells)
            faults.append(fault)
    return rows, faults


def _split_row(lines: Sequence[str], at: int, separator: str, quotes: bool) -> tuple[list[str], int]:
    """Returns the cells of the row that begins at a line, and the number of its lines."""
    if separator == WHITESPACE:
        return lines[at].split(), 1
    if not quotes:
        return lines[at].rstrip("\r\n").split(separator), 1
    if '"' not in lines[at]:
        return lines[at].rstrip("\r\n").split(separator), 1
    csv.field_size_limit(_MOST_CELL)
    # A cell that goes on behind the line leaves an odd number of quotes in it.
    most = _MOST_LINES if lines[at].count('"') % 2 else 1
    reader = csv.reader(lines[at : at + most], delimiter=separator, skipinitialspace=True)
    try:
        return next(reader, []), reader.line_num
    except csv.Error:
        return [""], max(2, reader.line_num)


def _is_strict(lines: Sequence[str], separator: str) -> bool:
    csv.field_size_limit(_MOST_CELL)
    try:
        return len(list(csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True))) == 1
    except csv.Error:
        return False


def _align_rows(
    path: Path, rows: list[list[str]], faults: list[str], columns: Sequence[str] | None
) -> tuple[list[str], list[list[str]], list[str]]:
    """Returns the names of the columns, rows of as many cells, and why each cannot be read.

    Args:
        path: the file, for messages.
        rows: cells of every row.
        faults: why each cannot be read.
        columns: names for a file without a header.
    """
    if not rows:
        raise BadInput(f"{path}: expected a readable table, got an empty one")
    if columns is None:
        if faults[0]:
            raise BadInput(f"{path}: expected a readable first line: {faults[0]}")
        columns, rows, faults = [name.strip() for name in rows[0]], rows[1:], faults[1:]
    elif not any(len(row) == len(columns) for row in rows):
        raise BadInput(f"{path}: expected {len(columns)} columns, as many as `columns` names, got {len(rows[0])}")
    width, cells, checked = len(columns), [], []
    for row, fault in zip(rows, faults, strict=True):
        if any(cell.strip() for cell in row[width:]):
            fault = "the row has more cells than there are columns"
        row = [] if fault else row[:width]
        cells.append(row + [""] * (width - len(row)))
        checked.append(fault)
    return list(columns), cells, checked


def _read_parquet(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Returns the cells of every row as text, and why each row cannot be read, "" where it can."""
    import pyarrow.parquet

    # Not pandas.read_parquet: it follows what pandas once wrote about the table, which hides an index column and, where
    # it is damaged, fails in ways without end.
    return _read_arrow(pyarrow.parquet.read_table(path))


def _read_arrow(table: pa.Table) -> tuple[pd.DataFrame, list[str]]:
    import pandas as pd

    columns = [_read_cells(column) for column in table.columns]
    faults = [""] * table.num_rows
    for cells in columns:
        for row in [row for row, cell in enumerate(cells) if cell is not None and _SURROGATE.search(cell)]:
            faults[row] = "the row holds a cell that cannot be read as UTF-8 text"
    for cells in columns:
        cells[:] = [None if fault else cell for cell, fault in zip(cells, faults, strict=True)]
    frame = pd.DataFrame(dict(enumerate(columns)), index=range(table.num_rows), dtype="string")
    frame.columns = pd.Index(table.column_names)
    return frame, faults


def _read_cells(column: pa.ChunkedArray) -> list[str | None]:
    """Returns a column's cells as text; each follows from that cell alone, which pandas' dates for example do not.

    Bytes that are not UTF-8 become surrogates, and so does a cell that cannot be read.
    """
    import pyarrow as pa
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        return _read_cells(column.cast(kind.value_type))
    if types.is_temporal(kind):
        # A moment as it is written, a length of time as its number of units: Python knows the years 1 to 9999 alone.
        texts = column.cast(pa.int64() if types.is_duration(kind) else pa.string()).cast(pa.string()).to_pylist()
        return [None if text is None else _NO_TIME.sub("", text) for text in texts]
    if any(is_of(kind) for is_of in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)):
        found = column.cast(pa.large_binary())
        found.validate(full=True)
        return [None if data is None else data.decode("utf-8", "surrogateescape") for data in found.to_pylist()]
    if types.is_primitive(kind) or types.is_decimal(kind):
        # A missing whole number must not turn the others into 1.0.
        cells = column.to_pandas(integer_object_nulls=True).astype("string")
        return list(cells.astype(object).where(cells.notna(), None))
    return [_read_nested(cell) for cell in column]


def _read_nested(cell: pa.Scalar) -> str | None:
    if not cell.is_valid:
        return None
    text, _ = try_record(lambda: str(cell.as_py()))
    return _UNREADABLE if text is None else text


def require_columns(frame: pd.DataFrame, path: Path, names: Iterable[str | None]) -> None:
    """Checks that a table has the named columns.

    Args:
        frame: the table.
        path: path of its file, for messages.
        names: names of columns; None stands for a column that is not asked for.

    Raises:
        BadInput: a name is no column of the table.
    """
    for name in names:
        if name is not None and name not in frame.columns:
            raise BadInput(
                f"{path}: expected exactly one column {name!r} among its {frame.shape[1] - 1} column(s); see the "
                f"file's first line, and name one of its columns in the source's settings, or all of them with "
                f"`header` where it has no line of names{_guess_separator(frame)}"
            )


def _guess_separator(frame: pd.DataFrame) -> str:
    """Returns advice where a table has one column whose name looks like several."""
    names = [str(name) for name in frame.columns if name != FAULT]
    if len(names) != 1:
        return ""
    most = max((";", "\t", "|", ","), key=names[0].count)
    return f"; that line looks separated by {most!r}: write `separator: {most!r}`" if names[0].count(most) else ""
