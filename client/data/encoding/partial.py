"""An array of features while it is written: an encoding that was interrupted goes on after the last block on disk.

Beside the array lies a file of lines: first the conditions under which its rows are computed, then one line for each
block of rows, with its digest. Whoever opens the array again keeps the blocks from the first on whose digests are those
of the rows that are there; everything after them is encoded again.

Guarantees:
- A row that is kept was written under the same conditions, and is the row that was written.
- Nothing has to be flushed while encoding: what a power cut took from the disk does not have its digest.

# Shapes: N records of a source, B of a block, D values of a stored row.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import explain_os_error
from common.files import allocate, flush, private_folder
from common.types import BadInput

ARRAY = "features.npy"
BLOCKS = "blocks.jsonl"

BLOCK_S = 1.0
"""Seconds of encoding that a killed process loses at most, beside a batch; a shorter encoding writes no block."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of an encoding: under others, a row may have other last bits.

    Attributes:
        batch_size: records that are read together.
        step: inputs that are encoded together.
        device: name of the device that encodes.
        versions: versions of the code that encodes.
    """

    batch_size: int
    step: int
    device: str
    versions: str


class _Block(BaseModel):
    """A line: some consecutive records, those that have no features, and a digest of both and of their rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int
    end: int
    unusable: Mapping[int, str]
    sha256: str


@final
class PartialArray:
    """An array of rows that is filled in order.

    Attributes:
        path: the array's file.
        dtype: type of its values.
        done: number of records whose rows are in it.
        unusable: position -> why that record has no features; its row is zeros.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any], conditions: Conditions) -> None:
        """Opens an array in a folder of its own; one that was begun under the same conditions is gone on with.

        Args:
            folder: the folder; created where it is missing.
            shape: shape [N, D] of the array.
            dtype: type of its values.
            conditions: what decides the bits of a row.

        Raises:
            BadInput: the disk has no room for the array.
        """
        self.path, self.dtype, self._lines = folder / ARRAY, dtype, folder / BLOCKS
        self._head = json.dumps([shape, str(dtype), vars(conditions)])
        self.done, self.unusable = 0, dict[int, str]()
        self._recorded, self._noted, self._last = 0, dict[int, str](), time.monotonic()
        found = self._find_blocks(folder)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
            private_folder(folder)
            self._rows_ND = np.lib.format.open_memmap(self.path, mode="w+", dtype=dtype, shape=shape)
            self.path.chmod(0o600)
            _allocate(self.path)
            found = []
        else:
            self._rows_ND = np.load(self.path, mmap_mode="r+", allow_pickle=False)
        kept = [self._head]
        for line, block in found:
            if block.start != self.done or not self.done < block.end <= shape[0] or not self._is_whole(block):
                break
            self.done = self._recorded = block.end
            self.unusable |= block.unusable
            kept.append(line)
        self._write_lines("".join(f"{line}\n" for line in kept), append=False)

    def add(self, end: int, positions: list[int], rows_BD: NDArray[Any] | None, unusable: Mapping[int, str]) -> None:
        """Writes the rows of the next records.

        Args:
            end: position after the last of them.
            positions: positions of those that have features.
            rows_BD: the features of these, None where there are none.
            unusable: position -> why a record among them has no features.
        """
        self._rows_ND[self.done : end] = 0
        if rows_BD is not None:
            self._rows_ND[positions] = rows_BD
        self.unusable |= unusable
        self._noted |= unusable
        self.done = end
        if time.monotonic() - self._last >= BLOCK_S:
            self._record()

    def leave(self) -> None:
        """Removes the array where it holds no block, so that nothing of it can be gone on with."""
        if not self._recorded:
            shutil.rmtree(self.path.parent, ignore_errors=True)

    def finish(self) -> None:
        """Brings all rows to the disk. The lines stay until the array has its own digest."""
        self._rows_ND.flush()
        with self.path.open("rb+") as file:
            flush(file.fileno())

    def _record(self) -> None:
        """Appends the line of the rows since the last line."""
        digest = self._compute_digest(self._recorded, self.done, self._noted)
        block = _Block(start=self._recorded, end=self.done, unusable=self._noted, sha256=digest)
        self._write_lines(f"{block.model_dump_json()}\n", append=True)
        self._recorded, self._noted, self._last = self.done, {}, time.monotonic()

    def _write_lines(self, text: str, *, append: bool) -> None:
        mode = os.O_APPEND if append else os.O_TRUNC
        with os.fdopen(os.open(self._lines, os.O_WRONLY | os.O_CREAT | mode, 0o600), "w", encoding="utf-8") as file:
            file.write(text)

    def _find_blocks(self, folder: Path) -> list[tuple[str, _Block]] | None:
        """Returns the lines of blocks; None where no array lies here that was begun under the same conditions."""
        try:
            head, *lines = (folder / BLOCKS).read_text(encoding="utf-8").split("\n")[:-1]
            shape = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if head != self._head or json.loads(head)[:2] != [list(shape.shape), str(shape.dtype)]:
                return None
        except (OSError, ValueError):
            return None
        found = []
        for line in lines:
            try:
                found.append((line, _Block.model_validate_json(line)))
            except ValidationError:
                break
        return found

    def _is_whole(self, block: _Block) -> bool:
        return self._compute_digest(block.start, block.end, block.unusable) == block.sha256

    def _compute_digest(self, start: int, end: int, unusable: Mapping[int, str]) -> str:
        noted = {str(position): reason for position, reason in unusable.items()}
        digest = hashlib.sha256(json.dumps([self._head, start, end, noted]).encode())
        digest.update(np.ascontiguousarray(self._rows_ND[start:end]).data)
        return digest.hexdigest()


def _allocate(path: Path) -> None:
    """Gives an array's file its whole place on the disk before a record is encoded.

    Raises:
        BadInput: there is not so much room; its folder is removed.
    """
    size = path.stat().st_size
    try:
        with path.open("rb+") as file:
            allocate(file.fileno(), size)
    except OSError as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise BadInput(
            f"cache_dir: expected room for {max(1, size >> 20)} MiB of features in {path.parent.parent}, got: "
            f"{explain_os_error(error)}, or name a folder on a larger disk"
        ) from error
