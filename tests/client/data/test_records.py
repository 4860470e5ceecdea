"""The split: patient-disjoint, the source's own word first, and stable when rows are added or reordered."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.config import Split
from client.data.records import SIDES, UsableRecord, place_records
from client.data.sources import SourceRecord
from common.types import BadInput, Unit

HALF = Split(test_fraction=0.5, salt="pepper")
TRAIN, TEST = SIDES.index("train"), SIDES.index("test")


def member(
    key: str, patient: str | None = None, side: int | None = None, source: str = "scans", identified: bool = True
) -> UsableRecord:
    record = SourceRecord(int.from_bytes(key.encode()) + 1, f"{source}.csv", key, patient, None, {}, identified)
    return UsableRecord(source, 0, patient or f"{source} {key}", side, record)


def sides(members: list[UsableRecord], split: Split = HALF) -> dict[tuple[str, str, str | None], int | None]:
    """Each member's side after placing."""
    placed, _ = place_records(members, split, Unit.PATIENT)
    return {(found.source, found.record.key, found.record.patient): found.side for found in placed}


KEYS = st.text("abcdef", min_size=1, max_size=2)
PATIENTS = st.sampled_from([None, "", "p1", "p2", "p3", "p4", "p5"])
MEMBERS = st.lists(
    st.builds(member, KEYS, PATIENTS, st.none(), st.sampled_from(["scans", "bloods"])),
    unique_by=lambda found: (found.source, found.record.key),
    max_size=12,
)


@given(MEMBERS, MEMBERS, st.randoms(use_true_random=False))
def test_a_record_keeps_its_side_when_others_are_added_and_all_are_shuffled(
    members: list[UsableRecord], more: list[UsableRecord], random: object
) -> None:
    known = {(found.source, found.record.key) for found in members}
    added = [*members, *(found for found in more if (found.source, found.record.key) not in known)]
    random.shuffle(added)  # type: ignore[attr-defined]
    assert sides(members).items() <= sides(added).items()


STATED = st.builds(
    member, KEYS, PATIENTS, st.sampled_from([None, TRAIN, TEST]), st.sampled_from(["scans", "bloods"]), st.booleans()
)


@given(st.lists(STATED, max_size=12))
def test_no_patient_and_no_record_stands_on_both_sides(members: list[UsableRecord]) -> None:
    try:
        placed, problems = place_records(members, HALF, Unit.PATIENT)
    except BadInput:
        stated = {(found.record.patient, found.side) for found in members if found.side is not None}
        assert any({(patient, TRAIN), (patient, TEST)} <= stated for patient, _ in stated if patient)
        return
    assert len(placed) + len(problems) == len(members)
    people: dict[int | None, set[object]] = {TRAIN: set(), TEST: set()}
    records: dict[int | None, set[object]] = {TRAIN: set(), TEST: set()}
    for found in placed:
        if found.record.patient:
            people[found.side].add(found.record.patient)
        records[found.side].add((found.source, found.record.key, found.record.identified))
    assert not people[TRAIN] & people[TEST]
    assert not {entry for entry in records[TRAIN] & records[TEST] if entry[2]}  # type: ignore[index]


@given(st.lists(STATED, max_size=12))
def test_a_stated_side_is_kept(members: list[UsableRecord]) -> None:
    try:
        placed, _ = place_records(members, HALF, Unit.PATIENT)
    except BadInput:
        return
    for before in members:
        for after in placed:
            if after.record is before.record and before.side is not None:
                assert after.side == before.side


def test_the_rest_of_a_patient_follows_what_a_source_states() -> None:
    for side in (TRAIN, TEST):
        for number in range(20):
            patient = f"p{number}"
            members = [member("a", patient), member("b", patient, side), member("c", patient, source="bloods")]
            assert set(sides(members).values()) == {side}


def test_a_patient_stated_on_both_sides_is_an_error_that_names_the_rows_only() -> None:
    members = [member("a", "q7-ann", TRAIN), member("b", "q7-ann", TEST, source="bloods")]
    with pytest.raises(BadInput, match=r"both sides of the split: scans\.csv row 98 and bloods\.csv row 99") as caught:
        place_records(members, HALF, Unit.PATIENT)
    assert "q7" not in str(caught.value)


def test_a_record_stated_on_both_sides_is_not_tested_on() -> None:
    placed, problems = place_records(
        [member("a", side=TEST), member("a", side=TRAIN), member("b", side=TEST)], HALF, Unit.PATIENT
    )
    assert [(found.record.key, found.side) for found in placed] == [("a", TRAIN), ("b", TEST)]
    assert [(problem.file, problem.row, problem.reason) for problem in problems] == [
        ("scans.csv", 98, "the same record is on the train side")
    ]


def test_equal_rows_of_a_table_may_be_two_people() -> None:
    members = [member("a", side=side, identified=False) for side in (TEST, TRAIN)]
    placed, problems = place_records(members, HALF, Unit.PATIENT)
    assert len(placed) == 2
    assert not problems


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_the_hash_holds_out_the_fraction_that_was_asked_for(fraction: float) -> None:
    count = 4000
    found = sides([member(f"k{number}") for number in range(count)], Split(test_fraction=fraction, salt="s"))
    tolerance = 4 * math.sqrt(count * fraction * (1 - fraction))
    assert abs(sum(side == TEST for side in found.values()) - fraction * count) <= tolerance


def test_another_salt_holds_out_others() -> None:
    members = [member(f"k{number}") for number in range(100)]
    assert sides(members) != sides(members, Split(test_fraction=0.5, salt="another"))


def test_one_record_more_moves_no_other_where_each_is_a_unit_of_its_own() -> None:
    """A stated side that carried a patient's other records along would move the training sum by many units at once."""
    for number in range(20):
        patient = f"p{number}"
        members = [member(key, patient) for key in "abcdef"]
        before, _ = place_records(members, HALF, Unit.EXAMPLE)
        for side in (TRAIN, TEST):
            after, _ = place_records([*members, member("new", patient, side)], HALF, Unit.EXAMPLE)
            assert [found.side for found in after[:-1]] == [found.side for found in before]
            assert after[-1].side == side
