"""First contact with pictures that have masks or boxes: the layouts that are found, and the file that is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.data.sources import open_source
from client.data.sources.voc import write_annotation
from client.inspect.draft import draft_file
from client.inspect.finding import Finding
from client.inspect.folders import inspect
from common.types import BadInput
from common.yaml import load
from headwater.__main__ import make_app
from simulations.check import check_simulation
from simulations.config import SimulationConfig

MASK = np.zeros((4, 6), np.uint8)
MASK[1:3, 2:5] = 255


def draw(path: Path, values: np.ndarray = MASK) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def draft(finding: Finding, folder: Path) -> SimulationConfig:
    """Returns the simulation file that is written, which reads every record and its label."""
    out = folder / "draft.yaml"
    written = draft_file(finding, out, site=False, backbone=None)
    assert written.blanks == (("run.tasks.boxes.sizes in draft.yaml",) if finding.label == "boxes" else ())
    for path, text in written.files.items():
        assert ("FILL_IN" in text) == bool(written.blanks)
        path.write_text(text.replace("FILL_IN, FILL_IN", "0.2, 0.3"), encoding="utf-8")
    config = load(SimulationConfig, out)
    check_simulation(config)
    index = open_source(config.sources["records"], "sources.records").open().index()
    assert len(index) == finding.records and all(record.cells[finding.label] for record in index)
    return config


PAIRS = [
    ("images/{}.jpg", "masks/{}.png", False),
    ("images/{}.png", "masks/{}.npy", False),
    ("{}.jpg", "{}_mask.png", False),
    ("{}.png", "{}_mask.png", False),
    ("benign/{}.png", "benign/{}_mask.png", False),
    ("imgs/ward 1/{}.png", "segmentations/ward 1/{}_seg.png", False),
    ("leftImg8bit/{side}/aachen/{}_leftImg8bit.png", "gtFine/{side}/aachen/{}_gtFine_labelIds.png", True),
]


@pytest.mark.parametrize(("image", "mask", "has_sides"), PAIRS)
def test_masks_beside_pictures_become_a_segmentation(tmp_path: Path, image: str, mask: str, has_sides: bool) -> None:
    data = tmp_path / "data"
    for number in range(4):
        side = ["train", "val"][number % 2]
        draw(data / image.format(f"q7-{number}", side=side), np.zeros((4, 6, 3), np.uint8))
        path = data / mask.format(f"q7-{number}", side=side)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, MASK)
        else:
            draw(path)
    if has_sides:
        draw(data / "gtFine" / "train" / "aachen" / "q7-0_gtFine_color.png", np.zeros((4, 6, 3), np.uint8))
    finding = inspect(data, None)
    assert (finding.records, finding.label, finding.has_split) == (4, "mask", has_sides)
    assert finding.label_facts.values == ("0", "255")
    config = draft(finding, tmp_path)
    assert config.run.tasks["mask"].settings()["labels"] == ["background", "object"]
    assert config.tasks["mask"].values == {"0": "background", "255": "object"}
    assert config.partition.split == ("source" if has_sides else "hash")
    assert "q7" not in (tmp_path / "draft.yaml").read_text()


def test_a_folder_of_voc_becomes_a_detection(tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / "VOC" / "JPEGImages" / f"{number}.jpg")
        (tmp_path / "VOC" / "Annotations").mkdir(exist_ok=True)
        text = write_annotation(6, 4, [(["cell", "grain"][number % 2], 0, 0, 3, 3)])
        (tmp_path / "VOC" / "Annotations" / f"{number}.xml").write_text(text)
    lists = tmp_path / "VOC" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for name, text in (("trainval", "0\n1\n2"), ("val", "2"), ("train", "0\n1"), ("test", "3")):
        (lists / f"{name}.txt").write_text(text)
    finding = inspect(tmp_path / "VOC", None)
    assert finding.source["sides"] == {"train": ["trainval"], "test": ["test"]}
    config = draft(finding, tmp_path)
    assert (config.run.tasks["boxes"].kind, config.partition.split) == ("detection", "source")
    settings = config.run.tasks["boxes"].settings()
    assert settings["labels"] == ["cell", "grain"] and settings["sizes"] == {"cell": [0.2, 0.3], "grain": [0.2, 0.3]}
    inner = inspect(tmp_path, None)
    assert (inner.source["images"], inner.source["lists"]) == ("VOC/JPEGImages", "VOC/ImageSets/Main")


def test_a_folder_of_yolo_becomes_a_detection(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(4):
        side = ["train", "val"][number % 2]
        draw(data / "images" / side / f"{number}.jpg")
        (data / "labels" / side).mkdir(parents=True, exist_ok=True)
        (data / "labels" / side / f"{number}.txt").write_text(f"{number // 2} 0.5 0.5 0.5 0.5\n")
    with pytest.raises(BadInput, match="names of the classes in a file data.yaml"):
        inspect(data, None)
    for names in ("[cell, grain]", "{0: cell, 1: grain}"):
        (data / "data.yaml").write_text(f"train: images/train\nnames: {names}\nnc: 2\n")
        finding = inspect(data, None)
        assert finding.source["names"] == ["cell", "grain"]
    config = draft(finding, tmp_path)
    assert (config.run.tasks["boxes"].kind, config.partition.split) == ("detection", "source")
    assert config.run.tasks["boxes"].settings()["labels"] == ["cell", "grain"]
    (data / "data.yaml").unlink()
    (data / "classes.txt").write_text("cell\ngrain\n")
    assert inspect(data, None).source["names"] == ["cell", "grain"]


def test_a_mask_for_each_object_becomes_a_segmentation(tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / "data" / f"q7{number}" / "images" / f"q7{number}.png", np.zeros((4, 6, 3), np.uint8))
        for place in range(2 + number):
            one = np.zeros((4, 6), np.uint8)
            one[place % 4, place] = 255
            draw(tmp_path / "data" / f"q7{number}" / "masks" / f"m{place}.png", one)
    finding = inspect(tmp_path / "data", None)
    assert (finding.records, finding.label, finding.label_facts.values) == (4, "mask", ("0", "1"))
    config = draft(finding, tmp_path)
    assert config.run.tasks["mask"].kind == "segmentation"
    assert "q7" not in (tmp_path / "draft.yaml").read_text()


def coco(folder: Path, names: list[str], file: str, category: str = "rider") -> None:
    content: dict[str, Any] = {
        "images": [{"id": name, "file_name": name} for name in names],
        "categories": [{"id": 1, "name": category}],
        "annotations": [
            {"image_id": name, "category_id": 1, "bbox": [0, 0, 3, 2], "segmentation": [[0, 0, 3, 0, 3, 2]]}
            for name in names
        ],
    }
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / file).write_text(json.dumps(content))


def test_a_folder_of_coco_becomes_a_detection_or_a_segmentation(tmp_path: Path) -> None:
    data = tmp_path / "streets"
    for side, names in (("train", ["0.png", "1.png", "2.png"]), ("val", ["0.png"])):
        coco(data, names, f"instances_{side}2017.json")
        for name in names:
            draw(data / f"{side}2017" / name)
    finding = inspect(data, None)
    assert finding.source["root"] == {"train": data / "train2017", "test": data / "val2017"}
    config = draft(finding, tmp_path)
    assert (config.run.tasks["boxes"].kind, config.partition.split) == ("detection", "source")
    config = draft(inspect(data, "mask"), tmp_path)
    assert config.run.tasks["mask"].settings()["labels"] == ["background", "rider"]
    one = tmp_path / "one"
    coco(one, ["a.png"], "all.json")
    draw(one / "annotations" / "a.png")
    assert inspect(one / "annotations" / "all.json", None).records == 1


def test_masks_in_a_table_and_in_arrays_are_found(tmp_path: Path) -> None:
    lines = ["image,patient,mask"]
    for number in range(4):
        draw(tmp_path / "t" / f"{number}.png")
        draw(tmp_path / "t" / f"m{number}.png")
        lines.append(f"{number}.png,p{number // 2},m{number}.png")
    (tmp_path / "t" / "list.csv").write_text("\n".join(lines))
    config = draft(inspect(tmp_path / "t" / "list.csv", None), tmp_path)
    assert config.sources["records"].settings()["masks"] == ["mask"] and config.unit == "patient"
    np.savez(
        tmp_path / "a.npz", images=np.zeros((4, 4, 6, 3), np.uint8), masks=np.stack([MASK // 255] * 4), y=[0, 1, 0, 1]
    )
    assert inspect(tmp_path / "a.npz", None).label == "y"
    draft(inspect(tmp_path / "a.npz", "masks"), tmp_path)


def test_masks_that_number_objects_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for number in range(2):
        draw(tmp_path / "images" / f"{number}.png")
        draw(tmp_path / "masks" / f"{number}.png", np.arange(24, dtype=np.uint8).reshape(4, 6))
    with pytest.raises(BadInput, match="at most 20 numbers, one for each label, got 24: do they number the objects"):
        inspect(tmp_path, None)


def test_classes_whose_pictures_have_equal_names_are_no_masks(tmp_path: Path) -> None:
    for name in ("benign", "malignant", "segments"):
        for number in range(4):
            draw(tmp_path / name / f"{number}{'' if name != 'segments' else 'x'}.png")
    finding = inspect(tmp_path, None)
    assert (finding.label, finding.label_facts.values) == ("label", ("benign", "malignant", "segments"))


def test_names_in_a_strangers_file_do_not_command_the_terminal(tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw(data / "a.png")
    draw(data / "b.png")
    coco(data, ["a.png", "b.png"], "objects.json", category="\x1b]0;owned\x07\x9b31mred")
    (data / "annotations" / "objects.json").rename(data / "objects.json")
    site = {
        "name": "north",
        "registry": "north",
        "unit": "example",
        "budget": {"epsilon": 1, "delta": 1e-5},
        "allow": {"tasks": "any", "backbones": "any", "solvers": "any"},
        "sources": {"records": {"kind": "coco", "path": str(data / "objects.json")}},
        "tasks": {"t": {"source": "records", "label": "boxes", "missing": "refuse", "public_size": 3}},
        "split": {"test_fraction": 0.3},
        "on_bad_record": "skip",
        "evaluation": "local",
        "ledger_dir": str(tmp_path / "ledgers"),
        "state_dir": str(tmp_path / "state"),
    }
    (tmp_path / "site.yaml").write_text(json.dumps(site))
    drafted = tmp_path / "draft.yaml"
    for words in (["site", "check", "--offline", tmp_path / "site.yaml"], ["inspect", data, "--out", drafted]):
        shown = CliRunner().invoke(make_app(), list(map(str, words)), color=True).output
        assert "owned" in shown
        assert "\x07" not in shown and "\x9b" not in shown and "\x1b]" not in shown
    assert drafted.read_text(encoding="utf-8").replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (("p1_a", "p1_b", "p2_a", "p3_a"), 3),
        (("07-a", "07-b", "08-a", "09-a"), 3),
        (("p1_a", "p2_a", "p3_a", "p4_a"), None),  # Each once: nothing is told apart.
        (("s2_1", "s2_2", "s2_3", "s2_4"), None),
        (("red_1", "red_2", "blue_1", "blue_2"), None),  # Words are no ids.
        (("p1_a", "p1_b", "p2_a", "other"), None),
    ],
)
def test_names_that_begin_with_a_patients_id_make_the_patient_the_unit(
    tmp_path: Path, names: Sequence[str], patients: int | None
) -> None:
    """A promise for each picture protects a patient with two of them half as well."""
    data = tmp_path / "set"
    for name in names:
        draw(data / "images" / f"{name}.png")
        draw(data / "masks" / f"{name}.png", MASK)
    finding = inspect(data, None)
    config = draft(finding, tmp_path)
    assert (finding.patients, config.unit) == (patients, "patient" if patients else "example")


def test_masks_that_cannot_be_read_are_named_by_row_and_reason(tmp_path: Path) -> None:
    data = tmp_path / "set"
    for name in "abcd":
        draw(data / "images" / f"{name}.png")
        draw(data / "masks" / f"{name}.png", MASK)
    (data / "masks" / "c.png").write_bytes(b"no picture")
    assert inspect(data, None).notes == ("mask: 1 of 4 cannot be read (row 3: unreadable mask).",)
    for name in "abd":
        (data / "masks" / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"got none .*; mask: 4 of 4 cannot be read \(row 1: unreadable mask; row 2"):
        inspect(data, None)
