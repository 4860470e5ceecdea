"""From a site's sources to units: labels mapped, held-out units chosen, arrays written once and opened each round.

Invariant: a unit is on one side of the split only, and stays there when rows are added or reordered; what cannot be
used is named by file and row in the site's own `problems.csv`, counted, and skipped or fatal as its file says.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from client.features import Features, FeatureStore, Problem, Progress
from client.sources import Record, open_source
from client.units import TaskRecords, Units
from common.cells import position as cell_position
from common.config import SiteConfig, SiteTask
from common.files import private_folder, write_atomic
from common.tasks import Task
from common.types import BadInput, BadRecord, Unit

if TYPE_CHECKING:
    from common.backbones import Backbone

Side = Literal["train", "test"]
SIDES: tuple[Side, Side] = ("train", "test")


@dataclass(frozen=True)
class Preparation:
    """What preparing a run found, for local eyes only.

    Attributes:
        problems: records that are not used.
        num_units: units on each side.
    """

    problems: tuple[Problem, ...] = field(repr=False)
    num_units: Mapping[str, int] = field(repr=False)


@dataclass(frozen=True)
class _Member:
    """A usable record: its position in the source, its unit, and a side where the source or row list gives one."""

    position: int
    unit_key: str
    side: str | None
    record: Record = field(repr=False)


def prepare(
    config: SiteConfig,
    tasks: Mapping[str, Task],
    backbones: Mapping[str, Backbone],
    store: FeatureStore,
    folder: Path,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> Preparation:
    """Encode what is not encoded yet and write the arrays that `open_units` reads.

    Args:
        config: the site's file.
        tasks: the run's tasks at this site.
        backbones: task -> frozen backbone; tasks on one source share one.
        store: cached features.
        folder: receives the arrays and `problems.csv`; replaced whole.
        device: where to encode.
        progress: told (done, total) in records, source by source.

    Raises:
        BadInput: a source cannot be opened; a bad record where `on_bad_record` is `stop`; a unit or record on both
            sides of the split.
    """
    problems: list[Problem] = []
    members: dict[str, list[_Member]] = {}
    features: dict[str, Features] = {}
    for name in sorted({config.tasks[task].source for task in tasks}):
        kind = open_source(config.sources[name], f"sources.{name}")
        source = kind.open()
        backbone = next(backbones[task] for task in tasks if config.tasks[task].source == name)
        features[name] = store.open_or_encode(source, backbone, device=device, progress=progress)
        found, bad = _usable(config, name, source.index(), features[name], kind.rows)
        members[name] = found
        problems += bad
    sides = _sides(config, members)
    arrays: dict[str, Tensor] = {}
    for task_name, task in tasks.items():
        own = config.tasks[task_name]
        labels, mask, bad = _labels(task_name, task, own, members[own.source])
        problems += bad
        arrays |= {f"{task_name}/labels": labels, f"{task_name}/mask": mask}
    _report(config, problems)
    sources = {task: config.tasks[task].source for task in tasks}
    num_units = _write(folder, members, sides, arrays, sources, features, problems)
    return Preparation(tuple(problems), num_units)


def open_units(folder: Path, side: Side, tasks: Sequence[str], device: torch.device) -> Units:
    """One side's units of a prepared run; tasks on one source share their features.

    Args:
        folder: what `prepare` wrote.
        side: "train" or "test".
        tasks: which tasks.
        device: where the tensors are to be.
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    arrays = load_file(folder / "arrays.safetensors")
    shared: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    records = {}
    for task in tasks:
        source = about["sources"][task]
        chosen = arrays[f"{source}/side"] == SIDES.index(side)
        if source not in shared:
            rows = arrays[f"{source}/position"][chosen].numpy()
            features_ND = np.load(about["features"][source], mmap_mode="r", allow_pickle=False)
            features_RD = torch.from_numpy(np.array(features_ND[rows], dtype=np.float32)).to(device)
            unit_R = arrays[f"{source}/unit"][chosen].to(device)
            weight_R = TaskRecords.of(features_RD, unit_R, unit_R, unit_R, about["num_units"][side]).weight_R
            shared[source] = (features_RD, unit_R, weight_R)
        features_RD, unit_R, weight_R = shared[source]
        labels, mask_R = arrays[f"{task}/labels"][chosen].to(device), arrays[f"{task}/mask"][chosen].to(device)
        records[task] = TaskRecords(features_RD, labels, mask_R, unit_R, weight_R)
    return Units(about["num_units"][side], records)


# --- which records --------------------------------------------------------------------------------------------------


def _usable(
    config: SiteConfig, source: str, index: list[Record], features: Features, rows: Path | None
) -> tuple[list[_Member], list[Problem]]:
    """Records that have features and a unit."""
    chosen = _chosen(rows, len(index))
    unreadable = {(problem.file, problem.row): problem for problem in features.problems}
    members, problems = [], []
    for position, side in chosen.items():
        record = index[position]
        if not features.valid_N[position]:
            problems.append(unreadable[(record.file, record.row)])
            continue
        if config.unit is Unit.PATIENT and _patient_key(record) is None:
            problems.append(Problem(record.file, record.row, "blank patient id"))
            continue
        # Each record is a unit of its own, also where two hold the same content.
        key = _patient_key(record) if config.unit is Unit.PATIENT else f"record {source} {position}"
        members.append(_Member(position, key or "", side or record.split, record))
    return members, problems


