"""No network: the features are given. Rows of a table by declared public columns, or vectors as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import numpy as np
from pydantic import Field, model_validator

from common.backbones import Architecture, Example, Projection, RawInputs
from common.backbones.parts.columns import Column
from common.plugins import LocalPath, Plugin
from common.types import BadRecord

if TYPE_CHECKING:
    from torch import Tensor


@final
class Identity(Plugin):
    """Settings of given features. Exactly one of `columns`, `ranges` and `dim`.

    Attributes:
        columns: what is made of each column, in this order; other columns of a record are not read.
        ranges: a CSV `column,lowest,highest,levels,missing,indicator` that says the same; levels are separated by `|`,
            `missing` may be `middle`. It is read with the run or simulation file that names it, and becomes `columns`.
        dim: length of vectors that already are features.
        missing_values: cell texts that mean an empty cell; the empty text always does.
        projection: its `dim` and `shift: batch_norm` are not possible here.
    """

    kind: Literal["identity"] = "identity"
    columns: Annotated[tuple[Column, ...], Field(min_length=1)] | None = None
    ranges: Annotated[LocalPath | None, Field(exclude=True)] = None
    dim: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    missing_values: tuple[str, ...] = ("",)
    projection: Projection | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Identity:
        if self.ranges is not None:
            # Never read here: settings also come from others.
            raise ValueError("ranges: expected it in a run file or simulation file only; write `columns` here")
        if (self.columns is None) == (self.dim is None):
            raise ValueError("expected exactly one of columns and dim")
        names = [column.name for column in self.columns or ()]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"columns: expected each column once, got {repeated!r} twice")
        return self

    @classmethod
    def example(cls, folder: Path) -> Example:
        """Returns rows with a number that may be missing, and a category."""
        del folder
        settings = {
            "kind": "identity",
            "columns": [
                {"name": "age", "range": [0, 100], "missing": 50, "indicator": True},
                {"name": "sex", "levels": [0, 1], "missing": "refuse"},
            ],
            "missing_values": ["", "?"],
        }
        items = [{"age": "25", "sex": "1"}, {"age": "?", "sex": "0"}, {"age": "300", "sex": "1.0"}]
        return Example(settings, [*items, {"age": "75.5", "sex": "0"}])

    def architecture(self) -> Architecture:
        """Returns the identity, on all columns' inputs or the vector's length."""
        from torch import nn

        dim = self.dim if self.dim is not None else sum(column.width for column in self.columns or ())
        return Architecture(nn.Identity(), dim, open_raw=self._open_raw)

    def preprocess(self, item: Any) -> Tensor:
        """Returns a float32 vector of finite values from a mapping column -> text, or from a vector.

        Raises:
            BadRecord: a column is absent, or a cell or value cannot be used; no content is named.
        """
        if self.columns is None:
            return self._vector(item)
        if not isinstance(item, Mapping):
            raise BadRecord("expected a row with named columns")
        import torch

        return torch.tensor([value for column in self.columns for value in column.inputs(self._cell(item, column))])

    def list_clipped(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the names of the columns whose number in a row lies beyond the declared range."""
        cells = [(column, self._cell(row, column)) for column in self.columns or () if column.name in row]
        return [column.name for column, cell in cells if cell is not None and column.clips(cell)]

    def _open_raw(self) -> RawInputs:
        from common.backbones.parts.raw import open_columns, open_given

        if self.columns is not None:
            return open_columns(self.columns, self.missing_values, self._cell)
        return open_given("vector", (self.dim or 0,), "numbers that already are features", self.preprocess)

    def list_columns(self) -> list[str]:
        """Returns the columns' names; none where vectors are given."""
        return [column.name for column in self.columns or ()]

    def _cell(self, row: Mapping[str, Any], column: Column) -> str | None:
        if column.name not in row:
            raise BadRecord(f"column {column.name!r}: expected it in the row, found none of that name")
        text = str(row[column.name]).strip()
        return None if text == "" or text in self.missing_values else text

    def _vector(self, item: Any) -> Tensor:
        import torch

        if isinstance(item, Mapping):
            raise BadRecord("expected a vector of numbers, got a row with named columns")
        try:
            values = np.asarray(item, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise BadRecord("expected a vector of numbers") from error
        if values.shape != (self.dim,):
            raise BadRecord(f"expected a vector of {self.dim} numbers, got an array of another shape")
        if not np.isfinite(values).all():
            raise BadRecord("expected finite numbers")
        return torch.from_numpy(values.copy())
