"""Checks of a site's own data before a run: for its staff's eyes, on its own screen.

Found without any backbone, so records are looked at, not encoded. Values of label columns are shown here and nowhere
else: they are the staff's own words, which only they can map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np

from client.config import LabelColumns, SiteConfig, SiteTask
from client.data.drawn import DrawnCounts, count_drawn, find_unknown, is_drawn
from client.data.exclusions import Exclusions
from client.data.records import (
    SIDES,
    PlacedRecord,
    RejectedRecord,
    UsableRecord,
    count_copies,
    encode_labels,
    explain_label,
    find_usable,
    place_records,
    select_rows,
)
from client.data.sources import PassesOver, Source, SourceRecord, open_source
from client.data.sources.parts.boundary import try_record
from client.ledger.overlap import record_patients
from client.ledger.place import locate_ledgers
from common.errors import instead
from common.inputs import Several, find_name, normalise_patient_id
from common.run import RunConfig
from common.tasks import NamedParts, Task, open_task
from common.types import BadInput, Unit

Found = tuple[str, Literal["pass", "warn", "fail"], str, str]
MAX_LOADED = 200
"""Records that are opened, evenly spaced over a source."""
_MAX_SHOWN = 12


def data_checks(config: SiteConfig, offers: Mapping[str, RunConfig]) -> Iterator[Found]:
    """Sources, records, patients, sides, labels and sizes: (what, outcome, detail, remedy)."""
    members: list[UsableRecord] = []
    columns: dict[str, list[Mapping[str, str]]] = {}
    for name in config.sources:
        try:
            opened, found, rejected = _open(config, name)
            yield _loaded(name, opened, config, rejected)
        except BadInput as error:
            yield f"source {name}", "fail", str(error), "correct the path, its permissions or the columns named there"
            continue
        members += found
        columns[name] = [member.record.cells for member in found]
    placed, problems = place_records(members, config.split, config.unit)
    if columns:  # Else the sources' own lines say why there is nobody.
        yield _sides(config, placed, problems)
    if config.unit is Unit.PATIENT and len(columns) > 1:
        yield _compare_patients(members, list(columns))
    if len(columns) == len(config.sources):  # Else some patients are not known.
        yield from find_overlaps(config, (member.record for member in members))
    tasks = {name: spec for run in offers.values() for name, spec in run.tasks.items()}
    for name, own in config.tasks.items():
        if own.source not in columns:
            continue
        mine = [member for member in placed if member.source == own.source]
        try:
            yield from _labels(name, own, open_task(tasks[name], f"tasks.{name}") if name in tasks else None, mine)
            yield _size(name, own, mine)
        except BadInput as error:
            yield f"task {name}", "fail", str(error), "correct the column"
    for name in sorted(set(tasks) - set(config.tasks)):
        yield f"task {name}", "warn", "it is offered, and this site does not take part in it", "add it under `tasks`"


def _open(config: SiteConfig, name: str) -> tuple[Source, list[UsableRecord], list[RejectedRecord]]:
    kind = open_source(config.sources[name], f"sources.{name}", config.plugins)
    exclusions = Exclusions.read(config.state_dir)
    opened = exclusions.applied(kind.open())
    index = opened.index()
    # No backbone is needed to tell who is there: a record is unusable if it cannot be loaded, which `_loaded` samples.
    sides, unlisted = select_rows(kind.rows, index, exclusions.positions(index))
    members, rejected = find_usable(name, index, sides, {}, config.unit)
    problems = unlisted + rejected
    if problems and not members:
        raise BadInput(f"sources.{name}: no usable record; the first: row {problems[0].row}: {problems[0].reason}")
    return opened, members, problems


def _loaded(name: str, opened: Source, config: SiteConfig, rejected: Sequence[RejectedRecord]) -> Found:
    count = len(opened.index())
    if count == 0:
        return f"source {name}", "fail", "it opens, and holds no record", "check the path and the filter"
    left_out = Exclusions.read(config.state_dir).positions(opened.index())
    wanted = sorted({round(at) for at in np.linspace(0, count - 1, MAX_LOADED)} - left_out)
    bad: list[tuple[int | None, str]] = [(record.row, record.reason) for record in rejected]
    several, passed_over = 0, opened.passed_over if isinstance(opened, PassesOver) else 0
    for position in wanted:
        item, reason = try_record(lambda position=position: opened.load(position))  # type: ignore[misc]
        if reason is not None:
            bad.append((opened.index()[position].row, reason))
        if isinstance(item, Several):
            several, passed_over = several + 1, passed_over + item.passed_over
    detail = f"{count} records, {len(wanted)} of them opened"
    detail += f"; {several} of several pages, frames or slices, whose features are averaged" if several else ""
    detail += f"; {passed_over} file(s) beside them passed over" if passed_over else ""
    if not bad:
        return f"source {name}", "pass", detail, ""
    outcome: Literal["warn", "fail"] = "warn" if config.on_bad_record == "skip" else "fail"
    rows = ", ".join(f"row {row}: {reason}" for row, reason in bad[:3])
    return f"source {name}", outcome, f"{detail}, {len(bad)} unusable ({rows})", "mend them, or let them be left out"


def _sides(config: SiteConfig, placed: Sequence[PlacedRecord], problems: Sequence[RejectedRecord]) -> Found:
    units = {side: len({member.unit_key for member in placed if member.side == at}) for at, side in enumerate(SIDES)}
    noun = "patients" if config.unit is Unit.PATIENT else "records"
    detail = f"{units['train']} {noun} to train on, {units['test']} held out"
    if units["train"] == 0:
        return "sides", "fail", detail, "lower split.test_fraction, or check the split column"
    if problems:
        return (
            "sides",
            "warn" if config.on_bad_record == "skip" else "fail",
            f"{detail}; {len(problems)} records are of patients on both sides (the first: {problems[0].file} row "
            f"{problems[0].row}), who are trained on with all records",
            "put all records of a patient on one side",
        )
    copies = count_copies(placed)
    if copies:
        return (
            "sides",
            "warn",
            f"{detail}; {copies} of them are trained on too, as copies: the evaluation flatters",
            "remove the copies",
        )
    unknown = sum(member.record.patient is None for member in placed)
    if unknown and config.unit is Unit.EXAMPLE:
        return "sides", "warn", f"{detail}; without patient ids one person may stand on both sides", "name the column"
    return "sides", "pass", detail, ""


def _compare_patients(members: Sequence[UsableRecord], sources: Sequence[str]) -> Found:
    """Returns how many patients each two sources have in common: ids that are written differently share none."""
    patients = {name: {member.unit_key for member in members if member.source == name} for name in sources}
    shared = {pair: len(patients[pair[0]] & patients[pair[1]]) for pair in combinations(sources, 2)}
    detail = "in common: " + ", ".join(f"{count} in {one} and {other}" for (one, other), count in shared.items())
    if all(shared.values()):
        return "patients", "pass", detail, ""
    return (
        "patients",
        "warn",
        f"{detail}; sources that write one patient's id in different ways make several patients of one",
        "compare the ids of the sources that have none in common, leading zeros too; where they are different people, "
        "nothing is wrong",
    )


def find_overlaps(config: SiteConfig, records: Iterable[SourceRecord]) -> Iterator[Found]:
    """Yields the other populations of this machine that have patients of this one; keeps fingerprints of this one's."""
    known = {normalise_patient_id(record.patient or "") for record in records} - {""}
    try:
        folder = locate_ledgers(config)
        shared = record_patients(folder, config.registry, config.state_dir, known)
    except BadInput:
        return  # Said of the ledger.
    except OSError as error:
        detail = f"the folder of ledgers cannot be written{instead(error)}"
        yield "overlap", "fail", detail, "name one in ledger_dir that this user may write"
        return
    for other, count in shared.items():
        yield (
            "overlap",
            "warn",
            f"{count} patient(s) of this site are in registry {other} too: each budget holds for itself only, and what "
            "both spend on them adds up",
            "before any run name one registry for both; later, count both budgets together; nothing where the two give "
            "one number to different people",
        )
    if not known:
        yield "overlap", "pass", "records without patient ids are not compared with other registries", ""
    elif not shared:
        yield "overlap", "pass", "no other registry in the folder of ledgers has a patient of this site", ""


