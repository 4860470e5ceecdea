"""The feature store: a source is encoded once for a backbone, kept on disk, and read by memory map.

Features that heads read are kept as the 16-bit integers that training computes with (`client.data.quantised`); what
passes a trunk first is kept in float32.

Invariant: an entry appears whole, by one rename, or not at all; everything in it is readable by its owner only.

# Shapes: N records of a source, I items of some of them, D features.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.batches import choose_batch_size, draw_inputs, draw_inputs_like, encode_padded
from client.data.quantised import QuantisedRows, pack_rows
from client.data.sources import Source
from client.data.sources.parts.boundary import MAX_ITEMS, try_record
from common.errors import explain_os_error
from common.files import allocate, flush, flush_folder, lock_file, private_folder, stamp_file, write_atomic
from common.inputs import Several
from common.process.threads import one_thread
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from common.backbones import Precision
    from common.model.backbones import Backbone

Progress = Callable[[int, int], None]
BATCH_SIZE = 100
"""Inputs that a CPU's cores hold at once, all together: measured best for small images is 50 to 125 on a core."""

CUDA_BATCH_SIZE = 256

_LEAST_BATCH_SIZE = 8
"""Records that a core encodes together at least, however many cores there are."""

_FEW_ROWS = 256
"""So many are read one by one: to map a file takes longer."""

_HEADER_BYTES = 1024
"""More than the first line of an array's file has."""

_LOADERS = 4
"""Threads that load and preprocess the next batches while a GPU encodes."""

_Made = TypeVar("_Made")
StoredRows = NDArray[Any]
"""int16: packed (`client.data.quantised.pack_rows`); float32: as they are."""


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


def rows_of(path: Path, positions_R: NDArray[np.int64]) -> StoredRows:
    """Copies of some rows of a cached array: what is trained on does not refer to the read-only file.

    Raises:
        OSError: it is gone.
        ValueError: it is damaged.
    """
    if len(positions_R) > _FEW_ROWS:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)[positions_R])
    with path.open("rb", buffering=0) as file:
        shape, dtype, start = _layout(os.pread(file.fileno(), _HEADER_BYTES, 0).partition(b"\n")[0] + b"\n")
        rows_RD: StoredRows = np.empty((len(positions_R), *shape[1:]), dtype)
        step = math.prod(shape[1:]) * rows_RD.itemsize
        for row_D, position in zip(rows_RD, positions_R.tolist(), strict=True):
            if os.preadv(file.fileno(), [row_D], start + position * step) != step:
                raise ValueError("expected all of the array's rows")
    return rows_RD


@lru_cache(maxsize=1024)
def _layout(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape and type of an array, and where its values start, from the first line of its file."""
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("expected a NumPy array of format 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if by_columns or dtype not in (np.int16, np.float32):
        raise ValueError("expected int16 or float32, row by row")
    return shape, dtype, stream.tell()


def decode_rows(rows_R: StoredRows) -> Tensor:
    """Returns stored rows as float32."""
    return QuantisedRows.unpack(rows_R).decode() if rows_R.dtype == np.int16 else torch.from_numpy(rows_R)


class FeatureStore:
    """A folder of encoded sources, keyed by backbone (weights and preprocessing) and data digests."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open_or_encode(
        self,
        source: Source,
        backbone: Backbone,
        *,
        device: torch.device,
        precision: Precision = "float32",
        progress: Progress | None = None,
    ) -> Features:
        """The features of a source, encoded now if they are not there yet.

        Two processes may ask at once: one encodes, the other waits and reads.

        Args:
            source: what to encode.
            backbone: with what.
            device: where.
            precision: precision inside the backbone; other than float32 it is another entry of the store.
            progress: told (done, total) in records.
        """
        how = f" {_choose_type(backbone)}" + ("" if precision == "float32" else f" {precision}")
        key = hashlib.sha256(f"{backbone.digest} {source.digest()}{how}".encode()).hexdigest()
        entry = private_folder(self._folder) / key
        with lock_file(self._folder / f".{key}.lock"):
            found = _open(entry)
            if found is None:
                # Under the lock nobody else writes this entry: what lies there is damaged or a dead writer's.
                for leftover in (entry, *self._folder.glob(f".{key}.*.partial")):
                    shutil.rmtree(leftover, ignore_errors=True)
                moved = backbone.to(device)
                self._write(entry, source, moved if precision == "float32" else moved.at(precision), progress)
                found = _open(entry)
        assert found is not None
        return found

    def _write(self, entry: Path, source: Source, backbone: Backbone, progress: Progress | None) -> None:
        scratch = Path(tempfile.mkdtemp(dir=self._folder, prefix=f".{entry.name}.", suffix=".partial"))
        try:
            path = scratch / "features.npy"
            count = len(source.index())
            unusable = _encode(path, count, source, backbone, progress)
            about = {
                "error": backbone.error,
                "bytes": path.stat().st_size,
                "content": _hash_file(path, stamp_file(path)),
                "unusable": {str(position): reason for position, reason in unusable.items()},
            }
            signed = {"about": about, "sha256": _digest(about)}
            write_atomic(scratch / "about.json", json.dumps(signed).encode())
            scratch.rename(entry)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        flush_folder(self._folder)


