"""Tables with one time step, or one value, in each row: series of vital signs as databases export them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.sources import open_source
from common.types import BadInput, BadRecord

WIDE = """stay,when,pulse,pressure,died,patient
A,2024-01-31 08:00,60,,0,p1
B,2024-02-01 23:00,90,7,1,p2
A,2024-01-31 10:00,64,9,0,p1
A,2024-01-31 09:00,,8,0,p1
A,2024-01-31 10:30,66,NA,0,p1
B,2024-02-02 00:00,92,,1,p2
"""
LONG = """stay;hour;sign;number
1;0,5;pulse;60
2;0;pulse;90
1;0,5;pressure;8,5
1;2,5;pulse;66
1;1,5;weight;70
3;1;weight;70
"""
NAN = np.nan


def open_table(folder: Path, text: str, **settings: Any) -> Any:
    (folder / "vitals.csv").write_text(text, encoding="utf-8")
    return open_source({"kind": "steps", "path": str(folder / "vitals.csv"), **settings}, "sources.v").open()


def open_wide(folder: Path, text: str = WIDE, **changes: Any) -> Any:
    settings = {"record": "stay", "time": "when", "columns": ["pulse", "pressure"], "gaps": "keep"}
    return open_table(folder, text, **{**settings, "labels": ["died"], "patient": "patient", **changes})


def open_long(folder: Path, **changes: Any) -> Any:
    settings = {"record": "stay", "time": "hour", "columns": ["pressure", "pulse"], "name": "sign", "value": "number"}
    return open_table(folder, LONG, **settings, **{"decimal": ",", "separator": ";", "gaps": "keep", **changes})


def test_rows_of_a_series_are_ordered_by_time_and_its_labels_are_the_same_in_all(tmp_path: Path) -> None:
    source = open_wide(tmp_path)
    first, second = source.index()
    assert [(r.row, r.patient, r.cells["died"], r.fault) for r in (first, second)] == [
        (1, "p1", "0", ""),
        (2, "p2", "1", ""),
    ]
    np.testing.assert_array_equal(source.load(0), [[60, NAN], [NAN, 8], [64, 9], [66, NAN]])
    np.testing.assert_array_equal(source.load(1), [[90, 7], [92, NAN]])


def test_steps_of_a_fixed_time_average_their_values_and_are_gaps_without_any(tmp_path: Path) -> None:
    np.testing.assert_array_equal(open_wide(tmp_path, every=3600).load(0), [[60, NAN], [NAN, 8], [65, 9]])
    np.testing.assert_array_equal(open_wide(tmp_path, every=3600, gaps="hold").load(0), [[60, 8], [60, 8], [65, 9]])
    half_hours = open_wide(tmp_path, every=1800, columns=["pulse"]).load(0)
    np.testing.assert_array_equal(half_hours, [60, NAN, NAN, NAN, 64, 66])
    text = "stay,when,pulse,pressure,died,patient\n" + "".join(f"A,0.{n},{n},1,0,p\n" for n in range(1, 8))
    np.testing.assert_array_equal(open_wide(tmp_path, text, every=0.1).load(0)[:, 0], range(1, 8))


def test_one_value_in_each_row_is_sorted_into_the_named_channels(tmp_path: Path) -> None:
    source = open_long(tmp_path, labels=[])
    np.testing.assert_array_equal(source.load(0), [[8.5, 60], [NAN, 66]])
    hours = open_long(tmp_path, every=1.0).load(0)
    np.testing.assert_array_equal(hours, [[8.5, 60], [NAN, NAN], [NAN, 66]])
    with pytest.raises(BadRecord, match="a value of one of the channels"):
        source.load(2)


def test_labels_of_another_table_belong_to_the_series_of_their_number(tmp_path: Path) -> None:
    (tmp_path / "stays.csv").write_text("died;stay;who\n1;2.0;p2\n0;1;p1\n0;9;p9\n0;;p8\n", encoding="utf-8")
    source = open_long(tmp_path, records=str(tmp_path / "stays.csv"), patient="who")
    index = source.index()
    assert [(r.row, r.file, r.patient, r.cells["died"]) for r in index[:2]] == [
        (1, "stays.csv", "p2", "1"),
        (2, "stays.csv", "p1", "0"),
    ]
    assert [r.fault for r in index] == ["", "", "no time step in vitals.csv", "no value in the column 'stay'"]
    np.testing.assert_array_equal(source.load(0), [[NAN, 90]])


def test_rows_of_labels_for_one_series_make_those_of_no_other_patient_unusable(tmp_path: Path) -> None:
    labels, said = tmp_path / "stays.csv", "another row has the same value in the column 'stay'"
    labels.write_text("died;stay;who\n1;2;p2\n0;2;p1\n0;2.0;p1.0\n0;2;1\n0;2;1.0\n", encoding="utf-8")
    found = open_long(tmp_path, records=str(labels), patient="who").index()
    assert [record.fault for record in found] == ["", "", "", said, said]
    assert {record.fault for record in open_long(tmp_path, records=str(labels)).index()} == {said}


def test_a_long_series_of_many_channels_takes_no_more_memory_than_others(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text("stay,hour,what,is\nA,0,c0,1\nA,10000,c0,1\nB,0,c0,1\n", encoding="utf-8")
    columns = {"record": "stay", "time": "hour", "name": "what", "value": "is", "every": 1, "gaps": "keep"}
    settings = {"kind": "steps", "path": str(tmp_path / "wide.csv"), "columns": [f"c{at}" for at in range(4096)]}
    source = open_source(settings | columns, "sources.vitals").open()
    assert source.load(1).shape == (1, 4096)
    with pytest.raises(BadRecord, match="at most 32 million values"):
        source.load(0)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (",2024-01-31 08:00,60,8,0,p1", "a time step without a value in the column 'stay'"),
        ("A,2024-01-31 08:00,60,8,1,p1", "its rows differ in the column 'died'"),
        (",2024-01-31 08:00,60,8,1,", "a time step without a value in the column 'stay'"),
        ("A,2024-01-31 08:00,60,8,0,p1,more", "the row has more cells than there are columns"),
    ],
)
def test_rows_that_fit_no_series_are_bad_records_of_their_own(line: str, fault: str, tmp_path: Path) -> None:
    source = open_wide(tmp_path, WIDE + line + "\n")
    index = source.index()
    assert [r.fault for r in index if r.fault] == [fault]
    (position,) = [at for at, r in enumerate(index) if r.fault]
    with pytest.raises(BadRecord, match=fault):
        source.load(position)
    good = next(at for at, r in enumerate(index) if r.patient == "p2")
    np.testing.assert_array_equal(source.load(good), [[90, 7], [92, NAN]])


def test_rows_of_another_patient_are_another_series_whatever_their_number_is(tmp_path: Path) -> None:
    source = open_wide(tmp_path, WIDE + "A,2024-01-31 08:00,70,5,1,p3\n")
    assert [(r.patient, r.cells["died"], r.fault) for r in source.index()] == [
        ("p1", "0", ""),
        ("p2", "1", ""),
        ("p3", "1", ""),
    ]
    np.testing.assert_array_equal(source.load(0), open_wide(tmp_path).load(0))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("A,2024-01-31 08:00,high,8,0,p1", "numbers in the columns of values"),
        ("A,31.1.2024,60,8,0,p1", "numbers, or dates and times as 2024-01-31 08:15"),
        ("A,1024-01-31 08:00,60,8,0,p1", "at most 1,048,576 steps"),
    ],
)
def test_a_series_with_a_bad_cell_is_a_bad_record(line: str, sentence: str, tmp_path: Path) -> None:
    source = open_wide(tmp_path, WIDE + line + "\n", every=60)
    with pytest.raises(BadRecord, match=sentence), warnings.catch_warnings(action="error"):
        source.load(0)
    assert source.load(1).shape == (61, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "sign"}, "name, value: expected both"),
        ({"time": None, "every": 1.0}, "time: expected a column beside"),
        ({"records": "x.csv"}, "labels: expected none beside `records`"),
        ({"columns": ["pulse", "pulse"]}, "columns: expected each channel once"),
        ({"columns": ["puls"]}, "exactly one column 'puls'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        open_wide(tmp_path, **changes)
