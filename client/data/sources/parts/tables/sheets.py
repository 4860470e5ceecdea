"""Spreadsheets (.xlsx, .ods) as rows of texts. A row whose cells do not hold what they show is a fault of that row.

No message repeats a cell, or the name of a sheet, which may be a patient's.
"""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from client.data.sources.parts.tree import MAX_FILE_BYTES
from common.errors import instead
from common.types import BadInput

SUFFIXES = frozenset({".xlsx", ".xlsm", ".ods"})
_FORMULA = "the row holds a formula without its value; open the file in a spreadsheet program and save it"
_MERGED = "the row holds merged cells, whose value stands in one of them alone"
_MOST_CELLS = 1 << 26


def read_sheet(path: Path, sheet: int | str | None) -> tuple[list[list[str]], list[str]]:
    """Returns the cells of every row that holds any, and why each cannot be read, "" where it can.

    A whole number is written without a point, a date as YYYY-MM-DD. Row 1 may be any: a title above the table too.

    Args:
        path: the file.
        sheet: name or 1-based number of the sheet; None where only one holds anything.

    Raises:
        BadInput: unreadable, without its package, without that sheet, or with several and none named.
    """
    read = _read_ods if path.suffix.lower() == ".ods" else _read_xlsx
    try:
        with zipfile.ZipFile(path) as archive:
            # A zip may be a thousand times as large when it is unpacked.
            num_bytes = sum(info.file_size for info in archive.infolist())
        if num_bytes > MAX_FILE_BYTES:
            raise BadInput(f"{path}: expected a spreadsheet of at most {MAX_FILE_BYTES >> 20} MiB; save it as CSV")
        sheets = read(path)
    except ImportError:
        raise BadInput(f'{path}: expected a package for spreadsheets; pip install "headwater[excel]"') from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, zipfile.BadZipFile) as error:
        # From None: a parser's own message may quote the file.
        raise BadInput(f"{path}: expected a spreadsheet that can be read{instead(error)}") from None
    filled = [number for number, (_, rows, _) in enumerate(sheets) if rows]
    if sheet is None:
        if len(filled) > 1:
            raise BadInput(
                f"{path}: expected `sheet` (of inspect, --sheet), a name or a number from 1, as {len(filled)} sheets "
                "hold cells"
            )
        chosen = filled[:1]
    elif isinstance(sheet, int):
        chosen = [sheet - 1] if 1 <= sheet <= len(sheets) else []
    else:
        chosen = [number for number, (name, *_) in enumerate(sheets) if name == sheet]
    if not chosen:
        raise BadInput(f"{path}: expected a sheet {'with cells' if sheet is None else repr(sheet)}, got none such")
    _, rows, faults = sheets[chosen[0]]
    return rows, faults


_Sheet = tuple[str, list[list[str]], list[str]]
"""Name, cells and faults."""


def _read_xlsx(path: Path) -> list[_Sheet]:
    import openpyxl

    with path.open("rb") as file:
        values = openpyxl.load_workbook(file, data_only=True)
        # A second time: a formula that no program has worked out yet has no value, like an empty cell.
        formulas = openpyxl.load_workbook(file, data_only=False)
    return [_read_worksheet(sheet, formulas[sheet.title]) for sheet in values.worksheets]


def _read_worksheet(values: Any, formulas: Any) -> _Sheet:
    if values.max_row * values.max_column > _MOST_CELLS:
        raise ValueError
    merged = {row for area in values.merged_cells.ranges for row in range(area.min_row, area.max_row + 1)}
    rows, faults = [], []
    for number, (cells, written) in enumerate(zip(values.iter_rows(), formulas.iter_rows(), strict=True), start=1):
        texts = [_write_cell(cell.value) for cell in cells]
        unknown = any(cell.data_type == "f" and not text for cell, text in zip(written, texts, strict=True))
        if any(texts) or unknown:
            rows.append(texts)
            faults.append(_FORMULA if unknown else _MERGED if number in merged else "")
    return values.title, _trim(rows), faults


def _read_ods(path: Path) -> list[_Sheet]:
    import odf  # noqa: F401
    import pandas as pd

    with path.open("rb") as file:
        frames = pd.read_excel(file, sheet_name=None, header=None, dtype=object, engine="odf", na_filter=False)
    return [
        (str(name), rows, [""] * len(rows))
        for name, frame in frames.items()
        for rows in [_trim([texts for texts in _write_rows(frame.itertuples(index=False)) if any(texts)])]
    ]


def _write_rows(rows: Any) -> Iterator[list[str]]:
    for row in rows:
        yield [_write_cell(cell) for cell in row]


def _trim(rows: Sequence[list[str]]) -> list[list[str]]:
    """Returns rows without the empty columns at their end: formats alone make a sheet wide."""
    width = max((at + 1 for row in rows for at, text in enumerate(row) if text), default=0)
    return [row[:width] for row in rows]


def _write_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ").removesuffix(" 00:00:00")
    return str(value).strip()
