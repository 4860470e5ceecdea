"""Arrays of one .npz file: images or vectors, with arrays of labels. Never unpickled."""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import SourceSettings, digest
from client.data.sources.parts.masks import LazyCells, find_indices
from common.errors import instead
from common.inputs import write_mask
from common.plugins import Frozen, LocalPath
from common.types import BadInput

# What zipfile, zlib and numpy raise when they meet arbitrary bytes, an unknown compression or a password.
_UNREADABLE = (EOFError, OSError, RuntimeError, SyntaxError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)


class ArrayPart(Frozen):
    """One part of the file.

    Attributes:
        inputs: array of images or vectors, one record each.
        labels: column -> array of labels: one value for each record, or a mask: a whole number for each place, or one
            number for each label there, with a single 1.
        patient: array of patient ids.
    """

    former_keys: ClassVar[Mapping[str, str]] = {"columns": "labels"}
    inputs: str
    labels: dict[str, str]
    patient: str | None = None

    def per_record(self) -> list[str]:
        """Arrays with one value, or one mask, for each record."""
        return [*self.labels.values(), *([self.patient] if self.patient else [])]


class Npz(SourceSettings):
    """Settings: the file, its parts (`train` and `test`, or one called `all` without a split), names for integers.

    Attributes:
        path: the file.
        parts: `train` and `test`, or `all` -> the part's arrays.
        names: column -> array of names that the column's integers index.
    """

    kind: Literal["npz"]
    path: LocalPath
    parts: Annotated[dict[Literal["train", "test", "all"], ArrayPart], Field(min_length=1)]
    names: dict[str, str] = {}

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Three pictures to train on, two held out, labels as numbers with names."""
        pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
        np.savez(
            folder / "arrays.npz",
            train_x=pictures[:3],
            test_x=pictures[3:],
            train_y=np.array([0, 1, 1], dtype=np.uint8),
            test_y=np.array([1, 0], dtype=np.uint8),
            train_patient=np.array(["q7-ann", "q7-bea", "q7-bea"]),
            test_patient=np.array(["q7-cem", "q7-dan"]),
            classes=np.array(["z-benign", "z-malignant"]),
        )
        parts = {
            part: {"inputs": f"{part}_x", "labels": {"finding": f"{part}_y"}, "patient": f"{part}_patient"}
            for part in ("train", "test")
        }
        path = str(folder / "arrays.npz")
        settings = {"kind": "npz", "path": path, "parts": parts, "names": {"finding": "classes"}}
        return SourceExample(settings, ["q7-", "z-benign", "z-malignant"])

    def open(self) -> Arrays:
        """The opened file. Raises BadInput: missing, not an npz file, an array missing or of another length."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise BadInput(f"{self.path}: expected a readable .npz file{instead(error)}") from None
        # Which rows a site has is not a fact about the file.
        settings = self.model_dump_json(exclude={"rows"})
        return _opened(settings, self.path, (found.st_ino, found.st_size, found.st_mtime_ns))

    def read(self) -> Arrays:
        """The file, read and checked. Raises BadInput."""
        try:
            with self.path.open("rb") as whole:
                sha = hashlib.file_digest(whole, "sha256").hexdigest()
                # np.load would also take a single array or a pickle.
                if not zipfile.is_zipfile(whole):
                    raise BadInput(f"{self.path}: expected an .npz file, got another format")
                whole.seek(0)
                with np.load(whole, allow_pickle=False) as file:
                    absent = [name for name in self._wanted() if name not in file.files]
                    if absent:
                        raise BadInput(f"{self.path}: expected an array {absent[0]!r}, found none of that name")
                    arrays = {name: np.asarray(file[name]) for name in self._wanted()}
        except _UNREADABLE as error:
            raise BadInput(
                f"{self.path}: expected a readable .npz file without Python objects{instead(error)}"
            ) from None
        for part in self.parts.values():
            for name in part.per_record():
                # Some archives (MedMNIST) hold labels as N x 1.
                if arrays[name].ndim == 2 and arrays[name].shape[1] == 1 and name != part.inputs:
                    arrays[name] = arrays[name].reshape(-1)
            self._check(part, arrays)
        return Arrays(self, sha, arrays)

    def _wanted(self) -> list[str]:
        wanted = list(self.names.values())
        for part in self.parts.values():
            wanted += [part.inputs, *part.per_record()]
        return wanted

    def _check(self, part: ArrayPart, arrays: Mapping[str, np.ndarray]) -> None:
        if arrays[part.inputs].ndim < 2:
            raise BadInput(f"{self.path}: expected {part.inputs!r} to hold one image or vector for each record")
        for name in part.per_record():
            of_places = name != part.patient and arrays[name].ndim in (3, 4)
            if arrays[name].shape[: 3 if of_places else None] != arrays[part.inputs].shape[: 3 if of_places else 1]:
                what = "one mask of its size" if of_places else "one value"
                raise BadInput(f"{self.path}: expected {name!r} to hold {what} for each record of {part.inputs!r}")
        for column, array in self.names.items():
            numbers, names = arrays.get(part.labels.get(column, "")), arrays[array]
            if numbers is None:
                continue
            if numbers.dtype.kind not in "iu" or names.ndim != 1:
                raise BadInput(f"{self.path}: expected whole numbers in column {column!r} and a list of their names")


