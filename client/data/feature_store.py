"""The feature store: a source is encoded once for a backbone, kept on disk, and read by memory map.

Features that heads read are kept as the 16-bit integers that training computes with (`client.data.quantised`), or in 8
bits where the site says so; what passes a trunk first is kept in float32.

Invariant: an entry appears whole, by one rename, or not at all; everything in it is readable by its owner only. An
encoding that was interrupted goes on where it stopped (`client.data.encoding.partial`).

# Shapes: N records of a source, D features.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.encoding.encode import Progress, choose_type, encode_source
from client.data.encoding.partial import BLOCKS
from client.data.quantised import QuantisedRows, unpack_small_rows
from client.data.sources import Source
from common.files import flush_folder, lock_file, private_folder, stamp_file, write_atomic
from common.model.fast import WAY

if TYPE_CHECKING:
    from common.backbones import CacheBits, Precision
    from common.model.backbones import Backbone

_KEPT_S = 7 * 86400.0
"""An interrupted encoding that nobody has gone on with for so long is removed: its source may have changed."""

_FEW_ROWS = 256
"""So many are read one by one: to map a file takes longer."""

_HEADER_BYTES = 1024
"""More than the first line of an array's file has."""

_ABOUT = "about.json"

StoredRows = NDArray[Any]
"""int16 and int8: packed (`client.data.quantised`); float32: as they are."""

_Places = TypeVar("_Places", StoredRows, Tensor)


@dataclass(frozen=True)
class Features:
    """Features of a whole source, in its index's order.

    Attributes:
        rows_N: memory-mapped, read-only: packed rows, or float32 N x D; a row of zeros where a record has no features.
        unusable: position -> why that record has no features. Positions, not files and rows: another file with the same
            content shares the entry.
        path: the array's file, for later opening.
        error: how far features are from those of float32, relative, as seen on made-up inputs; None where not computed.
    """

    rows_N: StoredRows = field(repr=False)
    unusable: Mapping[int, str] = field(repr=False)
    path: Path
    error: float | None = None

    @property
    def valid_N(self) -> NDArray[np.bool_]:
        """A bool for each record: true where it has features."""
        valid_N = np.ones(len(self.rows_N), dtype=np.bool_)
        valid_N[list(self.unusable)] = False
        return valid_N

    @property
    def features_ND(self) -> NDArray[np.float32]:
        """All features as they are trained on."""
        features_ND: NDArray[np.float32] = decode_rows(np.array(self.rows_N)).numpy()
        return features_ND


def check_features(path: Path) -> None:
    """Checks that a cached array is whole and unchanged, by its size and digest; its rows are not looked at.

    Raises:
        OSError: it is gone.
        ValueError: it is damaged.
    """
    _read_about(path.parent)


def list_feature_files(path: Path) -> tuple[Path, Path]:
    """Returns the files that `check_features` looks at, by the path of the array's."""
    return path, path.parent / _ABOUT


def rows_of(path: Path, positions_R: NDArray[np.int64], every: int = 1) -> StoredRows:
    """Copies of some rows of a cached array: what is trained on does not refer to the read-only file.

    Args:
        path: the array's file.
        positions_R: which rows.
        every: for rows of places, every so manieth place along each side is read, and no other (`thin`).

    Raises:
        OSError: it is gone.
        ValueError: it is damaged.
    """
    if len(positions_R) > _FEW_ROWS or every > 1:
        return np.asarray(thin(np.load(path, mmap_mode="r", allow_pickle=False), every)[positions_R])
    with path.open("rb", buffering=0) as file:
        shape, dtype, start = _layout(os.pread(file.fileno(), _HEADER_BYTES, 0).partition(b"\n")[0] + b"\n")
        rows_RD: StoredRows = np.empty((len(positions_R), *shape[1:]), dtype)
        step = math.prod(shape[1:]) * rows_RD.itemsize
        for row_D, position in zip(rows_RD, positions_R.tolist(), strict=True):
            if os.preadv(file.fileno(), [row_D], start + position * step) != step:
                raise ValueError("expected all of the array's rows")
    return rows_RD


