"""Selects a site's records, gives each its unit and its side of the split, and encodes its labels.

The steps are select_rows -> find_usable -> place_records -> encode_labels, each a pure function of its arguments; only
`select_rows` reads a file, the row list. Shape: R records.

Invariant: a unit is on one side of the split only, and stays there when rows are added or reordered.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from client.config import LabelColumns, SiteTask, Split
from client.data.sources import SourceRecord
from common.errors import instead
from common.inputs import encode_text, find_name, normalise_patient_id
from common.tasks import Task
from common.types import BadInput, BadRecord, Unit

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class RejectedRecord:
    """A record that cannot be used: where it stands and why, never what it holds.

    Attributes:
        file: file that lists or holds the record; names of sources where a whole source is rejected.
        row: 1-based row in the file; None where a whole source is rejected.
        reason: why it cannot be used, for the site's staff.
        task: the only task that cannot use the record; "" where none can.
    """

    file: str
    row: int | None
    reason: str
    task: str = ""


@dataclass(frozen=True)
class UsableRecord:
    """A record with features and a unit, not yet placed on a side of the split.

    Attributes:
        source: name of its source in the site's file.
        position: its position in the source's index.
        unit_key: key that all records of a unit share.
        side: index in SIDES that the source or its row list states; None where neither does.
        record: its index entry.
    """

    source: str
    position: int
    unit_key: str = field(repr=False)
    side: int | None
    record: SourceRecord


@dataclass(frozen=True)
class PlacedRecord:
    """A usable record on a side of the split.

    Attributes:
        source: name of its source in the site's file.
        position: its position in the source's index.
        unit_key: key that all records of a unit share.
        side: index in SIDES.
        record: its index entry.
    """

    source: str
    position: int
    unit_key: str = field(repr=False)
    side: int
    record: SourceRecord


@dataclass(frozen=True)
class TaskLabels:
    """One task's labels for a list of records.

    Attributes:
        labels: tensor of the codec's labels, a placeholder where a label is missing or cannot be used.
        mask_R: bool [R], false where the label is a placeholder.
        rejected: records whose label is to be reported.
    """

    labels: Tensor = field(repr=False)
    mask_R: Tensor = field(repr=False)
    rejected: tuple[RejectedRecord, ...] = field(repr=False)


def select_rows(
    rows: Path | None, index: Sequence[SourceRecord], excluded: Container[int] = ()
) -> dict[int, str | None]:
    """Returns the stated side of each record of a source that the site uses, by position; none is "" or None.

    Args:
        rows: the CSV that restricts the site to some records of the source, or None for all.
        index: all records of the source.
        excluded: positions of excluded records, which are named nowhere.

    Raises:
        BadInput: `rows` cannot be read or names a row twice or outside the source.
    """
    listed = _read_row_list(rows, len(index)) if rows is not None else dict.fromkeys(range(len(index)), "")
    return {position: side or index[position].split for position, side in listed.items() if position not in excluded}


def find_usable(
    source: str, index: Sequence[SourceRecord], sides: Mapping[int, str | None], unusable: Mapping[int, str], unit: Unit
) -> tuple[list[UsableRecord], list[RejectedRecord]]:
    """Returns the chosen records of one source that have features and a unit, and the others with their reasons.

    Args:
        source: name of the source in the site's file.
        index: all records of the source.
        sides: stated side of each chosen record, by position (see `select_rows`).
        unusable: reason why a record has no features, by position.
        unit: unit that the privacy budget protects.

    Raises:
        BadInput: the unit is the patient and the source knows no patients; a stated side is neither train nor test.
    """
    usable, rejected = [], []
    for position, side in sides.items():
        record = index[position]
        if unit is Unit.PATIENT and record.patient is None:
            raise BadInput(f"sources.{source}: the unit is patient, and the source has no patients; name its column")
        patient = _get_patient_key(record)
        if position in unusable:
            rejected.append(RejectedRecord(record.file, record.row, unusable[position]))
        elif unit is Unit.PATIENT and patient is None:
            rejected.append(RejectedRecord(record.file, record.row, record.blank))
        else:
            # Each record is a unit of its own, also where two hold the same content.
            key = f"record {source} {position}" if unit is Unit.EXAMPLE or patient is None else patient
            usable.append(UsableRecord(source, position, key, _parse_side(side, record), record))
    return usable, rejected


def place_records(
    records: Sequence[UsableRecord], split: Split, unit: Unit
) -> tuple[list[PlacedRecord], list[RejectedRecord]]:
    """Returns every record on its side of the split, and rejects test records that also stand on the train side.

    A source's own split goes before the hash. Where the unit is the patient, for all records of a patient and across
    sources. Where it is the example, for that record alone: a record that moved a patient's others, which are units
    of their own, would change the training sum by more than one unit may. Without a stated side, records of a patient
    share their hash and stay together in either case.

    Args:
        records: usable records of all sources.
        split: the site's test fraction and salt, for records without a stated side.
        unit: unit that the privacy budget protects.

    Raises:
        BadInput: the sources' own splits put a patient on both sides.
    """
    stated = _find_stated_patients(records)
    decided = stated if unit is Unit.PATIENT else {}
    placed = [
        PlacedRecord(each.source, each.position, each.unit_key, _choose_side(each, decided, split), each.record)
        for each in records
    ]
    train = {_get_identity(each) for each in placed if each.side == SIDES.index("train")}
    kept, rejected = [], []
    for each in placed:
        if each.side == SIDES.index("test") and each.record.identified and _get_identity(each) in train:
            rejected.append(RejectedRecord(each.record.file, each.record.row, "the same record is on the train side"))
        else:
            kept.append(each)
    return kept, rejected


def encode_labels(name: str, task: Task, own: SiteTask, records: Iterable[PlacedRecord]) -> TaskLabels:
    """Returns a task's labels of the records of its source, in their order.

    Args:
        name: name of the task, for messages.
        task: the task whose codec encodes the cells.
        own: the site's columns and mapping of values for the task.
        records: placed records of the task's source.

    Raises:
        BadInput: the source has no such column.
    """
    import torch

    columns = [own.column] if isinstance(own.column, str) else own.column
    labels, mask, rejected = [task.codec.missing()], [], []
    for record in (each.record for each in records):
        absent = [column for column in columns if column not in record.cells]
        if absent:
            raise BadInput(f"tasks.{name}.column: {record.file} has no column {absent[0]!r}")
        label, reason = _encode_label(task, own, [record.cells[column].strip() for column in columns])
        if reason is not None:
            rejected.append(RejectedRecord(record.file, record.row, reason, name))
        labels.append(task.codec.missing() if label is None else label)
        mask.append(label is not None)
    # The first only gives the shape, also where there is no record.
    return TaskLabels(torch.stack(labels)[1:], torch.tensor(mask, dtype=torch.bool), tuple(rejected))


def _read_row_list(rows: Path, count: int) -> dict[int, str]:
    """Returns the side of each listed row by its position, "" where the list states none."""
    chosen: dict[int, str] = {}
    try:
        with rows.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"row", "split"} <= set(reader.fieldnames or ()):
                raise BadInput(f"{rows}: expected columns row,split in its first line")
            for line in reader:
                position = int(line["row"]) - 1
                if not 0 <= position < count or position in chosen:
                    raise BadInput(f"{rows}: expected each row once and within the source, got {position + 1}")
                chosen[position] = (line["split"] or "").strip()
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f"{rows}: expected rows of a number and a side{instead(error)}") from None
    return chosen


def _get_patient_key(record: SourceRecord) -> str | None:
    patient = normalise_patient_id(record.patient or "")
    return f"patient {patient}" if patient else None


def _parse_side(stated: str | None, record: SourceRecord) -> int | None:
    if not stated:
        return None
    if stated not in SIDES:
        raise BadInput(f"{record.file} row {record.row}: expected a split train or test, got another word")
    return SIDES.index(stated)


def _find_stated_patients(records: Iterable[UsableRecord]) -> dict[str, int]:
    """Returns the side that sources state for a patient, by patient key."""
    first: dict[str, UsableRecord] = {}
    for each in records:
        patient = _get_patient_key(each.record)
        if patient is None or each.side is None:
            continue
        other = first.setdefault(patient, each)
        if other.side != each.side:
            where = " and ".join(f"{record.file} row {record.row}" for record in (other.record, each.record))
            raise BadInput(f"one patient is on both sides of the split: {where}")
    return {patient: each.side for patient, each in first.items() if each.side is not None}


def _choose_side(usable: UsableRecord, stated: Mapping[str, int], split: Split) -> int:
    patient = _get_patient_key(usable.record)
    if patient is not None and patient in stated:
        return stated[patient]
    if usable.side is not None:
        return usable.side
    key = patient or f"record {usable.source} {usable.record.key}"
    hashed = hashlib.sha256(encode_text(f"{split.salt}\0{key}")).digest()
    return int(int.from_bytes(hashed[:8], "big") / 2**64 < split.test_fraction)


def _get_identity(placed: PlacedRecord) -> tuple[str, str]:
    return placed.source, placed.record.key


def _encode_label(task: Task, own: SiteTask, cells: list[str]) -> tuple[Tensor | None, str | None]:
    """Returns the label, or None with a reason to report the record, or None without one."""
    if not any(cells):
        return None, "missing label" if own.missing == "refuse" else None
    try:
        return task.codec.encode([_map_value(own, cell) for cell in cells]), None
    except BadRecord as error:
        return None, str(error) if own.unmapped == "refuse" else None


def check_values(name: str, task: Task, own: LabelColumns) -> None:
    """Checks that local values are mapped to values of the task: a typo would leave out every record that has one.

    Args:
        name: name of the task, for messages.
        task: the task whose codec knows its values.
        own: the site's columns and mapping of values for the task.

    Raises:
        BadInput: a local value is mapped to something that is no value of the task.
    """
    # A value of one of several columns means nothing by itself.
    for local, value in (own.values or {}).items() if isinstance(own.column, str) else ():
        try:
            task.codec.encode([value])
        except BadRecord as error:
            raise BadInput(f"tasks.{name}.values.{local}: {error}, got {value!r}") from error


def _map_value(own: SiteTask, cell: str) -> str:
    """Returns the task's value for a local one; a value that is not listed may be the task's own."""
    known = list(own.values or {})
    found = find_name(cell, known)
    return cell if own.values is None or found is None else own.values[known[found]]
