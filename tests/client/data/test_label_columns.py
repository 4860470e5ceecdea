"""Label columns of a site: values and units of each column, and cells of one label that mean different things."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from client.config import SiteTask
from client.data.records import PlacedRecord, check_values, encode_labels
from client.data.sources import SourceRecord
from common.tasks import Task, open_task
from common.types import BadInput

DEATH = open_task({"kind": "survival", "boundaries": [365.25, 730.5, 1461]}, "death")
SIGNS = open_task({"kind": "multilabel", "labels": ["fever", "cough"]}, "signs")
AGE = open_task({"kind": "regression", "range": [0, 100]}, "age")


def columns(**changes: Any) -> SiteTask:
    values = {"source": "rows", "label": ["years", "status"], "missing": "skip", "public_size": 10}
    return SiteTask.model_validate({**values, **changes})


def encode(task: Task, own: SiteTask, *rows: dict[str, str]) -> tuple[list[Any], list[str]]:
    """Returns labels, None where there is none, and the reasons for which records are bad."""
    placed = [
        PlacedRecord("rows", at, f"unit {at}", 0, SourceRecord(at + 1, "rows.csv", str(at), None, None, row, True))
        for at, row in enumerate(rows)
    ]
    found = encode_labels("t", task, own, placed)
    labels = [label.tolist() if known else None for label, known in zip(found.labels, found.mask_R, strict=True)]
    return labels, [each.reason for each in found.rejected]


def test_times_are_multiplied_and_events_are_mapped_each_in_its_own_column() -> None:
    own = columns(values={"status": {"1": "0", "2": "1"}}, multiply={"years": 365.25})
    # A time of 1 or 2 is no event: values are those of their column.
    labels, reasons = encode(
        DEATH, own, {"years": "1", "status": "2"}, {"years": "2", "status": "1"}, {"years": " 4 ", "status": "2.0"}
    )
    assert labels == [[1, -1, -1], [0, 0, -1], [0, 0, 1]] and reasons == []


def test_a_time_or_an_event_that_is_missing_is_a_missing_label() -> None:
    rows = ({"years": "", "status": "1"}, {"years": "300", "status": ""}, {"years": "", "status": ""})
    assert encode(DEATH, columns(), *rows) == ([None] * 3, [])
    assert encode(DEATH, columns(missing="refuse"), *rows) == ([None] * 3, ["missing label"] * 3)
    # Of several labels each may be unknown.
    own = columns(label=["a", "b"])
    assert encode(SIGNS, own, {"a": "", "b": "1"}, {"a": "", "b": ""}) == ([[-1, 1], None], [])


def test_a_strange_time_or_event_is_a_bad_record_or_left_out_as_the_site_says() -> None:
    rows = ({"years": "-3", "status": "1"}, {"years": "9", "status": "lost"})
    said = ["expected a time of 0 or more, got a negative one", "expected 1 for an event or 0 for none"]
    assert encode(DEATH, columns(), *rows) == ([None, None], said)
    assert encode(DEATH, columns(unmapped="skip"), *rows) == ([None, None], [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "years"}, "label: expected 2 columns, for time and event, got 1"),
        ({"label": ["years", "status", "age"]}, "expected 2 columns, for time and event, got 3"),
        ({"values": {"1": "0", "2": "1"}}, "values: expected them under a column's name"),
    ],
)
def test_a_time_and_an_event_have_a_column_each_and_values_of_their_own(changes: dict[str, Any], said: str) -> None:
    own = columns(**changes)
    for use in (lambda: check_values("t", DEATH, own), lambda: encode(DEATH, own)):
        with pytest.raises(BadInput, match=said):
            use()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": {"status": {"2": "1"}, "1": "0"}}, "expected all of them under a column's name or none"),
        ({"values": {"stauts": {"2": "1"}}}, "values: expected names of this task's columns, got 'stauts'"),
        ({"multiply": {"days": 2.0}}, "multiply: expected names of this task's columns, got 'days'"),
        ({"multiply": {"years": 0.0}}, "greater than 0"),
    ],
)
def test_columns_are_named_as_they_are(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        columns(**changes)


def test_any_number_can_be_in_another_unit() -> None:
    own = columns(label="months", multiply={"months": 0.1})
    labels, reasons = encode(AGE, own, {"months": "3"}, {"months": "old"})
    assert labels[0] == pytest.approx(0.3) and reasons == ["expected one number"]
    assert own.read_cell("months", "3") == "0.3"  # Not 0.30000000000000004.


def test_values_under_a_columns_name_are_those_of_several_labels_too() -> None:
    own = columns(label=["a", "b"], values={"a": {"yes": "1", "no": "0"}, "b": {"yes": "0", "no": "1"}})
    assert encode(SIGNS, own, {"a": "yes", "b": "no"}, {"a": "no", "b": "no"}) == ([[1, 1], [0, 1]], [])


def test_a_file_that_sets_no_unit_is_dumped_as_before() -> None:
    assert "multiply" not in columns().model_dump()
    assert columns(multiply={"years": 2.0}).model_dump()["multiply"] == {"years": 2.0}