def _labels(name: str, own: SiteTask, task: Task | None, members: Sequence[PlacedRecord]) -> Iterator[Found]:
    for column in own.columns:
        if members and column not in members[0].record.cells:
            raise BadInput(f"tasks.{name}.label: there is no column {column!r}")
        values, reasons = Counter[str](), list[tuple[int, str]]()
        counts = count_drawn(_read_drawn((member.record for member in members), column, values, reasons))
        missing = values.pop("", 0)
        if counts.number or reasons or counts.damaged:
            yield from _drawn(name, own, task, column, counts, missing)
            yield from _list_reasons(name, column, [*reasons, *counts.damaged])
            continue
        unmapped = {value: count for value, count in values.items() if not _mapped(own, column, value)}
        shown = ", ".join(f"{value} {count}" for value, count in values.most_common(_MAX_SHOWN))
        more = f" and {len(values) - _MAX_SHOWN} more values" if len(values) > _MAX_SHOWN else ""
        detail = f"{column}: {shown}{more}; {missing} empty"
        if missing and not values:
            yield (
                f"labels {name}",
                "warn",
                f"{column}: {missing} empty, no record has a label",
                "check the column, or the paths of masks",
            )
        elif unmapped:
            lost = ", ".join(f"{value} {count}" for value, count in list(unmapped.items())[:_MAX_SHOWN])
            yield f"labels {name}", "warn", f"{detail}; not in `values`: {lost}", f"map them in tasks.{name}.values"
        else:
            yield f"labels {name}", "pass", detail, ""
    if task is None:
        return
    encoded = encode_labels(name, task, own, members)
    mask, problems = encoded.mask_R, [each for each in encoded.rejected if not each.is_used]
    detail = f"{int(mask.sum())} of {len(members)} records have a label of the offered task"
    if problems:
        rows = ", ".join(f"row {problem.row}: {problem.reason}" for problem in problems[:3])
        yield (
            f"task {name}",
            "warn",
            f"{detail}; {len(problems)} do not fit ({rows})",
            f"map them in tasks.{name}.values",
        )
    elif not bool(mask.any()):
        yield f"task {name}", "fail", detail, f"check tasks.{name}.label and values"
    else:
        yield f"task {name}", "pass", detail, ""


