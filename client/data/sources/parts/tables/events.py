"""From the dated events of patients, such as measurements and diagnoses, to one row of cells for each patient.

An event counts before a patient's index date, or from it on, where its whole date does: a year alone is the time from
its first to its last day. What happened at an unknown time counts only where there is no index.
"""

from __future__ import annotations

import calendar
import datetime
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from client.data.sources import Source, SourceRecord
from client.data.sources.parts.base import digest
from common.inputs import CellText, encode_text, parse_number
from common.plugins import Frozen
from common.types import BadRecord

_OWN = ("sex", "age")
_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2})(?:[T ].*)?)?)?")


class Coded(Frozen):
    """Events of some codes.

    Attributes:
        code: the code, or several that mean the same here.
        system: system of the codes, such as `http://loinc.org`; null takes any.
    """

    code: CellText | Annotated[list[CellText], Field(min_length=1)]
    system: str | None = None

    def matches(self, event: PatientEvent) -> bool:
        """Returns whether an event has one of the codes."""
        codes = [self.code] if isinstance(self.code, str) else self.code
        return any(code in codes and self.system in (None, system) for system, code in event.codes)


class EventColumn(Coded):
    """A column made of a patient's events.

    Attributes:
        take: the value of the latest or first event, the mean, lowest or highest of the numbers, their `count`, or
            `any`: 1 where there is an event, else 0.
        when: `before` the index date, or from it on: `after`.
        days: only events within so many days of the index date.
        unit: unit of the values, as the events name it; null for values without one. A patient with values of another
            is a bad record.
    """

    take: Literal["latest", "first", "mean", "lowest", "highest", "count", "any"] = "latest"
    when: Literal["before", "after"] = "before"
    days: Annotated[int, Field(ge=1)] | None = None
    unit: CellText | None = None


Index = datetime.date | Coded
"""One date for all patients, or the first event of a code, without which a patient is no record."""


@dataclass(frozen=True)
class PatientEvent:
    """Something that happened to a patient.

    Attributes:
        patient: the patient's key in the files.
        codes: system and code, one or several of the same meaning.
        start: first day that it may have happened on; None where no date is known.
        end: last day that it may have happened on.
        value: its value as text, "" where it has none.
        unit: unit of the value, "" where it has none.
    """

    patient: str = field(repr=False)
    codes: Sequence[tuple[str, str]] = field(repr=False)
    start: datetime.date | None = field(repr=False)
    end: datetime.date | None = field(repr=False)
    value: str = field(default="", repr=False)
    unit: str = field(default="", repr=False)


@dataclass(frozen=True)
class KnownPatient:
    """A patient.

    Attributes:
        key: by which events name the patient.
        patient: the patient's id; "" where there is none.
        sex: as the files have it, "" where they do not.
        birth: day of birth; None where it is not known.
    """

    key: str = field(repr=False)
    patient: str = field(repr=False)
    sex: str = field(repr=False)
    birth: datetime.date | None = field(repr=False)


@dataclass(frozen=True)
class CodeCount:
    """A code and who has it, for drafts.

    Attributes:
        code: the code.
        patients: number of patients with an event of it.
        is_number: whether most of its events have a number.
        unit: the most frequent unit of its numbers, "" where they have none.
    """

    code: str
    patients: int
    is_number: bool
    unit: str


@runtime_checkable
class ListsEvents(Protocol):
    """A kind of source that makes records of patients' events."""

    def list_events(self) -> Iterator[PatientEvent]:
        """Yields every event that can be read, whatever its code is."""

    def open(self) -> Source:
        """The opened source."""


def count_codes(events: Iterable[PatientEvent]) -> list[CodeCount]:
    """Returns every code, from the one that most patients have; of several of one event the first counts."""
    patients: dict[str, set[str]] = {}
    units: dict[str, Counter[str]] = {}
    totals: Counter[str] = Counter()
    for event in events:
        code = next((code for _, code in event.codes if code not in ("", "0")), None)
        if code is None:
            continue
        patients.setdefault(code, set()).add(event.patient)
        totals[code] += 1
        if parse_number(event.value) is not None:
            units.setdefault(code, Counter())[event.unit] += 1
    found = []
    for code, having in patients.items():
        own = units.get(code, Counter())
        unit = own.most_common(1)[0][0] if own else ""
        found.append(CodeCount(code, len(having), 2 * own.total() > totals[code], unit))
    return sorted(found, key=lambda each: (-each.patients, each.code))


def read_dates(text: str) -> tuple[datetime.date, datetime.date] | tuple[None, None]:
    """Returns the first and last day of a date that may lack its day or month; None twice of what is no date."""
    found = _DATE.fullmatch(text.strip())
    try:
        year, month, day = (int(part) if part else None for part in found.groups()) if found else (None, None, None)
        if year is None:
            return None, None
        last_month = month or 12
        last_day = day or calendar.monthrange(year, last_month)[1]
        return datetime.date(year, month or 1, day or 1), datetime.date(year, last_month, last_day)
    except ValueError:
        return None, None


def check_columns(columns: Sequence[str], codes: Mapping[str, EventColumn], index: Index | None) -> None:
    """Checks that the columns of a source of patients exist.

    Args:
        columns: names of the columns that are inputs.
        codes: column -> events that it is made of.
        index: see `Index`.

    Raises:
        ValueError: a column is unknown, has a name that is taken, or counts time from an index that is none.
    """
    taken = next((name for name in codes if name in _OWN), None)
    if taken is not None:
        raise ValueError(f"codes: expected other names than {' and '.join(_OWN)}, got {taken!r}")
    known = [*codes, *(_OWN if index is not None else ("sex",))]
    unknown = next((name for name in columns if name not in known), None)
    if unknown is not None:
        raise ValueError(f"columns: expected some of {', '.join(known)}, got {unknown!r}")
    if index is None and any(column.when == "after" or column.days is not None for column in codes.values()):
        raise ValueError("index: expected a date or a code, as a column counts time from it")


