"""Pictures from a manifest, from folders and from a zip; what cannot be read is a bad record, not an end."""

from __future__ import annotations

import os
import traceback
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.sources import PassesOver, Source, open_source
from client.data.sources.parts.pictures import write_example_pictures
from common.types import BadInput, BadRecord


def picture(path: Path, value: int = 100, size: tuple[int, int] = (4, 3), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path, **options)
    return path


def manifest(folder: Path, lines: list[str], **settings: Any) -> Source:
    (folder / "list.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_source({"kind": "manifest", "path": str(folder / "list.csv"), **settings}, "sources.scans").open()


def image_folder(path: Path, **settings: Any) -> Source:
    return open_source({"kind": "image_folder", "path": str(path), **settings}, "sources.scans").open()


def test_a_manifest_lists_images_labels_patients_and_splits(tmp_path: Path) -> None:
    picture(tmp_path / "scans" / "one.png", 7)
    source = manifest(
        tmp_path,
        ["file,diagnosis,person,part", "one.png,flu,p1,test", "two.png,,p2,"],
        image="file",
        root=str(tmp_path / "scans"),
        patient="person",
        split="part",
    )
    first, second = source.index()
    assert (first.row, first.file, first.key, first.patient, first.split) == (1, "list.csv", "one.png", "p1", "test")
    assert (second.row, second.cells["diagnosis"], second.split) == (2, "", None)
    assert source.load(0).getpixel((0, 0)) == 7


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.png", "missing image"),
        ("", "empty or leaves the folder"),
        ("../outside.png", "empty or leaves the folder"),
        ("/etc/hostname", "empty or leaves the folder"),
        ("link.png", "empty or leaves the folder"),
        ("loop.png", "missing image|cannot be used"),
        ("x" * 5000 + ".png", "missing image|cannot be used"),
        ("text.png", "unreadable image"),
        ("half.png", "unreadable image"),
        ("bomb.png", "unreadable image"),
    ],
)
def test_an_image_that_cannot_be_used_is_a_bad_record(tmp_path: Path, name: str, reason: str) -> None:
    folder = tmp_path / "inside"
    picture(tmp_path / "outside.png")
    whole = picture(folder / "whole.png", size=(50, 50)).read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    # A header that claims 2^31 - 1 pixels in each direction.
    (folder / "bomb.png").write_bytes(whole[:16] + b"\x7f\xff\xff\xff" * 2 + whole[24:])
    source = manifest(folder, ["image,label", f"{name},x", "whole.png,x"])
    with pytest.raises(BadRecord, match=reason):
        source.load(0)
    assert source.load(1).size == (50, 50)
    assert len(source.digest()) == 64


def test_a_changed_or_restored_image_changes_the_digest(tmp_path: Path) -> None:
    path = picture(tmp_path / "one.png")
    lines = ["image,label", "one.png,x"]
    before = manifest(tmp_path, lines).digest()
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    touched = manifest(tmp_path, lines).digest()
    path.unlink()
    assert len({before, touched, manifest(tmp_path, lines).digest()}) == 3


