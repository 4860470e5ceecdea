"""Boxes around objects on pictures, from VOC annotations: read as labels, and each bad one refused by itself."""

from __future__ import annotations

import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.sources import Source, open_source
from client.data.sources.voc import MAX_BYTES, write_annotation
from common.inputs import Box, read_boxes
from common.types import BadInput, BadRecord


def draw(path: Path, width: int = 8, height: int = 4, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, **options)


def voc(folder: Path, **settings: Any) -> Source:
    return open_source({"kind": "voc", "path": str(folder), **settings}, "s").open()


def annotate(folder: Path, text: str | bytes, name: str = "a") -> Source:
    """Returns a source of one picture, 8 x 4 pixels, with this annotation."""
    draw(folder / "JPEGImages" / f"{name}.png")
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return voc(folder)


def read(source: Source, position: int = 0) -> list[Box]:
    return read_boxes(source.index()[position].cells["boxes"])


def test_boxes_are_read_in_pixels_of_the_picture(tmp_path: Path) -> None:
    source = annotate(
        tmp_path, write_annotation(8, 4, [("cell", 2, 1, 6, 4), ("q & r".replace("&", "&amp;"), 0, 0, 8, 4)])
    )
    assert read(source) == [Box("cell", 0.25, 0.25, 0.75, 1.0), Box("q & r", 0, 0, 1, 1)]


def test_a_picture_without_objects_has_a_label_and_one_without_an_annotation_has_none(tmp_path: Path) -> None:
    source = annotate(tmp_path, write_annotation(8, 4, []))
    assert read(source) == []
    draw(tmp_path / "JPEGImages" / "b.jpg")
    (tmp_path / "Annotations" / "c.xml").write_text(write_annotation(8, 4, []))
    source = voc(tmp_path)
    assert [record.cells["boxes"] for record in source.index()[1:]] == ["", ""]
    assert [record.fault for record in source.index()] == ["", "", "there is no image to its annotation"]
    with pytest.raises(BadRecord, match="no image to its annotation"):
        source.load(2)


def test_lists_say_the_sides_and_leave_out_pictures_that_are_on_none(tmp_path: Path) -> None:
    for name in ("a 1", "b", "c", "d"):
        annotate(tmp_path, write_annotation(8, 4, []), name)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "cell_train.txt").write_text("a 1  1\nb -1\n\nz\n")
    (lists / "test.txt").write_text("b\nc\n")
    source = voc(tmp_path, sides={"train": ["cell_train"], "test": ["test"]})
    assert [(record.key, record.split) for record in source.index()] == [
        ("JPEGImages/a 1.png", "train"),
        ("JPEGImages/b.png", "train"),
        ("JPEGImages/c.png", "test"),
    ]
    with pytest.raises(BadInput, match=r"expected a list ImageSets/Main/val\.txt"):
        voc(tmp_path, sides={"train": ["val"]})
    (lists / "test.txt").write_text("z\n")
    with pytest.raises(BadInput, match="expected names of its images in the lists"):
        voc(tmp_path, sides={"test": ["test"]})


def test_pictures_and_annotations_may_lie_in_one_folder_and_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        draw(tmp_path / "p.png")
        archive.write(tmp_path / "p.png", "ward/p7_1.png")
        archive.writestr("ward/p7_1.xml", write_annotation(8, 4, [("cell", 0, 0, 4, 4)]))
    source = voc(tmp_path / "set.zip", images=".", annotations=".", patient_pattern="^(p[0-9]+)_")
    assert read(source) == [Box("cell", 0, 0, 0.5, 1)] and source.index()[0].patient == "p7"
    for settings, said in (({}, "images in its folder 'JPEGImages'"), ({"images": "."}, "xml files in its folder")):
        with pytest.raises(BadInput, match=said):
            voc(tmp_path / "set.zip", **settings)


def test_sizes_are_those_of_the_turned_picture_and_may_be_missing(tmp_path: Path) -> None:
    annotate(tmp_path, write_annotation(0, 0, [("cell", 0, 0, 2, 4)]))
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(tmp_path / "JPEGImages" / "a.jpg", exif=exif)
    (tmp_path / "JPEGImages" / "a.png").unlink()
    source = voc(tmp_path)
    assert source.load(0).size == (4, 8) and read(source) == [Box("cell", 0, 0, 0.5, 0.5)]


NUMBERS = "expected a name and the numbers xmin"
LAUGHS = b'<!DOCTYPE l [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><object>&b;</object></annotation>'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (write_annotation(8, 5, [("q7-cell", 0, 0, 2, 2)]), "of its size, got those of another size"),
        (write_annotation(8, 4, [("q7-cell", 0, 0, 2, 2)])[:-20], "got a file that cannot be read"),
        (b"", "got a file that cannot be read"),
        (b"\x00\xff\xfeq7", "got a file that cannot be read"),
        (b'<?xml version="1.0" encoding="q7"?><annotation/>', "got a file that cannot be read"),
        (LAUGHS, "without a document type"),
        (LAUGHS.decode().encode("utf-16"), "without a document type"),
        (write_annotation(8, 4, [("q7-cell", float("nan"), 0, 2, 2)]), NUMBERS),
        (write_annotation(8, 4, [("q7-cell", 0, float("inf"), 2, 2)]), NUMBERS),
        (write_annotation(8, 4, [(" ", 0, 0, 2, 2)]), NUMBERS),
        ("<annotation><object><name>q7-cell</name><bndbox/></object></annotation>", NUMBERS),
        ("<annotation><object/></annotation>", NUMBERS),
        (b"<annotation>" + b" " * MAX_BYTES, "at most 16 MiB"),
    ],
)
def test_a_bad_annotation_is_refused_in_one_sentence_that_names_nothing_of_it(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    source = annotate(tmp_path, text)
    with pytest.raises(BadRecord, match=said) as refused:
        read(source)
    assert "q7" not in str(refused.value)
    assert source.load(0).size == (8, 4)


def test_a_deep_annotation_is_read_in_no_time(tmp_path: Path) -> None:
    began = time.perf_counter()
    assert read(annotate(tmp_path, "<a>" * 200_000 + "</a>" * 200_000)) == []
    assert time.perf_counter() - began < 5


def test_another_annotation_is_another_source(tmp_path: Path) -> None:
    before = annotate(tmp_path, write_annotation(8, 4, [])).digest()
    assert annotate(tmp_path, write_annotation(8, 4, [("cell", 0, 0, 2, 2)])).digest() != before


def test_blood_cells_are_read_from_their_zip(assets: Path) -> None:
    source = voc(assets / "data" / "bccd" / "bccd_voc.zip", sides={"train": ["trainval"], "test": ["test"]})
    index = source.index()
    assert Counter(record.split for record in index) == {"train": 292, "test": 72}
    names = Counter(box.name for position in range(len(index)) for box in read(source, position))
    # The numbers of <name> elements in the files.
    assert names == {"RBC": 4155, "WBC": 372, "Platelets": 361}
    assert source.load(0).size == (640, 480)
