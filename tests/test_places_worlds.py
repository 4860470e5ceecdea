"""As tests/test_two_worlds.py, for tasks of places: one hostile unit moves nothing but the noised sums, by its part.

Pictures have unequal sizes, masks show nothing or do not fit, and a patient has several pictures.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.inputs import Box, write_boxes
from common.model.backbones import Backbone, open_backbones
from common.run import ONLY_BACKBONE, RunConfig
from tests.finished import write_maps
from tests.worlds import MEASURED, Replies, answer_run, make_run, make_site

pytestmark = pytest.mark.usefixtures("two_threads")

TASKS: dict[str, dict[str, Any]] = {
    "finding": {"kind": "classification", "labels": ["absent", "present"], "head": MEASURED},
    "objects": {"kind": "detection", "labels": ["cell"], "sizes": {"cell": [0.6, 0.5]}, "most_boxes": 2, "scale": 6.0},
    "places": {"kind": "segmentation", "labels": ["ground", "cell"], "side": 8, "ignore": 9, "scale": 4.0},
}
COLUMNS = {"finding": "finding", "objects": "boxes", "places": "mask"}
LARGEST = {"moments": 1.0, "update": 1.0, "statistics": len(TASKS) ** 0.5}
NO_BOXES = write_boxes([], 1, 1)
SIDES = {"moments": "train", "update": "train", "statistics": "test"}


@dataclass(frozen=True)
class Picture:
    """A record that a test writes: whose it is, its side, its files and its label.

    Attributes:
        patient: whose it is.
        split: its side.
        picture: bytes of the picture's file; None where it is missing.
        mask: bytes of the mask's file; None where it is missing, "" for an empty cell.
        finding: its label.
        boxes: its boxes as a cell.
    """

    patient: str
    split: str
    picture: bytes | None
    mask: bytes | str | None
    finding: str = "present"
    boxes: str = NO_BOXES


def write_png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values))
    return stream.getvalue()


def draw(patient: str, split: str, seed: int, height: int, width: int, *, empty: bool = False) -> Picture:
    """A dark picture with a bright cell, or without one."""
    rng = np.random.default_rng(seed)
    pixels, mask = rng.integers(0, 90, (height, width, 3)), np.zeros((height, width), np.uint8)
    if not empty:
        mask[: height // 2, width // 3 :] = 1
        pixels[mask > 0] += 140
    boxes = [] if empty else [Box("cell", width // 3, 0, width, height // 2)]
    finding = "absent" if empty else "present"
    return Picture(patient, split, write_png(pixels), write_npy(mask), finding, write_boxes(boxes, width, height))


def honest(count: int) -> list[Picture]:
    """Two pictures of unequal size for each patient, a third of them held out; some show nothing."""
    sides = ["test" if patient % 3 == 2 else "train" for patient in range(count)]
    return [
        draw(f"p{patient}", side, 10 * patient + number, 8 + 3 * patient, 14 - number, empty=patient % 4 == number)
        for patient, side in enumerate(sides)
        for number in range(2)
    ]


def hostile_units() -> dict[str, list[Picture]]:
    """Returns units by what is wrong with them; the first ones are those of the quick test."""
    good, test = draw("pX", "train", 99, 9, 21), draw("pX", "test", 99, 9, 21)
    shown, mask = good.picture, good.mask

    def of(mask: bytes | str | None, picture: bytes | None = shown) -> list[Picture]:
        return [Picture("pX", "train", picture, mask)]

    def with_boxes(*boxes: Box, side: str = "train") -> list[Picture]:
        return [replace(good, split=side, boxes=write_boxes(boxes, 1, 1))]

    cut = mask[:-30] if isinstance(mask, bytes) else b""
    # The header promises 40,000 x 40,000 places.
    absurd = write_npy(np.zeros((9, 21), np.uint8)).replace(b"(9, 21)", b"(40000,40000)")
    return {
        "good": [good],
        "several of unequal size": [good, draw("pX", "train", 98, 30, 5), draw("pX", "train", 97, 6, 6, empty=True)],
        "nothing on it": [draw("pX", "train", 99, 9, 21, empty=True)],
        "a mask of another size": of(write_npy(np.ones((8, 8), np.uint8))),
        "an unknown label": of(write_npy(np.full((9, 21), 5, np.uint8))),
        "held out": [test],
        "boxes of another name": with_boxes(Box("grain", 0, 0, 1, 1)),
        "too many boxes, held out": with_boxes(*[Box("cell", 0, 0, 1, 1)] * 3, side="test"),
        "no label anywhere": of(write_npy(np.full((9, 21), 9, np.uint8))),
        "held out, no label anywhere": [Picture("pX", "test", shown, write_npy(np.full((9, 21), 9, np.uint8)))],
        "no mask": of(""),
        "a mask that is missing": of(None),
        "a mask cut off": of(cut),
        "a mask of fractions": of(write_npy(np.full((9, 21), 0.5))),
        "negative": of(write_npy(np.full((9, 21), -1))),
        "absurdly large": of(absurd),
        "objects": of(write_npy(np.array([["a"]], dtype="U1"))),
        "a picture cut off": of(mask, shown[:-30] if shown else None),
        "no picture": of(mask, None),
        "one pixel": [Picture("pX", "train", write_png([[[255] * 3]]), write_npy([[1]]))],
        "good and bad": [good, *of(write_npy(np.ones((8, 8), np.uint8))), *of(mask, b"garbage")],
        "a box without area": with_boxes(Box("cell", 0.5, 0.5, 0.5, 0.5)),
        "a box outside": with_boxes(Box("cell", 2.0, 2.0, 3.0, 3.0)),
        "boxes twice": with_boxes(*[Box("cell", 0, 0, 0.5, 0.5)] * 2),
        "boxes cut off": [replace(good, boxes=good.boxes[:-4])],
        "no boxes known": [replace(good, boxes="")],
        "many": [good] * 40,
    }


def write_source(folder: Path, pictures: Sequence[Picture]) -> dict[str, Any]:
    folder.mkdir()
    rows = []
    for number, each in enumerate(pictures):
        for name, data in ((f"{number}.png", each.picture), (f"{number}.npy", each.mask)):
            if isinstance(data, bytes):
                (folder / name).write_bytes(data)
        mask = "" if each.mask == "" else f"{number}.npy"
        rows.append((f"{number}.png", mask, each.finding, each.boxes, each.patient, each.split))
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "finding", "boxes", "patient", "split"), *rows])
    listed = {"patient": "patient", "split": "split", "masks": ["mask"]}
    return {"kind": "manifest", "path": str(folder / "rows.csv"), **listed}


@dataclass(frozen=True)
class Worlds:
    """One run, and sites that differ by their rows alone."""

    folder: Path
    unit: str
    run: RunConfig
    backbone: Backbone

    @classmethod
    def of(cls, folder: Path, unit: str) -> Worlds:
        backbone = {
            **write_maps(folder, num_classes=1000, resize=16, grid=4, colours=True),
            "projection": {"normalize": True},
        }
        run = make_run(backbone, unit, tasks=TASKS)
        return cls(folder, unit, run, open_backbones(run)[ONLY_BACKBONE])

    def answers(self, name: str, pictures: Sequence[Picture]) -> Replies:
        folder = self.folder / name
        source = write_source(folder, pictures)
        return answer_run(make_site(folder, source, self.unit, COLUMNS), self.run, self.backbone)


def compute_part(before: Replies, after: Replies, hostile: Sequence[Picture]) -> dict[str, Any]:
    """Returns by how much the sums differ; everything else is the same, and so is the side on which the unit is not."""
    assert before.plain == after.plain
    part = {name: getattr(after, name) - getattr(before, name) for name in LARGEST}
    for name, largest in LARGEST.items():
        # Sums travel as float32.
        assert np.linalg.norm(part[name]) <= largest * (1.0 + 1e-5)
        if not any(each.split == SIDES[name] for each in hostile):
            assert not part[name].any()
    return part


def test_a_hostile_patient_moves_the_sums_of_places_by_its_own_part_alone(tmp_path: Path) -> None:
    worlds, others, units = Worlds.of(tmp_path, "patient"), honest(6), hostile_units()
    before = worlds.answers("before", others)
    for name in list(units)[: list(units).index("no label anywhere")]:
        part = compute_part(before, worlds.answers(name, [*units[name], *others]), units[name])
        assert name not in ("good", "several of unequal size", "nothing on it") or part["update"].any()
        assert name != "held out" or part["statistics"].any()


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["example", "patient"])
def test_a_units_part_of_places_is_the_same_beside_whatever_records_it_stands(tmp_path: Path, unit: str) -> None:
    worlds, few, many = Worlds.of(tmp_path, unit), honest(6), honest(9)
    before_few, before_many = worlds.answers("few", few), worlds.answers("many", many)
    for name, hostile in hostile_units().items():
        if unit == "example" and len(hostile) > 1:
            continue  # They are several units.
        first = compute_part(before_few, worlds.answers(f"{name}, few", [*hostile, *few]), hostile)
        last = compute_part(before_many, worlds.answers(f"{name}, many", [*many, *hostile]), hostile)
        for what in LARGEST:
            np.testing.assert_allclose(first[what], last[what], atol=2e-5, err_msg=f"{name}: {what}")
