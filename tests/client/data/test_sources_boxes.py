"""Objects on pictures, from VOC annotations and COCO's lists: read as labels, and each bad one refused by itself."""

from __future__ import annotations

import json
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from client.data.sources import Source, coco, open_source
from client.data.sources.coco import decode_counts, decode_runs, draw_mask, encode_runs
from client.data.sources.parts.boundary import try_record
from client.data.sources.voc import MAX_BYTES, write_annotation
from common.inputs import Box, read_boxes, read_mask, read_mask_names
from common.types import BadInput, BadRecord


def draw(path: Path, width: int = 8, height: int = 4, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # Written again, it would be another file.
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


def test_difficult_objects_are_ignored(tmp_path: Path) -> None:
    plain = write_annotation(8, 4, [("cell", 2, 1, 6, 4)])
    for mark, ignored in (("1", True), ("0", False), ("", False)):
        source = annotate(tmp_path, plain.replace("<bndbox>", f"<difficult>{mark}</difficult><bndbox>"))
        assert read(source) == [Box("cell", 0.25, 0.25, 0.75, 1.0, ignored=ignored)]


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
        (b"<annotation>" + b" " * MAX_BYTES, "at most 4 MiB"),
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


# --- COCO ------------------------------------------------------------------------------------------------------------


def write_list(folder: Path, objects: list[Any], **changes: Any) -> Source:
    """Returns a source of two pictures, 8 x 4 and 5 x 4 pixels, with these annotations."""
    draw(folder / "a.png")
    draw(folder / "sub" / "b.png", width=5)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 4}, {"id": "2", "file_name": "sub/b.png"}],
        "categories": [{"id": 3, "name": "cell"}, {"id": 1, "name": "grain"}],
        "annotations": [
            {"image_id": 1, "category_id": 3, **each} if isinstance(each, dict) else each for each in objects
        ],
        **changes,
    }
    (folder / "objects.json").write_text(json.dumps(content))
    return open_source({"kind": "coco", "path": str(folder / "objects.json")}, "s").open()


def mask_of(source: Source, position: int = 0) -> tuple[list[list[int]], dict[int, str] | None]:
    cell = source.index()[position].cells["mask"]
    return read_mask(cell).tolist(), read_mask_names(cell)


def test_boxes_of_a_list_are_a_corner_with_width_and_height_and_crowds_are_ignored(tmp_path: Path) -> None:
    boxes = [
        {"bbox": [2, 1, 4, 3], "ignore": 0},
        {"bbox": [0, 0, 8, 4], "iscrowd": 1},
        {"bbox": [0, 0, 4, 4], "ignore": 1},
        {"bbox": [0, 0, 4, -1], "category_id": 1},
    ]
    source = write_list(tmp_path, boxes)
    assert read(source) == [
        Box("cell", 0.25, 0.25, 0.75, 1.0),
        Box("cell", 0, 0, 1, 1, ignored=True),
        Box("cell", 0, 0, 0.5, 1, ignored=True),
        Box("grain", 0, 0, 0.5, -0.25),
    ]
    assert read(source, 1) == []
    assert [record.path for record in source.index()] == ["a.png", "sub/b.png"] and source.load(1).size == (5, 4)


def test_a_mask_has_the_later_object_where_two_overlap_and_no_label_on_a_crowd(tmp_path: Path) -> None:
    source = write_list(
        tmp_path,
        [
            {"image_id": "2", "segmentation": [[0, 0, 3, 0, 3, 2, 0, 2]]},
            {"image_id": "2", "category_id": 1, "segmentation": [[2, 1, 5, 1, 5, 2, 2, 2], [0, 3, 1, 3, 1, 4, 0, 4]]},
            {"image_id": "2", "iscrowd": 1, "segmentation": {"size": [4, 5], "counts": [15, 1, 3, 1]}},
        ],
    )
    assert mask_of(source, 1) == (
        [[1, 1, 1, 0, 0], [1, 1, 2, 2, 2], [0, 0, 0, 0, 0], [2, 0, 0, 3, 3]],
        {0: "background", 1: "cell", 2: "grain", 3: ""},
    )
    assert mask_of(source) == ([[0] * 8] * 4, {0: "background"})