@lru_cache(maxsize=1)
def _opened(settings: str, path: Path, state: tuple[int, int, int]) -> Arrays:
    """The last file that was opened, while it has the same inode, size and time: simulated sites share one in turn."""
    del path, state
    return Npz.model_validate_json(settings).read()


@dataclass(frozen=True)
class Arrays:
    """An opened file."""

    settings: Npz
    sha: str
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def digest(self) -> str:
        """Over the file's bytes and which arrays are the inputs."""
        parts = [text.encode() for name, part in self.settings.parts.items() for text in (name, part.inputs)]
        return digest([self.sha.encode(), *parts])

    def index(self) -> list[SourceRecord]:
        """Records part by part, in the file's order; `row` counts on from part to part."""
        return list(self._records)

    @cached_property
    def _records(self) -> list[SourceRecord]:
        records: list[SourceRecord] = []
        for split, part in self.settings.parts.items():
            inputs = self.arrays[part.inputs]
            masks = {column: self.arrays[name] for column, name in part.labels.items() if self.arrays[name].ndim > 2}
            columns = {column: self._texts(column, name) for column, name in part.labels.items() if column not in masks}
            patients = None if part.patient is None else _as_texts(self.arrays[part.patient])
            for row in range(len(inputs)):
                records.append(
                    SourceRecord(
                        row=len(records) + 1,
                        file=self.settings.path.name,
                        key=hashlib.sha256(np.ascontiguousarray(inputs[row]).tobytes()).hexdigest(),
                        patient=patients[row] if patients is not None else None,
                        split=None if split == "all" else split,
                        cells=_join_cells({column: texts[row] for column, texts in columns.items()}, masks, row),
                    )
                )
        return records

    def _texts(self, column: str, name: str) -> list[str]:
        values = self.arrays[name]
        if column not in self.settings.names:
            return _as_texts(values)
        names = _as_texts(self.arrays[self.settings.names[column]])
        # A number without a name is a missing label: that record's alone.
        return [names[value] if 0 <= value < len(names) else "" for value in values.tolist()]

    def load(self, position: int) -> Any:
        """One image or vector."""
        for part in self.settings.parts.values():
            inputs = self.arrays[part.inputs]
            if position < len(inputs):
                return inputs[position]
            position -= len(inputs)
        raise IndexError("no record at this position")


def _join_cells(cells: Mapping[str, str], masks: Mapping[str, np.ndarray], row: int) -> Mapping[str, str]:
    if not masks:
        return cells
    return LazyCells(cells, {column: partial(_write_one, values, row) for column, values in masks.items()})


def _as_texts(values: np.ndarray) -> list[str]:
    """Labels or ids as text; NaN is a missing one."""
    if values.dtype.kind == "S":
        return [value.decode("utf-8", errors="surrogateescape").strip() for value in values.tolist()]
    try:
        found = values.tolist()
    except (SystemError, ValueError):  # A number that is no character: those texts alone are missing.
        found = [_read_text(values, row) for row in range(len(values))]
    return ["" if value != value else str(value).strip() for value in found]


def _read_text(values: np.ndarray, row: int) -> str:
    try:
        return str(values[row])
    except (SystemError, ValueError):
        return ""


def _write_one(values: np.ndarray, row: int) -> str:
    return write_mask(find_indices(values[row]))