def test_another_label_leaves_the_digest(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    digests = {manifest(tmp_path, ["image,label", f"one.png,{label}"]).digest() for label in "ab"}
    assert len(digests) == 1


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees.
    picture(tmp_path / "one.jpg", size=(4, 3), exif=exif)
    assert manifest(tmp_path, ["image,label", "one.jpg,x"]).load(0).size == (3, 4)


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """train/{cat,dog} and test/{cat}, with equal file names, and what a desktop leaves there."""
    folder = tmp_path / "animals"
    for number, name in enumerate(["train/cat/ann-1.png", "train/dog/bea-1.PNG", "test/cat/ann-1.png"]):
        picture(folder / name, number)
    for name in ["train/.cache/x.png", "__MACOSX/cat/x.png", "readme.png"]:
        picture(folder / name)
    (folder / "train" / "cat" / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("pack", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_a_folder_and_its_zip_hold_the_same_records(labelled: Path, pack: Any) -> None:
    source = image_folder(pack(labelled), splits=True, patient_pattern=r"^(\w+)-")
    index = source.index()
    assert [record.key for record in index] == ["test/cat/ann-1.png", "train/cat/ann-1.png", "train/dog/bea-1.PNG"]
    assert [record.split for record in index] == ["test", "train", "train"]
    assert [record.cells["label"] for record in index] == ["cat", "cat", "dog"]
    assert [record.patient for record in index] == ["ann", "ann", "bea"]
    assert [source.load(position).getpixel((0, 0)) for position in range(3)] == [2, 0, 1]


def test_without_splits_the_first_level_is_the_label(labelled: Path) -> None:
    source = image_folder(labelled / "train")
    assert [record.cells["label"] for record in source.index()] == ["cat", "dog"]
    assert {record.split for record in source.index()} == {None}


def test_a_name_outside_the_pattern_is_a_blank_patient(labelled: Path) -> None:
    source = image_folder(labelled / "train", patient_pattern=r"^(b\w+)-")
    assert [record.patient for record in source.index()] == ["", "bea"]


@pytest.mark.parametrize(
    ("pattern", "expected"), [("(", "got one with an error"), ("x", "one group, got 0"), ("(a)(b)", "one group, got 2")]
)
def test_a_patient_pattern_has_exactly_one_group(labelled: Path, pattern: str, expected: str) -> None:
    with pytest.raises(BadInput, match=r"sources\.scans\.patient_pattern") as caught:
        image_folder(labelled, patient_pattern=pattern)
    assert expected in str(caught.value)


def test_a_folder_without_an_image_at_the_right_depth_is_refused(labelled: Path) -> None:
    with pytest.raises(BadInput, match="expected images as label/file, got none"):
        image_folder(labelled / "train" / "cat")


def test_a_damaged_member_of_a_zip_is_a_bad_record(labelled: Path) -> None:
    path = zipped(labelled)
    data = path.read_bytes()
    start = data.index((labelled / "train/dog/bea-1.PNG").read_bytes())
    path.write_bytes(data[: start + 40] + b"!" + data[start + 41 :])
    source = image_folder(path, splits=True)
    with pytest.raises(BadRecord):
        source.load(2)
    assert source.load(1).size == (4, 3)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Pictures of two people at two depths, one that no pattern below fits, and what else a package holds."""
    folder = tmp_path / "package"
    for number, name in enumerate(["data/s1/2.pgm", "data/s1/10.pgm", "deep/data/s12/1.PGM", "data/s1/target.png"]):
        picture(folder / name, number)
    for name in ["data/.s3/1.pgm", "__MACOSX/data/s3/1.pgm"]:
        picture(folder / name)
    (folder / "data" / "s1" / "3.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("pack", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_a_pattern_says_an_images_columns_patient_and_side(people: Path, pack: Any) -> None:
    pattern = r"data/(?P<person>s\d+)/(?P<take>\d+)\."
    source = image_folder(pack(people), pattern=pattern, patient="person", test={"person": ["s12"], "take": [2]})
    found = [(r.key, r.cells["person"], r.cells["take"], r.patient, r.split) for r in source.index()]
    assert found == [
        ("data/s1/10.pgm", "s1", "10", "s1", "train"),
        ("data/s1/2.pgm", "s1", "2", "s1", "test"),
        ("data/s1/target.png", "", "", "", "train"),
        ("deep/data/s12/1.PGM", "s12", "1", "s12", "test"),
    ]
    assert [source.load(position).getpixel((0, 0)) for position in range(4)] == [1, 0, 3, 2]


def test_a_pattern_without_patients_and_sides_states_none(people: Path) -> None:
    index = image_folder(people, pattern=r"(?P<person>s\d+)/").index()
    assert {(record.patient, record.split) for record in index} == {(None, None)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "("}, r"scans\.pattern: .*got one with an error"),
        ({"pattern": r"(\d)"}, r"scans\.pattern: .*named group for each column"),
        ({"pattern": r"(?P<take>\d)", "patient": "who"}, "patient: expected one of .* take, got 'who'"),
        ({"pattern": r"(?P<take>\d)", "test": {"who": ["x"]}}, "test: expected one of .* take, got 'who'"),
        ({"pattern": r"(?P<take>\d)", "splits": True}, "expected no splits beside pattern"),
        ({"pattern": r"(?P<take>\d)", "patient_pattern": "(a)"}, "expected no patient_pattern beside pattern"),
        ({"test": {"label": ["x"]}}, "expected a pattern beside test"),
        ({"patient": "label", "test": {}}, "expected a pattern beside patient and test"),
    ],
)
def test_settings_that_contradict_each_other_are_one_sentence(
    people: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        image_folder(people, **settings)
    assert "\n" not in str(caught.value)


def test_with_a_pattern_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected images, got none"):
        image_folder(tmp_path, pattern=r"(?P<take>\d)")


def test_neither_names_nor_held_out_values_are_shown(people: Path) -> None:
    (people / "data" / "s1" / "2.pgm").write_bytes(b"P5 4 3 255 ")
    source = image_folder(people, pattern=r"(?P<person>s\d+)/", patient="person", test={"person": ["s12"]})
    with pytest.raises(BadRecord) as caught:
        source.load(1)
    shown = [*traceback.format_exception(caught.value), repr(source), *map(repr, source.index())]
    assert not [text for text in shown if "s1" in text]


def test_a_picture_of_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "1.pgm").write_bytes(b"P5 40000 40000 255\n")
    with pytest.raises(BadRecord, match="expected a picture of at most 178 million pixels"):
        image_folder(tmp_path, pattern=r"(?P<take>\d)").load(0)


@pytest.mark.parametrize("data", [b"", b"P5", b"P5 4 3 255\n\0", b"P5 -1 3 255\n", b"P5 4 3 0\n"])
def test_a_broken_pgm_is_a_bad_record(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "1.pgm").write_bytes(data)
    with pytest.raises(BadRecord, match="unreadable image"):
        image_folder(tmp_path, pattern=r"(?P<take>\d)").load(0)


def test_cifar_is_read_from_its_zip(assets: Path) -> None:
    source = image_folder(assets / "data" / "cifar10_jpg" / "cifar10_jpg_5000_2000.zip", splits=True)
    index = source.index()
    assert [sum(record.split == side for record in index) for side in ("train", "test")] == [5000, 2000]
    assert len({record.cells["label"] for record in index}) == 10
    assert np.asarray(source.load(6999)).shape == (32, 32, 3)


def test_folders_behind_links_are_read_and_a_loop_of_links_ends(tmp_path: Path) -> None:
    write_example_pictures(tmp_path / "archive", ["scans/1.png", "scans/2.png"])
    (tmp_path / "set").mkdir()
    for name in ("benign", "malignant"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "archive" / "scans")
    (tmp_path / "archive" / "scans" / "again").symlink_to(tmp_path / "archive" / "scans")
    (tmp_path / "set" / "gone").symlink_to(tmp_path / "nowhere")
    source = open_source({"kind": "image_folder", "path": str(tmp_path / "set")}, "sources.scans").open()
    assert [record.path for record in source.index()] == [
        "benign/1.png",
        "benign/2.png",
        "malignant/1.png",
        "malignant/2.png",
    ]
    source.load(3)
    # The link to nowhere alone: behind `again` the same pictures would come back without end.
    assert isinstance(source, PassesOver) and source.passed_over == 1


@pytest.mark.parametrize("path", ["C:\\\\scans\\\\q7.png", "D:/q7.png", "\\\\\\\\server\\\\q7.png"])
def test_a_path_of_windows_with_its_drive_is_named_as_what_it_is(tmp_path: Path, path: str) -> None:
    (tmp_path / "list.csv").write_text(f"image\n{path}\n", encoding="utf-8")
    source = open_source({"kind": "manifest", "path": str(tmp_path / "list.csv")}, "sources.scans").open()
    with pytest.raises(BadRecord, match=r"^image path begins with a drive or server of Windows; write it relative to"):
        source.load(0)
