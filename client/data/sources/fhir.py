"""Patients of FHIR files (R4): what a bulk export writes, one resource a line (.ndjson), and bundles (.json).

Each patient is one record, with columns made of observations, conditions, procedures and medications.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from client.data.sources import SourceExample
from client.data.sources.parts.base import SourceSettings
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.tables.events import (
    Coded,
    EventColumn,
    Index,
    KnownPatient,
    PatientEvent,
    PatientRows,
    check_columns,
    make_rows,
    read_dates,
)
from client.data.sources.parts.tree import Tree, open_tree
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

_DATES = {
    "Observation": ("effectiveDateTime", "effectiveInstant", "effectivePeriod", "issued"),
    "Condition": ("onsetDateTime", "onsetPeriod", "recordedDate"),
    "Procedure": ("performedDateTime", "performedPeriod"),
    "MedicationRequest": ("authoredOn",),
    "MedicationStatement": ("effectiveDateTime", "effectivePeriod"),
    "MedicationAdministration": ("effectiveDateTime", "effectivePeriod"),
}
_NOT_TRUE = frozenset({"entered-in-error", "cancelled", "not-done", "refuted", "not-taken"})
_ESCAPED = re.compile("[\udc80-\udcff]")
"""Signs that stand for bytes that are no characters."""

_UNREADABLE = "not a FHIR resource that can be read"


class Fhir(SourceSettings):
    """Settings: the files, and the columns that a patient's resources become.

    Attributes:
        path: folder or zip with .ndjson files of resources, or .json files of bundles or resources, anywhere below it.
        codes: column -> codes of the resources that it is made of.
        columns: columns given to the backbone: of `codes`, `sex`, and `age` where there is an index.
        index: date of all patients, or the code whose first resource is a patient's index; patients without it are no
            records.
        identifier: system of the identifiers that are patient ids; null takes the id of the resource Patient.
    """

    kind: Literal["fhir"]
    path: LocalPath
    codes: dict[str, EventColumn]
    columns: Annotated[list[str], Field(min_length=1)]
    index: Index | None = None
    identifier: str | None = None

    @model_validator(mode="after")
    def _check_columns(self) -> Fhir:
        check_columns(self.columns, self.codes, self.index)
        return self

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four patients, each with two measurements, two with a diagnosis, one of them unreadable."""
        (folder / "fhir").mkdir()
        lines: dict[str, list[str]] = {"Patient": [], "Observation": [], "Condition": []}
        for number in range(4):
            subject = {"reference": f"Patient/q7-{number}"}
            lines["Patient"].append(json.dumps({"resourceType": "Patient", "id": f"q7-{number}", "gender": "female"}))
            for month in (1, 2):
                coded = {"coding": [{"system": "http://loinc.org", "code": "8480-6"}]}
                quantity = {"value": 100 + 10 * number + month, "unit": "mmHg"}
                resource = {"resourceType": "Observation", "status": "final", "subject": subject, "code": coded}
                resource |= {"effectiveDateTime": f"2020-0{month}-01", "valueQuantity": quantity}
                lines["Observation"].append(json.dumps(resource))
        coded = {"coding": [{"system": "http://snomed.info/sct", "code": "38341003"}]}
        lines["Condition"].append(
            json.dumps({"resourceType": "Condition", "subject": {"reference": "Patient/q7-1"}, "code": coded})
        )
        lines["Observation"].append('{"resourceType": "Observation", "q7-')
        for name, texts in lines.items():
            (folder / "fhir" / f"{name}.ndjson").write_text("\n".join(texts) + "\n", encoding="utf-8")
        settings = {
            "kind": "fhir",
            "path": str(folder / "fhir"),
            "codes": {
                "pressure": {"code": "8480-6", "unit": "mmHg"},
                "hypertension": {"code": "38341003", "take": "any"},
            },
            "columns": ["pressure", "sex"],
        }
        return SourceExample(settings, ["q7-"])

    def open(self) -> PatientRows:
        """The patients. Raises BadInput: missing, or no patients."""
        wanted = [*self.codes.values(), *([self.index] if isinstance(self.index, Coded) else [])]
        people: dict[str, KnownPatient] = {}
        events: list[PatientEvent] = []
        faults: list[tuple[str, int, str]] = []
        for file, row, resource in _read_resources(self._open_tree()):
            try:
                if resource is None:
                    raise ValueError
                if resource.get("resourceType") == "Patient":
                    person = self._read_person(resource)
                    if not person.key.strip():
                        raise ValueError
                    people.setdefault(person.key, person)
                else:
                    # Most of an export is of no column: to keep it all would fill the memory.
                    events += (event for event in _read_events(resource) if any(each.matches(event) for each in wanted))
            except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError):
                faults.append((file, row, _UNREADABLE))
        if not people:
            raise BadInput(f"{self.path}: expected .ndjson or .json files with a resource Patient, got none")
        rows = make_rows(people.values(), events, self.codes, self.index)
        return PatientRows(self.path.name, tuple(self.columns), rows, faults)

    def list_events(self) -> Iterator[PatientEvent]:
        """Yields every event that can be read."""
        for _, _, resource in _read_resources(self._open_tree()):
            if resource is not None:
                events, _ = try_record(lambda resource=resource: list(_read_events(resource)))  # type: ignore[misc]
                yield from events or ()

    def _open_tree(self) -> Tree:
        return open_tree(self.path, "FHIR files").chosen(lambda name: name.suffix.lower() in {".ndjson", ".json"})

    def _read_person(self, resource: Mapping[str, Any]) -> KnownPatient:
        patient = str(resource["id"])
        if self.identifier is not None:
            found = [each for each in resource.get("identifier", []) if each.get("system") == self.identifier]
            patient = str(found[0].get("value", "")) if found else ""
        birth, _ = read_dates(str(resource.get("birthDate", "")))
        return KnownPatient(str(resource["id"]), patient, str(resource.get("gender", "")), birth)


