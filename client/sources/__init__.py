"""Where a site's records come from. One file is one kind. Only client code may import this folder.

A source never puts a record's content, label or patient id into a repr or an error; a bad record is named by file and
row number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from common.plugins import Spec, resolve


@dataclass(frozen=True)
class Record:
    """One record's index entry: everything but its content.

    Attributes:
        row: 1-based row (or position) in `file`, for messages to the site's own staff.
        file: name of the file that lists or holds the record.
        key: identity that survives reordering and re-export: a relative path or a hash of the content.
        patient: patient id, None where the source has none.
        split: "train" or "test" where the source decides, else None.
        cells: label columns, column name -> text ("" is missing).
    """

    row: int
    file: str
    key: str = field(repr=False)
    patient: str | None = field(repr=False)
    split: str | None
    cells: Mapping[str, str] = field(repr=False)


class Source(Protocol):
    """An opened source.

    Law (tests/contracts/test_sources.py): the order is deterministic; `digest` changes when any content changes;
    nothing of a record's content appears in repr or errors.
    """

    def digest(self) -> str:
        """64 hex digits over everything `load` can return."""

    def index(self) -> list[Record]:
        """All records in a deterministic order."""

    def load(self, position: int) -> Any:
        """The content of `index()[position]`, for the backbone's preprocessing.

        A PIL image or uint8/float array for images; a mapping column -> text for tabular rows.

        Raises:
            BadRecord: missing or unreadable; says why, without path or content.
        """


class SourceKind(Protocol):
    """What a plug-in file's class provides: settings, and `open`."""

    kind: str
    rows: Path | None

    def open(self) -> Source:
        """The opened source. Raises BadInput when the file is missing or lacks a column."""


def open_source(spec: Spec | Mapping[str, Any], key: str) -> SourceKind:
    """The source settings a site or simulation file asks for. Raises BadInput naming the key."""
    kind: SourceKind = resolve("client.sources", spec, key)
    return kind