def test_run_lengths_are_read_as_their_definition_says() -> None:
    # The example of MaskApi, as text and as numbers.
    runs = [6, 1, 40, 4, 5, 4, 5, 4, 21]
    assert decode_counts("61X13mN000`0") == runs
    inside = decode_runs({"size": [9, 10], "counts": "61X13mN000`0"}, (9, 10))
    assert inside.T.ravel().tolist() == [bool(at % 2) for at, run in enumerate(runs) for _ in range(run)]
    np.testing.assert_array_equal(inside, decode_runs({"size": [9, 10], "counts": runs}, (9, 10)))


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_a_mask_that_was_written_as_run_lengths_is_read_back(inside_HW: np.ndarray) -> None:
    np.testing.assert_array_equal(decode_runs(encode_runs(inside_HW), inside_HW.shape), inside_HW)


def test_run_lengths_are_written_as_maskapi_does() -> None:
    runs = [6, 1, 40, 4, 5, 4, 5, 4, 21]
    inside = decode_runs({"size": [9, 10], "counts": runs}, (9, 10))
    assert encode_runs(inside) == {"size": [9, 10], "counts": "61X13mN000`0"}
    # Runs of thousands take several characters.
    large = np.zeros((3000, 40), bool)
    large[17:, 3:31] = True
    np.testing.assert_array_equal(decode_runs(encode_runs(large), large.shape), large)


def is_inside(x: float, y: float, corners: list[tuple[float, float]]) -> bool:
    """Returns whether a ray to the left of a point crosses an odd number of edges."""
    inside = False
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if (y1 <= y) != (y2 <= y):
            inside ^= x1 + (y - y1) * (x2 - x1) / (y2 - y1) <= x
    return inside


