"""Selects a site's records, gives each its unit and its side of the split, and encodes its labels.

The steps are select_rows -> find_usable -> place_records -> encode_labels -> place_labels, each a pure function of its
arguments; only `select_rows` reads a file, the row list. Shapes: R records, P places of one.

Invariants: a unit is on one side of the split only, and stays there when rows are added or reordered. No unit removes,
moves or rejects a record of another, and no record stops the others: what is wrong with one is said of that one.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from client.config import LabelColumns, Split
from client.data.drawn import clip_boxes
from client.data.sources import SourceRecord
from client.data.sources.parts.boundary import try_record
from common.backbones import SPEECH
from common.errors import instead
from common.inputs import encode_text, find_name, is_boxes, is_mask, normalise_patient_id, read_mask_names, rename_parts
from common.tasks import NamedCells, NamedParts, PlacesLabels, Task
from common.types import BadInput, BadRecord, Unit

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = get_args(Side)
_ROW_NUMBER = re.compile("[0-9]{1,18}")


@dataclass(frozen=True)
class RejectedRecord:
    """A record that cannot be used, or not as its file says: where it stands and why, never what it holds.

    Attributes:
        file: file that lists or holds the record; names of sources where a whole source is rejected.
        row: 1-based row in the file; None where a whole source is rejected.
        reason: why it cannot be used, for the site's staff.
        task: the only task that cannot use the record; "" where none can.
        is_used: whether the record is used all the same.
    """

    file: str
    row: int | None
    reason: str
    task: str = ""
    is_used: bool = False


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
) -> tuple[dict[int, str | None], list[RejectedRecord]]:
    """Returns the stated side of each record of a source that the site uses, by position, and rows that name none.

    A side that is not stated is "" or None.

    Args:
        rows: the CSV that restricts the site to some records of the source, or None for all.
        index: all records of the source.
        excluded: positions of excluded records, which are named nowhere.

    Raises:
        BadInput: `rows` cannot be read or lacks a column.
    """
    listed, rejected = (dict.fromkeys(range(len(index)), ""), []) if rows is None else _read_row_list(rows, len(index))
    sides = {position: side or index[position].split for position, side in listed.items() if position not in excluded}
    return sides, rejected


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
    """
    usable, rejected = [], []
    for position, side in sides.items():
        record = index[position]
        patient = _get_patient_key(record)
        reason = unusable.get(position) or record.fault or None
        if reason is None and unit is Unit.PATIENT and record.patient is None:
            reason = "the unit is patient, and the source has no patients; name its column"
        elif reason is None and unit is Unit.PATIENT and patient is None:
            reason = record.blank
        elif reason is None and side and side not in SIDES:
            reason = "expected train, test or nothing as its side of the split, got another word"
        if reason is not None:
            rejected.append(RejectedRecord(record.file, record.row, reason))
        else:
            # Each record is a unit of its own, also where two hold the same content.
            key = f"record {source} {position}" if unit is Unit.EXAMPLE or patient is None else patient
            usable.append(UsableRecord(source, position, key, _parse_side(side), record))
    return usable, rejected


def place_records(
    records: Sequence[UsableRecord], split: Split, unit: Unit
) -> tuple[list[PlacedRecord], list[RejectedRecord]]:
    """Returns every record on its side of the split, and those of them that are not on the side that they state.

    A source's own split goes before the hash. Where the unit is the patient, for all records of a patient and across
    sources; a patient on both sides is trained on with all records, so that nothing trained on is tested on. Where it
    is the example, for that record alone: a record that moved a patient's others, which are units of their own, would
    change the training sum by more than one unit may. Without a stated side, records of a patient share their hash and
    stay together in either case.

    A record that is held out stays so where an equal one is trained on (see `count_copies`): they may be two units.

    Args:
        records: usable records of all sources.
        split: the site's test fraction and salt, for records without a stated side.
        unit: unit that the privacy budget protects.
    """
    stated = _find_stated_patients(records) if unit is Unit.PATIENT else {}
    both = {patient for patient, sides in stated.items() if len(sides) > 1}
    # The train side has the lowest index.
    decided = {patient: min(sides) for patient, sides in stated.items()}
    placed = [
        PlacedRecord(each.source, each.position, each.unit_key, _choose_side(each, decided, split), each.record)
        for each in records
    ]
    reason = "its patient is on both sides of the split; all records of the patient are trained on"
    listed = [
        RejectedRecord(each.record.file, each.record.row, reason, is_used=True)
        for each in records
        if _get_patient_key(each.record) in both
    ]
    return placed, listed