def _patient_key(record: Record) -> str | None:
    patient = (record.patient or "").strip()
    return f"patient {patient}" if patient else None


def _chosen(rows: Path | None, count: int) -> dict[int, str]:
    """Position -> side ("" where the row list gives none)."""
    if rows is None:
        return dict.fromkeys(range(count), "")
    chosen = {}
    try:
        with rows.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                position = int(line["row"]) - 1
                if not 0 <= position < count:
                    raise BadInput(f"{rows}: expected rows from 1 to {count}, got {position + 1}")
                chosen[position] = line["split"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{rows}: expected columns row,split, got {type(error).__name__}") from error
    return chosen


# --- which side ------------------------------------------------------------------------------------------------------


def _sides(config: SiteConfig, members: Mapping[str, list[_Member]]) -> dict[str, int]:
    """Unit key -> index in SIDES.

    A patient's records stay together, also where the unit is the example.

    Raises:
        BadInput: a patient's records stand on both sides of a source's own split, or a side is unknown.
    """
    sides: dict[str, int] = {}
    first: dict[str, tuple[int, Record]] = {}
    for source, found in members.items():
        for member in found:
            record, patient = member.record, _patient_key(member.record)
            side = _side(config, member, patient or f"record {source} {record.key}")
            if patient is not None:
                other_side, other = first.setdefault(patient, (side, record))
                if other_side != side:
                    where = f"{other.file} row {other.row} and {record.file} row {record.row}"
                    raise BadInput(f"one patient is on both sides of the split: {where}")
            sides[member.unit_key] = side
    return sides


def _side(config: SiteConfig, member: _Member, key: str) -> int:
    if member.side is None:
        hashed = hashlib.sha256(f"{config.split.salt}\0{key}".encode()).digest()
        return int(int.from_bytes(hashed[:8], "big") / 2**64 < config.split.test_fraction)
    if member.side not in SIDES:
        raise BadInput(f"{member.record.file} row {member.record.row}: expected a split train or test")
    return SIDES.index(member.side)


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels(name: str, task: Task, own: SiteTask, members: list[_Member]) -> tuple[Tensor, Tensor, list[Problem]]:
    """Label and mask of every record of the task's source."""
    columns = [own.column] if isinstance(own.column, str) else own.column
    labels, mask, problems = [], [], []
    for member in members:
        record = member.record
        try:
            cells = [record.cells[column].strip() for column in columns]
        except KeyError:
            raise BadInput(f"tasks.{name}.column: {record.file} has no column {_absent(columns, record)!r}") from None
        label, reason = _label(task, own, cells)
        if reason is not None:
            problems.append(Problem(record.file, record.row, reason, name))
        labels.append(task.missing() if label is None else label)
        mask.append(label is not None)
    stacked = torch.stack(labels) if labels else task.missing().unsqueeze(0)[:0]
    return stacked, torch.tensor(mask, dtype=torch.bool), problems


def _absent(columns: list[str], record: Record) -> str:
    return next(column for column in columns if column not in record.cells)


def _label(task: Task, own: SiteTask, cells: list[str]) -> tuple[Tensor | None, str | None]:
    """The label, or None with a reason that makes it a problem, or None without one."""
    if not any(cells):
        return None, "missing label" if own.missing == "refuse" else None
    try:
        return task.encode([_mapped(own, cell) for cell in cells]), None
    except BadRecord as error:
        return None, str(error) if own.unmapped == "refuse" else None


def _mapped(own: SiteTask, cell: str) -> str:
    if own.values is None:
        return cell
    known = list(own.values)
    found = cell_position(cell, known)
    return own.values[known[found]] if found is not None else cell


# --- reporting and writing -------------------------------------------------------------------------------------------


def _report(config: SiteConfig, problems: list[Problem]) -> None:
    if problems and config.on_bad_record == "stop":
        first = problems[0]
        raise BadInput(
            f"{first.file} row {first.row}: {first.reason}; {len(problems)} such record(s); mend them or write "
            "`on_bad_record: skip`"
        )


def _write(
    folder: Path,
    members: Mapping[str, list[_Member]],
    sides: Mapping[str, int],
    arrays: dict[str, Tensor],
    sources: Mapping[str, str],
    features: Mapping[str, Features],
    problems: list[Problem],
) -> dict[str, int]:
    number: dict[str, int] = {}
    num_units: dict[str, int] = dict.fromkeys(SIDES, 0)
    for key, side in sides.items():
        number[key] = num_units[SIDES[side]]
        num_units[SIDES[side]] += 1
    for source, found in members.items():
        arrays[f"{source}/position"] = torch.tensor([member.position for member in found], dtype=torch.int64)
        arrays[f"{source}/unit"] = torch.tensor([number[member.unit_key] for member in found], dtype=torch.int64)
        arrays[f"{source}/side"] = torch.tensor([sides[member.unit_key] for member in found], dtype=torch.int64)
    about = {
        "num_units": num_units,
        "sources": dict(sources),
        "features": {source: str(found.path) for source, found in features.items()},
    }
    shutil.rmtree(folder, ignore_errors=True)
    private_folder(folder.parent)
    private_folder(folder)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "row", "task", "reason"])
    writer.writerows([problem.file, problem.row, problem.task, problem.reason] for problem in problems)
    write_atomic(folder / "problems.csv", text.getvalue().encode())
    write_atomic(folder / "arrays.safetensors", save(arrays))
    # Last: its presence marks complete arrays.
    write_atomic(folder / "about.json", json.dumps(about).encode())
    return num_units