@given(st.lists(st.tuples(st.integers(-8, 40), st.integers(-8, 40)), min_size=3, max_size=8))
@example([(0, 0), (-5, 31), (25, 5)])
def test_a_place_is_on_an_object_where_its_centre_is_in_the_polygon(quarters: list[tuple[int, int]]) -> None:
    corners = [(x / 4, y / 4) for x, y in quarters]
    found = draw_mask([{"category_id": 1, "segmentation": [[v for c in corners for v in c]]}], {1: 1}, (7, 8))
    expected = [[int(is_inside(x + 0.5, y + 0.5, corners)) for x in range(8)] for y in range(7)]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    "annotations",
    [
        [{"segmentation": [[0, 0, 4, 0, 4, 4]] * 3}],
        [{"segmentation": [[0, 0, 4, 0, 4, 4, 2, 4] * 2]}],
        [{"segmentation": {"size": [4, 4], "counts": [16]}}] * 2,
    ],
    ids=["polygons", "corners", "runs"],
)
def test_a_few_bytes_cannot_ask_for_any_amount_of_drawing(
    monkeypatch: pytest.MonkeyPatch, annotations: list[dict[str, Any]]
) -> None:
    own = [{"category_id": 1, **each} for each in annotations]
    draw_mask(own, {1: 1}, (4, 4))
    monkeypatch.setattr(coco, "MAX_CORNERS", 7)
    # A polygon's columns are one more than its places.
    monkeypatch.setattr(coco, "MAX_DRAWN", 2 * 16 - 1)
    draw_mask([{"category_id": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]}], {1: 1}, (4, 4))
    with pytest.raises(BadRecord, match="fewer or smaller objects"):
        draw_mask(own, {1: 1}, (4, 4))


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ({"bbox": [0, 0, 2]}, "4 numbers of a box"),
        ({"bbox": "q7"}, "4 numbers of a box"),
        ({"bbox": [0, 0, float("nan"), 2]}, "4 numbers of a box"),
        ({"bbox": [0, 0, 10**400, 2]}, "4 numbers of a box"),
        ({"bbox": [0, 0, 1, 2], "category_id": 9}, "a category that the file names"),
        ({"bbox": [0, 0, 1, 2], "category_id": [3]}, "a category that the file names"),
        ({"segmentation": []}, "expected polygons or run lengths"),
        ({"segmentation": "q7"}, "expected polygons or run lengths"),
        ({"segmentation": [[0, 0, 1, 1]]}, "the corners of a polygon"),
        ({"segmentation": [[0, 0, 1, 1, 1, 1e300]]}, "the corners of a polygon"),
        ({"segmentation": [7]}, "the corners of a polygon"),
        ({"segmentation": {"size": [8, 4], "counts": [32]}}, "run lengths that fill"),
        ({"segmentation": {"size": [4, 8], "counts": [31]}}, "run lengths that fill"),
        ({"segmentation": {"size": [4, 8], "counts": [33, -1]}}, "run lengths that fill"),
        ({"segmentation": {"size": [4, 8], "counts": {"q7": 1}}}, "run lengths that fill"),
        ({"segmentation": {"size": [4, 8], "counts": "X"}}, "run lengths that can be read"),
        ({"segmentation": {"size": [4, 8], "counts": "q7é"}}, "run lengths that can be read"),
        ({"segmentation": {"size": [4, 8], "counts": "o" * 10_000 + "0"}}, "run lengths that can be read"),
    ],
)
def test_a_bad_object_makes_its_picture_a_bad_record_in_one_sentence(
    tmp_path: Path, annotation: dict[str, Any], said: str
) -> None:
    source = write_list(
        tmp_path, [annotation, {"image_id": "2", "bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]]}]
    )
    with pytest.raises(BadRecord, match=said) as refused:
        source.index()[0].cells["boxes" if "bbox" in annotation else "mask"]
    assert "q7" not in str(refused.value)
    assert read(source, 1) == [Box("cell", 0, 0, 0.2, 0.25)]


def test_what_is_wrong_with_one_picture_of_a_list_is_that_records_alone(tmp_path: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.png", "width": 8, "height": 5},
        {"id": 2, "file_name": "../a.png"},
        {"id": 3, "file_name": "a.png"},
        {"id": 3, "file_name": "sub/b.png"},
        "q7",
        {"id": 4},
        {"id": {}, "file_name": "a.png"},
        {"id": 5, "file_name": "a.png"},
    ]
    source = write_list(tmp_path, ["q7", {"image_id": []}, {"image_id": 77}, {"bbox": [0, 0, 2, 2]}], images=images)
    twice, nameless = "another image has its id too", "expected an id and a file_name of each image"
    assert [each.fault for each in source.index()] == ["", "", twice, twice, nameless, nameless, nameless, ""]
    for column in ("boxes", "mask"):
        with pytest.raises(BadRecord, match="of its size, got those of another size"):
            source.index()[0].cells[column]
        with pytest.raises(BadRecord, match="missing image"):
            source.index()[1].cells[column]
    with pytest.raises(BadRecord, match=twice):
        source.load(2)
    assert read(source, 7) == []


@pytest.mark.parametrize(
    "more",
    [
        {"id": 3, "file_name": "a.png"},
        {"id": 1, "file_name": "sub/b.png"},
        {"id": 1, "file_name": "a.png"},
        {"id": 9, "file_name": "q7"},
        {"id": None},
        "q7",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_one_picture_more_in_a_list_changes_one_record_at_most(tmp_path: Path, more: Any, first: bool) -> None:
    def usable(images: list[Any]) -> Counter[tuple[str, str]]:
        source = write_list(tmp_path, [{"bbox": [0, 0, 2, 2]}, {"image_id": "2", "bbox": [1, 1, 2, 2]}], images=images)
        read = ((each, try_record(lambda each=each: each.cells["boxes"])[0]) for each in source.index())
        return Counter((each.key, cell) for each, cell in read if cell)

    images = [{"id": 1, "file_name": "a.png"}, {"id": "2", "file_name": "sub/b.png"}]
    before, after = usable(images), usable([more, *images] if first else [*images, more])
    assert len(before) == 2 and ((before - after) + (after - before)).total() <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"images": []},
        {"images": {"q7": 1}},
        {"annotations": None},
        {"categories": [{"id": 1, "name": "q7"}, {"id": 1, "name": "other"}]},
        {"categories": [{"id": 1, "name": " "}]},
        {"categories": [{"id": [], "name": "q7"}]},
        {"categories": ["q7"]},
    ],
)
def test_a_file_that_is_no_list_of_coco_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"objects\.json: expected a COCO annotation file") as refused:
        write_list(tmp_path, [], **changes)
    assert "q7" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "[", "7", "[" * 100_000, '{"images": ' * 50_000, '{"images": [' + "9" * 5000 + "]}"]
)
def test_truncated_and_deep_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "objects.json").write_text(text)
    with pytest.raises(BadInput, match=r"objects\.json: expected a COCO annotation file"):
        open_source({"kind": "coco", "path": str(tmp_path / "objects.json")}, "s").open()


