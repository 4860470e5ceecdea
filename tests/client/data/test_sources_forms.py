"""Tables as hospitals save them: encodings, marks, lines around the table, spreadsheets; a wrong setting is named."""

from __future__ import annotations

import datetime
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.sources import Source, open_source
from client.data.sources.parts.tables.numbers import convert_number
from client.inspect.folders import inspect
from client.inspect.form import sniff
from common.types import BadInput, BadRecord

ROWS = [["age", "dose", "finding"], *[[str(40 + n), f"{n},5", "ab"[n % 2]] for n in range(6)]]


def opened(path: Path, columns: tuple[str, ...] = ("age", "dose"), **settings: Any) -> Source:
    return open_source({"kind": "table", "path": str(path), "columns": list(columns), **settings}, "sources.x").open()


def cells(source: Source) -> list[list[str]]:
    return [list(source.load(position).values()) for position in range(len(source.index()))]


def text(rows: list[list[str]] = ROWS, separator: str = ";") -> str:
    return "".join(separator.join(row) + "\n" for row in rows)


EXPECTED = [[str(40 + n), f"{n}.5"] for n in range(6)]


def save(path: Path, data: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(data.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("data", "encoding", "settings"),
    [
        (text(), "utf-16", {"encoding": "utf-16"}),
        ("sep=;\n" + text(), "utf-8", {}),
        ("sep=;\r\n" + text().replace("\n", "\r\n"), "utf-8-sig", {}),
        ("# drawn on Monday\n# by the ward\n" + text(), "utf-8", {"comment": "#"}),
        ("Values of the ward\n\n" + text(), "utf-8", {"skip_lines": 2}),
        ("Values of the ward;;\n" + text(), "utf-8", {"skip_lines": 1}),
        (text().replace("\n", ";\n"), "utf-8", {}),
        (text().replace("finding", "befund für"), "cp1252", {"encoding": "latin-1"}),
    ],
    ids=["UTF-16", "sep", "sep with BOM", "comments", "title", "wide title", "trailing separators", "umlaut"],
)
def test_inspect_writes_down_the_form_that_the_source_reads(
    tmp_path: Path, data: str, encoding: str, settings: dict[str, Any]
) -> None:
    path = save(tmp_path / "rows.csv", data, encoding)
    source = opened(path, separator=";", decimal=",", **settings)
    assert cells(source) == EXPECTED
    found = inspect(path, None).source
    wanted = {"separator": ";", "decimal": ",", **settings}
    assert {key: found[key] for key in wanted} == wanted
    assert not {"comment", "skip_lines", "encoding", "thousands"} & (set(found) - set(wanted))


def test_a_wrong_form_is_answered_in_one_sentence(tmp_path: Path) -> None:
    wide = save(tmp_path / "wide.csv", text(), "utf-16")
    with pytest.raises(BadInput, match="write `encoding: utf-16`"):
        opened(wide, separator=";")
    stated = save(tmp_path / "stated.csv", "sep=;\n" + text())
    with pytest.raises(BadInput, match="write `separator: ';'`"):
        opened(stated)
    with pytest.raises(BadInput, match="looks separated by ';'"):
        opened(save(tmp_path / "plain.csv", text()))
    with pytest.raises(BadInput, match="expected an encoding such as utf-8"):
        opened(wide, encoding="utf-99")


def test_marks_between_thousands() -> None:
    read = [
        ("1,234.5", ".", ",", "1234.5"),
        ("1,234", ".", ",", "1234"),
        ("12,34", ".", ",", "12,34"),
        ("1 234 567,8", ",", " ", "1234567.8"),
        ("1\u202f234,8", ",", " ", "1234.8"),
        ("1'234.5", ".", "'", "1234.5"),
        ("4.100", ",", ".", "4100"),
        ("4.100,25", ",", None, "4100.25"),
        ("4.100", ",", "none", "4.100"),
        ("-3,5e2", ",", None, "-3.5e2"),
        ("1,234", ".", None, "1,234"),
    ]
    for cell, decimal, thousands, expected in read:
        assert convert_number(cell, decimal, thousands) == expected, cell  # type: ignore[arg-type]


def test_a_point_among_decimal_commas_costs_its_row_until_the_file_says_what_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.csv", "id;dose\n1.000;1,5\n2.000;4.100\n3.000;0.192\n")
    settings: dict[str, Any] = {"separator": ";", "decimal": ",", "patient": "id"}
    source = opened(path, ("dose",), **settings)
    assert [record.fault != "" for record in source.index()] == [False, True, False]
    with pytest.raises(BadRecord, match="thousands: none") as caught:
        source.load(1)
    assert "4.100" not in str(caught.value)
    # Ids are no numbers.
    assert [record.patient for record in source.index()] == ["1.000", "2.000", "3.000"]
    assert cells(opened(path, ("dose",), thousands="none", **settings)) == [["1.5"], ["4.100"], ["0.192"]]
    grouped = opened(path, ("dose",), thousands=".", **settings)
    assert grouped.load(1) == {"dose": "4100"} and "three digits" in grouped.index()[2].fault
    with pytest.raises(BadInput, match="another mark than the decimal sign"):
        opened(path, ("dose",), thousands=",", **settings)


def test_inspect_tells_marks_between_thousands(tmp_path: Path) -> None:
    for data, comma, thousands in (
        ("a;b\n1.234,5;x\n4.100;y\n", True, "."),
        ("a;b\n1,5;x\n0.192;y\n", True, "none"),
        ("a;b\n1,5;x\n4.100;y\n", True, None),
        ('a,b\n"1,234.5",x\n"2,000",y\n', False, ","),
        ("a;b\n1'234.5;x\n7;y\n", False, "'"),
    ):
        form = sniff(save(tmp_path / "rows.csv", data))
        assert (form.is_comma, form.thousands) == (comma, thousands), data


def test_codes_with_leading_zeros_are_no_amounts(tmp_path: Path) -> None:
    rows = [["ward", "age", "finding"], *[[f"00{n % 3}", str(40 + n), "ab"[n % 2]] for n in range(30)]]
    columns = {each.name: each for each in inspect(save(tmp_path / "rows.csv", text(rows, ",")), None).columns}
    assert columns["ward"].kind == "category" and columns["ward"].values == ("000", "001", "002")


def write_xlsx(path: Path, rows: list[list[Any]], title: str = "q7-ann") -> Any:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    book.save(path)
    return book


SHEET: list[list[Any]] = [
    ["age", "dose", "day", "ill", "finding"],
    [41, 0.5, datetime.datetime(2024, 3, 1), True, "a"],
    [None, None, None, None, None],
    [42.0, 1e-3, datetime.datetime(2024, 3, 2, 7, 30), False, "b"],
]
TEXTS = [["41", "0.5", "2024-03-01", "true"], ["42", "0.001", "2024-03-02 07:30:00", "false"]]


def test_an_xlsx_sheet_is_read_as_text(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "a.xlsx", SHEET)
    assert cells(opened(tmp_path / "a.xlsx", ("age", "dose", "day", "ill"))) == TEXTS
    assert inspect(tmp_path / "a.xlsx", "finding").what.startswith("spreadsheet")


def test_an_ods_sheet_is_read_as_text(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("odf")
    frame = pd.DataFrame([[41, 0.5, "007", "a"], [42, 0.001, "1", "b"]], columns=["age", "dose", "ward", "finding"])
    frame.to_excel(tmp_path / "a.ods", engine="odf", index=False)
    source = opened(tmp_path / "a.ods", ("age", "dose", "ward"))
    assert cells(source) == [["41", "0.5", "007"], ["42", "0.001", "1"]]


def test_a_spreadsheet_that_says_it_grows_when_it_is_unpacked_is_refused(tmp_path: Path) -> None:
    rows: list[list[Any]] = [["age"], [40]]
    write_xlsx(tmp_path / "a.xlsx", rows)
    with zipfile.ZipFile(tmp_path / "a.xlsx", "a") as archive:
        archive.writestr("large", "q7")
        archive.getinfo("large").file_size = 2 << 30
    with pytest.raises(BadInput, match=r"a\.xlsx: expected a spreadsheet of at most 1024 MiB"):
        opened(tmp_path / "a.xlsx", ("age",))


def test_what_a_sheet_does_not_say_costs_its_row(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    rows: list[list[Any]] = [["age", "dose"], [41, 1], [42, "=A3*2"], [43, 3], [None, 4], [45, 5]]
    book = write_xlsx(tmp_path / "a.xlsx", rows)
    book.active.merge_cells("A4:A5")
    book.save(tmp_path / "a.xlsx")
    faults = [record.fault for record in opened(tmp_path / "a.xlsx").index()]
    assert [fault.removeprefix("the row holds ")[:6] for fault in faults] == ["", "a form", "merged", "merged", ""]
    second = openpyxl.load_workbook(tmp_path / "a.xlsx")
    second.create_sheet("q7-bea").append(["age", "dose"])
    second.save(tmp_path / "b.xlsx")
    with pytest.raises(
        BadInput, match=r"expected `sheet` \(of inspect, --sheet\), a name or a number from 1, as 2 sheets"
    ) as caught:
        opened(tmp_path / "b.xlsx")
    assert "q7" not in str(caught.value)
    assert len(opened(tmp_path / "b.xlsx", sheet=1).index()) == 5
    assert len(opened(tmp_path / "b.xlsx", sheet="q7-bea").index()) == 0
    with pytest.raises(BadInput, match="expected a sheet 3, got none such"):
        opened(tmp_path / "b.xlsx", sheet=3)
    (tmp_path / "c.xlsx").write_bytes(b"PK\3\4 no spreadsheet")
    with pytest.raises(BadInput, match="expected a spreadsheet that can be read"):
        opened(tmp_path / "c.xlsx")


def test_labels_of_n_by_1_are_read(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    labels = np.array([[0], [1], [2], [0], [1], [2]], dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_images=pictures, train_labels=labels)
    part = {"inputs": "train_images", "labels": {"finding": "train_labels"}}
    settings = {"kind": "npz", "path": str(tmp_path / "a.npz"), "parts": {"train": part}}
    index = open_source(settings, "sources.x").open().index()
    assert [record.cells["finding"] for record in index] == ["0", "1", "2", "0", "1", "2"]
    assert inspect(tmp_path / "a.npz", None).label_facts.values == ("0", "1", "2")
