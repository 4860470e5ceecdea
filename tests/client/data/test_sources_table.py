"""Tables: cells stay text, what is missing is declared, and no message repeats a cell."""

from __future__ import annotations

import struct
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.data.sources import Source, open_source
from client.data.sources.parts.frame import FAULT, read_frame
from common.types import BadInput

HEART_COLUMNS = [f"column_{number}" for number in range(1, 15)]
FED_HEART = {"cleveland": (303, 303), "hungarian": (294, 261), "switzerland": (123, 46), "va": (200, 130)}


def write(folder: Path, text: str, name: str = "rows.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def table(path: Path, **settings: Any) -> Source:
    return open_source({"kind": "table", "path": str(path), "columns": ["a", "b"], **settings}, "sources.rows").open()


def loaded(source: Source) -> list[dict[str, str]]:
    return [dict(source.load(position)) for position in range(len(source.index()))]


def test_cells_stay_the_text_that_was_written(tmp_path: Path) -> None:
    path = write(tmp_path, 'a,b,label\n1.0,007,yes\n NaN ,"x, y",null\n1e3,,\n')
    assert loaded(table(path)) == [{"a": "1.0", "b": "007"}, {"a": "NaN", "b": "x, y"}, {"a": "1e3", "b": ""}]
    assert [record.cells["label"] for record in table(path).index()] == ["yes", "null", ""]


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("1,2,3\n4,5,6\n", {"header": ["a", "b", "label"]}),
        ("a\tb\tlabel\n1\t2\t3\n4\t5\t6\n", {"separator": "\t"}),
        ("  a   b label\n   1 2\t3\n 4  5   6\n", {"separator": "whitespace"}),
        ("\ufeffa;b;label\n1;2;3\n\n4;5;6\n", {"separator": ";"}),
    ],
)
def test_the_same_rows_are_read_from_every_way_of_writing_them(
    tmp_path: Path, text: str, settings: dict[str, Any]
) -> None:
    source = table(write(tmp_path, text), **settings)
    assert loaded(source) == [{"a": "1", "b": "2"}, {"a": "4", "b": "5"}]
    assert [record.cells["label"] for record in source.index()] == ["3", "6"]
    assert [record.row for record in source.index()] == [1, 2]


def test_a_parquet_file_is_read_as_text_too(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None], "label": [True, False]})
    frame.to_parquet(tmp_path / "rows.parquet")
    assert loaded(table(tmp_path / "rows.parquet")) == [{"a": "1", "b": "x"}, {"a": "2", "b": ""}]


def test_a_parquet_cell_is_read_the_same_whatever_the_others_hold(tmp_path: Path) -> None:
    """Pandas wrote all days of a column with their time as soon as one of them had one."""
    days = [datetime(2020, 1, 1), datetime(2020, 1, 2)]
    table = pa.table({"day": pa.array([*days, datetime(2020, 1, 3, 4, 5)], pa.timestamp("us"))})
    for count in (2, 3):
        pq.write_table(table[:count], tmp_path / "rows.parquet")
        cells = read_frame(tmp_path / "rows.parquet")["day"].tolist()
        assert cells == ["2020-01-01", "2020-01-02", "2020-01-03 04:05:00"][:count]


@pytest.mark.parametrize(
    "column",
    [
        pa.Array.from_buffers(pa.string(), 2, [None, *map(pa.py_buffer, (struct.pack("<3i", 0, 1, 2), b"a\xff"))]),
        pa.array([b"a", b"\xff"]),
        pa.array([[0], [2**62]], pa.list_(pa.timestamp("us"))),
    ],
    ids=["text", "bytes", "a year that Python does not know"],
)
def test_a_parquet_cell_that_cannot_be_read_is_a_fault_of_its_row_alone(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"x": [1, 2], "note": column}), tmp_path / "rows.parquet")
    frame = read_frame(tmp_path / "rows.parquet")
    assert frame["x"].tolist() == ["1", ""]
    assert [bool(fault) for fault in frame[FAULT]] == [False, True]


@pytest.mark.parametrize("first", ['p0,"x', "p0", "p0,1,2"])
def test_the_first_row_without_a_header_leaves_rows_of_several_lines_as_they_are(tmp_path: Path, first: str) -> None:
    path = write(tmp_path, f'{first}\np1,"two\nlines"\np2,b\n')
    assert read_frame(path, columns=["a", "b"])["b"].tolist()[1:] == ["two\nlines", "b"]


@pytest.mark.parametrize("cell", [b"\xff", b"z\0", b"z\x0cz"], ids=["not UTF-8", "null character", "form feed"])
def test_one_line_of_a_file_of_series_is_one_record_whatever_it_holds(tmp_path: Path, cell: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(b"a,1,2\n" + cell + b",1,2\nb,1,2\n")
    settings = {"kind": "series", "path": str(tmp_path / "rows.csv"), "labels": {"label": 1}}
    labels = [record.cells["label"] for record in open_source(settings, "sources.rows").open().index()]
    assert (len(labels), labels[0], labels[2]) == (3, "a", "b")


def test_labels_are_never_part_of_the_input(tmp_path: Path) -> None:
    source = table(write(tmp_path, "a,b,label\n1,2,3\n"))
    assert set(source.load(0)) == {"a", "b"}


def test_incomplete_rows_are_no_records_and_the_others_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,c\n1,?,x\n2,5,\n3,6,z\n")
    source = table(path, missing_values=["", "?"], complete=["b"])
    assert loaded(source) == [{"a": "2", "b": "5"}, {"a": "3", "b": "6"}]
    assert [record.row for record in source.index()] == [2, 3]


def test_missing_values_are_read_as_nothing(tmp_path: Path) -> None:
    source = table(write(tmp_path, "a,b\n?,-9\n1,2\n"), missing_values=["?", "-9"])
    assert loaded(source) == [{"a": "", "b": ""}, {"a": "1", "b": "2"}]


def test_a_row_that_ends_early_lacks_its_last_cells(tmp_path: Path) -> None:
    assert loaded(table(write(tmp_path, "a,b\n1\n2,3\n"))) == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]


