"""Masks that a table lists or a folder holds: read as labels, and each bad one refused by itself."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.sources import Source, open_source
from common.inputs import read_mask
from common.types import BadInput, BadRecord

MASK = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 2, 2], [0, 0, 0, 2, 2]], np.uint8)


def listing(folder: Path, mask: str, **settings: Any) -> Source:
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(folder / "a.png")
    (folder / "list.csv").write_text(f"image,mask,finding\na.png,{mask},z-benign\n")
    spec = {"kind": "manifest", "path": str(folder / "list.csv"), "masks": ["mask"], **settings}
    return open_source(spec, "s").open()


def write(folder: Path, name: str, values: np.ndarray, mode: str | None = None) -> None:
    if name.endswith(".npy"):
        np.save(folder / name, values)
        return
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.fromarray(values, "L").convert("P")
        image.putdata(values.reshape(-1).tolist())
    image.save(folder / name)


@pytest.mark.parametrize(("name", "mode"), [("m.png", None), ("m.png", "P"), ("m.npy", None), ("m.tif", None)])
def test_a_mask_is_read_as_the_label_of_its_picture(tmp_path: Path, name: str, mode: str | None) -> None:
    write(tmp_path, name, MASK, mode)
    (record,) = listing(tmp_path, name).index()
    np.testing.assert_array_equal(read_mask(record.cells["mask"]), MASK)
    assert record.cells["finding"] == "z-benign" and "mask" in record.cells


def test_a_grey_mask_that_was_saved_in_colours_is_read_and_another_is_not(tmp_path: Path) -> None:
    write(tmp_path, "m.png", np.repeat(MASK[..., None], 3, axis=2))
    (record,) = listing(tmp_path, "m.png").index()
    np.testing.assert_array_equal(read_mask(record.cells["mask"]), MASK)
    write(tmp_path, "m.png", np.stack([MASK, MASK, 7 * MASK], axis=2))
    with pytest.raises(BadRecord, match="got a picture in colours"):
        record.cells["mask"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (MASK[:, :4], "of its picture's size, got one of another"),
        (MASK.astype(np.float32), "one whole number from 0"),
        (MASK.astype(np.int64) - 1, "one whole number from 0"),
        (None, "missing or unreadable mask"),
    ],
)
def test_a_bad_mask_is_refused_in_one_sentence_that_names_no_file(tmp_path: Path, values: Any, said: str) -> None:
    if values is not None:
        np.save(tmp_path / "q7-ann.npy", values)
    (record,) = listing(tmp_path, "q7-ann.npy").index()
    with pytest.raises(BadRecord, match=said) as refused:
        record.cells["mask"]
    assert "q7" not in str(refused.value)


@pytest.mark.parametrize("version", [1, 2, 3, 9])
def test_an_array_whose_header_asks_for_much_memory_is_refused_before_it_is_read(tmp_path: Path, version: int) -> None:
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (40000, 40000)}".ljust(117 if version == 1 else 115)
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    (tmp_path / "m.npy").write_bytes(b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + bytes(64))
    tracemalloc.start()
    with pytest.raises(BadRecord, match="missing or unreadable mask"):
        listing(tmp_path, "m.npy").index()[0].cells["mask"]
    assert tracemalloc.get_traced_memory()[1] < 1 << 30
    tracemalloc.stop()


def test_no_mask_is_a_missing_label_and_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    assert listing(tmp_path, "").index()[0].cells["mask"] == ""
    with pytest.raises(BadRecord, match="leaves the folder"):
        listing(tmp_path, "../m.png").index()[0].cells["mask"]


def test_another_mask_is_another_source(tmp_path: Path) -> None:
    write(tmp_path, "m.npy", MASK)
    before = listing(tmp_path, "m.npy").digest()
    write(tmp_path, "m.npy", np.ones((3, 5), np.int64))
    assert listing(tmp_path, "m.npy").digest() != before
    with pytest.raises(BadInput, match="masks"):
        listing(tmp_path, "m.npy", audio="image")


def test_files_that_were_masks_are_another_source_where_they_are_the_pictures(tmp_path: Path) -> None:
    """Else the features of some would be taken for those of the others."""
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(MASK).save(tmp_path / name)
    one, other = (
        source_of(tmp_path, pattern=rf"^{images}/(?P<n>\d).png", masks={"mask": f"{masks}/{{n}}.png"}, test=None)
        for images, masks in (("a", "b"), ("b", "a"))
    )
    assert (one.index()[0].path, other.index()[0].path) == ("a/1.png", "b/1.png")
    assert one.digest() != other.digest()
    (tmp_path / "two.csv").write_text("image,mask\na/1.png,b/1.png\n")
    (tmp_path / "one.csv").write_text("image\na/1.png\nb/1.png\n")
    two, four = (
        open_source({"kind": "manifest", "path": str(tmp_path / name), **more}, "s").open()
        for name, more in (("two.csv", {"masks": ["mask"]}), ("one.csv", {}))
    )
    assert len(two.index()) == 1 and len(four.index()) == 2 and two.digest() != four.digest()


ONE_HOT = np.eye(3, dtype=np.uint8)[MASK]


def test_a_mask_with_one_number_for_each_label_is_read_as_the_labels_positions(tmp_path: Path) -> None:
    write(tmp_path, "m.npy", ONE_HOT.astype(np.float32))
    (record,) = listing(tmp_path, "m.npy").index()
    np.testing.assert_array_equal(read_mask(record.cells["mask"]), MASK)
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 5), np.uint8), mask=np.stack([ONE_HOT, ONE_HOT[::-1]]))
    parts = {"all": {"inputs": "x", "labels": {"mask": "mask"}}}
    records = open_source({"kind": "npz", "path": str(tmp_path / "a.npz"), "parts": parts}, "s").open().index()
    assert [read_mask(each.cells["mask"]).tolist() for each in records] == [MASK.tolist(), MASK[::-1].tolist()]


@pytest.mark.parametrize("values", [ONE_HOT * 2, ONE_HOT * 0, np.maximum(ONE_HOT, ONE_HOT[..., ::-1]), ONE_HOT / 2])
def test_a_place_with_two_labels_or_none_among_them_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path, "m.npy", values)
    with pytest.raises(BadRecord, match="expected a mask with a single 1 for each place"):
        listing(tmp_path, "m.npy").index()[0].cells["mask"]


def folder_of(folder: Path, **settings: Any) -> Source:
    """Three frames in the layout of Cityscapes, of which the last has no mask; and files that are no frames."""
    pictures, masks = folder / "leftImg8bit", folder / "gtFine"
    for name in ("train/aachen/aachen_0_1", "val/bonn/bonn_0_2", "val/bonn/bonn_0_3"):
        for path, end in ((pictures, "leftImg8bit"), (masks, "gtFine_labelIds"), (masks, "gtFine_color")):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if end != "gtFine_labelIds" or not name.endswith("3"):
                Image.fromarray(MASK).save(path / f"{name}_{end}.png")
    return source_of(folder, **settings)


def source_of(folder: Path, **settings: Any) -> Source:
    pattern = r"^leftImg8bit/(?P<side>\w+)/(?P<city>\w+)/(?P<frame>.+)_leftImg8bit\.png$"
    masks_of = {"mask": "gtFine/{side}/{city}/{frame}_gtFine_labelIds.png"}
    spec = {
        "kind": "image_folder",
        "path": str(folder),
        "pattern": pattern,
        "masks": masks_of,
        "test": {"side": ["val"]},
    }
    return open_source({**spec, **settings}, "s").open()


def test_masks_in_a_folder_beside_the_pictures_are_found_by_name(tmp_path: Path) -> None:
    source = folder_of(tmp_path)
    records = source.index()
    assert [(each.split, each.cells["city"]) for each in records] == [
        ("train", "aachen"),
        ("test", "bonn"),
        ("test", "bonn"),
    ]
    np.testing.assert_array_equal(read_mask(records[1].cells["mask"]), MASK)
    assert records[2].cells["mask"] == "" and source.load(2).size == (5, 3)
    path = tmp_path / "gtFine" / "val" / "bonn" / "bonn_0_2_gtFine_labelIds.png"
    Image.fromarray(MASK[:, :3]).save(path)
    changed = source_of(tmp_path)
    assert changed.digest() != source.digest()
    with pytest.raises(BadRecord, match="of its picture's size, got one of another"):
        changed.index()[1].cells["mask"]


def test_masks_of_a_folder_need_a_pattern_whose_groups_they_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"masks\.mask: expected groups of the pattern in braces, got 'town'"):
        folder_of(tmp_path, masks={"mask": "gtFine/{town}.png"})
    with pytest.raises(BadInput, match="expected a pattern beside test and masks"):
        folder_of(tmp_path, pattern=None)
    assert len(folder_of(tmp_path, masks={"mask": "../{frame}.png"}).index()) == 3
    assert folder_of(tmp_path, masks={"mask": "../{frame}.png"}).index()[0].cells["mask"] == ""


def test_a_mask_of_a_dicom_picture_is_read_and_one_of_a_series_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from client.data.sources.dicom import write_dicom

    (tmp_path / "series").mkdir()
    for path in ("a.dcm", "series/1.dcm", "series/2.dcm"):
        write_dicom(tmp_path / path, 100 * MASK.astype(np.uint16))
    write(tmp_path, "m.npy", MASK)
    (tmp_path / "list.csv").write_text("file,mask\na.dcm,m.npy\nseries,m.npy\n")
    spec = {"kind": "dicom", "path": str(tmp_path / "list.csv"), "masks": ["mask"], "window": "full"}
    one, series = open_source(spec, "s").open().index()
    np.testing.assert_array_equal(read_mask(one.cells["mask"]), MASK)
    with pytest.raises(BadRecord, match="expected a mask of one picture, got one of several"):
        series.cells["mask"]


def test_masks_of_an_image_are_never_those_of_another(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in ("a*", "ab"):
        write(tmp_path / "images", f"{name}.png", np.zeros((2, 2), np.uint8))
        write(tmp_path / "masks", f"{name}-1.png", np.full((2, 2), name == "ab", np.uint8))

    def open_masks(path: str) -> Source:
        return source_of(tmp_path, pattern=r"^images/(?P<name>.+)\.png", masks={"mask": path}, test=None)

    # A star in a file's own name stands for itself.
    cells = [record.cells["mask"] for record in open_masks("masks/{name}-*.png").index()]
    assert [read_mask(cell).max() for cell in cells] == [0, 1]
    write(tmp_path / "images", "ab-2.png", np.zeros((2, 2), np.uint8))
    write(tmp_path / "masks", "ab-2-1.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(BadInput, match=r"masks\.mask: expected a path by which a file is a mask of one image"):
        open_masks("masks/{name}-*.png")


def test_masks_of_single_objects_are_one_mask_of_their_picture(tmp_path: Path) -> None:
    for name in ("q7[ann", "q7-bea", "q7-cem"):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "masks").mkdir()
        Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / name / "images" / f"{name}.png")
    for number, value in ((1, 255), (2, 255)):
        for name in ("q7[ann", "q7-bea"):
            values = np.where(number == MASK, value, 0).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / name / "masks" / f"{number}.png")
    Image.fromarray(np.zeros((2, 5), np.uint8)).save(tmp_path / "q7-bea" / "masks" / "3.png")

    def open_objects() -> Source:
        return source_of(tmp_path, pattern=r"^(?P<name>[^/]+)/images/", masks={"mask": "{name}/masks/*.png"}, test=None)

    bad, none, good = open_objects().index()
    np.testing.assert_array_equal(read_mask(good.cells["mask"]), MASK > 0)
    assert none.cells["mask"] == "" and good.path == "q7[ann/images/q7[ann.png"
    with pytest.raises(BadRecord, match="of its picture's size"):
        bad.cells["mask"]
    before = open_objects().digest()
    (tmp_path / "q7[ann" / "masks" / "2.png").unlink()
    assert open_objects().digest() != before
    np.testing.assert_array_equal(read_mask(open_objects().index()[2].cells["mask"]), MASK == 1)
