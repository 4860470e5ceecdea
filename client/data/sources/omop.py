"""Patients of an OMOP common data model (v5): tables as CSV or Parquet, a DuckDB file, or any database of SQLAlchemy.

Each person is one record, with columns made of measurements, conditions and other tables of events.
"""

from __future__ import annotations

import csv
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from client.data.sources import SourceExample
from client.data.sources.parts.base import SourceSettings
from client.data.sources.parts.frame import FAULT, read_frame
from client.data.sources.parts.tables.events import (
    EventColumn,
    Index,
    KnownPatient,
    PatientEvent,
    PatientRows,
    check_columns,
    make_rows,
    read_dates,
)
from common.errors import instead
from common.plugins import LocalPath
from common.types import BadInput

_PERSON = ("person_id", "gender_concept_id", "year_of_birth", "month_of_birth", "day_of_birth")
_EVENTS = {
    "measurement": ("measurement_concept_id", "measurement_date", "value_as_number", "unit_concept_id"),
    "observation": ("observation_concept_id", "observation_date", "value_as_number", "unit_concept_id"),
    "condition_occurrence": ("condition_concept_id", "condition_start_date", None, None),
    "drug_exposure": ("drug_concept_id", "drug_exposure_start_date", "quantity", None),
    "procedure_occurrence": ("procedure_concept_id", "procedure_date", None, None),
}
"""Table -> its columns of concept, day, value and unit."""

_SEXES = {"8507": "male", "8532": "female", "0": ""}
_Rows = tuple[list[dict[str, str]], list[tuple[str, int, str]]]
"""Rows of a table, and what cannot be read of it."""


class Omop(SourceSettings):
    """Settings: where the tables are, and the columns that a person's rows become. Codes are concept ids.

    Attributes:
        path: folder with person.csv or person.parquet, measurement and so on, or a DuckDB file, whose
            views may read nothing but itself.
        database: name of the environment variable that holds the address of a database, as SQLAlchemy reads it.
        schema_name: schema of its tables; null takes the database's own.
        codes: column -> concept ids of the rows that it is made of.
        columns: columns given to the backbone: of `codes`, `sex`, and `age` where there is an index.
        index: date of all patients, or the concept whose first row is a patient's index; patients without it are no
            records.
    """

    kind: Literal["omop"]
    path: LocalPath | None = None
    database: str | None = None
    schema_name: str | None = None
    codes: dict[str, EventColumn]
    columns: Annotated[list[str], Field(min_length=1)]
    index: Index | None = None

    @model_validator(mode="after")
    def _check(self) -> Omop:
        if (self.path is None) == (self.database is None):
            raise ValueError("path: expected either it or `database`")
        check_columns(self.columns, self.codes, self.index)
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four persons, each with two measurements, two with a diagnosis."""
        people = [[f"71{n}", "8507", str(1950 + n), "5", "1"] for n in range(4)]
        measured = [
            [f"71{n}", "3004249", f"2020-0{m}-01", str(100 + 10 * n + m), "8876"] for n in range(4) for m in (1, 2)
        ]
        tables: dict[str, list[Sequence[Any]]] = {
            "person": [_PERSON, *people],
            "measurement": [("person_id", *_EVENTS["measurement"]), *measured],
            "condition_occurrence": [
                ("person_id", "condition_concept_id", "condition_start_date"),
                ("711", "320128", "2019-01-01"),
                ("712", "320128", "2019-02-01"),
            ],
        }
        for name, rows in tables.items():
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        settings = {
            "kind": "omop",
            "path": str(folder),
            "codes": {"pressure": {"code": 3004249, "unit": 8876}, "hypertension": {"code": 320128, "take": "any"}},
            "columns": ["pressure", "sex"],
        }
        return SourceExample(settings)

    def open(self) -> PatientRows:
        """The persons. Raises BadInput: missing, or no table of persons."""
        rows, faults = self._read("person", _PERSON)
        people: dict[str, KnownPatient] = {}
        for number, row in enumerate(rows, start=1):
            person = _read_person(row)
            if person.key:
                people[person.key] = person
            else:
                # Else all events of nobody would be one record.
                faults.append(("person", number, "the row has no person_id"))
        if not people:
            raise BadInput(f"{self._name()}: expected a table `person` with rows, got none")
        events: list[PatientEvent] = []
        for table, names in _EVENTS.items():
            found, bad = self._read(table, ("person_id", *(name for name in names if name)))
            events += _read_events(table, found)
            faults += bad
        return PatientRows(
            self._name(), tuple(self.columns), make_rows(people.values(), events, self.codes, self.index), faults
        )

    def list_events(self) -> Iterator[PatientEvent]:
        """Yields every event that can be read."""
        for table, names in _EVENTS.items():
            yield from _read_events(table, self._read(table, ("person_id", *(name for name in names if name)))[0])

    def _name(self) -> str:
        return "database" if self.path is None else self.path.name

    def _read(self, table: str, names: Sequence[str]) -> _Rows:
        """Returns a table's rows of some columns; none where there is no such table."""
        if self.path is None:
            return _query(f"{self.database}", self.schema_name, table, names), []
        if self.path.is_dir():
            return _read_file(self.path, table, names)
        return _query_duckdb(self.path, table, names), []