def _choose_type(backbone: Backbone) -> str:
    """Returns the type of the stored rows: of what a trunk reads no bit is lost."""
    return "int16" if backbone.trunk is None else "float32"


def _encode(path: Path, count: int, source: Source, backbone: Backbone, progress: Progress | None) -> dict[int, str]:
    """Write the array and return the records that have no features."""
    unusable: dict[int, str] = {}
    dtype = np.dtype(_choose_type(backbone))
    shape = (count, backbone.feature_dim + (dtype == np.int16))
    rows_N = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    path.chmod(0o600)
    _allocate(path)
    for batch, encoded_BD in _encoded_batches(source, backbone, count):
        unusable |= batch.unusable
        if encoded_BD is not None:
            finite_B = np.asarray(np.isfinite(encoded_BD).all(axis=1))
            usable_BD = np.where(finite_B[:, None], encoded_BD, np.float32(0.0))
            rows_N[batch.positions] = pack_rows(torch.from_numpy(usable_BD)) if dtype == np.int16 else usable_BD
            for index in np.flatnonzero(~finite_B):
                unusable[batch.positions[index]] = "features are not finite"
        if progress is not None:
            progress(batch.end, count)
    rows_N.flush()
    with path.open("rb+") as file:
        flush(file.fileno())
    return unusable


def _allocate(path: Path) -> None:
    """Gives an array's file its whole place on the disk before a record is encoded.

    Raises:
        BadInput: there is not so much room.
    """
    size = path.stat().st_size
    try:
        with path.open("rb+") as file:
            allocate(file.fileno(), size)
    except OSError as error:
        raise BadInput(
            f"cache_dir: expected room for {max(1, size >> 20)} MiB of features in {path.parent.parent}, got: "
            f"{explain_os_error(error)}, or name a folder on a larger disk"
        ) from error


@dataclass(frozen=True)
class _Batch:
    """Some records as inputs.

    Attributes:
        positions: of the records that can be encoded.
        sizes: how many inputs each of them has, most often one.
        items_I: all their inputs, None where there is none.
        unusable: position -> why a record cannot be used.
        end: the first position after them.
    """

    positions: list[int]
    sizes: list[int]
    items_I: Tensor | None = field(repr=False)
    unusable: Mapping[int, str]
    end: int