def check_drawn(name: str, own: LabelColumns, task: Task, records: Sequence[SourceRecord]) -> Iterator[Found]:
    """Yields what there is to say of masks or boxes, without anything of a run.

    Args:
        name: name of the task.
        own: columns and mapping of values.
        task: the task, whose label is a mask or boxes.
        records: records whose labels are read.
    """
    for column in own.columns:
        if records and column not in records[0].cells:
            raise BadInput(f"tasks.{name}.label: there is no column {column!r}")
        values, reasons, unfit = Counter[str](), list[tuple[int, str]](), list[tuple[int, str]]()
        counts = count_drawn(_explain_each(_read_drawn(records, column, values, reasons), own, task, unfit))
        missing = values.pop("", 0)
        yield from _drawn(name, own, task, column, counts, missing)
        yield from _list_reasons(name, column, sorted([*reasons, *unfit]))
        if missing:
            yield (
                f"labels {name}",
                "warn",
                f"{column}: {missing} of {len(records)} records are without a label",
                "add their files, or leave it so: they are not trained on",
            )
        if values:
            yield (
                f"labels {name}",
                "warn",
                f"{column}: {values.total()} records have neither a mask nor boxes there",
                "check the column",
            )


def _explain_each(
    cells: Iterable[tuple[int, str]], own: LabelColumns, task: Task, unfit: list[tuple[int, str]]
) -> Iterator[tuple[int, str]]:
    """Yields the same cells; adds row and reason of each that cannot be the task's label to a list."""
    for row, cell in cells:
        reason = explain_label(task, own, cell)
        if reason is not None:
            unfit.append((row, reason))
        yield row, cell


def _read_drawn(
    records: Iterable[SourceRecord], column: str, values: Counter[str], reasons: list[tuple[int, str]]
) -> Iterator[tuple[int, str]]:
    """Yields row and cell of each mask and of all boxes, one at a time: together they may not fit into memory.

    Args:
        records: the records.
        column: name of the column.
        values: counts of other cells, which are added.
        reasons: row of each cell that cannot be read, and why, which are added.
    """
    for record in records:
        cell, reason = try_record(lambda record=record: record.cells[column].strip())  # type: ignore[misc]
        if cell is None:
            reasons.append((record.row, f"{reason}"))
        elif is_drawn(cell):
            yield record.row, cell
        else:
            values[cell] += 1


def _drawn(
    name: str, own: LabelColumns, task: Task | None, column: str, counts: DrawnCounts, missing: int
) -> Iterator[Found]:
    known = task.part_names if isinstance(task, NamedParts) else None
    detail = counts.describe(column, missing)
    unknown = find_unknown(counts.parts, own, column, known)
    if unknown:
        lost = ", ".join(f"{part} {counts.parts[part]}" for part in unknown[:_MAX_SHOWN])
        where = "`values`" if known is None else "`values` and the offered task"
        if own.unmapped == "skip":
            yield f"labels {name}", "pass", f"{detail}; not in {where}, and left out: {lost}", ""
        else:
            yield f"labels {name}", "warn", f"{detail}; not in {where}: {lost}", f"map them in tasks.{name}.values"
    else:
        yield f"labels {name}", "pass", detail, ""
    for warning, remedy in counts.list_warnings():
        yield f"labels {name}", "warn", f"{column}: {warning}", remedy


def _list_reasons(name: str, column: str, reasons: Sequence[tuple[int, str]]) -> Iterator[Found]:
    """Yields each reason for which labels cannot be read, with its count and first rows."""
    for reason, count in Counter(reason for _, reason in reasons).most_common(_MAX_SHOWN):
        rows = ", ".join(f"row {row}" for row, other in reasons if other == reason)
        shown = rows if count <= 3 else ", ".join([*rows.split(", ")[:3], "..."])
        yield f"labels {name}", "warn", f"{column}: {count} unusable: {reason} ({shown})", "mend these files"


def _mapped(own: SiteTask, column: str, value: str) -> bool:
    values = own.list_values(column)
    return values is None or find_name(value, list(values)) is not None or value in values.values()


def _size(name: str, own: SiteTask, members: Sequence[PlacedRecord]) -> Found:
    true = len({member.unit_key for member in members if member.side == SIDES.index("train")})
    detail = f"declared {own.public_size}, counted {true} to train on (the count stays here)"
    # Twice too large or small costs accuracy; it never costs privacy.
    if true and not 0.5 <= own.public_size / true <= 2.0:
        return f"size {name}", "warn", detail, f"declare a round number nearer to it in tasks.{name}.public_size"
    return f"size {name}", "pass", detail, ""
