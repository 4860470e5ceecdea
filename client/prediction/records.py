"""From a source's records to what each task says of them, in batches; only a few of them are in memory at a time.

A record's row depends on that record alone: records are encoded in batches of one shape (`client.data.encoding`),
and so are features. A record that cannot be used costs itself only, and is named by file and row.

# Shapes: B records, D features, C columns of what a task serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.encoding.batches import encode_padded
from client.data.encoding.encode import EncodedRecords, encode_records
from client.data.records import RejectedRecord
from client.data.sources import Source, SourceRecord
from client.data.sources.parts.tree import make_readable
from common.model.backbones import Backbone
from common.serving.network import Model, ServedHead
from common.tasks import WRITTEN_AT_ONCE, JoinsCells, Task, WritesTexts

_ROWS = 256
"""Rows that pass a head at once: vectors of records, or of places, where a record has many."""

_BLOCK = 4096
"""Records that are encoded by one backbone after the other where a source has several."""

Encode = Callable[[Source, str, Backbone], Iterator[EncodedRecords]]
"""A source, a backbone's name, and the backbone -> features of all of its records, in order."""

Progress = Callable[[int, int], None]
"""Told how many of how many records are done."""


def encode_now(source: Source, name: str, backbone: Backbone) -> Iterator[EncodedRecords]:
    """Yields the features of a source's records, computed now.

    Args:
        source: the records.
        name: name of the backbone, unused.
        backbone: what encodes them.
    """
    del name
    return encode_records(source, backbone)


@dataclass(frozen=True)
class Part:
    """Records of one source, and what is said of them.

    Attributes:
        name: name of the source; "" where it has none.
        source: its records.
        tasks: names of the model's tasks.
        sides: side of the split of each record; None where there is no split.
    """

    name: str
    source: Source = field(repr=False)
    tasks: Sequence[str]
    sides: Sequence[str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TaskResult:
    """One task's predictions for some records, B of them.

    Attributes:
        labels: the prediction as one cell.
        served_BC: what else the task says, float32.
    """

    labels: list[str] = field(repr=False)
    served_BC: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True)
class PredictedRecord:
    """One record and what is said of it.

    Attributes:
        position: its position in the part's source.
        record: its index entry.
        results: task -> its label, and what else it says; tasks that cannot use the record are left out.
    """

    position: int
    record: SourceRecord = field(repr=False)
    results: Mapping[str, tuple[str, NDArray[np.float32]]] = field(repr=False)


@dataclass(frozen=True)
class Chosen:
    """Some records of a source, as a source of their own.

    Attributes:
        whole: the source.
        positions: which of its records.
    """

    whole: Source = field(repr=False)
    positions: Sequence[int] = field(repr=False)

    def digest(self) -> str:
        """The whole source's: nothing is kept by it."""
        return self.whole.digest()

    def index(self) -> list[SourceRecord]:
        """Returns the chosen records' entries."""
        records = self.whole.index()
        return [records[position] for position in self.positions]

    def load(self, position: int) -> Any:
        """Returns one chosen record's content."""
        return self.whole.load(self.positions[position])


def resolve(source: Source) -> tuple[Source, list[int]]:
    """Returns the source that some records are of, and their positions in it."""
    if not isinstance(source, Chosen):
        return source, list(range(len(source.index())))
    whole, positions = resolve(source.whole) if isinstance(source.whole, Chosen) else (source.whole, None)
    return whole, list(source.positions) if positions is None else [positions[at] for at in source.positions]


def predict_part(
    model: Model, part: Part, encode: Encode = encode_now, progress: Progress | None = None
) -> Iterator[tuple[list[PredictedRecord], list[RejectedRecord]]]:
    """Yields what a model says of some records, in their order, and which of them it cannot use.

    Args:
        model: the model, with its backbones on the device that is to encode.
        part: the records, and the tasks.
        encode: computes or reads features.
        progress: told how far it is.
    """
    index, backbones = (
        part.source.index(),
        list(dict.fromkeys(model.config.tasks[name].backbone for name in part.tasks)),
    )
    done = 0
    for encoded in _encode_together(model, part.source, len(index), backbones, encode):
        results: dict[int, dict[str, tuple[str, NDArray[np.float32]]]] = {}
        for task in part.tasks:
            own = encoded[model.config.tasks[task].backbone]
            found = _apply_head(model.tasks[task], model.heads[task], own.features_BD)
            for position, label, row_C in zip(own.positions, found.labels, found.served_BC, strict=True):
                results.setdefault(position, {})[task] = (label, row_C)
        end = max(each.end for each in encoded.values())
        predicted = [PredictedRecord(at, index[at], results[at]) for at in range(done, end) if at in results]
        rejected = [
            _reject(index[at], reason, task if at in results else "")
            for at in range(done, end)
            for task, reason in _list_reasons(model, part.tasks, encoded, at)
        ]
        yield predicted, list(dict.fromkeys(rejected))
        done = end
        if progress is not None:
            progress(done, len(index))


def name_file(record: SourceRecord) -> str:
    """Returns the path of the record's own file where it has one, else the name of the file that holds it."""
    return make_readable(record.path) or record.file


def _reject(record: SourceRecord, reason: str, task: str) -> RejectedRecord:
    return RejectedRecord(name_file(record), record.row, reason, task)


def _list_reasons(
    model: Model, tasks: Sequence[str], encoded: Mapping[str, EncodedRecords], position: int
) -> list[tuple[str, str]]:
    """Returns the tasks that cannot use a record, each with the reason."""
    found = [(task, encoded[model.config.tasks[task].backbone].unusable.get(position)) for task in tasks]
    return [(task, reason) for task, reason in found if reason is not None]


def _encode_together(
    model: Model, source: Source, count: int, backbones: Sequence[str], encode: Encode
) -> Iterator[dict[str, EncodedRecords]]:
    """Yields the features of consecutive records by every backbone."""
    if len(backbones) == 1:
        (name,) = backbones
        for encoded in encode(source, name, model.backbones[name]):
            yield {name: encoded}
        return
    for first in range(0, count, _BLOCK):
        block = Chosen(source, range(first, min(first + _BLOCK, count)))
        yield {name: _join(list(encode(block, name, model.backbones[name])), first) for name in backbones}


def _join(parts: Sequence[EncodedRecords], first: int) -> EncodedRecords:
    return EncodedRecords(
        [first + position for part in parts for position in part.positions],
        np.concatenate([part.features_BD for part in parts]),
        {first + position: reason for part in parts for position, reason in part.unusable.items()},
        first + parts[-1].end,
    )


def _apply_head(task: Task, head: ServedHead, features_BD: NDArray[np.float32]) -> TaskResult:
    num_places = math.prod(features_BD.shape[1:-1])
    at_once = WRITTEN_AT_ONCE if isinstance(task, WritesTexts) else max(1, _ROWS // max(1, num_places))
    with torch.inference_mode():
        outputs_BO = encode_padded(head.compute_outputs, torch.from_numpy(features_BD), at_once)
        # Outputs of places are refined: those of all records together would need more memory than the features.
        parts = torch.split(outputs_BO, at_once if num_places > 1 else max(1, len(outputs_BO)))
        served_BC = torch.cat([head.serve(part).float() for part in parts]).numpy()
        cells = [each for part in parts for each in task.codec.decode(part)]
    return TaskResult([_join_cells(task, each) for each in cells], served_BC)


def _join_cells(task: Task, cells: Sequence[str]) -> str:
    return task.join_cells(cells) if isinstance(task, JoinsCells) else "|".join(cells)
