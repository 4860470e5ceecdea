"""A few labelled records of a new site, with the features that a finished model's heads read. They stay at home.

    sources: {few: {kind: image_folder, path: ./few}}
    tasks: {finding: {source: few, label: label, missing: skip}}

Sources and columns of labels are written as in a site file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from client.config import LabelColumns
from client.data.encoding.encode import encode_records
from client.data.records import PlacedRecord, check_values, encode_labels, select_rows
from client.data.sources import Source, open_source
from client.data.units import TaskRecords
from client.prediction.records import Chosen
from common.errors import nearest
from common.model.backbones import Backbone
from common.plugins import Frozen, Spec
from common.run import Name
from common.tasks import Task
from common.tasks.parts.declared import LabelRatios
from common.types import BadInput

Progress = Callable[[int, int], None]
"""Told how many of how many records are encoded."""


class ShotTask(LabelColumns):
    """The place of the labels of one of the prior's tasks.

    Attributes:
        prior: label -> share, the label shares for which this site's head is served; without it those of the prior.
    """

    prior: LabelRatios | None = None


class ShotsFile(Frozen):
    """A few labelled records.

    Attributes:
        sources: the sources by name, as in a site file.
        tasks: task of the prior -> where its labels are, and `prior`.
    """

    model_config = ConfigDict(title="file of labelled records")

    sources: Annotated[dict[Name, Spec], Field(min_length=1)]
    tasks: Annotated[dict[Name, ShotTask], Field(min_length=1)]


@dataclass(frozen=True)
class Shots:
    """Labelled records of one task.

    Attributes:
        records: features, labels and units; each record has a label.
        num_unusable: number of records without a label, or that could not be read.
    """

    records: TaskRecords = field(repr=False)
    num_unusable: int


def open_shots(
    file: ShotsFile,
    tasks: Mapping[str, Task],
    backbones: Mapping[str, Backbone],
    progress: Progress | None = None,
) -> dict[str, Shots]:
    """Returns the labelled records of each of a file's tasks, encoded.

    Args:
        file: the file.
        tasks: task -> its definition, for the tasks that a head is wanted of.
        backbones: task -> the backbone that its head stands on.
        progress: told how far it is.

    Raises:
        BadInput: a task or source is not known, a source cannot be opened, or no record can be used.
    """
    shots = {}
    for name, own in file.tasks.items():
        if name not in tasks:
            raise BadInput(f"tasks: expected some of {', '.join(tasks)}, got {name!r}{nearest(name, list(tasks))}")
        if own.source not in file.sources:
            known = ", ".join(file.sources)
            raise BadInput(f"tasks.{name}.source: expected one of {known}, got {own.source!r}")
        check_values(name, tasks[name], own)
        kind = open_source(file.sources[own.source], f"sources.{own.source}")
        whole = kind.open()
        sides, _ = select_rows(kind.rows, whole.index())
        source = Chosen(whole, sorted(sides))
        shots[name] = _open_task(name, tasks[name], own, source, backbones[name], progress)
    return shots


def _open_task(
    name: str, task: Task, own: ShotTask, source: Source, backbone: Backbone, progress: Progress | None
) -> Shots:
    index = source.index()
    features: list[NDArray[np.float32]] = []
    placed: list[PlacedRecord] = []
    unusable: Counter[str] = Counter()
    for encoded in encode_records(source, backbone):
        features.append(encoded.features_BD)
        placed += [
            PlacedRecord(own.source, at, index[at].patient or f"record {at}", 0, index[at]) for at in encoded.positions
        ]
        unusable.update(encoded.unusable.values())
        if progress is not None:
            progress(encoded.end, len(index))
    labels = encode_labels(name, task, own, placed)
    if not bool(labels.mask_R.any()):
        reason = f": {unusable.most_common(1)[0][0]}" if unusable else ""
        raise BadInput(f"tasks.{name}: expected records with a label that the backbone can read, got none{reason}")
    units = {key: number for number, key in enumerate(dict.fromkeys(each.unit_key for each in placed))}
    records = TaskRecords.of(
        torch.from_numpy(np.concatenate(features)),
        labels.labels,
        labels.mask_R,
        torch.tensor([units[each.unit_key] for each in placed]),
        len(units),
    ).labelled()
    return Shots(records, len(index) - len(records.unit_R))
