"""The split: patient-disjoint, the source's own word first, and stable when rows are added or reordered."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.config import Split
from client.data.records import (
    SIDES,
    TaskLabels,
    UsableRecord,
    count_copies,
    find_usable,
    place_labels,
    place_records,
    select_rows,
)
from client.data.sources import SourceRecord
from common.backbones import SPEECH
from common.tasks import PlacesLabels, open_task
from common.types import Unit

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
def test_every_record_is_placed_and_no_patient_stands_on_both_sides(members: list[UsableRecord]) -> None:
    placed, _ = place_records(members, HALF, Unit.PATIENT)
    assert [found.record for found in placed] == [found.record for found in members]
    people: dict[int | None, set[object]] = {TRAIN: set(), TEST: set()}
    for found in placed:
        if found.record.patient:
            people[found.side].add(found.record.patient)
    assert not people[TRAIN] & people[TEST]


@given(st.lists(STATED, max_size=12), st.lists(STATED, min_size=1, max_size=4), st.sampled_from(list(Unit)))
def test_one_unit_more_changes_nothing_of_any_other(
    members: list[UsableRecord], more: list[UsableRecord], unit: Unit
) -> None:
    """Add/remove neighbours, in both units: no record of another unit is removed, moved, rejected or listed."""

    def keyed(records: list[UsableRecord], what: str) -> list[UsableRecord]:
        patients = [found.record.patient if unit is Unit.PATIENT else None for found in records]
        return [
            replace(found, unit_key=f"patient {patient}" if patient else f"{what} {at}")
            for at, (found, patient) in enumerate(zip(records, patients, strict=True))
        ]

    before = keyed(members, "old")
    one = keyed(more, "new")
    added = [found for found in one if found.unit_key == one[0].unit_key]
    if added[0].unit_key in {found.unit_key for found in before}:
        before = [found for found in before if found.unit_key != added[0].unit_key]
    placed, listed = place_records(before, HALF, unit)
    after, listed_after = place_records([*added, *before], HALF, unit)
    assert after[len(added) :] == placed
    own = [(found.record.file, found.record.row) for found in added]
    assert [(found.file, found.row) for found in listed_after][len(listed_after) - len(listed) :] == [
        (found.file, found.row) for found in listed
    ]
    assert all((found.file, found.row) in own for found in listed_after[: len(listed_after) - len(listed)])


@given(st.lists(STATED, max_size=12), st.sampled_from(list(Unit)))
def test_a_stated_side_is_kept_or_listed(members: list[UsableRecord], unit: Unit) -> None:
    placed, listed = place_records(members, HALF, unit)
    rows = {(found.file, found.row) for found in listed}
    for before, after in zip(members, placed, strict=True):
        if before.side is not None and (before.record.file, before.record.row) not in rows:
            assert after.side == before.side
    assert unit is Unit.PATIENT or not listed


def test_the_rest_of_a_patient_follows_what_a_source_states() -> None:
    for side in (TRAIN, TEST):
        for number in range(20):
            patient = f"p{number}"
            members = [member("a", patient), member("b", patient, side), member("c", patient, source="bloods")]
            assert set(sides(members).values()) == {side}


def test_a_patient_stated_on_both_sides_is_trained_on_and_listed_and_nobody_else_is() -> None:
    members = [
        member("a", "q7-ann", TRAIN),
        member("b", "q7-ann", TEST, source="bloods"),
        member("c", "q7-ann"),
        member("d", "q7-bea", TEST),
        member("e", side=TEST),
    ]
    placed, listed = place_records(members, HALF, Unit.PATIENT)
    assert [found.side for found in placed] == [TRAIN, TRAIN, TRAIN, TEST, TEST]
    assert [(found.file, found.row, found.is_used) for found in listed] == [
        ("scans.csv", 98, True),
        ("bloods.csv", 99, True),
        ("scans.csv", 100, True),
    ]
    assert "q7" not in repr(listed)
    placed, listed = place_records(members, HALF, Unit.EXAMPLE)
    assert [found.side for found in placed if found.record.key != "c"] == [TRAIN, TEST, TEST, TEST]
    assert not listed


def test_a_record_that_is_trained_on_removes_no_copy_of_it_that_is_held_out() -> None:
    copies = [member("a", f"p{number}", TEST) for number in range(60)]
    for unit in Unit:
        placed, listed = place_records([*copies, member("a", "other", TRAIN)], HALF, unit)
        assert [found.side for found in placed] == [TEST] * 60 + [TRAIN]
        assert not listed
        assert count_copies(placed) == 60
        assert count_copies(placed[:60]) == 0


def test_equal_rows_of_a_table_may_be_two_people() -> None:
    members = [member("a", side=side, identified=False) for side in (TEST, TRAIN)]
    placed, _ = place_records(members, HALF, Unit.PATIENT)
    assert len(placed) == 2
    assert count_copies(placed) == 0


def test_a_word_that_is_no_side_rejects_that_record_alone() -> None:
    sides = ["train", "validation", "test", "", "Train"]
    index = [SourceRecord(at + 1, "x.csv", f"k{at}", None, side, {}) for at, side in enumerate(sides)]
    usable, rejected = find_usable("x", index, select_rows(None, index)[0], {}, Unit.EXAMPLE)
    assert [found.side for found in usable] == [TRAIN, TEST, None]
    assert [(found.row, found.is_used) for found in rejected] == [(2, False), (5, False)]
    assert not any("alid" in found.reason for found in rejected)


def test_a_line_of_a_row_list_that_names_no_row_is_rejected_alone(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    lines = ["1,train", "nine,test", "7,train", "1,test", "3,", "-2,train", "2.0,test", ",", "2,test", "9" * 5000 + ","]
    rows.write_text("row,split\n" + "\n".join(lines) + "\n")
    index = [SourceRecord(at + 1, "x.csv", f"k{at}", None, None, {}) for at in range(3)]
    sides, rejected = select_rows(rows, index)
    assert sides == {0: "train", 2: None, 1: "test"}
    assert [(found.file, found.row) for found in rejected] == [
        ("rows.csv", number) for number in (2, 3, 4, 6, 7, 8, 10)
    ]


def test_a_source_without_patients_has_no_usable_record_where_the_unit_is_the_patient() -> None:
    index = [SourceRecord(1, "x.csv", "k", None, None, {})]
    usable, rejected = find_usable("x", index, {0: None}, {}, Unit.PATIENT)
    assert not usable
    assert [found.reason for found in rejected] == [
        "the unit is patient, and the source has no patients; name its column"
    ]


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


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "ctc", "symbols": ["yes", "no"], "unit": "words", "max_symbols": 4},
        {"kind": "seq2seq", "max_tokens": 4},
    ],
    ids=["behind each label stand its places", "nothing stands behind it"],
)
def test_a_site_without_a_label_has_labels_as_long_as_those_of_others(settings: dict[str, object]) -> None:
    task = open_task(settings, "task")
    assert isinstance(task, PlacesLabels)
    label = torch.tensor([[0, 1, -1, -1]], dtype=torch.int32)
    marks_RP = torch.full((1, 9), SPEECH)
    widths = set()
    for is_known in (True, False):
        labels = TaskLabels(label, torch.tensor([is_known]), ())
        placed = place_labels("said", task, labels, [], marks_RP)
        assert placed.mask_R.tolist() == [is_known] and not placed.rejected
        widths.add(placed.labels.shape[1])
    assert len(widths) == 1