def _read_resources(tree: Tree) -> Iterator[tuple[str, int, Mapping[str, Any] | None]]:
    """Returns file, line and resource of every resource, those of bundles one by one; None of one that is none."""
    for number, name in enumerate(tree.stamps, start=1):
        # A file's name may be a patient's.
        file = f"file {number}"
        try:
            # Line by line: neither a file's length nor a byte that is no character costs other patients theirs.
            lines = (
                tree.read_lines(name, "FHIR file") if name.lower().endswith(".ndjson") else [tree.read(name, "file")]
            )
            for row, data in enumerate(lines, start=1):
                line = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
                for resource in _unpack(line) if line.strip() else ():
                    yield file, row, None if _ESCAPED.search(line) and not _is_text(resource) else resource
        except BadRecord:
            yield file, 0, None


def _unpack(text: str) -> list[Mapping[str, Any] | None]:
    try:
        found = json.loads(text)
        if found["resourceType"] == "Bundle":
            return [entry.get("resource") for entry in found.get("entry", [])]
        return [found]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [None]


def _is_text(resource: Any) -> bool:
    try:
        return _ESCAPED.search(json.dumps(resource, ensure_ascii=False)) is None
    except RecursionError:
        return False


def _read_events(resource: Mapping[str, Any]) -> Iterator[PatientEvent]:
    """Returns the events of a resource: none where it is of a kind that is not read, or says what is not true."""
    kind = resource["resourceType"]
    if kind not in _DATES or _NOT_TRUE & {resource.get("status"), *_list_codes(resource.get("verificationStatus"))}:
        return
    patient = _find_patient(str((resource.get("subject") or resource["patient"])["reference"]))
    if patient is None:
        return
    start, end = _read_time(resource, _DATES[kind])
    coded = resource.get("code") or resource.get("medicationCodeableConcept") or {}
    # Blood pressure is one observation of two components.
    for part in ({**resource, "code": coded}, *resource.get("component", [])):
        codes = [(str(each.get("system", "")), str(each.get("code", ""))) for each in part["code"].get("coding", [])]
        yield PatientEvent(patient, codes, start, end, *_read_value(part))


def _find_patient(reference: str) -> str | None:
    """Returns the id in a reference; None where it is to something else, such as a group with a patient's id.

    Before it there may be an address, and behind it a version: `http://host/Patient/12/_history/3`.
    """
    parts = reference.partition("/_history/")[0].rstrip("/").replace(":", "/").split("/")
    return parts[-1] if len(parts) == 1 or parts[-2] in ("Patient", "uuid", "oid") else None


def _list_codes(concept: Any) -> list[str]:
    return [each.get("code") for each in (concept or {}).get("coding", [])]


def _read_time(resource: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if name in resource:
            found = resource[name]
            return read_dates(str(found.get("start", "")) if isinstance(found, dict) else str(found))
    return None, None


def _read_value(part: Mapping[str, Any]) -> tuple[str, str]:
    """Returns value and unit of an observation or of a component; an upper or lower limit is its number."""
    quantity = part.get("valueQuantity")
    if quantity is not None:
        return str(quantity.get("value", "")), str(quantity.get("code") or quantity.get("unit") or "")
    for name in ("valueInteger", "valueDecimal", "valueString", "valueBoolean", "valueDateTime"):
        if name in part:
            return (str(part[name]).lower() if name == "valueBoolean" else str(part[name])), ""
    found = _list_codes(part.get("valueCodeableConcept"))
    return (str(found[0]), "") if found else ("", "")