def test_sides_of_a_list_have_files_and_folders_of_their_own(tmp_path: Path) -> None:
    for side in ("train", "test"):
        (tmp_path / side).mkdir()
        write_list(tmp_path / side, [{"bbox": [0, 0, 8, 4]}] if side == "test" else [])
    files = {side: str(tmp_path / side / "objects.json") for side in ("train", "test")}
    folders = {side: str(tmp_path / side) for side in files}
    source = open_source({"kind": "coco", "path": files, "root": folders}, "s").open()
    assert [record.split for record in source.index()] == ["train", "train", "test", "test"]
    assert [len(read(source, position)) for position in range(4)] == [0, 0, 1, 0]
    assert source.digest() == open_source({"kind": "coco", "path": files}, "s").open().digest()
    with pytest.raises(BadInput, match="root: expected one folder, or one for each side"):
        open_source({"kind": "coco", "path": files, "root": {"train": folders["train"]}}, "s").open()


def test_another_annotation_of_a_list_is_another_source(tmp_path: Path) -> None:
    before = write_list(tmp_path, []).digest()
    assert write_list(tmp_path, [{"bbox": [0, 0, 2, 2]}]).digest() != before


def yolo(folder: Path, text: str | None, **settings: Any) -> Source:
    draw(folder / "images" / "ward" / "a.png")
    (folder / "labels" / "ward").mkdir(parents=True, exist_ok=True)
    (folder / "labels" / "classes.txt").write_text("cell\ngrain\n")
    if text is not None:
        (folder / "labels" / "ward" / "a.txt").write_text(text)
    spec = {"kind": "yolo", "path": str(folder), "names": ["cell", "grain"], **settings}
    return open_source(spec, "s").open()


def test_lines_of_numbers_are_the_middle_and_the_sides_of_boxes_or_corners_of_polygons(tmp_path: Path) -> None:
    source = yolo(tmp_path, "1 0.5 0.25 0.5 0.5\n\n0 0.1 0.2 0.3 0.2 0.3 0.9\n")
    assert read(source) == [Box("grain", 0.25, 0.0, 0.75, 0.5), Box("cell", 0.1, 0.2, 0.3, 0.9)]
    assert len(source.index()) == 1 and source.load(0).size == (8, 4)


def test_an_empty_text_file_shows_nothing_and_none_is_what_the_settings_say(tmp_path: Path) -> None:
    assert yolo(tmp_path, None).index()[0].cells["boxes"] == ""
    nothing = yolo(tmp_path, None, without_file="nothing")
    assert read(nothing) == [] and nothing.digest() != yolo(tmp_path, None).digest()
    assert read(yolo(tmp_path, "")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2 0.5 0.5 0.1 0.1", "number of a class that `names` lists"),
        ("0.5 0.5 0.5 0.1 0.1", "number of a class that `names` lists"),
        ("-1 0.5 0.5 0.1 0.1", "number of a class that `names` lists"),
        ("0 0.5 0.5 0.1", "a class's number and four numbers"),
        ("0 0.5 0.5 0.1 nan", "a class's number and four numbers"),
        ("cell 0.5 0.5 0.1 0.1", "a class's number and four numbers"),
        ("0 0.1 0.2 0.3 0.2 0.3", "a class's number and four numbers"),
    ],
)
def test_a_bad_line_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadRecord, match=said) as refused:
        read(yolo(tmp_path, f"0 0.5 0.5 0.2 0.2\n{text}\n"))
    assert "0.5" not in str(refused.value)


def test_folders_below_the_pictures_are_sides(tmp_path: Path) -> None:
    for name in ("train/b", "val/c", "other/d"):
        draw(tmp_path / "images" / f"{name}.png")
    source = yolo(tmp_path, "", sides={"train": ["train"], "test": ["val", "ward"]})
    assert {record.path: record.split for record in source.index()} == {
        "images/train/b.png": "train",
        "images/val/c.png": "test",
        "images/ward/a.png": "test",
    }
    with pytest.raises(BadInput, match="folders of `sides`"):
        yolo(tmp_path, "", sides={"train": ["nowhere"]})
