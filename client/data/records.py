"""Which of a site's records are used, which unit each belongs to, on which side of the split it stands, its labels.

Invariant: a unit is on one side of the split only, and stays there when rows are added or reordered.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from client.config import LabelColumns, SiteTask, Split
from client.data.sources import Record
from common.errors import instead
from common.inputs import find_name
from common.tasks import Task
from common.types import BadInput, BadRecord, Unit

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Problem:
    """A record, or without a row a whole source, that cannot be used: where and why, never what it holds."""

    file: str
    row: int | None
    reason: str
    task: str = ""


@dataclass(frozen=True)
class Member:
    """A usable record.

    Attributes:
        source: name of its source in the site's file.
        position: in that source's index.
        unit_key: the same for all records of a unit.
        side: index in SIDES; None where the source or its row list does not say and it is not placed yet.
        record: its index entry.
    """

    source: str
    position: int
    unit_key: str = field(repr=False)
    side: int | None
    record: Record


def usable(
    source: str,
    index: list[Record],
    unusable: Mapping[int, str],
    rows: Path | None,
    unit: Unit,
    left_out: Container[int] = (),
) -> tuple[list[Member], list[Problem]]:
    """Records of one source that have features and a unit, not yet placed on a side.

    Args:
        source: its name in the site's file.
        index: all its records.
        unusable: reason why a record has no features, by its position in the index.
        rows: the CSV that restricts the site to some of them, if there is one.
        unit: what one budget protects.
        left_out: positions of excluded records, which are named nowhere.

    Raises:
        BadInput: the unit is the patient and the source knows none; `rows` cannot be read; a side is unknown.
    """
    members, problems = [], []
    for position, stated in _chosen(rows, len(index)).items():
        if position in left_out:
            continue
        record = index[position]
        if unit is Unit.PATIENT and record.patient is None:
            raise BadInput(f"sources.{source}: the unit is patient, and the source has no patients; name its column")
        patient = _patient_key(record)
        if position in unusable:
            problems.append(Problem(record.file, record.row, unusable[position]))
        elif unit is Unit.PATIENT and patient is None:
            problems.append(Problem(record.file, record.row, record.blank))
        else:
            # Each record is a unit of its own, also where two hold the same content.
            key = f"record {source} {position}" if unit is Unit.EXAMPLE or patient is None else patient
            members.append(Member(source, position, key, _stated_side(stated or record.split, record), record))
    return members, problems


def place(members: Iterable[Member], split: Split, unit: Unit) -> tuple[list[Member], list[Problem]]:
    """Every member on its side, those left out that stand on both.

    A source's own split goes before the hash. Where the unit is the patient, for all records of a patient and across
    sources. Where it is the example, for that record alone: a record that moved a patient's others, which are units
    of their own, would change the training sum by more than one unit may. Without a stated side, records of a patient
    share their hash and stay together in either case.

    Raises:
        BadInput: the sources' own splits put a patient on both sides.
    """
    members = list(members)
    stated = _stated_patients(members)
    decided = stated if unit is Unit.PATIENT else {}
    placed = [replace(member, side=_side(member, decided, split)) for member in members]
    train = {_identity(member) for member in placed if member.side == SIDES.index("train")}
    kept, problems = [], []
    for member in placed:
        if member.side == SIDES.index("test") and member.record.identified and _identity(member) in train:
            problems.append(Problem(member.record.file, member.record.row, "the same record is on the train side"))
        else:
            kept.append(member)
    return kept, problems


def labels_of(name: str, task: Task, own: SiteTask, members: Iterable[Member]) -> tuple[Tensor, Tensor, list[Problem]]:
    """Labels and mask of the records of a task's source; a placeholder where a label is missing or not usable.

    Raises:
        BadInput: the source has no such column.
    """
    import torch

    columns = [own.column] if isinstance(own.column, str) else own.column
    labels, mask, problems = [task.codec.missing()], [], []
    for record in (member.record for member in members):
        absent = [column for column in columns if column not in record.cells]
        if absent:
            raise BadInput(f"tasks.{name}.column: {record.file} has no column {absent[0]!r}")
        label, reason = _label(task, own, [record.cells[column].strip() for column in columns])
        if reason is not None:
            problems.append(Problem(record.file, record.row, reason, name))
        labels.append(task.codec.missing() if label is None else label)
        mask.append(label is not None)
    # The first only gives the shape, also where there is no record.
    return torch.stack(labels)[1:], torch.tensor(mask, dtype=torch.bool), problems


# --- which records ---------------------------------------------------------------------------------------------------


def _chosen(rows: Path | None, count: int) -> dict[int, str]:
    """Position -> side, "" where the row list gives none."""
    if rows is None:
        return dict.fromkeys(range(count), "")
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


def _patient_key(record: Record) -> str | None:
    patient = (record.patient or "").strip()
    return f"patient {patient}" if patient else None


# --- which side ------------------------------------------------------------------------------------------------------


def _stated_side(stated: str | None, record: Record) -> int | None:
    if not stated:
        return None
    if stated not in SIDES:
        raise BadInput(f"{record.file} row {record.row}: expected a split train or test, got another word")
    return SIDES.index(stated)


def _stated_patients(members: Iterable[Member]) -> dict[str, int]:
    """Patient -> the side that sources state."""
    first: dict[str, Member] = {}
    for member in members:
        patient = _patient_key(member.record)
        if patient is None or member.side is None:
            continue
        other = first.setdefault(patient, member)
        if other.side != member.side:
            where = " and ".join(f"{record.file} row {record.row}" for record in (other.record, member.record))
            raise BadInput(f"one patient is on both sides of the split: {where}")
    return {patient: member.side for patient, member in first.items() if member.side is not None}


def _side(member: Member, stated: Mapping[str, int], split: Split) -> int:
    patient = _patient_key(member.record)
    if patient is not None and patient in stated:
        return stated[patient]
    if member.side is not None:
        return member.side
    key = patient or f"record {member.source} {member.record.key}"
    hashed = hashlib.sha256(f"{split.salt}\0{key}".encode()).digest()
    return int(int.from_bytes(hashed[:8], "big") / 2**64 < split.test_fraction)


def _identity(member: Member) -> tuple[str, str]:
    return member.source, member.record.key


# --- labels ----------------------------------------------------------------------------------------------------------


def _label(task: Task, own: SiteTask, cells: list[str]) -> tuple[Tensor | None, str | None]:
    """The label, or None with a reason that makes it a problem, or None without one."""
    if not any(cells):
        return None, "missing label" if own.missing == "refuse" else None
    try:
        return task.codec.encode([_mapped(own, cell) for cell in cells]), None
    except BadRecord as error:
        return None, str(error) if own.unmapped == "refuse" else None


def check_values(name: str, task: Task, own: LabelColumns) -> None:
    """Whether local values are mapped to values of the task; a typo there would leave out every record that has one.

    Raises:
        BadInput: one is not.
    """
    # A value of one of several columns means nothing by itself.
    for local, value in (own.values or {}).items() if isinstance(own.column, str) else ():
        try:
            task.codec.encode([value])
        except BadRecord as error:
            raise BadInput(f"tasks.{name}.values.{local}: {error}, got {value!r}") from error


def _mapped(own: SiteTask, cell: str) -> str:
    """The task's value of a local one; a value that is not listed may be the task's own."""
    known = list(own.values or {})
    found = find_name(cell, known)
    return cell if own.values is None or found is None else own.values[known[found]]
