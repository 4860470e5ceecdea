"""Masks and boxes as labels of a site: its own names, what is left out of them, and what `check` says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from client.config import SiteTask
from client.data.checks import data_checks
from client.data.drawn import clip_boxes, count_drawn
from client.data.records import PlacedRecord, RejectedRecord, check_values, encode_labels
from client.data.sources import SourceRecord
from client.data.sources.voc import write_annotation
from common.inputs import Box, read_boxes, read_mask, read_mask_names, write_boxes, write_mask
from common.tasks import Task, open_task
from common.types import BadInput, BadRecord
from tests.tiny import run_config, site_config

CELLS = open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 2}, "cells")
MASK = np.array([[0, 128], [7, 128]])


def own(**changes: Any) -> SiteTask:
    return SiteTask.model_validate({"source": "s", "label": "m", "missing": "skip", "public_size": 10, **changes})


def encode(task: Task, settings: SiteTask, cell: str) -> tuple[Any, tuple[RejectedRecord, ...]]:
    """Returns the label, None where there is none, and what is reported."""
    record = SourceRecord(7, "list.csv", "k", None, None, {"m": cell})
    found = encode_labels("t", task, settings, [PlacedRecord("s", 0, "u", 0, record)])
    return found.labels[0].tolist() if found.mask_R[0] else None, found.rejected


def test_a_masks_numbers_are_mapped_to_labels_and_others_are_refused_or_left_without_one() -> None:
    values = {"0": "ground", "128": "cell"}
    label, rejected = encode(CELLS, own(values=values), write_mask(MASK))
    assert label is None and rejected[0].reason == "expected a mask of the task's labels, got a place with another one"
    assert encode(CELLS, own(values=values, unmapped="skip"), write_mask(MASK)) == ([[0, 1], [255, 1]], ())
    assert encode(CELLS, own(values={**values, "7": "cell"}), write_mask(MASK)) == ([[0, 1], [1, 1]], ())
    ignoring = open_task({"kind": "segmentation", "labels": ["ground", "cell"], "side": 2, "ignore": 7}, "cells")
    assert encode(ignoring, own(values=values), write_mask(MASK)) == ([[0, 1], [255, 1]], ())


def test_numbers_that_a_file_does_not_quote_are_their_text() -> None:
    assert own(values={0: "ground", 128: "cell"}).values == {"0": "ground", "128": "cell"}
    with pytest.raises(ValidationError, match="put yes, no, true and false in quotes"):
        own(values={True: "cell"})


def test_names_of_a_masks_values_are_mapped_and_an_empty_one_is_no_label() -> None:
    cell = write_mask(MASK, {0: "Boden", 7: "", 128: "cell"})
    assert encode(CELLS, own(values={"Boden": "ground"}), cell) == ([[0, 1], [255, 1]], ())
    assert read_mask_names(cell) == {0: "Boden", 7: "", 128: "cell"}
    np.testing.assert_array_equal(read_mask(cell), MASK)


@pytest.mark.parametrize("end", ["{", "{}x", '{"a": "b"}', '{"1": 2}', "[]"])
def test_damaged_names_of_a_mask_are_a_bad_record(end: str) -> None:
    with pytest.raises(BadRecord, match="expected a mask"):
        read_mask_names(f"mask 1 1 0*1 {end}")
    label, rejected = encode(CELLS, own(values={"0": "ground"}), f"mask 1 1 0*1 {end}")
    assert label is None and "expected a mask" in rejected[0].reason


def test_values_of_a_mask_are_names_of_the_task() -> None:
    check_values("t", CELLS, own(values={"128": "cell"}))
    with pytest.raises(BadInput, match=r"tasks\.t\.values\.128: expected one of ground, cell, got 'sell'"):
        check_values("t", CELLS, own(values={"128": "sell"}))


DETECTION = {"kind": "detection", "labels": ["red", "white"], "most_boxes": 4}
BOXES = open_task(DETECTION, "boxes")
SIX = write_boxes(
    [
        Box("RBC", 1, 1, 5, 5),
        Box("RBC", 3, 3, 3, 3),
        Box("WBC", 6, 4, 2, 8),
        Box("WBC", -4, -4, 2, 2),
        Box("WBC", 10, 2, 30, 8),
        Box("dust", 8, 8, 10, 10),
    ],
    10,
    20,
)


def test_boxes_without_area_are_left_out_and_listed_and_the_picture_is_used() -> None:
    values = {"RBC": "red", "WBC": "white"}
    label, rejected = encode(BOXES, own(values=values, unmapped="skip"), SIX)
    assert [row[0] for row in label] == [0, 1, -1, -1]
    said = "3 of its 6 boxes have no area on the picture and are left out"
    assert rejected == (RejectedRecord("list.csv", 7, said, "t", is_used=True),)
    label, rejected = encode(BOXES, own(values=values), SIX)
    assert label is None and [each.reason for each in rejected] == [
        said,
        "expected boxes of the task's labels, got one of another name",
    ]


def test_boxes_are_cut_at_the_edges_of_their_picture() -> None:
    cut, left_out, count = clip_boxes(SIX)
    assert (left_out, count) == (3, 6)
    assert read_boxes(cut)[1] == Box("WBC", 0, 0, 0.2, 0.1)


def test_boxes_that_look_like_another_unit_are_counted_by_row() -> None:
    def counts(boxes: Sequence[Box], width: float, height: float) -> Any:
        return count_drawn([(3, write_boxes(boxes, width, height))])

    fractions, pixels = [Box("a", 0.1, 0.2, 0.9, 1.0)], [Box("a", 40, 20, 90, 60)]
    assert counts(fractions, 640, 480).as_fractions == (3,) and counts(fractions, 1, 1).as_fractions == ()
    assert counts(pixels, 1, 1).as_pixels == (3,) and counts(pixels, 640, 480).as_pixels == ()
    assert counts([], 640, 480).empty == 1


def checked(
    folder: Path, annotations: Mapping[str, str], offered: Any = None, **task: Any
) -> list[tuple[str, str, str]]:
    """Returns what `check` says of the labels of pictures of 8 x 4 pixels, and of an offered task."""
    for name, text in annotations.items():
        for inner in ("JPEGImages", "Annotations"):
            (folder / "voc" / inner).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(folder / "voc" / "JPEGImages" / f"{name}.png")
        if text:
            (folder / "voc" / "Annotations" / f"{name}.xml").write_text(text)
    site = site_config(
        folder,
        "north",
        unit="example",
        sources={"s": {"kind": "voc", "path": str(folder / "voc")}},
        tasks={"cells": {"source": "s", "label": "boxes", "missing": "skip", "public_size": 4, **task}},
        split={"test_fraction": 0},
    )
    offers = {} if offered is None else {"run": run_config(tasks={"cells": offered})}
    found = data_checks(site, offers)
    return [
        (outcome, detail, remedy) for what, outcome, detail, remedy in found if what in ("labels cells", "task cells")
    ]


def test_check_counts_boxes_by_name_and_warns_of_each_kind_of_bad_ones(tmp_path: Path) -> None:
    found = checked(
        tmp_path,
        {
            "a": write_annotation(8, 4, [("RBC", 0, 0, 2, 2), ("RBC", 3, 1, 6, 4), ("WBC", 4, 2, 4, 2)]),
            "b": write_annotation(8, 4, [("WBC", 0.25, 0.5, 0.5, 1.0)]),
            "c": write_annotation(8, 4, []),
            "d": "",
            "e": write_annotation(4, 4, [("q7", 0, 0, 2, 2)]),
            "f": "<annotation",
        },
        values={"RBC": "red"},
    )
    assert found == [
        (
            "warn",
            "boxes: 3 drawn, 1 of them without an object; 1 without a label; RBC 2 in 1 record(s), WBC 2 in 2 "
            "record(s); not in `values`: WBC 2",
            "map them in tasks.cells.values",
        ),
        (
            "warn",
            "boxes: boxes without area on their picture, which are left out while the pictures are used: 1 (row 1)",
            "draw them again, or leave it so",
        ),
        (
            "warn",
            "boxes: boxes that look like fractions of the picture where pixels are expected: in 1 record(s) (row 2)",
            "export the boxes in the other unit",
        ),
        (
            "warn",
            "boxes: 1 unusable: expected boxes of a picture of its size, got those of another size (row 5)",
            "mend these files",
        ),
        (
            "warn",
            "boxes: 1 unusable: expected an annotation in XML, got a file that cannot be read as such (row 6)",
            "mend these files",
        ),
    ]


def test_check_does_not_warn_of_names_that_the_file_leaves_out(tmp_path: Path) -> None:
    boxes = {"a": write_annotation(8, 4, [("RBC", 0, 0, 2, 2), ("WBC", 3, 1, 6, 4)])}
    ((outcome, detail, remedy),) = checked(tmp_path, boxes, values={"RBC": "red"}, unmapped="skip")
    assert (outcome, remedy) == ("pass", "") and detail.endswith("; not in `values`, and left out: WBC 1")


def test_check_warns_where_no_picture_has_a_label(tmp_path: Path) -> None:
    (tmp_path / "voc" / "Annotations").mkdir(parents=True)
    (tmp_path / "voc" / "Annotations" / "z.xml").write_text(write_annotation(8, 4, []))
    found = checked(tmp_path, {"a": "", "b": ""})
    remedy = "check the column, or the paths of masks"
    assert found == [("warn", "boxes: 2 empty, no record has a label", remedy)]


def test_check_of_good_boxes_passes_in_one_line(tmp_path: Path) -> None:
    found = checked(tmp_path, {"a": write_annotation(8, 4, [("RBC", 0, 0, 2, 2)])})
    assert found == [
        ("pass", "boxes: 1 drawn, 0 of them without an object; 0 without a label; RBC 1 in 1 record(s)", "")
    ]


def test_check_of_an_offered_detection_names_what_it_lacks_and_counts_no_used_picture_as_lost(tmp_path: Path) -> None:
    flat = write_annotation(8, 4, [("RBC", 0, 0, 2, 2), ("RBC", 1, 1, 1, 1)])
    found = checked(
        tmp_path, {"a": flat, "b": write_annotation(8, 4, [("dust", 0, 0, 2, 2)])}, DETECTION, values={"RBC": "red"}
    )
    assert [outcome for outcome, *_ in found] == ["warn", "warn", "warn"]
    assert found[0][1].endswith("not in `values` and the offered task: dust 1")
    assert found[2] == (
        "warn",
        "1 of 2 records have a label of the offered task; 1 do not fit (row 2: expected boxes of the task's labels, "
        "got one of another name)",
        "map them in tasks.cells.values",
    )
    (tmp_path / "2").mkdir()
    found = checked(tmp_path / "2", {"a": flat}, DETECTION, values={"RBC": "red"})
    assert found[-1] == ("pass", "1 of 1 records have a label of the offered task", "")
