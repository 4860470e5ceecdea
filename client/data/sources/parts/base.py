"""Shared parts of the kinds: the restriction to some rows, and an unambiguous digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from common.inputs import encode_text
from common.plugins import LocalPath, Plugin


class SourceSettings(Plugin):
    """Base of every source's settings.

    Attributes:
        rows: a CSV `row,split` of 1-based positions in the source's index; client/data/records.py applies it, so that
            sites that share a source share its cached features.
    """

    former_keys: ClassVar[Mapping[str, str]] = {"patient_column": "patient", "split_column": "split"}
    rows: LocalPath | None = None


Side = Literal["train", "test", "all"]


def list_files(path: Path | Mapping[Side, Path]) -> Mapping[Side, Path]:
    """Returns side -> file of a `path` that is one file, or one for each side of the split."""
    return {"all": path} if isinstance(path, Path) else path


FilesOfSides = LocalPath | Annotated[dict[Side, LocalPath], Field(min_length=1)]
"""One file, or `train` and `test` -> its file."""


def _check_header(value: object) -> object:
    if value is False:
        raise ValueError("expected the columns' names as a list, where the file has no line of them")
    return value


Header = Annotated[Literal[True] | list[str], BeforeValidator(_check_header)]
"""True where the first line of a file names the columns; else their names."""


def list_names(header: Literal[True] | list[str]) -> list[str] | None:
    """Returns the names of the columns of a file without a line of them; None where it has one."""
    return None if header is True else header


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over parts, unambiguous about where one ends."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def digest_of_texts(rows: Sequence[Sequence[str]]) -> str:
    """SHA-256 over rows of texts, unambiguous about where a row ends."""
    return digest(part for row in rows for part in (len(row).to_bytes(8, "little"), *map(encode_text, row)))