def thin(values: _Places, every: int) -> _Places:
    """Returns a view of every so manieth place along both sides, R x G x G x ..., from the middle of the first."""
    return values if every == 1 else values[:, every // 2 :: every, every // 2 :: every]


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type of an array, and where its values start, from the first line of its file."""
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected a NumPy array of format 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if by_columns or dtype not in (np.int8, np.int16, np.float32):
        raise ValueError("expected int8, int16 or float32, row by row")
    return shape, dtype, stream.tell()


def decode_rows(rows_R: StoredRows) -> Tensor:
    """Returns stored rows as float32."""
    if rows_R.dtype == np.int8:
        return unpack_small_rows(rows_R)
    return QuantisedRows.unpack(rows_R).decode() if rows_R.dtype == np.int16 else torch.from_numpy(rows_R)


class FeatureStore:
    """A folder of encoded sources, keyed by backbone (weights and preprocessing), data digests and way of encoding."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open_or_encode(
        self,
        source: Source,
        backbone: Backbone,
        *,
        device: torch.device,
        precision: Precision = "float32",
        bits: CacheBits = 16,
        progress: Progress | None = None,
    ) -> Features:
        """The features of a source, encoded now if they are not there yet.

        Two processes may ask at once: one encodes, the other waits and reads.

        Args:
            source: what to encode.
            backbone: with what.
            device: where; a processor's features and a GPU's are different entries of the store.
            precision: precision inside the backbone; so are those of each.
            bits: bits of a stored feature that heads read; so are those of each.
            progress: told (done, total) in records.
        """
        # Another way of computing gives other last bits, for all records at once.
        how = f"{choose_type(backbone, bits)} {precision} {device.type} {WAY}"
        key = hashlib.sha256(f"{backbone.digest} {source.digest()} {how}".encode()).hexdigest()
        entry = private_folder(self._folder) / key
        with lock_file(self._folder / f".{key}.lock"):
            found = _open(entry)
            if found is None:
                self._remove_leftovers(key)
                moved = backbone.to(device)
                self._write(entry, source, moved if precision == "float32" else moved.at(precision), progress, bits)
                found = _open(entry)
        assert found is not None
        return found

    def _write(
        self, entry: Path, source: Source, backbone: Backbone, progress: Progress | None, bits: CacheBits
    ) -> None:
        # What an earlier process left of this entry is gone on with. So it is after an error: it may be mended.
        partial = self._folder / f".{entry.name}.partial"
        array = encode_source(partial, source, backbone, progress, bits)
        about = {
            "error": backbone.error,
            "bytes": array.path.stat().st_size,
            "content": _hash_file(array.path, stamp_file(array.path)),
            "unusable": {str(position): reason for position, reason in array.unusable.items()},
        }
        signed = {"about": about, "sha256": _digest(about)}
        write_atomic(partial / _ABOUT, json.dumps(signed).encode())
        (partial / BLOCKS).unlink()
        partial.rename(entry)
        flush_folder(self._folder)

    def _remove_leftovers(self, key: str) -> None:
        """Removes what is damaged of an entry, and what nobody has gone on with for a long time of any.

        Under the entry's lock nobody else writes it.
        """
        for leftover in (self._folder / key, *self._folder.glob(f".{key}.*.partial")):  # Of earlier versions too.
            shutil.rmtree(leftover, ignore_errors=True)
        for partial in self._folder.glob(".*.partial"):
            lines = partial / BLOCKS
            if lines.exists() and time.time() - lines.stat().st_mtime > _KEPT_S:
                name = partial.name.removesuffix(".partial")
                with suppress(TimeoutError), lock_file(self._folder / f"{name}.lock", timeout_s=0.0):
                    shutil.rmtree(partial, ignore_errors=True)


def _open(entry: Path) -> Features | None:
    """A complete entry, or None where there is none or it is damaged."""
    path = entry / "features.npy"
    try:
        about = _read_about(entry)
        rows_N = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    unusable = {int(position): reason for position, reason in about["unusable"].items()}
    return Features(rows_N, unusable, path, about.get("error"))


def _read_about(entry: Path) -> dict[str, Any]:
    """Returns what was noted of a complete entry. Raises OSError or ValueError where it is gone or damaged."""
    path = entry / "features.npy"
    try:
        signed = json.loads((entry / _ABOUT).read_text(encoding="utf-8"))
        about: dict[str, Any] = signed["about"]
        whole = signed["sha256"] == _digest(about) and path.stat().st_size == about["bytes"]
        whole = whole and _hash_file(path, stamp_file(path)) == about["content"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("expected the notes of a cached array") from error
    if not whole:
        raise ValueError("expected the cached array that was written")
    return about


@lru_cache(maxsize=2**14)
def _hash_file(path: Path, stamp: tuple[int, ...]) -> str:
    """Returns a file's digest; remembered while nobody touches the file, because every round asks."""
    del stamp
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
