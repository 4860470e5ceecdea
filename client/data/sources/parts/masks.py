"""Label cells that are read when somebody asks for them: masks, which are files or arrays of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import final


@final
class LazyCells(Mapping[str, str]):
    """A record's cells, some of which are read each time they are asked for.

    Reading one may raise BadRecord, as loading the record may.
    """

    def __init__(self, cells: Mapping[str, str], read: Mapping[str, Callable[[], str]]) -> None:
        """Joins cells.

        Args:
            cells: column -> text.
            read: column -> what reads it.
        """
        self._cells, self._read = cells, read

    def __getitem__(self, column: str) -> str:
        return self._read[column]() if column in self._read else self._cells[column]

    def __contains__(self, column: object) -> bool:
        return column in self._read or column in self._cells

    def __iter__(self) -> Iterator[str]:
        yield from self._cells
        yield from self._read

    def __len__(self) -> int:
        return len(self._cells) + len(self._read)
