"""One patient is one unit in all sources of a population, however a tool wrote the id."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.config import SiteConfig, Split
from client.data.checks import data_checks
from client.data.exclusions import Exclusions
from client.data.records import SIDES, find_usable, place_records, select_rows
from client.data.sources import SourceRecord
from common.inputs import encode_text, normalise_patient_id
from common.types import Unit
from tests.tiny import site_config

SAME = [
    ("1001", ["1001.0", "1001.", " 1001", "1001 ", "\u00a01001", "1001\u00a0", "\ufeff1001", "10\u200b01", "1001\0"]),
    ("1001", ["1.001e+03", "1.001E+03", "1.00100e+03"]),
    ("2025000123", ["2.025000123e+09", "2025000123.00"]),
    ("1000000", ["1e+06", "1.E+06"]),
    ("007", ["007.0", " 007"]),
    ("Zoë 4", ["Zoe\u0308 4", "Zoë\u00a04", "Zoë  4"]),
]


@pytest.mark.parametrize(("id", "forms"), SAME)
def test_every_form_of_an_id_is_one_patient(id: str, forms: list[str]) -> None:
    assert {normalise_patient_id(form) for form in [id, *forms]} == {id}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("007", "7"),
        ("1001", "1001.5"),
        ("12e3", "12000"),
        ("1.2345e+03", "1234"),
        ("q7", "Q7"),
        ("A-1", "A1"),
        ("1001-", "1001"),
        ("-1", "1"),
    ],
)
def test_ids_that_may_be_two_people_stay_two_patients(one: str, other: str) -> None:
    assert normalise_patient_id(one) != normalise_patient_id(other)


@given(st.integers(0, 10**15))
def test_a_whole_number_is_the_same_patient_as_the_float_that_a_table_makes_of_it(number: int) -> None:
    assert normalise_patient_id(repr(float(number))) == str(number)
    assert normalise_patient_id(f"{float(number):.16e}") == str(number)


@given(st.text())
def test_the_shared_form_of_an_id_is_its_own(text: str) -> None:
    once = normalise_patient_id(text)
    assert normalise_patient_id(once) == once


@given(st.text(st.characters()), st.text(st.characters()))
def test_any_two_texts_have_bytes_and_different_ones(one: str, other: str) -> None:
    assert (encode_text(one) == encode_text(other)) == (one == other)
    assert encode_text("Lübeck-\udcfc") == "Lübeck-".encode() + b"\xed\xb3\xbc"


def sides_of(ids: list[str], unit: Unit, salt: str) -> list[int]:
    index = [SourceRecord(at + 1, "x.csv", f"k{at}", id, None, {}) for at, id in enumerate(ids)]
    usable, _ = find_usable("x", index, dict.fromkeys(range(len(index))), {}, unit)
    placed, _ = place_records(usable, Split(test_fraction=0.4, salt=salt), unit)
    return [each.side for each in placed]


@pytest.mark.parametrize("unit", list(Unit))
def test_all_forms_of_an_id_fall_on_one_side(unit: Unit) -> None:
    for salt in map(str, range(10)):
        for id, forms in SAME:
            assert len(set(sides_of([id, *forms], unit, salt))) == 1


def test_the_side_of_a_plain_id_is_what_it_was_in_earlier_versions() -> None:
    """The documented hash, written out here, so that no patient moves who was trained on before."""
    for id in ["1001", "007", "q7-ann", "Zoë"]:
        for salt in map(str, range(20)):
            drawn = hashlib.sha256(f"{salt}\0patient {id}".encode()).digest()[:8]
            expected = SIDES.index("test" if int.from_bytes(drawn, "big") / 2**64 < 0.4 else "train")
            assert sides_of([id], Unit.PATIENT, salt) == [expected]


@pytest.mark.parametrize(("listed", "recorded"), [("1001", "1001.0"), ("1001.0", "1001"), ("1001.0", "1001.0")])
def test_a_purged_patient_is_left_out_in_every_form(listed: str, recorded: str, tmp_path: Path) -> None:
    Exclusions.read(tmp_path).with_ids([listed]).write(tmp_path)
    record = SourceRecord(1, "x.csv", "k", recorded, None, {})
    assert Exclusions.read(tmp_path).positions([record]) == {0}


def test_a_list_of_an_earlier_version_still_leaves_out_the_id_as_it_was_written() -> None:
    import hmac

    key = bytes(32)
    written = frozenset({hmac.new(key, b"1001.0", hashlib.sha256).hexdigest()})
    assert Exclusions(key, written).positions([SourceRecord(1, "x.csv", "k", "1001.0", None, {})]) == {0}


def site_of_two(folder: Path, ids: list[list[str]]) -> SiteConfig:
    """A site with two tables that list the patients."""
    sources = {}
    for name, listed in zip(("labs", "notes"), ids, strict=True):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("patient", "age", "size"), *((id, 40, "small") for id in listed)])
        settings = {"kind": "table", "path": str(folder / f"{name}.csv"), "columns": ["age"]}
        sources[name] = {**settings, "patient": "patient"}
    task = {"label": "size", "missing": "skip", "unmapped": "refuse", "public_size": 4}
    tasks = {name: {**task, "source": name} for name in sources}
    return site_config(folder, "north", unit="patient", sources=sources, tasks=tasks, split={"test_fraction": 0})


def test_check_counts_the_patients_that_two_sources_share(tmp_path: Path) -> None:
    config = site_of_two(tmp_path, [["1001", "1002", "1003"], ["1001.0", " 1003", "1004"]])
    found = {name: (outcome, detail) for name, outcome, detail, _ in data_checks(config, {})}
    assert found["patients"] == ("pass", "in common: 2 in labs and notes")
    assert found["sides"][1].startswith("4 patients to train on")


def test_check_warns_where_two_sources_share_no_patient(tmp_path: Path) -> None:
    config = site_of_two(tmp_path, [["007", "008"], ["7", "8"]])
    [(outcome, detail)] = [
        (outcome, detail) for name, outcome, detail, _ in data_checks(config, {}) if name == "patients"
    ]
    assert outcome == "warn"
    assert detail.startswith("in common: 0 in labs and notes")


def test_check_says_nothing_of_patients_where_each_record_is_a_unit(tmp_path: Path) -> None:
    config = site_of_two(tmp_path, [["1"], ["2"]]).model_copy(update={"unit": Unit.EXAMPLE})
    assert "patients" not in [name for name, *_ in data_checks(config, {})]


def test_rows_of_a_patient_in_a_simulation_stay_at_one_site_in_every_form() -> None:
    from simulations.partition import _group_by_unit

    index = [SourceRecord(at + 1, "x.csv", f"k{at}", id, None, {}) for at, id in enumerate(["1001", "7", "1001.0", ""])]
    assert _group_by_unit(index, Unit.PATIENT) == [[0, 2], [1], [3]]
    assert select_rows(None, index) == (dict.fromkeys(range(4)), [])