def _read_file(folder: Path, table: str, names: Sequence[str]) -> _Rows:
    known = {path.name.lower(): path for path in folder.iterdir()}
    path = next((known[f"{table}{end}"] for end in (".parquet", ".csv") if f"{table}{end}" in known), None)
    if path is None:
        return [], []
    frame = read_frame(path)
    frame.columns = frame.columns.map(lambda name: name if name == FAULT else str(name).lower())
    _require(path.name, names[: 3 if table != "person" else 1], list(frame.columns))
    rows = frame.to_dict("records")
    return (
        [{name: row.get(name, "") for name in names} for row in rows if not row[FAULT]],
        [(path.name, number, row[FAULT]) for number, row in enumerate(rows, start=1) if row[FAULT]],
    )


def _require(table: str, names: Sequence[str], known: Sequence[str]) -> None:
    absent = next((name for name in names if name not in known), None)
    if absent is not None:
        raise BadInput(f"{table}: expected a column {absent!r}, as the OMOP common data model has it")


def _query_duckdb(path: Path, table: str, names: Sequence[str]) -> list[dict[str, str]]:
    try:
        import duckdb
    except ImportError:
        raise BadInput(f'{path}: expected the package duckdb; pip install "headwater[omop]"') from None
    if not path.is_file():
        raise BadInput(f"{path}: expected a folder of tables or a DuckDB file, found none")
    try:
        # Nothing but this file: a view in it could read others.
        only_this: dict[str, str | bool | int | float | list[str]] = {"enable_external_access": False}
        with duckdb.connect(str(path), read_only=True, config=only_this) as database:
            found = database.execute(
                "select column_name from information_schema.columns where lower(table_name) = ?", [table]
            ).fetchall()
            known = {str(name).lower() for (name,) in found}
            if not known:
                return []
            _require(table, names[: 3 if table != "person" else 1], list(known))
            chosen = [name for name in names if name in known]
            # Names are those of the list above, never a user's.
            rows = database.execute(f"select {', '.join(chosen)} from {table}").fetchall()
    except duckdb.Error as error:
        # From None: the database's own message may quote it.
        raise BadInput(f"{path}: expected a DuckDB file that can be read{instead(error)}") from None
    return _as_texts(chosen, rows)


def _query(variable: str, schema: str | None, table: str, names: Sequence[str]) -> list[dict[str, str]]:
    try:
        import sqlalchemy as sa
    except ImportError:
        raise BadInput('database: expected the package sqlalchemy; pip install "headwater[omop]"') from None
    address = os.environ.get(variable)
    if not address:
        raise BadInput(f"database: expected the environment variable {variable} to hold the address of a database")
    try:
        engine = sa.create_engine(address)
        with engine.connect() as database:
            inspector = sa.inspect(database)
            own = next((name for name in inspector.get_table_names(schema) if name.lower() == table), None)
            if own is None:
                return []
            columns = {
                str(column["name"]).lower(): str(column["name"]) for column in inspector.get_columns(own, schema)
            }
            _require(table, names[: 3 if table != "person" else 1], list(columns))
            chosen = [name for name in names if name in columns]
            source = sa.table(own, *(sa.column(columns[name]) for name in chosen), schema=schema)
            rows = database.execute(sa.select(source)).fetchall()
        engine.dispose()
    except (sa.exc.SQLAlchemyError, ImportError, ValueError) as error:
        # From None: the address holds a password.
        raise BadInput(f"database: expected one that can be read at {variable}{instead(error)}") from None
    return _as_texts(chosen, rows)


def _as_texts(names: Sequence[str], rows: Any) -> list[dict[str, str]]:
    return [dict(zip(names, map(_write_cell, row), strict=True)) for row in rows]


def _write_cell(value: Any) -> str:
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    return "" if value is None else str(value)


def _read_person(row: Mapping[str, str]) -> KnownPatient:
    sex = _whole(row.get("gender_concept_id", ""))
    parts = [_whole(row.get(name, "")) for name in _PERSON[2:]]
    # Without its month a birth is taken to be in the middle of the year.
    year, month, day = parts[0], parts[1] or "7", parts[2] or "1"
    birth, _ = read_dates(f"{year:0>4}-{month:0>2}-{day:0>2}")
    key = _whole(row["person_id"])
    return KnownPatient(key, key, _SEXES.get(sex, sex), birth if year else None)


def _read_events(table: str, rows: Sequence[Mapping[str, str]]) -> Iterator[PatientEvent]:
    concept, day, value, unit = _EVENTS[table]
    for row in rows:
        start, end = read_dates(row[day])
        code = _whole(row[concept])
        number, said = (row.get(name, "") if name else "" for name in (value, unit))
        # 0 says that nothing is known.
        yield PatientEvent(
            _whole(row["person_id"]), [("", code)], start, end, number, _whole(said) if said != "0" else ""
        )


def _whole(text: str) -> str:
    """Returns an id that a tool may have written as `1.0`."""
    return text.removesuffix(".0").strip()
