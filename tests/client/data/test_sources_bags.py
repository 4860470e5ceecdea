"""Rows of one slide, visit or examination become one record of several items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.encoding.encode import list_inputs
from client.data.sources import Source, open_source
from common.backbones import Bag
from common.inputs import Several
from common.tasks import open_task
from common.types import BadInput, BadRecord

ROWS = [
    ("a.png", "s1", "ann", "train", "x"),
    ("b.png", "s2", "bea", "test", "y"),
    ("c.png", "s1", "ann", "train", "y"),
    ("d.png", "", "cem", "train", "x"),
    ("e.png", "s3", "cem", "train", "x"),
    ("f.png", "s3", "dan", "train", "x"),
    ("g.png", "s4", "eve", "train", "x"),
    ("h.png", "s4", "eve", "test", "x"),
    ("missing.png", "s5", "fay", "train", "x"),
    ("i.png", "s5", "fay", "train", "x"),
]


def opened(folder: Path, rows: list[tuple[str, ...]], **changes: Any) -> Source:
    for row in rows:
        if row[0] != "missing.png":
            Image.fromarray(np.full((4, 4), ord(row[0][0]), np.uint8)).save(folder / row[0])
    lines = ["image,slide,patient,split,finding", *map(",".join, rows)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    of = {"kind": "manifest", "path": str(folder / "list.csv"), "patient": "patient", "split": "split"}
    return open_source({"kind": "bags", "of": of, "column": "slide", **changes}, "sources.slides").open()


def values(item: Any) -> list[str]:
    assert isinstance(item, Several)
    return [chr(np.asarray(part)[0, 0]) for part in item.items]


def test_rows_of_one_bag_are_one_record_in_the_order_of_first_rows(tmp_path: Path) -> None:
    source = opened(tmp_path, ROWS)
    index = source.index()
    assert [record.row for record in index] == [1, 2, 4, 5, 7, 9]
    assert [values(source.load(at)) for at in (0, 1)] == [["a", "c"], ["b"]]
    assert [record.patient for record in index[:2]] == ["ann", "bea"]
    assert [record.split for record in index[:2]] == ["train", "test"]


def test_a_bag_that_contradicts_itself_is_a_bad_record(tmp_path: Path) -> None:
    faults = [record.fault for record in opened(tmp_path, ROWS).index()]
    assert faults == [
        "",
        "",
        "its cell in the column of bags is blank",
        "its items are of different patients",
        "its items are on different sides of the split",
        "",
    ]


def test_different_cells_of_a_bag_are_labels_that_a_multilabel_task_reads(tmp_path: Path) -> None:
    index = opened(tmp_path, ROWS).index()
    assert [record.cells["finding"] for record in index[:2]] == ["x|y", "y"]
    several = open_task({"kind": "multilabel", "labels": ["x", "y"]}, "task")
    assert several.codec.encode([index[0].cells["finding"]]).tolist() == [1, 1]
    one = open_task({"kind": "classification", "labels": ["x", "y"]}, "task")
    with pytest.raises(BadRecord):
        one.codec.encode([index[0].cells["finding"]])


def test_an_item_that_cannot_be_read_makes_its_bag_a_bad_record(tmp_path: Path) -> None:
    source = opened(tmp_path, ROWS)
    with pytest.raises(BadRecord, match=r"^one of its 2 items: missing image$"):
        list_inputs(source.load(5), lambda item: item, bag=Bag(2, cuts=True), one="")


def test_of_a_bag_that_is_cut_no_other_item_is_read(tmp_path: Path) -> None:
    """A slide has thousands of tiles: what a backbone does not keep is not opened."""
    rows = [(name, "s1", "ann", "train", "x") for name in ("missing.png", "a.png", "b.png")]
    source = opened(tmp_path, rows)
    read: list[Any] = list_inputs(source.load(0), lambda item: item, bag=Bag(1, cuts=True), one="")
    assert values(Several(read)) == ["a"]


def test_a_bags_key_is_its_name_whatever_stands_in_which_order(tmp_path: Path) -> None:
    first = {record.key for record in opened(tmp_path, ROWS[:3]).index()}
    second = {record.key for record in opened(tmp_path, [ROWS[2], ROWS[1]]).index()}
    assert first == second


def test_which_bag_an_item_is_in_is_part_of_the_digest(tmp_path: Path) -> None:
    before = opened(tmp_path, ROWS[:3])
    stamps = {path: path.stat() for path in tmp_path.glob("*.png")}
    digest = before.digest()
    lines = (tmp_path / "list.csv").read_text(encoding="utf-8").replace("c.png,s1", "c.png,s9")
    (tmp_path / "list.csv").write_text(lines, encoding="utf-8")
    of = {"kind": "manifest", "path": str(tmp_path / "list.csv")}
    moved = open_source({"kind": "bags", "of": of, "column": "slide"}, "s").open()
    assert all(path.stat().st_mtime_ns == status.st_mtime_ns for path, status in stamps.items())
    assert moved.digest() != digest


def test_a_column_that_the_source_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="column: expected a column of the source, got 'slides'"):
        opened(tmp_path, ROWS, column="slides")


def test_rows_are_of_bags_and_not_of_their_items(tmp_path: Path) -> None:
    of = {"kind": "manifest", "path": str(tmp_path / "list.csv"), "rows": str(tmp_path / "rows.csv")}
    with pytest.raises(BadInput, match=r"of\.rows: expected none"):
        opened(tmp_path, ROWS, of=of)