def test_a_table_without_rows_is_an_empty_source(tmp_path: Path) -> None:
    source = table(write(tmp_path, "a,b\n"))
    assert source.index() == []
    assert source.digest() != table(write(tmp_path, "a,b\n1,2\n")).digest()


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("a,label\n1,2\n", {}, "expected exactly one column 'b'"),
        ("a,b,b\n1,2,3\n", {}, "expected exactly one column 'b'"),
        ("a,b\n1,2\n", {"patient": "person"}, "expected exactly one column 'person'"),
        ("1,2,q7\n", {"header": ["a", "b"]}, "expected 2 columns, as many as `columns` names, got 3"),
        ("", {}, "expected a readable table, got an empty one"),
        # The first record stands where a header was expected.
        ("q7,2\n3,4\n", {}, "expected exactly one column 'a'"),
    ],
)
def test_a_table_that_does_not_fit_its_settings_is_refused_without_a_word_of_its_content(
    tmp_path: Path, text: str, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadInput) as caught:
        table(write(tmp_path, text), **settings)
    assert expected in str(caught.value)
    assert "q7" not in str(caught.value)


def test_a_key_of_an_earlier_version_is_read_under_its_name_of_now(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b,person\n1,2,p\n")
    settings = {"kind": "table", "path": str(path), "inputs": ["b"], "patient_column": "person"}
    source = open_source(settings, "sources.rows").open()
    assert loaded(source) == [{"b": "2"}]
    assert [record.patient for record in source.index()] == ["p"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"separator": "::"}, "sources.rows.separator: expected one character or 'whitespace', got '::'"),
        ({"header": False}, "sources.rows.header: expected the columns' names as a list"),
        ({"columns": []}, "sources.rows.columns"),
        ({"columns": ["a"], "inputs": ["a"]}, "sources.rows: inputs: this key has another name now, write `columns`"),
        ({"pateint": "p"}, "sources.rows.pateint: unknown key (nearest: 'patient')"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        table(write(tmp_path, "a,b\n1,2\n"), **settings)
    assert expected in str(caught.value)


CELL = st.text("ab\x00", max_size=2)
ROWS = st.lists(st.tuples(CELL, CELL), max_size=2)


@given(first=ROWS, second=ROWS)
@example(first=[("a", "")], second=[("", "a")])
@example(first=[("a", "b")], second=[("a", "b"), ("", "")])
@example(first=[("a\x00", "b")], second=[("a", "\x00b")])
@example(first=[("a", "b")], second=[("a", "b")])
def test_digests_and_keys_agree_exactly_where_the_inputs_do(
    first: list[tuple[str, str]], second: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sources = []
    for rows in (first, second):
        path = tmp_path_factory.mktemp("rows") / "rows.parquet"
        pd.DataFrame(rows, columns=["a", "b"], dtype="string").to_parquet(path)
        sources.append(table(path))
    assert (sources[0].digest() == sources[1].digest()) == (loaded(sources[0]) == loaded(sources[1]))
    if first and second:
        keys = [source.index()[0].key for source in sources]
        assert (keys[0] == keys[1]) == (loaded(sources[0])[0] == loaded(sources[1])[0])


@pytest.mark.parametrize("hospital", FED_HEART)
def test_the_four_hospitals_have_the_published_numbers_of_rows(assets: Path, hospital: str) -> None:
    settings: dict[str, Any] = {
        "header": HEART_COLUMNS,
        "columns": [f"column_{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)],
        "missing_values": ["", "?"],
    }
    path = assets / "data" / "fed_heart_disease" / f"processed.{hospital}.data"
    # FLamby (Ogier du Terrail et al. 2022) leaves out columns 11 to 13 and then incomplete rows.
    complete = [*settings["columns"], "column_14"]
    found = len(table(path, **settings).index()), len(table(path, **settings, complete=complete).index())
    assert found == FED_HEART[hospital]


def test_points_that_group_digits_are_no_decimal_points_where_the_decimal_sign_is_a_comma(tmp_path: Path) -> None:
    path = write(tmp_path, "a;b;label\n1.105;1.234.567,8;x\n-1.000,5;4.1;y\n0.192;0,5;z\n")
    read = loaded(table(path, separator=";", decimal=",", thousands="none"))
    assert read == [{"a": "1.105", "b": "1234567.8"}, {"a": "-1000.5", "b": "4.1"}, {"a": "0.192", "b": "0.5"}]
    assert loaded(table(path, separator=";"))[1]["a"] == "-1.000,5"


def test_a_decimal_comma_and_an_encoding_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("a;b;label\n1,5;süß;x\n-2,25e3;1,2,3;y\n7;,5;z\n".encode("latin-1"))
    source = table(path, separator=";", decimal=",", encoding="latin-1")
    assert loaded(source) == [{"a": "1.5", "b": "süß"}, {"a": "-2.25e3", "b": "1,2,3"}, {"a": "7", "b": ".5"}]
    assert [record.fault for record in table(path, separator=";").index()] == [
        "the row is not UTF-8 text; save the table as CSV UTF-8, or set `encoding`",
        "",
        "",
    ]
