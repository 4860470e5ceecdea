"""The form of a table's file: its separator, encoding, decimal sign and first line."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from client.data.sources.image_folder import SUFFIXES as PICTURES
from client.data.sources.parts.frame import WHITESPACE, Encoding, Surroundings
from client.data.sources.parts.recordings import SUFFIXES as RECORDINGS
from client.data.sources.parts.tables.numbers import Decimal, Thousands, convert_number
from client.data.sources.parts.tables.sheets import read_sheet
from common.errors import instead
from common.inputs import parse_number
from common.types import BadInput

_SAMPLE_BYTES = 1 << 18
_SAMPLE_ROWS = 200
_SEPARATORS = (";", "\t", "|", ",")

_COMMA = re.compile(r"[+-]?\d*,\d+")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_THOUSANDS_POINT = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+\.\d+")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+,\d+")
_POINT = re.compile(r"[+-]?\d*\.\d+")
_ONE_GROUP = re.compile(r"[+-]?[1-9]\d{0,2}\.\d{3}")
_APOSTROPHES = re.compile(r"[+-]?[1-9]\d{0,2}(['\u2019]\d{3})+(\.\d+)?")
_WIDE = (b"\xff\xfe", b"\xfe\xff")
"""Marks in front of UTF-16."""

DICOM = (".dcm", ".dicom")
_SERIES = (".npy", ".csv", ".tsv", ".hea", ".edf")


@dataclass(frozen=True)
class TextForm:
    """The form of a text file, or of a spreadsheet.

    Attributes:
        separator: of its cells.
        encoding: its characters.
        names: names made up for a file without a line of them; None where it has one.
        quotes: whether quotes enclose cells.
        is_comma: whether the decimal sign is a comma.
        thousands: the mark between thousands; None where there is none.
        comment: beginning of the lines that are none of the table's; None where there are no such lines.
        skip_lines: number of lines above the table.
        is_sheet: whether it is a spreadsheet, which has no separator and no encoding to choose.
        sheet: name or 1-based number of its sheet; None where only one holds anything.
    """

    separator: str
    encoding: Encoding
    names: list[str] | None
    quotes: bool
    is_comma: bool
    thousands: Thousands | None = None
    comment: str | None = None
    skip_lines: int = 0
    is_sheet: bool = False
    sheet: int | str | None = None

    @property
    def decimal(self) -> Decimal:
        """The decimal sign."""
        return "," if self.is_comma else "."

    @property
    def layout(self) -> Surroundings:
        """The parts of the file that are not the table."""
        return Surroundings(self.comment, self.skip_lines, self.sheet)

    def read_number(self, cell: str) -> str:
        """Returns a number with a decimal point; other texts as they are."""
        return convert_number(cell, self.decimal, self.thousands)

    def describe(self) -> str:
        """Returns the form in words."""
        separator = {"\t": "tab", WHITESPACE: "white space"}.get(self.separator, repr(self.separator))
        header = "its first line names the columns" if self.names is None else "no line of names"
        comma = ", decimal comma" if self.is_comma else ""
        comma += f", {self.thousands!r} between thousands" if self.thousands not in (None, "none") else ""
        around = f", {self.skip_lines} line(s) above it" if self.skip_lines else ""
        around += f", comments after {self.comment!r}" if self.comment else ""
        if self.is_sheet:
            return f"spreadsheet{'' if self.sheet is None else f', sheet {self.sheet!r}'}{comma}{around}"
        return f"text table, separator {separator}, {self.encoding}{comma}{around}, {header}"


def sniff(path: Path) -> TextForm:
    """Returns the form of a text file. Raises BadInput where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise BadInput(f"{path}: expected a readable table{instead(error)}") from None
    if not data.strip():
        raise BadInput(f"{path}: expected a table, got an empty file")
    if b"\0" in data and not data.startswith(_WIDE):
        raise BadInput(
            f"{path}: expected a CSV, Parquet, .xlsx, .ods or npz file, a zip, or a folder of pictures, recordings or "
            "DICOM files; got a binary file of another kind"
        )
    encoding = _find_encoding(data if len(data) < _SAMPLE_BYTES else data[: data.rfind(b"\n") + 1 or None])
    text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding, "replace")
    stated, text = _take_stated(text)
    comment = "#" if text.startswith("#") and any(not line.startswith("#") for line in text.splitlines()) else None
    if comment:
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(comment))
    separator, rows = (stated, _take_rows(text, stated)) if stated else _find_separator(text)
    skip_lines = 0 if separator == WHITESPACE else _count_titles(text, separator)
    text = "".join(text.splitlines(keepends=True)[skip_lines:])
    rows = _take_rows(text, separator) if skip_lines else rows
    quotes = separator != WHITESPACE and _has_quoted_cells(text, separator, rows)
    if not quotes and separator != WHITESPACE:
        rows = _split_lines(text, separator)
    if len(rows[0]) < 2:
        raise BadInput(f"{path}: expected a table of several columns, got lines without a separator")
    first = [cell.strip() for cell in rows[0]]
    is_comma, thousands = _find_marks([cell.strip() for row in rows for cell in row], separator)
    form = TextForm(separator, encoding, None, quotes, is_comma, thousands, comment, skip_lines)
    has_numbers = any(parse_number(form.read_number(cell)) is not None for cell in first)
    has_files = any(cell.lower().endswith((*PICTURES, *RECORDINGS, *DICOM, *_SERIES)) for cell in first)
    is_named = all(first) and not has_numbers and not has_files and len(set(first)) == len(first)
    # Spreadsheets leave the name of a column of row numbers empty, and end each line with a separator.
    is_named = is_named or (not has_numbers and len(rows) > 1 and sum(not cell for cell in first) == 1)
    names = None if is_named else [f"column{number}" for number, _ in enumerate(first, start=1)]
    return replace(form, names=names)