def _encoded_batches(
    source: Source, backbone: Backbone, count: int
) -> Iterator[tuple[_Batch, NDArray[np.float32] | None]]:
    """All records in order, with the features of those that can be used.

    A GPU encodes while threads load the next batches. A CPU's cores each load and encode batches of their own, torch on
    one thread in each: beside another busy process this is up to ten times faster than all cores on one batch, alone it
    is as fast (measured); and no feature depends on how many cores there are.
    """
    on_gpu = backbone.device.type == "cuda"
    cores = torch.get_num_threads()
    size = CUDA_BATCH_SIZE if on_gpu else max(_LEAST_BATCH_SIZE, BATCH_SIZE // cores)

    with nullcontext() if on_gpu else one_thread():
        made_up = draw_inputs(backbone.preprocess, size) if count else None
        first = _load(source, backbone, range(min(size, count)), made_up, most=size)
        if made_up is None and first.items_I is not None:
            made_up = draw_inputs_like(first.items_I[0], size)
        # The first inputs that a backbone encodes, and those that decide how, are nobody's.
        together = 1 if made_up is None else choose_batch_size(backbone.encode, made_up, size)

        def both(batch: _Batch) -> tuple[_Batch, NDArray[np.float32] | None]:
            return _encode_batch(backbone, batch, together, made_up)

        yield both(first)
        # Volumes hold many items each: as many records are read at once as the first batch says fit.
        step = max(1, size * len(first.sizes) // sum(first.sizes)) if first.sizes else size
        ranges = [range(start, min(start + step, count)) for start in range(first.end, count, step)]
        if on_gpu:
            yield from map(both, _made_ahead(lambda some: _pinned(source, backbone, some, made_up), ranges, _LOADERS))
        else:
            yield from _made_ahead(lambda some: both(_load(source, backbone, some, made_up)), ranges, cores)


def _made_ahead(make: Callable[[range], _Made], ranges: list[range], workers: int) -> Iterator[_Made]:
    """Yields the result for each range, in order, made by some threads; only a few are held at once."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Made]] = deque()
        for some in ranges:
            waiting.append(pool.submit(make, some))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _load(
    source: Source, backbone: Backbone, positions: range, like_I: Tensor | None, most: int | None = None
) -> _Batch:
    """Returns records as inputs, those that are not of the others' shape and type left out.

    Args:
        source: source of the records.
        backbone: what preprocesses them.
        positions: their positions.
        like_I: inputs of the right shape and type; None takes those of the first record.
        most: once there are so many inputs, no further record is read.
    """
    usable: list[int] = []
    sizes: list[int] = []
    items: list[Tensor] = []
    unusable: dict[int, str] = {}
    end = positions.stop
    for position in positions:
        if most is not None and len(items) >= most:
            end = position
            break
        inputs, reason = try_record(lambda position=position: _load_inputs(source, position, backbone))  # type: ignore[misc]
        if inputs is None:
            unusable[position] = str(reason)
            continue
        like_I = inputs[0].unsqueeze(0) if like_I is None else like_I
        if any((each.shape, each.dtype) != (like_I.shape[1:], like_I.dtype) for each in inputs):
            unusable[position] = "its size is another than that of the others"
            continue
        usable.append(position)
        sizes.append(len(inputs))
        items += inputs
    return _Batch(usable, sizes, torch.stack(items) if items else None, unusable, end)


def _pinned(source: Source, backbone: Backbone, positions: range, like_I: Tensor | None) -> _Batch:
    """In page-locked memory, from which a copy to the GPU overlaps with computing."""
    batch = _load(source, backbone, positions, like_I)
    return batch if batch.items_I is None else replace(batch, items_I=batch.items_I.pin_memory())


def _load_inputs(source: Source, position: int, backbone: Backbone) -> list[Tensor]:
    return list_inputs(source.load(position), backbone.preprocess, has_trunk=backbone.trunk is not None)


def list_inputs(item: Any, preprocess: Callable[[Any], Tensor], *, has_trunk: bool) -> list[Tensor]:
    """Returns one record's inputs: one, or one for each of its items.

    Args:
        item: the content of a record.
        preprocess: source item -> input of the backbone.
        has_trunk: whether a part of the backbone trains.

    Raises:
        BadRecord: the record cannot be used.
    """
    if not isinstance(item, Several):
        return [preprocess(item)]
    if not 0 < len(item.items) <= MAX_ITEMS:
        raise BadRecord(f"expected between one and {MAX_ITEMS} items in the record")
    if has_trunk and len(item.items) > 1:
        # What trains above is not linear: the mean of its inputs is not the input of its mean.
        raise BadRecord("expected one item in the record where a part of the backbone trains, got several")
    return [preprocess(part) for part in item.items]


def _encode_batch(
    backbone: Backbone, batch: _Batch, step: int, made_up: Tensor | None
) -> tuple[_Batch, NDArray[np.float32] | None]:
    """Returns a batch and its features; where it fails, its records are encoded one by one, padded to the same shape.

    Args:
        backbone: what encodes them.
        batch: records as inputs.
        step: number of inputs that are encoded at once.
        made_up: inputs that the backbone has encoded before; where it no longer does, no record is at fault.
    """
    items_I = batch.items_I
    if items_I is None:
        return batch, None
    encoded_BD, _ = try_record(lambda: _means(backbone, items_I, batch.sizes, step))
    if encoded_BD is not None:
        return batch, encoded_BD
    rows: dict[int, NDArray[np.float32]] = {}
    unusable = dict(batch.unusable)
    for position, part_I in zip(batch.positions, torch.split(items_I, batch.sizes), strict=True):
        row_1D, reason = try_record(lambda part_I=part_I: _means(backbone, part_I, [len(part_I)], step))  # type: ignore[misc]
        if row_1D is not None:
            rows[position] = row_1D
            continue
        if made_up is not None:
            # Raises where it is the machine that fails: else all of its records would be kept as bad ones.
            encode_padded(backbone.encode, made_up, step)
        unusable[position] = str(reason)
    # Only positions and reasons are read of a batch that is encoded.
    done = replace(batch, positions=list(rows), items_I=None, unusable=unusable)
    return done, np.concatenate(list(rows.values())) if rows else None


def _means(backbone: Backbone, items_I: Tensor, sizes: list[int], step: int) -> NDArray[np.float32]:
    """Features of consecutive records, each the mean of as many inputs as its size says, `step` inputs at once."""
    encoded_ID = encode_padded(backbone.encode, items_I, step)
    if len(encoded_ID) == len(sizes):
        means: NDArray[np.float32] = encoded_ID.numpy()
        return means
    return np.stack([part.mean(0).numpy() for part in torch.split(encoded_ID, sizes)])


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
        signed = json.loads((entry / "about.json").read_text(encoding="utf-8"))
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
