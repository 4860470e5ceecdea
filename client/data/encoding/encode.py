"""All records of a source in order, as rows of features; what was encoded before an interruption is not encoded again.

# Shapes: N records of a source, I items of some of them, D features.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.data.encoding.batches import choose_batch_size, draw_inputs, draw_inputs_like, encode_padded
from client.data.encoding.partial import Conditions, PartialArray
from client.data.quantised import pack_rows, pack_small_rows
from client.data.sources import Source
from client.data.sources.parts.boundary import try_record
from common.backbones import Bag, list_items
from common.bundle import compute_code_digest
from common.model.backbones import join_items
from common.process.threads import kept_memory, make_ahead, one_thread
from common.types import BadRecord

if TYPE_CHECKING:
    from common.backbones import CacheBits
    from common.model.backbones import Backbone

Progress = Callable[[int, int], None]
"""Told how many records are done, of how many."""

BATCH_SIZE = 100
"""Inputs that a CPU's cores hold at once, all together: measured best for small images is 50 to 125 on a core."""

BATCH_VALUES = 2**20
"""Values of the inputs that one core encodes together, at most, but for 8 inputs: 26 pictures of 112 x 112 pixels.

More gain nothing and take memory: MobileNetV2 at 224 pixels took 9.5 to 10.2 ms of the processor a picture and 1.05 GiB
in batches of 8, decoding included, and 10.5 to 14.1 ms and 1.27 GiB in batches of 13 (measured).
"""

CUDA_BATCH_SIZE = 256

_LEAST_BATCH_SIZE = 8
"""Records that a core encodes together at least, however many cores there are."""

_LOADERS = 4
"""Threads that load and preprocess the next batches while a GPU encodes."""


def choose_type(backbone: Backbone, bits: CacheBits = 16) -> str:
    """Returns the type of the stored rows: of what a trunk reads no bit is lost.

    Args:
        backbone: what encodes.
        bits: bits of a feature that heads read.
    """
    return f"int{bits}" if backbone.trunk is None else "float32"


def count_bytes(feature_dim: int, grid: tuple[int, ...], type_: str) -> int:
    """Returns the number of bytes that one record's stored features take.

    Args:
        feature_dim: number of features of a place, or of the record.
        grid: number of places along each axis; none of a record with one vector.
        type_: type of the stored rows (`choose_type`).
    """
    dtype = np.dtype(type_)
    return math.prod(grid) * (feature_dim + _count_exponents(dtype)) * dtype.itemsize


def _count_exponents(dtype: np.dtype[Any]) -> int:
    """Returns the number of values that stand before a row's features: the exponent of integers."""
    return int(dtype.kind == "i")


def encode_source(
    folder: Path, source: Source, backbone: Backbone, progress: Progress | None, bits: CacheBits = 16
) -> PartialArray:
    """Writes the features of all records of a source to an array in a folder, and returns it.

    Args:
        folder: folder of this encoding alone; where it holds the beginning of one that was interrupted, under the same
            conditions, that is kept to the bit.
        source: source of the records.
        backbone: what encodes them, on its device.
        progress: told (done, total) in records.
        bits: bits of a stored feature that heads read.

    Raises:
        BadInput: the disk has no room, or the backbone does not encode.
    """
    count, dtype = len(source.index()), np.dtype(choose_type(backbone, bits))
    cores = torch.get_num_threads()
    with _use_cores(backbone.device):
        batches = _Batches(source, backbone, count, cores)
        shape = (count, *backbone.grid, backbone.feature_dim + _count_exponents(dtype))
        array = PartialArray(folder, shape, dtype, batches.conditions)
        if array.done and progress is not None:
            progress(array.done, count)
        try:
            for batch, encoded_BD in batches.encode(array.done):
                _add(array, batch, encoded_BD)
                if progress is not None:
                    progress(batch.end, count)
        except BaseException:
            array.leave()
            raise
    array.finish()
    return array


@dataclass(frozen=True)
class EncodedRecords:
    """Consecutive records of a source, encoded.

    Attributes:
        positions: positions of those that have features, B of them.
        features_BD: their features, in float32.
        unusable: position -> why a record has no features.
        end: the first position after them.
    """

    positions: list[int]
    features_BD: NDArray[np.float32] = field(repr=False)
    unusable: Mapping[int, str]
    end: int


