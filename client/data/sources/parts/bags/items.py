"""Items of a record that has many: they are read when they are asked for, and their cells become the record's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final, overload

from common.types import BadRecord

SEPARATOR = "|"
"""Stands between different cells of one column; tasks of kind `multilabel` read it so."""


@final
class Items(Sequence[Any]):
    """Items of a bag, each read when it is asked for."""

    def __init__(self, positions: Sequence[int], read: Callable[[int], Any]) -> None:
        """Keeps how items are read.

        Args:
            positions: position of each in its source.
            read: position -> item.
        """
        self._positions, self._read = positions, read

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, at: int) -> Any: ...
    @overload
    def __getitem__(self, at: slice) -> Items: ...
    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Items(self._positions[at], self._read)
        try:
            return self._read(self._positions[at])
        except BadRecord as error:
            raise BadRecord(f"one of its {len(self)} items: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return (self[at] for at in range(len(self)))


@final
class JoinedCells(Mapping[str, str]):
    """Cells of a record from those of its items: where these differ, all that occur, in alphabetical order."""

    def __init__(self, cells: Sequence[Mapping[str, str]]) -> None:
        """Keeps the cells of the items, at least one; a column is joined when it is asked for."""
        self._cells = cells

    def __getitem__(self, column: str) -> str:
        return SEPARATOR.join(sorted({cells[column] for cells in self._cells}))

    def __contains__(self, column: object) -> bool:
        return column in self._cells[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells[0])

    def __len__(self) -> int:
        return len(self._cells[0])