def count_copies(placed: Sequence[PlacedRecord]) -> int:
    """Returns how many records are held out while the same record is also trained on, for the site's staff alone."""
    train = {_get_identity(each) for each in placed if each.side == SIDES.index("train")}
    return sum(
        each.side == SIDES.index("test") and each.record.identified and _get_identity(each) in train for each in placed
    )


def encode_labels(name: str, task: Task, own: LabelColumns, records: Iterable[PlacedRecord]) -> TaskLabels:
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

    check_columns(name, task, own)
    columns, encode = own.columns, _make_encoder(task, own)
    labels, mask, rejected = [task.codec.missing()], [], []
    for record in (each.record for each in records):
        absent = [column for column in columns if column not in record.cells]
        if absent:
            raise BadInput(f"tasks.{name}.label: {record.file} has no column {absent[0]!r}")
        # A mask is read now, and may be a bad one.
        cells, reason = try_record(lambda record=record: [record.cells[column].strip() for column in columns])  # type: ignore[misc]
        label = None
        if cells is not None:
            cells, note = _leave_out_boxes(cells)
            if note is not None:
                rejected.append(RejectedRecord(record.file, record.row, note, name, is_used=True))
            label, reason = encode(cells)
        if reason is not None:
            rejected.append(RejectedRecord(record.file, record.row, reason, name))
        labels.append(task.codec.missing() if label is None else label)
        mask.append(label is not None)
    # The first only gives the shape, also where there is no record.
    return TaskLabels(torch.stack(labels)[1:], torch.tensor(mask, dtype=torch.bool), tuple(rejected))


def explain_label(task: Task, own: LabelColumns, cell: str) -> str | None:
    """Returns why a mask or boxes cannot be a label; None where they can.

    Args:
        task: the task.
        own: the site's columns and mapping of values for the task.
        cell: the mask or the boxes.
    """
    reason = None
    cells, reason = try_record(lambda: _leave_out_boxes([cell])[0])
    return reason if cells is None else _make_encoder(task, own)(cells)[1]


def place_labels(
    name: str, task: PlacesLabels, labels: TaskLabels, records: Sequence[PlacedRecord], marks_RP: Tensor
) -> TaskLabels:
    """Returns a task's labels with what its loss needs to know of each record's places.

    Args:
        name: name of the task, for messages.
        task: the task.
        labels: its labels as encoded.
        records: the records, in the labels' order.
        marks_RP: marks of their places.
    """
    import torch

    mask_R, rejected = labels.mask_R.clone(), list(labels.rejected)
    missing = task.codec.missing()
    placed: list[Tensor | None] = []
    for row, (label, marks_P) in enumerate(zip(labels.labels, marks_RP, strict=True)):
        found, reason = None, None
        if mask_R[row]:
            found, reason = try_record(lambda label=label, marks_P=marks_P: task.place_label(label, marks_P))  # type: ignore[misc]
        if reason is not None:
            rejected.append(RejectedRecord(records[row].record.file, records[row].record.row, reason, name))
            mask_R[row] = False
        placed.append(found)
    # What a label is followed by, if by anything, is of one length, which a site without a label has too.
    width = len(task.place_label(missing, torch.full_like(marks_RP[0], SPEECH))) if len(marks_RP) else len(missing)
    blank = torch.cat([missing, missing.new_zeros(width - len(missing))])
    stacked = torch.stack([blank, *(blank if each is None else each for each in placed)])
    return TaskLabels(stacked[1:].to(labels.labels.dtype), mask_R, tuple(rejected))


def _read_row_list(rows: Path, count: int) -> tuple[dict[int, str], list[RejectedRecord]]:
    """Returns the side of each listed row by its position, "" where the list states none, and lines that name none."""
    chosen: dict[int, str] = {}
    rejected = []
    try:
        with rows.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            if not {"row", "split"} <= set(reader.fieldnames or ()):
                raise BadInput(f"{rows}: expected columns row,split in its first line")
            for number, line in enumerate(reader, start=1):
                written = (line["row"] or "").strip()
                position = int(written) - 1 if _ROW_NUMBER.fullmatch(written) else -1
                if 0 <= position < count and position not in chosen:
                    chosen[position] = (line["split"] or "").strip()
                else:
                    rejected.append(RejectedRecord(rows.name, number, "expected a row of the source, each once"))
    except (OSError, csv.Error) as error:
        raise BadInput(f"{rows}: expected rows of a number and a side{instead(error)}") from None
    return chosen, rejected