def encode_records(source: Source, backbone: Backbone) -> Iterator[EncodedRecords]:
    """Yields the features of all records of a source in order; only a few batches are in memory, and nothing is kept.

    Args:
        source: source of the records.
        backbone: what encodes them, on its device.
    """
    cores = torch.get_num_threads()
    with _use_cores(backbone.device):
        for batch, encoded_BD in _Batches(source, backbone, len(source.index()), cores).encode(0):
            unusable, positions = dict(batch.unusable), batch.positions
            if encoded_BD is None:
                positions, encoded_BD = [], np.zeros((0, *backbone.grid, backbone.feature_dim), np.float32)
            finite_B = _find_finite(encoded_BD)
            unusable |= {positions[index]: "features are not finite" for index in np.flatnonzero(~finite_B)}
            kept = [positions[index] for index in np.flatnonzero(finite_B)]
            yield EncodedRecords(kept, encoded_BD[finite_B], unusable, batch.end)


def _add(array: PartialArray, batch: _Batch, encoded_BD: NDArray[np.float32] | None) -> None:
    """Adds the rows of a batch to an array."""
    unusable = dict(batch.unusable)
    rows_BD: NDArray[Any] | None = None
    if encoded_BD is not None:
        finite_B = _find_finite(encoded_BD)
        rows_BD = np.where(finite_B.reshape(-1, *(1,) * (encoded_BD.ndim - 1)), encoded_BD, np.float32(0.0))
        if array.dtype != np.float32:
            pack = pack_rows if array.dtype == np.int16 else pack_small_rows
            rows_BD = pack(torch.from_numpy(rows_BD))
        for index in np.flatnonzero(~finite_B):
            unusable[batch.positions[index]] = "features are not finite"
    array.add(batch.end, batch.positions, rows_BD, unusable)


