"""Arrays of one .npz file: images or vectors, with arrays of labels. Never unpickled."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from client.sources import Record
from client.sources._base import SourceSettings, digest
from common.plugins import Frozen, LocalPath
from common.types import BadInput, BadRecord


class Part(Frozen):
    """One part of the file: an input array and a label array for each column."""

    inputs: str
    columns: dict[str, str]
    patient: str | None = None


class Npz(SourceSettings):
    """Settings: the file, its parts (`train` and `test`, or one called `all` without a split), names for integers.

    Attributes:
        names: column -> array of names that the column's integers index.
    """

    kind: Literal["npz"]
    path: LocalPath
    parts: dict[Literal["train", "test", "all"], Part]
    names: dict[str, str] = {}

    def open(self) -> Arrays:
        """The opened file. Raises BadInput: missing, not an npz file, an array missing or of another length."""
        try:
            data = self.path.read_bytes()
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in self._wanted()}
        except KeyError as error:
            raise BadInput(f"{self.path}: expected an array called {error.args[0].split()[0]}, got none") from error
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise BadInput(f"{self.path}: expected a readable .npz file, got {type(error).__name__}") from error
        for part in self.parts.values():
            length = len(arrays[part.inputs])
            for name in (*part.columns.values(), *([part.patient] if part.patient else [])):
                if len(arrays[name]) != length:
                    raise BadInput(f"{self.path}: expected {name} to be as long as {part.inputs} ({length})")
        return Arrays(self, hashlib.sha256(data).hexdigest(), arrays)

    def _wanted(self) -> list[str]:
        wanted = list(self.names.values())
        for part in self.parts.values():
            wanted += [part.inputs, *part.columns.values(), *([part.patient] if part.patient else [])]
        return wanted


@dataclass(frozen=True)
class Arrays:
    """An opened file."""

    settings: Npz
    sha: str
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def digest(self) -> str:
        """Over the file's bytes and which arrays are the inputs."""
        order = ",".join(f"{name}:{part.inputs}" for name, part in self.settings.parts.items())
        return digest([self.sha.encode(), order.encode()])

    def index(self) -> list[Record]:
        """Records part by part, in the file's order."""
        records: list[Record] = []
        for split, part in self.settings.parts.items():
            inputs = self.arrays[part.inputs]
            columns = {column: self._texts(column, name) for column, name in part.columns.items()}
            patients = None if part.patient is None else [str(value) for value in self.arrays[part.patient]]
            for row in range(len(inputs)):
                records.append(
                    Record(
                        row=len(records) + 1,
                        file=self.settings.path.name,
                        key=hashlib.sha256(np.ascontiguousarray(inputs[row]).tobytes()).hexdigest(),
                        patient=patients[row] if patients else None,
                        split=None if split == "all" else split,
                        cells={column: texts[row] for column, texts in columns.items()},
                    )
                )
        return records

    def _texts(self, column: str, array: str) -> list[str]:
        values = self.arrays[array]
        if column in self.settings.names:
            names = self.arrays[self.settings.names[column]]
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < len(names):
                raise BadInput(f"{self.settings.path}: column {column!r} has a number outside its names")
            values = names[values]
        return [str(value) for value in values]

    def load(self, position: int) -> Any:
        """One image or vector."""
        for part in self.settings.parts.values():
            inputs = self.arrays[part.inputs]
            if position < len(inputs):
                return inputs[position]
            position -= len(inputs)
        raise BadRecord("no such row")
