"""Bags: records of another source that have the same cell in a column are one record of several items.

Tiles of a slide, slices of an examination, recordings of a visit, notes of a patient: whatever the other source lists
one by one. How many items a record may have is public, and so the backbone's (kind `bag`); backbones of other kinds
average the features of a record's items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator

from client.data.sources import PassesOver, Source, SourceExample, SourceKind, SourceRecord, open_source
from client.data.sources.parts.bags.items import Items, JoinedCells
from client.data.sources.parts.base import SourceSettings, digest
from common.inputs import Several, encode_text, normalise_patient_id
from common.plugins import Spec, plugin_class
from common.types import BadInput


class Bags(SourceSettings):
    """Settings of bags. A column in which the items of a bag differ holds their different cells, joined by `|`.

    A task of kind `multilabel` reads such a cell as all of its labels; others need a column that is the same for all
    items of a bag. A bag one of whose items cannot be read is a bad record, and so is a row without a cell in the
    column.

    Attributes:
        of: the source of the items.
        column: the column that says which bag an item belongs to, such as `slide` or `visit`.
    """

    kind: Literal["bags"]
    of: Annotated[Spec, WithJsonSchema({"type": "object", "additionalProperties": {}})]
    column: Annotated[str, Field(min_length=1)]

    @field_validator("of")
    @classmethod
    def _make_paths_absolute(cls, of: Spec) -> Spec:
        # Its paths are those of the file that it was read from.
        kind: Any = open_source(of, "of")
        return Spec(**kind.model_dump(mode="json", by_alias=True, exclude_unset=True))

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four slides of one or two tiles, of three patients."""
        manifest: Any = plugin_class("client.data.sources", "manifest")
        settings = dict(manifest.example(folder).settings)
        rows = [
            ("q7-ann-1.png", "q7-s1", "q7-ann", "z-benign"),
            ("q7-ann-2.png", "q7-s1", "q7-ann", "z-benign"),
            ("q7-bea.png", "q7-s2", "q7-bea", "z-malignant"),
            ("q7-cem.png", "q7-s3", "q7-cem", "z-benign"),
            ("q7-cem.png", "q7-s4", "q7-cem", "z-malignant"),
            ("q7-bea.png", "q7-s4", "q7-cem", "z-benign"),
        ]
        lines = ["image,slide,patient,finding", *map(",".join, rows)]
        (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return SourceExample({"kind": "bags", "of": settings, "column": "slide"}, ["q7-", "z-benign", "z-malignant"])

    def open(self) -> OpenedBags:
        """The opened source, grouped. Raises BadInput: it cannot be opened, or lacks the column."""
        kind: SourceKind = open_source(self.of, "of")
        if kind.rows is not None:
            raise BadInput("of.rows: expected none; `rows` of the bags choose among bags")
        opened = kind.open()
        records = opened.index()
        if records and not any(self.column in record.cells for record in records):
            raise BadInput(f"column: expected a column of the source, got {self.column!r}, which it does not have")
        return OpenedBags(self.column, opened, tuple(records))


@dataclass(frozen=True)
class OpenedBags:
    """An opened source, grouped into bags.

    Attributes:
        column: the column that says which bag an item belongs to.
        source: the source of the items.
        records: its index.
    """

    column: str
    source: Source = field(repr=False)
    records: tuple[SourceRecord, ...] = field(repr=False)

    @property
    def passed_over(self) -> int:
        """Number of files that the source of the items does not read."""
        return self.source.passed_over if isinstance(self.source, PassesOver) else 0

    @cached_property
    def bags(self) -> tuple[tuple[int, ...], ...]:
        """The positions of the items of each bag, in the order of the bags' first items; a row without one is alone."""
        found: dict[str, list[int]] = {}
        for position, record in enumerate(self.records):
            name = _read_bag(record, self.column)
            found.setdefault(name or f"\0{position}", []).append(position)
        return tuple(map(tuple, found.values()))

    def digest(self) -> str:
        """Over the source of the items and which bag each is in."""
        return digest([self.source.digest().encode(), *(repr(bag).encode() for bag in self.bags)])

    def index(self) -> list[SourceRecord]:
        """Bags in the order of their first items, whose row they have."""
        return [self._join([self.records[at] for at in bag]) for bag in self.bags]

    def load(self, position: int) -> Several:
        """One bag, whose items are read one by one when they are asked for."""
        return Several(Items(self.bags[position], self.source.load))

    def _join(self, records: Sequence[SourceRecord]) -> SourceRecord:
        first = records[0]
        faults = [record.fault for record in records if record.fault]
        patients = {None if record.patient is None else normalise_patient_id(record.patient) for record in records}
        if not _read_bag(first, self.column):
            faults.append("its cell in the column of bags is blank")
        if len(patients) > 1:
            faults.append("its items are of different patients")
        if len({record.split for record in records}) > 1:
            faults.append("its items are on different sides of the split")
        return replace(
            first,
            key=digest([b"bag", encode_text(_read_bag(first, self.column) or first.key)]),
            cells=JoinedCells([record.cells for record in records]),
            fault=faults[0] if faults else "",
            identified=all(record.identified for record in records),
            path="",
        )


def _read_bag(record: SourceRecord, column: str) -> str:
    return "" if record.fault else record.cells.get(column, "").strip()