@dataclass(frozen=True)
class PatientRows:
    """One record for each patient.

    Attributes:
        file: name of what was read.
        columns: names of the columns that are inputs.
        rows: person, cells, and why the record cannot be used, "" where it can.
        faults: place in the files, and why something there cannot be read.
    """

    file: str
    columns: tuple[str, ...]
    rows: list[tuple[KnownPatient, dict[str, str], str]] = field(repr=False)
    faults: list[tuple[str, int, str]] = field(default_factory=list, repr=False)

    def digest(self) -> str:
        """Over the input columns of all patients, and over what could not be read."""
        inputs = (text for _, cells, fault in self.rows for text in (*(cells[name] for name in self.columns), fault))
        faults = (f"{file} {row}" for file, row, _ in self.faults)
        return digest(map(encode_text, (*self.columns, f"{len(self.rows)}", *inputs, *faults)))

    def index(self) -> list[SourceRecord]:
        """Patients in the order of their file, then what could not be read of any file."""
        people = [
            SourceRecord(
                row=number,
                file=self.file,
                key=digest([encode_text(person.key)]),
                patient=person.patient,
                split=None,
                cells=cells,
                fault=fault,
            )
            for number, (person, cells, fault) in enumerate(self.rows, start=1)
        ]
        blank = dict.fromkeys(self.rows[0][1] if self.rows else self.columns, "")
        return people + [
            SourceRecord(
                row=number,
                file=f"{file} (its line {row})",
                key=f"{file} {row}",
                patient="",
                split=None,
                cells=blank,
                fault=fault,
                identified=False,
            )
            for number, (file, row, fault) in enumerate(self.faults, start=len(people) + 1)
        ]

    def load(self, position: int) -> Mapping[str, Any]:
        """Returns the input cells of one patient. Raises BadRecord."""
        if position >= len(self.rows):
            raise BadRecord(self.faults[position - len(self.rows)][2])
        _, cells, fault = self.rows[position]
        if fault:
            raise BadRecord(fault)
        return {name: cells[name] for name in self.columns}


def make_rows(
    people: Iterable[KnownPatient],
    events: Iterable[PatientEvent],
    codes: Mapping[str, EventColumn],
    index: Index | None,
) -> list[tuple[KnownPatient, dict[str, str], str]]:
    """Returns each patient's cells, and why the record cannot be used, "" where it can.

    Beside those of the codes there are `sex`, and where the index is known `age` in whole years at it.

    Args:
        people: the patients.
        events: their events; those of others, and of no code, are passed over.
        codes: column -> events that it is made of.
        index: see `Index`.
    """
    wanted = [*codes.values(), *([index] if isinstance(index, Coded) else [])]
    by_patient: dict[str, list[PatientEvent]] = {}
    for event in events:
        if any(column.matches(event) for column in wanted):
            by_patient.setdefault(event.patient, []).append(event)
    rows = []
    for person in people:
        own = by_patient.get(person.key, [])
        at = _find_index(own, index)
        if index is not None and at is None:
            continue
        cells = {"sex": person.sex, "age": "" if at is None else _count_years(person.birth, at)}
        fault = ""
        for name, column in codes.items():
            chosen = [event for event in own if column.matches(event) and _is_in_time(event, column, at)]
            # By the patient's own values alone: nobody's unit decides about another's record.
            if column.take not in ("count", "any") and any(e.value and e.unit != (column.unit or "") for e in chosen):
                expected = (
                    "without a unit, or its name as `unit`" if column.unit is None else "of the unit that it names"
                )
                fault = f"column {name!r}: expected values {expected}, got another"
            cells[name] = _take(chosen, column.take)
        rows.append((person, cells, fault))
    return rows


def _find_index(events: Sequence[PatientEvent], index: Index | None) -> datetime.date | None:
    if not isinstance(index, Coded):
        return index
    return min((event.start for event in events if event.start is not None and index.matches(event)), default=None)


def _is_in_time(event: PatientEvent, column: EventColumn, at: datetime.date | None) -> bool:
    if at is None:
        return True
    if event.start is None or event.end is None:
        return False
    if column.when == "before":
        return event.end < at and (column.days is None or (at - event.start).days <= column.days)
    return event.start >= at and (column.days is None or (event.end - at).days <= column.days)


def _take(events: Sequence[PatientEvent], take: str) -> str:
    if take == "any":
        return str(int(bool(events)))
    if take == "count":
        return str(len(events))
    valued = [event for event in events if event.value]
    if take in ("latest", "first"):
        dated = sorted(valued, key=lambda event: (event.start or datetime.date.min, event.value))
        return dated[-1 if take == "latest" else 0].value if dated else ""
    numbers = [number for event in valued if (number := parse_number(event.value)) is not None]
    if not numbers:
        return ""
    return repr({"mean": sum(numbers) / len(numbers), "lowest": min(numbers), "highest": max(numbers)}[take])


def _count_years(birth: datetime.date | None, at: datetime.date) -> str:
    if birth is None or birth > at:
        return ""
    return str(at.year - birth.year - ((at.month, at.day) < (birth.month, birth.day)))
