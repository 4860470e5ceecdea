"""A data source that counts how often its records are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from client.data.sources import Source, SourceRecord


@dataclass(frozen=True)
class Counted:
    """A source, and the positions that were read of it.

    Attributes:
        source: the source.
        loads: positions in the order in which they were read.
    """

    source: Source
    loads: list[int] = field(default_factory=list)

    def digest(self) -> str:
        """Returns the source's digest."""
        return self.source.digest()

    def index(self) -> list[SourceRecord]:
        """Returns the source's records."""
        return self.source.index()

    def load(self, position: int) -> Any:
        """Returns one record's item, and counts it."""
        self.loads.append(position)
        return self.source.load(position)
