"""FHIR and OMOP: a patient's columns before and after an index date, against values worked out by hand."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from client.data.sources import Source, open_source
from client.data.sources.parts.tables.events import read_dates
from client.data.sources.parts.tree import MAX_FILE_BYTES
from common.types import BadInput, BadRecord

LOINC = "http://loinc.org"


def patient(name: str, **more: Any) -> dict[str, Any]:
    return {"resourceType": "Patient", "id": name, "gender": "female", "birthDate": "1960-06-15", **more}


def observation(name: str, code: str, date: str, value: float, unit: str = "mmol/L", **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "status": "final",
        "subject": {"reference": f"Patient/{name}"},
        "code": {"coding": [{"system": LOINC, "code": code}]},
        "effectiveDateTime": date,
        "valueQuantity": {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": unit},
        **more,
    }


def condition(name: str, code: str, date: str, **more: Any) -> dict[str, Any]:
    return {
        "resourceType": "Condition",
        "subject": {"reference": f"Patient/{name}"},
        "code": {"coding": [{"system": "http://snomed.info/sct", "code": code}]},
        "onsetDateTime": date,
        **more,
    }


PATIENTS = [
    patient("a", identifier=[{"system": "urn:mrn", "value": "0017"}]),
    patient("b", gender="male", birthDate="1970"),
    patient("c"),
]
PRESSURE = {
    "code": {"coding": [{"system": LOINC, "code": "85354-9"}]},
    "component": [
        {"code": {"coding": [{"system": LOINC, "code": "8480-6"}]}, "valueQuantity": {"value": 140, "unit": "mm[Hg]"}},
        {"code": {"coding": [{"system": LOINC, "code": "8462-4"}]}, "valueQuantity": {"value": 90, "unit": "mm[Hg]"}},
    ],
}
RESOURCES = [
    observation("a", "2345-7", "2020-01-01", 5.0),
    observation("a", "2345-7", "2020-03-01T08:30:00+01:00", 7.0),
    observation("a", "2345-7", "2021-02-01", 30.0),
    observation("a", "2345-7", "2020-04-01", 99.0, status="entered-in-error"),
    observation("b", "2345-7", "2020", 6.0),
    {**observation("b", "x", "2020-02-01", 0), **PRESSURE, "valueQuantity": None},
    condition("a", "38341003", "2020-06-15"),
    condition("b", "38341003", "2021-01-01"),
    condition("a", "22298006", "2020-09-01"),
    condition("b", "22298006", "2020-12-01"),
    condition("b", "22298006", "2021-05-01", verificationStatus={"coding": [{"code": "refuted"}]}),
]
CODES: dict[str, Any] = {
    "glucose": {"code": "2345-7", "system": LOINC, "unit": "mmol/L"},
    "glucose_mean": {"code": "2345-7", "take": "mean", "unit": "mmol/L"},
    "recent": {"code": "2345-7", "days": 120, "take": "count"},
    "systolic": {"code": "8480-6", "take": "highest", "unit": "mm[Hg]"},
    "infarction": {"code": "22298006", "take": "any", "when": "after"},
}


def write_ndjson(folder: Path, resources: list[dict[str, Any]], *lines: str) -> None:
    folder.mkdir(exist_ok=True)
    for kind in {each["resourceType"] for each in resources}:
        own = [json.dumps(each) for each in resources if each["resourceType"] == kind]
        (folder / f"{kind}.ndjson").write_text("\n".join([*own, *lines]) + "\n", encoding="utf-8")


def fhir(path: Path, codes: dict[str, Any] | None = None, **settings: Any) -> Source:
    chosen = CODES if codes is None else codes
    values = {"kind": "fhir", "path": str(path), "codes": chosen, "columns": ["sex", *chosen], **settings}
    return open_source(values, "sources.x").open()


EXPECTED = [
    # The index is the first 38341003: a on 2020-06-15, b on 2021-01-01; c has none and is no record.
    {
        "sex": "female",
        "age": "60",
        "glucose": "7.0",
        "glucose_mean": "6.0",
        "recent": "1",
        "systolic": "",
        "infarction": "1",
    },
    {
        "sex": "male",
        "age": "51",
        "glucose": "6.0",
        "glucose_mean": "6.0",
        "recent": "0",
        "systolic": "140.0",
        "infarction": "0",
    },
]


def test_columns_are_made_of_what_came_before_the_index_and_labels_of_what_came_after(tmp_path: Path) -> None:
    write_ndjson(tmp_path / "export", [*PATIENTS, *RESOURCES])
    source = fhir(tmp_path / "export", index={"code": "38341003"}, identifier="urn:mrn")
    index = source.index()
    assert [dict(record.cells) for record in index] == EXPECTED
    assert [record.patient for record in index] == ["0017", ""]
    assert source.load(0) == {key: EXPECTED[0][key] for key in ("sex", *CODES)}
    fixed = fhir(tmp_path / "export", index="2020-02-15")
    assert [record.cells["glucose"] for record in fixed.index()] == ["5.0", "", ""]
    assert [record.patient for record in fixed.index()] == ["a", "b", "c"]


def test_a_bundle_is_read_as_its_resources(tmp_path: Path) -> None:
    write_ndjson(tmp_path / "export", [*PATIENTS, *RESOURCES])
    (tmp_path / "bundles").mkdir()
    for person in PATIENTS:
        name = person["id"]
        own = [each for each in RESOURCES if each["subject"]["reference"] == f"Patient/{name}"]
        urn = [{**each, "subject": {"reference": f"urn:uuid:{name}"}} for each in own]
        entries = [{"fullUrl": f"urn:uuid:{each.get('id')}", "resource": each} for each in (person, *urn)]
        bundle = {"resourceType": "Bundle", "type": "transaction", "entry": entries}
        (tmp_path / "bundles" / f"{name}.json").write_text(json.dumps(bundle, indent=1), encoding="utf-8")
    one, other = (fhir(tmp_path / name, index={"code": "38341003"}) for name in ("export", "bundles"))
    assert one.digest() == other.digest()
    assert [record.cells for record in one.index()] == [record.cells for record in other.index()]


def test_a_line_that_is_no_resource_costs_itself_only(tmp_path: Path) -> None:
    write_ndjson(
        tmp_path / "export", [PATIENTS[0]], '{"resourceType": "Observation", "q7-', '{"resourceType": "Observation"}'
    )
    source = fhir(tmp_path / "export", {"glucose": {"code": "2345-7"}})
    faults = [(record.row, record.fault) for record in source.index()]
    assert faults == [(1, ""), (2, "not a FHIR resource that can be read"), (3, "not a FHIR resource that can be read")]
    with pytest.raises(BadRecord, match="not a FHIR resource"):
        source.load(1)


def test_a_byte_that_is_no_character_costs_its_own_resource_only(tmp_path: Path) -> None:
    write_ndjson(tmp_path, [patient("ann"), patient("bea"), observation("ann", "8480-6", "2020-01-01", 120.0)])
    with (tmp_path / "Patient.ndjson").open("ab") as file:
        file.write(json.dumps(patient("Müller"), ensure_ascii=False).encode("latin-1") + b"\n")
    records = fhir(tmp_path, {"pressure": {"code": "8480-6", "unit": "mmol/L"}}, columns=["pressure"]).index()
    assert [(record.cells["pressure"], record.fault) for record in records] == [
        ("120.0", ""),
        ("", ""),
        ("", "not a FHIR resource that can be read"),
    ]


@pytest.mark.slow
def test_a_file_of_over_a_gibibyte_costs_no_patient_anything(tmp_path: Path) -> None:
    write_ndjson(tmp_path, [patient("ann"), observation("ann", "8480-6", "2020-01-01", 120.0)])
    with (tmp_path / "Observation.ndjson").open("r+b") as file:
        # Lines of zeros, which take no room on the disk.
        for _ in range(MAX_FILE_BYTES >> 23):
            file.seek(1 << 23, os.SEEK_END)
            file.write(b"\n")
    records = fhir(tmp_path, {"pressure": {"code": "8480-6", "unit": "mmol/L"}}, columns=["pressure"]).index()
    assert [record.cells["pressure"] for record in records if not record.fault] == ["120.0"]


@pytest.mark.parametrize(
    ("reference", "pressures"),
    [
        # Version 2 of ann's own resource is not the patient 2.
        ("Patient/ann/_history/2", ["120.0", ""]),
        ("http://host/fhir/Patient/ann", ["120.0", ""]),
        ("urn:uuid:ann", ["120.0", ""]),
        ("Group/2", ["", ""]),
        ("Device/ann", ["", ""]),
    ],
)
def test_an_event_is_of_the_patient_that_it_refers_to(tmp_path: Path, reference: str, pressures: list[str]) -> None:
    found = observation("ann", "8480-6", "2020-01-01", 120.0) | {"subject": {"reference": reference}}
    write_ndjson(tmp_path, [patient("ann"), patient("2"), found])
    records = fhir(tmp_path, {"pressure": {"code": "8480-6", "unit": "mmol/L"}}, columns=["pressure"]).index()
    assert [record.cells["pressure"] for record in records] == pressures


def test_one_id_is_one_patient_and_none_is_nobody(tmp_path: Path) -> None:
    (tmp_path / "person.csv").write_text("person_id,gender_concept_id\n1,8507\n1.0,8507\n,8532\n")
    concept = "person_id,measurement_concept_id,measurement_date,value_as_number"
    (tmp_path / "measurement.csv").write_text(f"{concept}\n1,5,2020-01-01,7\n1.0,5,2021-01-01,8\n,5,2020-01-01,9\n")
    settings = {"path": str(tmp_path), "codes": {"x": {"code": 5, "take": "mean"}}, "columns": ["x"]}
    records = open_source({"kind": "omop", **settings}, "s").open().index()
    assert [(record.patient, record.cells["x"], record.fault) for record in records] == [
        ("1", "7.5", ""),
        ("", "", "the row has no person_id"),
    ]
    write_ndjson(tmp_path, [patient("ann"), patient(""), observation("", "5", "2020-01-01", 9.0)])
    assert [record.patient for record in fhir(tmp_path, {"x": {"code": "5"}}, columns=["x"]).index()] == ["ann", ""]


def test_a_view_of_a_database_file_reads_no_other_file(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    (tmp_path / "other.csv").write_text("person_id\n1\n")
    with duckdb.connect(str(tmp_path / "omop.duckdb")) as database:
        database.execute(f"create view person as select * from read_csv('{tmp_path / 'other.csv'}')")
    settings = {"path": str(tmp_path / "omop.duckdb"), "codes": {"x": {"code": 1}}, "columns": ["x"]}
    with pytest.raises(BadInput, match="expected a DuckDB file that can be read, got PermissionException"):
        open_source({"kind": "omop", **settings}, "s").open()


@pytest.mark.parametrize(
    ("unit", "usable"),
    [({}, [False] * 3), ({"unit": "mmol/L"}, [True, True, False]), ({"take": "count"}, [True] * 3)],
)
def test_a_unit_that_a_column_does_not_name_costs_its_own_patient_alone(
    tmp_path: Path, unit: dict[str, str], usable: list[bool]
) -> None:
    write_ndjson(tmp_path / "export", [*PATIENTS, *RESOURCES, observation("c", "2345-7", "2020-01-01", 90, "mg/dL")])
    source = fhir(tmp_path / "export", {"glucose": {"code": "2345-7", **unit}})
    assert ["got another" not in record.fault for record in source.index()] == usable


def test_a_date_without_its_day_is_all_of_its_days() -> None:
    assert [str(day) for day in read_dates("2020-02")] == ["2020-02-01", "2020-02-29"]
    assert [str(day) for day in read_dates("2021")] == ["2021-01-01", "2021-12-31"]
    assert read_dates("2020-13-01") == read_dates("last May") == (None, None)


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected some of glucose, sex"):
        fhir(tmp_path, {"glucose": {"code": "1"}}, columns=["age"])
    with pytest.raises(BadInput, match="index: expected a date or a code"):
        fhir(tmp_path, {"dead": {"code": "1", "when": "after"}})
    with pytest.raises(BadInput, match="resource Patient, got none"):
        fhir(tmp_path, {"glucose": {"code": "1"}})


TABLES: dict[str, list[tuple[Any, ...]]] = {
    "person": [
        ("person_id", "gender_concept_id", "year_of_birth", "month_of_birth", "day_of_birth"),
        (1, 8532, 1960, 6, 15),
        (2, 8507, 1970, None, None),
        (3, 8532, 1980, 1, 1),
    ],
    "measurement": [
        ("person_id", "measurement_concept_id", "measurement_date", "value_as_number", "unit_concept_id"),
        (1, 3004501, "2020-01-01", 5.0, 8753),
        (1, 3004501, "2020-03-01", 7.0, 8753),
        (1, 3004501, "2021-02-01", 30.0, 8753),
        (2, 3004501, "2020-05-01", 6.0, 8753),
    ],
    "condition_occurrence": [
        ("person_id", "condition_concept_id", "condition_start_date"),
        (1, 320128, "2020-06-15"),
        (2, 320128, "2021-01-01"),
        (1, 4329847, "2020-09-01"),
    ],
}
OMOP: dict[str, Any] = {
    "kind": "omop",
    "codes": {
        "glucose": {"code": 3004501},
        "glucose_mean": {"code": [3004501, 1], "take": "mean"},
        "infarction": {"code": 4329847, "take": "any", "when": "after", "days": 365},
    },
    "columns": ["sex", "age", "glucose", "glucose_mean"],
    "index": {"code": 320128},
}


def write_omop(folder: Path, form: str) -> dict[str, Any]:
    """Writes the tables in one of the forms, and returns where they are."""
    if form == "csv":
        for name, rows in TABLES.items():
            with (folder / f"{name.upper()}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([tuple(map(str.upper, rows[0])), *rows[1:]])
        return {"path": str(folder)}
    if form == "parquet":
        pd = pytest.importorskip("pandas")
        for name, rows in TABLES.items():
            pd.DataFrame(rows[1:], columns=rows[0]).to_parquet(folder / f"{name}.parquet")
        return {"path": str(folder)}
    if form == "duckdb":
        duckdb = pytest.importorskip("duckdb")
        connection, address = duckdb.connect(str(folder / "cdm.duckdb")), {"path": str(folder / "cdm.duckdb")}
    else:
        import sqlite3

        pytest.importorskip("sqlalchemy")
        connection, address = sqlite3.connect(folder / "cdm.db"), {"database": "CDM_ADDRESS"}
    for name, rows in TABLES.items():
        kinds = [
            "varchar" if isinstance(cell, str) else "double" if "value" in column else "integer"
            for column, cell in zip(rows[0], rows[1], strict=True)
        ]
        connection.execute(
            f"create table {name} ({', '.join(f'{c} {k}' for c, k in zip(rows[0], kinds, strict=True))})"
        )
        connection.executemany(f"insert into {name} values ({', '.join('?' * len(rows[0]))})", rows[1:])
    connection.commit()
    connection.close()
    return address


@pytest.mark.parametrize("form", ["csv", "parquet", "duckdb", "sql"])
def test_an_omop_model_is_read_in_each_form(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDM_ADDRESS", f"sqlite:///{tmp_path}/cdm.db")
    source = open_source({**OMOP, **write_omop(tmp_path, form)}, "sources.x").open()
    assert [record.patient for record in source.index()] == ["1", "2"]
    assert [dict(record.cells) for record in source.index()] == [
        {"sex": "female", "age": "60", "glucose": "7.0", "glucose_mean": "6.0", "infarction": "1"},
        {"sex": "male", "age": "50", "glucose": "6.0", "glucose_mean": "6.0", "infarction": "0"},
    ]


def test_a_database_that_is_not_there_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    with pytest.raises(BadInput, match="environment variable CDM_ADDRESS"):
        open_source({**OMOP, "database": "CDM_ADDRESS"}, "sources.x").open()
    # A sign of the password that would have to be escaped makes the rest of it a port.
    for address in ("nodialect://clinic:q7-secret@host/cdm", "sqlite://clinic@host:q7-secret/cdm"):
        monkeypatch.setenv("CDM_ADDRESS", address)
        with pytest.raises(BadInput, match="expected one that can be read at CDM_ADDRESS") as caught:
            open_source({**OMOP, "database": "CDM_ADDRESS"}, "sources.x").open()
        assert "q7" not in str(caught.value)