def _find_finite(encoded_BD: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns a bool for each record: true where all of its features are finite."""
    return np.asarray(np.isfinite(encoded_BD).all(axis=tuple(range(1, encoded_BD.ndim))))


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


@final
class _Batches:
    """The batches of a source, and how they are encoded.

    A GPU encodes while threads load the next batches. A CPU's cores each load and encode batches of their own, torch on
    one thread in each: beside another busy process this is up to ten times faster than all cores on one batch, alone it
    is as fast (measured); and no feature depends on how many cores there are.

    Attributes:
        conditions: what decides the bits of a row.
    """

    def __init__(self, source: Source, backbone: Backbone, count: int, cores: int) -> None:
        """Loads the first batch, and decides by made-up inputs how all are encoded."""
        self._source, self._backbone, self._count, self._cores = source, backbone, count, cores
        self._on_gpu = backbone.device.type == "cuda"
        size = CUDA_BATCH_SIZE if self._on_gpu else max(_LEAST_BATCH_SIZE, BATCH_SIZE // cores)
        made_up = draw_inputs(backbone.preprocess, size) if count else None
        if made_up is not None and not self._on_gpu:
            size = min(size, max(_LEAST_BATCH_SIZE, BATCH_VALUES // made_up[0].numel()))
            made_up = made_up[:size]
        self._first = _load(source, backbone, range(min(size, count)), made_up, most=size)
        like_I = self._first.items_I
        for start in range(self._first.end, count, size):
            # Where none of the first records can be used, the next one says only what form they all have.
            if made_up is not None or like_I is not None:
                break
            like_I = _load(source, backbone, range(start, min(start + size, count)), None, most=1).items_I
        if made_up is None and like_I is not None:
            made_up = draw_inputs_like(like_I[0], size)
        self._made_up = made_up
        # The first inputs that a backbone encodes, and those that decide how, are nobody's.
        self._step = 1 if made_up is None else choose_batch_size(backbone.encode_items, made_up, size)
        # Volumes hold many items each: as many records are read at once as the first batch says fit.
        sizes = self._first.sizes
        self._size = max(1, size * len(sizes) // sum(sizes)) if sizes else size
        self.conditions = Conditions(self._size, self._step, _name_device(backbone.device), _name_versions())

    def encode(self, done: int) -> Iterator[tuple[_Batch, NDArray[np.float32] | None]]:
        """Yields the batches from a position on, where a batch begins, with the features of records that have some."""
        if done == 0:
            yield self._encode_one(self._first)
            done = self._first.end
        ranges = [range(start, min(start + self._size, self._count)) for start in range(done, self._count, self._size)]
        source, backbone, made_up = self._source, self._backbone, self._made_up
        if self._on_gpu:
            loaded = make_ahead(lambda some: _pinned(source, backbone, some, made_up), ranges, _LOADERS)
            yield from map(self._encode_one, loaded)
        else:
            yield from make_ahead(
                lambda some: self._encode_one(_load(source, backbone, some, made_up)), ranges, self._cores
            )

    def _encode_one(self, batch: _Batch) -> tuple[_Batch, NDArray[np.float32] | None]:
        return _encode_batch(self._backbone, batch, self._step, self._made_up)


@contextmanager
def _use_cores(device: torch.device) -> Iterator[None]:
    """Sets a CPU up for encoding; a GPU needs nothing."""
    if device.type == "cuda":
        yield
        return
    with one_thread(), kept_memory():
        yield


def _name_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@cache
def _name_versions() -> str:
    return f"torch {torch.__version__}, numpy {np.__version__}, code {compute_code_digest()}"


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
    one = explain_one(has_trunk=backbone.trunk is not None, has_places=bool(backbone.grid) and backbone.bag is None)
    return list_inputs(source.load(position), backbone.preprocess, bag=backbone.bag, one=one)


def explain_one(*, has_trunk: bool, has_places: bool) -> str:
    """Returns why a record of a backbone may be one item only; "" where it may be several.

    Args:
        has_trunk: whether a part of the backbone trains.
        has_places: whether its features are those of an item's places.
    """
    # What trains above is not linear: the mean of its inputs is not the input of its mean.
    if has_trunk:
        return "a part of the backbone trains"
    return "features are those of places" if has_places else ""


def list_inputs(item: Any, preprocess: Callable[[Any], Tensor], *, bag: Bag | None, one: str) -> list[Tensor]:
    """Returns one record's inputs: one, or one for each of its items.

    Args:
        item: the content of a record.
        preprocess: source item -> input of the backbone.
        bag: the backbone's rule for records of several items.
        one: what `explain_one` says of the backbone.

    Raises:
        BadRecord: the record cannot be used.
    """
    items = list_items(item, bag)
    if one and len(items) > 1:
        raise BadRecord(f"expected one item in the record where {one}, got several")
    return [preprocess(part) for part in items]


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
    encoded_BD, _ = try_record(lambda: _encode_rows(backbone, items_I, batch.sizes, step))
    if encoded_BD is not None:
        return batch, encoded_BD
    rows: dict[int, NDArray[np.float32]] = {}
    unusable = dict(batch.unusable)
    for position, part_I in zip(batch.positions, torch.split(items_I, batch.sizes), strict=True):
        row_1D, reason = try_record(lambda part_I=part_I: _encode_rows(backbone, part_I, [len(part_I)], step))  # type: ignore[misc]
        if row_1D is not None:
            rows[position] = row_1D
            continue
        if made_up is not None:
            # Raises where it is the machine that fails: else all of its records would be kept as bad ones.
            encode_padded(backbone.encode_items, made_up, step)
        unusable[position] = str(reason)
    # Only positions and reasons are read of a batch that is encoded.
    done = replace(batch, positions=list(rows), items_I=None, unusable=unusable)
    return done, np.concatenate(list(rows.values())) if rows else None


def _encode_rows(backbone: Backbone, items_I: Tensor, sizes: list[int], step: int) -> NDArray[np.float32]:
    """Features of consecutive records, each of as many inputs as its size says, `step` inputs at once."""
    encoded_ID = encode_padded(backbone.encode_items, items_I, step)
    joined: NDArray[np.float32] = join_items(encoded_ID, sizes, backbone.bag).numpy()
    return joined