def _get_patient_key(record: SourceRecord) -> str | None:
    patient = normalise_patient_id(record.patient or "")
    return f"patient {patient}" if patient else None


def _parse_side(stated: str | None) -> int | None:
    return next((at for at, side in enumerate(SIDES) if side == stated), None)


def _find_stated_patients(records: Iterable[UsableRecord]) -> dict[str, set[int]]:
    """Returns the sides that sources state for a patient, by patient key."""
    stated: dict[str, set[int]] = {}
    for each in records:
        patient = _get_patient_key(each.record)
        if patient is not None and each.side is not None:
            stated.setdefault(patient, set()).add(each.side)
    return stated


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


def _make_encoder(task: Task, own: LabelColumns) -> Callable[[list[str]], tuple[Tensor | None, str | None]]:
    """Returns what turns cells into the label, or None with a reason to report the record, or None without one."""
    # Once: looking for a protocol's members takes longer than encoding a label.
    is_complete = all if isinstance(task, NamedCells) else any
    selects = isinstance(task, NamedParts) and own.unmapped == "skip"
    columns = own.columns

    def read(cells: list[str]) -> Tensor:
        found = [own.read_cell(column, cell) for column, cell in zip(columns, cells, strict=True)]
        if selects and isinstance(task, NamedParts):
            found = [_select_parts(cell, task.part_names) for cell in found]
        return task.codec.encode(found)

    def encode(cells: list[str]) -> tuple[Tensor | None, str | None]:
        if own.missing != "read" and not is_complete(cells):
            return None, "missing label" if own.missing == "refuse" else None
        label, reason = try_record(lambda: read(cells))
        return label, reason if own.unmapped == "refuse" else None

    return encode


def _leave_out_boxes(cells: list[str]) -> tuple[list[str], str | None]:
    """Returns cells without boxes that have no area on their picture, and a sentence where there were any."""
    if not any(map(is_boxes, cells)):
        return cells, None
    clipped, _ = try_record(lambda: [clip_boxes(cell) if is_boxes(cell) else (cell, 0, 0) for cell in cells])
    if clipped is None:
        return cells, None  # The codec says what is wrong with them.
    left_out, count = sum(each[1] for each in clipped), sum(each[2] for each in clipped)
    note = f"{left_out} of its {count} boxes have no area on the picture and are left out" if left_out else None
    return [cell for cell, *_ in clipped], note


def _select_parts(cell: str, names: Sequence[str]) -> str:
    """Returns boxes of other names left out, and places of other names without a label."""
    if not is_boxes(cell) and (not is_mask(cell) or read_mask_names(cell) is None):
        return cell
    return rename_parts(cell, lambda name: name if find_name(name, names) is not None else None)


def check_values(name: str, task: Task, own: LabelColumns) -> None:
    """Checks that local values are mapped to values of the task: a typo would leave out every record that has one.

    Args:
        name: name of the task, for messages.
        task: the task whose codec knows its values.
        own: the site's columns and mapping of values for the task.

    Raises:
        BadInput: a local value is mapped to something that is no value of the task.
    """
    check_columns(name, task, own)
    # A value of one of several columns means nothing by itself.
    for local, value in (own.list_values(own.label) or {}).items() if isinstance(own.label, str) else ():
        if isinstance(task, NamedParts):
            if find_name(value, task.part_names) is None:
                raise BadInput(
                    f"tasks.{name}.values.{local}: expected one of {', '.join(task.part_names)}, got {value!r}"
                )
            continue
        try:
            task.codec.encode([value])
        except BadRecord as error:
            raise BadInput(f"tasks.{name}.values.{local}: {error}, got {value!r}") from error


def check_columns(name: str, task: Task, own: LabelColumns) -> None:
    """Checks that a task whose label is several cells of different meanings has a column for each.

    Args:
        name: name of the task, for messages.
        task: the task.
        own: the site's columns and mapping of values for the task.

    Raises:
        BadInput: another number of columns, or values that are not under a column's name: those of an event would
            replace times that are written alike.
    """
    if not isinstance(task, NamedCells):
        return
    if len(own.columns) != len(task.cell_names):
        raise BadInput(
            f"tasks.{name}.label: expected {len(task.cell_names)} columns, for {' and '.join(task.cell_names)}, got "
            f"{len(own.columns)}"
        )
    if any(isinstance(value, str) for value in (own.values or {}).values()):
        raise BadInput(
            f"tasks.{name}.values: expected them under a column's name, such as `{{{own.columns[-1]}: {{...}}}}`, "
            f"because its columns mean different things ({', '.join(task.cell_names)})"
        )
