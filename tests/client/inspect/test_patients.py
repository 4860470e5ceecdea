"""Folders of FHIR files and of OMOP tables become first files that run once their ranges are filled in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from client.inspect.draft import draft_file
from client.inspect.folders import inspect
from common.types import BadInput
from common.yaml import load
from simulations.config import SimulationConfig

COUNT = 12


def write_fhir(folder: Path, *, bundles: bool = False) -> Path:
    """Twelve patients with a pressure each; every third has a diagnosis."""
    path = folder / "export"
    path.mkdir()
    resources: list[dict[str, Any]] = []
    for number in range(COUNT):
        own: list[dict[str, Any]] = [
            {"resourceType": "Patient", "id": f"p{number}", "gender": ["male", "female"][number % 2]}
        ]
        subject = {"reference": f"Patient/p{number}"}
        pressure = {"coding": [{"system": "http://loinc.org", "code": "8480-6"}]}
        quantity = {"value": 100 + number, "code": "mm[Hg]"}
        own.append({"resourceType": "Observation", "subject": subject, "code": pressure, "valueQuantity": quantity})
        if number % 3 == 0:
            own.append({"resourceType": "Condition", "subject": subject, "code": {"coding": [{"code": "44054006"}]}})
        if bundles:
            entries = [{"resource": each} for each in own]
            (path / f"{number}.json").write_text(json.dumps({"resourceType": "Bundle", "entry": entries}))
        resources += own
    if not bundles:
        (path / "all.ndjson").write_text("\n".join([*map(json.dumps, resources), "{"]))
    return path


def write_omop(folder: Path) -> Path:
    path = folder / "tables"
    path.mkdir()
    tables: dict[str, list[Any]] = {
        "person": [("person_id", "gender_concept_id", "year_of_birth", "month_of_birth", "day_of_birth")],
        "measurement": [
            ("person_id", "measurement_concept_id", "measurement_date", "value_as_number", "unit_concept_id")
        ],
        "condition_occurrence": [("person_id", "condition_concept_id", "condition_start_date")],
    }
    for number in range(COUNT):
        tables["person"].append((number, [8507, 8532][number % 2], 1950, 1, 1))
        tables["measurement"].append((number, 3004249, "2020-01-01", 100 + number, 8876))
        if number % 3 == 0:
            tables["condition_occurrence"].append((number, 320128, "2020-01-01"))
    for name, rows in tables.items():
        with (path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("make", "kind", "label", "column"),
    [
        (write_fhir, "fhir", "code_44054006", {"code": "8480-6", "take": "latest", "unit": "mm[Hg]"}),
        (
            lambda folder: write_fhir(folder, bundles=True),
            "fhir",
            "code_44054006",
            {"code": "8480-6", "take": "latest", "unit": "mm[Hg]"},
        ),
        (write_omop, "omop", "code_320128", {"code": "3004249", "take": "latest", "unit": "8876"}),
    ],
)
def test_the_most_frequent_codes_become_columns_and_the_file_runs_once_ranges_are_filled_in(
    make: Any, kind: str, label: str, column: dict[str, str], tmp_path: Path
) -> None:
    finding = inspect(make(tmp_path), None)
    assert (finding.source["kind"], finding.label, finding.records, finding.patients) == (kind, label, COUNT, COUNT)
    assert [each["take"] for each in finding.source["codes"].values()] == ["latest", "any"]
    assert next(iter(finding.source["codes"].values())) == column
    assert finding.features[0] == "sex" and label not in finding.features
    draft = draft_file(finding, tmp_path / "first.yaml", site=False, backbone=None)
    assert draft.blanks
    for path, text in draft.files.items():
        path.write_text(text.replace("FILL_IN,FILL_IN", "50,250"), encoding="utf-8")
    config = load(SimulationConfig, tmp_path / "first.yaml")
    assert config.run.requested_privacy is not None and config.run.requested_privacy.unit == "patient"


def test_another_code_may_be_the_label_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    path = write_fhir(tmp_path)
    assert inspect(path, "8480-6").label_facts.kind == "number"
    with pytest.raises(BadInput, match="--task 8480-7: .* has no such code"):
        inspect(path, "8480-7")


def test_without_a_code_that_only_some_have_the_label_is_asked_for(tmp_path: Path) -> None:
    path = write_omop(tmp_path)
    (path / "condition_occurrence.csv").unlink()
    with pytest.raises(BadInput, match="say which with --task CODE"):
        inspect(path, None)