def sniff_sheet(path: Path, sheet: int | str | None) -> TextForm:
    """Returns the form of a spreadsheet: the lines above its table, and how numbers that are texts are written.

    Args:
        path: the file.
        sheet: name or 1-based number of the sheet; None where only one holds anything.

    Raises:
        BadInput: it cannot be read, or has several sheets and none is named.
    """
    rows = read_sheet(path, sheet)[0][:_SAMPLE_ROWS]
    # A title stands in one cell, and a line of names has more.
    skip_lines = next((number for number, row in enumerate(rows) if sum(map(bool, row)) > 1), 0)
    is_comma, thousands = _find_marks([cell for row in rows[skip_lines + 1 :] for cell in row], separator="")
    form = TextForm(",", "utf-8", None, True, is_comma, thousands, None, skip_lines)
    return replace(form, is_sheet=True, sheet=sheet)


def _take_stated(text: str) -> tuple[str | None, str]:
    """Returns the separator that a line `sep=;` in front names, and what follows the line."""
    found = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)
    return (found[1], text[found.end() :]) if found else (None, text)


def _count_titles(text: str, separator: str) -> int:
    """Returns the number of lines in front of the first that has several cells."""
    lines = text.splitlines()[:_SAMPLE_ROWS]
    # A title has no separator, or nothing but separators behind it.
    inner = [line.rstrip(f"{separator} ").count(separator) for line in lines]
    return next((number for number, count in enumerate(inner) if count), 0)


def _find_marks(cells: Sequence[str], separator: str) -> tuple[bool, Thousands | None]:
    """Returns whether the decimal sign is a comma, and the mark between thousands."""
    # Between commas, a quoted 1,234 may as well be a thousand.
    is_comma = any(_COMMA.fullmatch(cell) and (separator != "," or not _THOUSANDS.fullmatch(cell)) for cell in cells)
    is_comma |= any(_GROUPED.fullmatch(cell) for cell in cells)
    is_comma &= not any(_THOUSANDS_POINT.fullmatch(cell) for cell in cells)
    if is_comma:
        points = [cell for cell in cells if _POINT.fullmatch(cell)]
        if any(_GROUPED.fullmatch(cell) for cell in cells):
            return True, "."
        return True, "none" if any(not _ONE_GROUP.fullmatch(cell) for cell in points) else None
    if any(_THOUSANDS_POINT.fullmatch(cell) or (_THOUSANDS.fullmatch(cell) and separator == ",") for cell in cells):
        return False, ","
    return False, "'" if any(_APOSTROPHES.fullmatch(cell) for cell in cells) else None


def _find_encoding(data: bytes) -> Encoding:
    if data.startswith(_WIDE):
        return "utf-16"
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in data) else "latin-1"


def _find_separator(text: str) -> tuple[str, list[list[str]]]:
    """Returns the separator that divides nearly all rows into as many cells, and the first rows."""
    best: tuple[float, int, str, list[list[str]]] = (0.0, 1, ",", [[text.split("\n")[0]]])
    for separator in _SEPARATORS:
        try:
            rows = _take_rows(text, separator)
        except csv.Error:
            continue
        width, number = Counter(map(len, rows)).most_common(1)[0]
        share = number / len(rows)
        if width > 1 and share > best[0] + 0.05:
            best = (share, width, separator, rows)
    if best[0] >= 0.8:
        return best[2], best[3]
    lines = [line.split() for line in text.splitlines()[:_SAMPLE_ROWS] if line.strip()]
    width, number = Counter(map(len, lines)).most_common(1)[0]
    # Words of a sentence are no cells.
    if width > 1 and number > 0.95 * len(lines) and sum(parse_number(c) is not None for c in lines[-1]) > width / 2:
        return WHITESPACE, lines
    return best[2], best[3]


def _take_rows(text: str, separator: str) -> list[list[str]]:
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows = [row for row, _ in zip((row for row in reader if any(row)), range(_SAMPLE_ROWS), strict=False)]
    return rows or [[""]]


def _has_quoted_cells(text: str, separator: str, rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether quotes enclose cells: where none opens one, or rows fall apart so, they belong to the text."""
    if '"' not in text:
        return separator != "\t"
    if not re.search(f'(?:^|{re.escape(separator)})"', text, re.MULTILINE):
        return False
    return _share_width(rows) >= _share_width(_split_lines(text, separator))


def _split_lines(text: str, separator: str) -> list[list[str]]:
    return [line.split(separator) for line in text.splitlines()[:_SAMPLE_ROWS] if line.strip()]


def _share_width(rows: Sequence[Sequence[str]]) -> float:
    """Returns the part of the rows that have the most frequent number of cells."""
    return Counter(map(len, rows)).most_common(1)[0][1] / len(rows)
