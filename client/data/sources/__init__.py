"""Sources of a site's records. One file is one kind. Only client code may import this folder.

A source never puts a record's content, label or patient id into a repr or an error; a bad record is named by file and
row number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from common.plugins import Spec, resolve


@dataclass(frozen=True)
class SourceRecord:
    """One record's index entry: everything but its content.

    Attributes:
        row: 1-based row (or position) in `file`, for messages to the site's own staff.
        file: name of the file that lists or holds the record.
        key: identity that survives reordering and re-export: a relative path or a hash of the content.
        patient: patient id, "" where it is blank, None where the source has none.
        split: "train" or "test" where the source decides, else None.
        cells: label columns, column name -> text ("" is missing); those in files of their own are read when they are
            asked for, and may then be a BadRecord.
        identified: whether an equal key means the same record, so that it may not stand on both sides of a split.
            Two people can have equal rows in a table; two equal pictures are one.
        blank: why `patient` is blank, where the source knows more than that it is.
        fault: why the record cannot be used, where its listing says so already; "" where it may be.
        path: relative path of the record's own file, where it has one.
    """

    row: int
    file: str
    key: str = field(repr=False)
    patient: str | None = field(repr=False)
    split: str | None
    cells: Mapping[str, str] = field(repr=False)
    identified: bool = True
    blank: str = "blank patient id"
    fault: str = ""
    path: str = field(default="", repr=False)


class Source(Protocol):
    """An opened source.

    Law (tests/contracts/test_sources.py): the order is deterministic; `digest` changes when any content changes;
    nothing of a record's content appears in repr or errors.
    """

    def digest(self) -> str:
        """64 hex digits over everything that `load` can return, and over labels that have files of their own."""

    def index(self) -> list[SourceRecord]:
        """All records in a deterministic order."""

    def load(self, position: int) -> Any:
        """The content of `index()[position]`, for the backbone's preprocessing.

        A PIL image or uint8/float array for images; a mapping column -> text for tabular rows.

        Raises:
            BadRecord: missing or unreadable; says why, without path or content.
        """


@runtime_checkable
class LocatesFiles(Protocol):
    """Optional part of a source each of whose records is a file of its own."""

    def locate(self, position: int) -> Path:
        """Returns the path of the file of `index()[position]`. Raises BadRecord where it may not be read."""


@runtime_checkable
class PassesOver(Protocol):
    """Optional part of a source of files in folders.

    Attributes:
        passed_over: number of files there that it does not read, for the site's staff.
    """

    @property
    def passed_over(self) -> int:
        """Number of files that it does not read."""


@dataclass(frozen=True)
class SlicePlace:
    """Place of a record in a NIfTI volume of several slices.

    Attributes:
        path: the volume's file.
        plane: across which it is sliced: axial, coronal or sagittal.
        at: number of the slice, from 0.
    """

    path: Path
    plane: Literal["axial", "coronal", "sagittal"]
    at: int


@runtime_checkable
class LocatesSlices(Protocol):
    """Optional part of a source each of whose records is a slice of a volume."""

    def locate_slice(self, position: int) -> SlicePlace:
        """Returns where `index()[position]` stands. Raises BadRecord where its file may not be read."""


@dataclass(frozen=True)
class SourceExample:
    """A small instance of a kind: every kind is tested with its own.

    Attributes:
        settings: what a user would write.
        secrets: texts of the written files (names, labels, patient ids) that no repr and no error may show.
    """

    settings: Mapping[str, Any]
    secrets: Sequence[str] = ()


class SourceKind(Protocol):
    """The class of a plug-in file; it provides settings, and `open`.

    Attributes:
        rows: a CSV that restricts a site to some of the source's records; client/data/records.py applies it.
    """

    kind: str
    rows: Path | None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """At least four different records for tests; their files are written to `folder`, the same on every call."""

    def open(self) -> Source:
        """The opened source. Raises BadInput when the file is missing or lacks a column."""


def open_source(spec: Spec | Mapping[str, Any], key: str, own: Path | None = None) -> SourceKind:
    """The source settings a site or simulation file asks for. Raises BadInput naming the key.

    Args:
        spec: `kind` plus the kind's settings.
        key: where they stand in the file.
        own: folder of the site's own kinds.
    """
    kind: SourceKind = resolve("client.data.sources", spec, key, own)
    return kind
