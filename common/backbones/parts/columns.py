"""One column of a table as inputs: scaled by a declared public range, or one-hot over declared public levels.

Nothing is estimated from data: ranges, levels and imputed values are written by whoever writes the run. A table may say
all columns at once:

    column,lowest,highest,levels,missing,indicator
    age,0,110,,middle,
    sex,,,f|m,refuse,

It is read with the run file that names it as `ranges`, and becomes `columns`: no path travels, and the digest covers
what it says.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from common.errors import describe, instead
from common.inputs import CellName, CellNames, find_name, parse_number
from common.plugins import Frozen
from common.types import BadInput, BadRecord
from common.yaml import FILL_IN

REFUSE = "refuse"

HEADER = ("column", "lowest", "highest", "levels", "missing", "indicator")

BETWEEN = "|"
"""Stands between the levels of a cell."""

MIDDLE = "middle"
"""Word for the middle of the range as the value in place of an empty cell."""

_NO_WORDS, _YES_WORDS = ("", "no", "false", "0"), ("yes", "true", "1")
_MOST_BYTES = 1 << 24


class Column(Frozen):
    """One column. Exactly one of `range` and `levels`.

    Attributes:
        name: the column's name in the records.
        range: lowest and highest public value; scaled to [-1, 1], values beyond are clipped.
        levels: public values; one 0/1 input for each. "1.0" is level 1.
        missing: what an empty cell means: `refuse` (the record is bad), or the value or level to put in its place.
        indicator: whether one more 0/1 input says that the cell was empty.
    """

    name: Annotated[str, Field(min_length=1)]
    range: tuple[float, float] | None = None
    levels: Annotated[CellNames, Field(min_length=2)] | None = None
    missing: CellName
    indicator: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Column:
        if (self.range is None) == (self.levels is None):
            raise ValueError(f"expected exactly one of range and levels for column {self.name!r}")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range: expected [lowest, highest], got {list(self.range)} for column {self.name!r}")
        if self.missing == REFUSE:
            if self.indicator:
                raise ValueError(f"indicator: expected false where missing is 'refuse', in column {self.name!r}")
        elif not self._can_stand(self.missing):
            raise ValueError(
                f"missing: expected 'refuse', a value in the range or a level, got {self.missing!r} for column "
                f"{self.name!r}"
            )
        return self

    @property
    def width(self) -> int:
        """Number of inputs."""
        return (len(self.levels) if self.levels is not None else 1) + int(self.indicator)

    def clips(self, cell: str) -> bool:
        """Returns whether a cell is a number beyond the range."""
        value = parse_number(cell)
        return self.range is not None and value is not None and not self.range[0] <= value <= self.range[1]

    def inputs(self, cell: str | None) -> list[float]:
        """`width` inputs from a cell; None is an empty one.

        Raises:
            BadRecord: empty and not to be imputed, not a number, or not a level; names the column only.
        """
        if cell is None and self.missing == REFUSE:
            raise BadRecord(f"column {self.name!r}: expected a value, got an empty cell")
        values = self._values(self.missing if cell is None else cell)
        return [*values, float(cell is None)] if self.indicator else values

    def _values(self, text: str) -> list[float]:
        if self.levels is not None:
            level = find_name(text, self.levels)
            if level is None:
                raise BadRecord(f"column {self.name!r}: expected one of the declared levels")
            return [float(index == level) for index, _ in enumerate(self.levels)]
        value = parse_number(text)
        if value is None or self.range is None:
            raise BadRecord(
                f"column {self.name!r}: expected a number with a decimal point (a source `table` reads others with "
                "`decimal` and `thousands`)"
            )
        low, high = self.range
        return [2.0 * (min(max(value, low), high) - low) / (high - low) - 1.0]

    def _can_stand(self, text: str) -> bool:
        if self.levels is not None:
            return find_name(text, self.levels) is not None
        value = parse_number(text)
        return value is not None and self.range is not None and self.range[0] <= value <= self.range[1]


def replace_ranges(values: Mapping[str, Any], base: Path) -> Mapping[str, Any]:
    """Returns a run file's values with `columns` in place of each backbone's `ranges`.

    Raises:
        BadInput: a table cannot be read, or says too little; names the key.
    """
    several = values.get("backbones")
    if isinstance(several, Mapping):
        named = {name: _replace(spec, base, f"backbones.{name}") for name, spec in several.items()}
        return {**values, "backbones": named}
    return {**values, "backbone": _replace(values["backbone"], base, "backbone")} if "backbone" in values else values


def _replace(spec: Any, base: Path, key: str) -> Any:
    if not (isinstance(spec, Mapping) and spec.get("kind") == "identity" and isinstance(spec.get("ranges"), str)):
        return spec
    if spec.get("columns") is not None:
        raise BadInput(f"{key}.ranges: expected either it or `columns`, got both")
    others = {name: value for name, value in spec.items() if name != "ranges"}
    return {**others, "columns": read_ranges(base / Path(spec["ranges"]).expanduser(), f"{key}.ranges")}


def read_ranges(path: Path, key: str) -> list[dict[str, Any]]:
    """Returns a table of ranges as the settings of columns.

    Args:
        path: the table, a CSV; a semicolon may separate its cells, and then a comma may be its decimal sign.
        key: key of the setting, for messages.

    Raises:
        BadInput: it cannot be read, or a column's cells are wrong or still to be filled in; names the column.
    """
    where = f"{key}: {path}"
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{where}: expected a readable CSV of public ranges{instead(error)}") from None
    first = text.partition("\n")[0]
    separator = ";" if ";" in first and "," not in first else ","
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as error:
        raise BadInput(f"{where}: expected a readable CSV of public ranges, got a damaged one") from error
    rows = [[cell.strip() for cell in line] for line in lines if any(cell.strip() for cell in line)]
    names = rows[0] if rows else []
    if not set(HEADER[:-1]) <= set(names) <= set(HEADER) or len(set(names)) < len(names):
        raise BadInput(f"{where}: expected a first line {','.join(HEADER)}, the last of them optional; got another")
    if len(rows) < 2:
        raise BadInput(f"{where}: expected a line for each column, got none")
    lines_of_cells = []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) > len(names):
            raise BadInput(f"{where}: line {number} below the first: expected {len(names)} cells, got {len(row)}")
        cells = dict(zip(names, [*row, *[""] * (len(names) - len(row))], strict=True))
        lines_of_cells.append({"indicator": "", **cells})
    waiting = [_find_marks(cells) for cells in lines_of_cells]
    if any(waiting):
        raise BadInput(
            f"{where}: expected a public value in every cell, got {FILL_IN} in {', '.join(filter(None, waiting))}; "
            "write values in their place"
        )
    return [_make_column(cells, where, separator == ";") for cells in lines_of_cells]


def _find_marks(cells: Mapping[str, str]) -> str:
    """Returns a column and its cells that are still to be filled in; nothing where there are none."""
    names = [name for name in HEADER[1:] if cells[name].upper() == FILL_IN]
    return f"column {cells['column']!r} ({', '.join(names)})" if names else ""


def _make_column(cells: Mapping[str, str], table: str, has_decimal_comma: bool) -> dict[str, Any]:
    named = f"column {cells['column']!r}"
    where = f"{table}: {named}"
    if cells["indicator"].lower() not in (*_NO_WORDS, *_YES_WORDS):
        raise BadInput(f"{where}: expected yes or no in the cell indicator, got {cells['indicator'][:40]!r}")
    values: dict[str, Any] = {"name": cells["column"], "missing": cells["missing"] or REFUSE}
    if cells["levels"]:
        values["levels"] = [level.strip() for level in cells["levels"].split(BETWEEN)]
    if cells["lowest"] or cells["highest"]:
        ends = [_read_end(cells, name, where, has_decimal_comma) for name in ("lowest", "highest")]
        values["range"] = ends
        if values["missing"] == MIDDLE:
            values["missing"] = f"{sum(ends) / 2:.12g}"
    if cells["indicator"].lower() in _YES_WORDS:
        values["indicator"] = True
    try:
        Column.model_validate(values)
    except ValidationError as error:
        # The path apart from the key, which is cut where it is long.
        raise BadInput(f"{table}: {describe(error, Column, named)}") from None
    return values


def _read_end(cells: Mapping[str, str], name: str, where: str, has_decimal_comma: bool) -> float:
    text = cells[name]
    number = parse_number(text.replace(",", ".") if has_decimal_comma else text)
    if number is None:
        raise BadInput(f"{where}: expected a number in the cell {name}, got {text[:40]!r}")
    return number
