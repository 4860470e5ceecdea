"""One column of a table as inputs: scaled by a declared public range, or one-hot over declared public levels.

Nothing is estimated from data: ranges, levels and imputed values are written by whoever writes the run.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from common.inputs import CellName, CellNames, find_name, parse_number
from common.plugins import Frozen
from common.types import BadRecord

REFUSE = "refuse"


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
            raise BadRecord(f"column {self.name!r}: expected a number")
        low, high = self.range
        return [2.0 * (min(max(value, low), high) - low) / (high - low) - 1.0]

    def _can_stand(self, text: str) -> bool:
        if self.levels is not None:
            return find_name(text, self.levels) is not None
        value = parse_number(text)
        return value is not None and self.range is not None and self.range[0] <= value <= self.range[1]
