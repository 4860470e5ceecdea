"""Masks and boxes as files: of the picture's own size, one for each record, whole or not there, nothing overwritten."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import headwater
from client.data.sources import open_source
from client.data.sources.coco import decode_runs
from client.data.sources.nifti import Nifti
from client.prediction.data import choose_tasks, open_records
from client.prediction.files import strip_suffix
from client.prediction.output import plan_output
from client.prediction.places import PlacesOutput, opened_places, plan_places
from client.prediction.predict import write_predictions
from client.prediction.records import PredictedRecord, predict_part
from common.inputs import Box, read_mask, write_boxes
from headwater.__main__ import make_app
from tests.finished import MASKS, TASKS, write_finished, write_maps

SIZES = [(40, 40), (50, 30), (16, 64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a mask and a label of the whole picture."""
    folder = tmp_path_factory.mktemp("places")
    return write_finished(folder / "model", write_maps(folder), {"cells": MASKS, **TASKS})


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["predict", *map(str, arguments)])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns a picture whose left half is dark and whose right half is light, with noise."""
    pixels = np.random.default_rng(seed).integers(0, 60, (height, width, 3)).astype(np.uint8)
    pixels[:, width // 2 :] += 180
    return Image.fromarray(pixels)


def write_scans(folder: Path) -> list[str]:
    """Writes pictures of unequal size, one in a folder of its own, and a file that is none."""
    (folder / "sub").mkdir(parents=True)
    names = ["a.png", "b.jpg", "sub/a.png"]
    for number, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        draw(*size, seed=number).save(folder / name)
    (folder / "broken.png").write_bytes(b"nothing")
    return names


def test_each_record_has_a_mask_of_its_pictures_own_size(model: Path, tmp_path: Path) -> None:
    names, out = write_scans(tmp_path / "scans"), tmp_path / "p.csv"
    assert predict(model, "--data", tmp_path / "scans", "--out", tmp_path / "plain.csv").exit_code == 0
    asked = ("--masks", tmp_path / "masks", "--overlays", tmp_path / "overlays")
    result = predict(model, "--data", tmp_path / "scans", "--out", out, *asked)
    assert result.exit_code == 0, result.output
    rows = read(out)
    assert [row["file"] for row in rows] == names
    assert [row["cells"] for row in rows] == ["masks/a.png", "masks/b.png", "masks/sub/a.png"]
    for row, before, size in zip(rows, read(tmp_path / "plain.csv"), SIZES, strict=True):
        mask = Image.open(tmp_path / row["cells"])
        own_SS = read_mask(before.pop("cells"))
        assert mask.mode == "L" and mask.size == size and set(np.unique(own_SS)) == {0, 1}
        # Pillow's nearest neighbour is a reference of its own.
        expected = Image.fromarray(own_SS.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        assert np.mean(np.asarray(mask) == np.asarray(expected)) > 0.98
        drawn, picture = Image.open(tmp_path / "overlays" / Path(row["cells"]).relative_to("masks")), row["file"]
        changed_HW = (np.asarray(drawn) != np.asarray(Image.open(tmp_path / "scans" / picture))).any(axis=2)
        assert drawn.size == size and np.array_equal(changed_HW, np.asarray(mask) == 1)
        assert {key: value for key, value in row.items() if key != "cells"} == before
    assert json.loads((tmp_path / "masks" / "labels.json").read_text()) == {"cells": ["ground", "cell"]}
    assert [row["file"] for row in read(tmp_path / "p.rejected.csv")] == ["broken.png"]
    written = [*(tmp_path / "masks").rglob("*"), *(tmp_path / "overlays").rglob("*")]
    assert all(path.stat().st_mode & 0o077 == 0 for path in [tmp_path / "masks", tmp_path / "overlays", *written])


def test_masks_in_one_json_file_are_the_same_by_their_run_lengths(model: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    command = (
        model,
        "--data",
        tmp_path / "scans",
        "--task",
        "cells",
        "--force",
        "--out",
        tmp_path / "p.csv",
        "--masks",
    )
    assert predict(*command, tmp_path / "m").exit_code == 0
    assert predict(*command, tmp_path / "m.json").exit_code == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["categories"] == [{"id": 1, "name": "cell"}]
    pictures = {each["id"]: each for each in found["images"]}
    assert len(found["annotations"]) == len(pictures) == len(SIZES)
    for each in found["annotations"]:
        picture = pictures[each["image_id"]]
        mask_HW = np.asarray(Image.open((tmp_path / "m" / picture["file_name"]).with_suffix(".png"))) == 1
        assert mask_HW.shape == (picture["height"], picture["width"])
        np.testing.assert_array_equal(decode_runs(each["segmentation"], mask_HW.shape), mask_HW)
        left, top, width, height = each["bbox"]
        assert each["area"] == mask_HW.sum() == mask_HW[top : top + height, left : left + width].sum()
        assert mask_HW[top].any() and mask_HW[:, left].any()
    assert "ground" not in (tmp_path / "m.json").read_text()
    settings = {"kind": "coco", "path": str(tmp_path / "m.json"), "root": str(tmp_path / "scans")}
    for record in open_source(settings, "s").open().index():
        mask_HW = np.asarray(Image.open((tmp_path / "m" / record.path).with_suffix(".png")))
        np.testing.assert_array_equal(read_mask(record.cells["mask"]), mask_HW)
    again = predict(*[each for each in command if each != "--force"], tmp_path / "m.json", "--out", tmp_path / "q.csv")
    assert again.exit_code == 2 and "there is" in again.stderr


def test_a_table_of_pictures_and_predicted_masks_is_a_source(model: Path, tmp_path: Path) -> None:
    """The table that `predict --masks` writes is a manifest: corrected by hand, it can be trained on."""
    write_scans(tmp_path / "scans")
    assert (
        predict(model, "--data", tmp_path / "scans", "--out", tmp_path / "p.csv", "--masks", tmp_path / "m").exit_code
        == 0
    )
    rows = [{**row, "file": f"scans/{row['file']}"} for row in read(tmp_path / "p.csv")]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    settings = {"kind": "manifest", "path": str(tmp_path / "list.csv"), "image": "file", "masks": ["cells"]}
    cells = [record.cells["cells"] for record in open_source(settings, "s").open().index()]
    assert [read_mask(cell).shape[::-1] for cell in cells] == SIZES


def test_records_of_one_array_file_have_their_masks_in_one(model: Path, tmp_path: Path) -> None:
    pictures = np.stack([np.asarray(draw(20, 24, seed)) for seed in range(3)])
    np.savez(tmp_path / "x.npz", images=pictures)
    table = headwater.load(model).predict(tmp_path / "x.npz", masks=tmp_path / "masks", overlays=tmp_path / "o")
    assert set(table["cells"]) == {str(tmp_path / "masks" / "x.npz")}
    with np.load(tmp_path / "masks" / "x.npz") as file:
        assert file["rows"].tolist() == [1, 2, 3] and file["masks"].shape == (3, 24, 20)
        assert file["masks"].dtype == np.uint8 and file["masks"].any()
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["000001.png", "000002.png", "000003.png"]


def test_a_volume_of_one_slice_has_its_mask_at_its_place_in_the_body(model: Path, tmp_path: Path) -> None:
    affine = np.array([[0, -2.0, 0, 5], [3.0, 0, 0, 1], [0, 0, 4.0, 2], [0, 0, 0, 1]])
    (tmp_path / "scans").mkdir()
    values = np.asarray(draw(30, 20).convert("L")).astype(np.float32)[:, :, None]
    own_path = tmp_path / "scans" / "v.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, affine), own_path)
    asked = ("--masks", tmp_path / "m", "--out", tmp_path / "p.csv")
    assert predict(model, "--data", tmp_path / "scans", *asked).exit_code == 0
    own, mask = nibabel.load(own_path), nibabel.load(tmp_path / "m" / "v.nii.gz")
    canonical = nibabel.as_closest_canonical(own)
    assert np.allclose(mask.affine, canonical.affine) and mask.shape == canonical.shape
    assert nibabel.aff2axcodes(mask.affine) == ("R", "A", "S")
    # The slice as a picture, whose first row is the front, has the same mask there.
    Image.fromarray(Nifti(kind="nifti", path=own_path).read(own_path).items[0]).save(tmp_path / "slice.png")
    (cell,) = headwater.load(model).predict([tmp_path / "slice.png"], masks=tmp_path / "flat")["cells"]
    flat_HW, body = np.asarray(Image.open(cell)), np.asarray(mask.dataobj)
    assert flat_HW.any() and flat_HW.shape == (body.shape[1], body.shape[0])
    for x, y in np.ndindex(body.shape[:2]):
        assert body[x, y, 0] == flat_HW[body.shape[1] - 1 - y, x]


@pytest.mark.parametrize(("plane", "axis"), [("axial", 2), ("sagittal", 0)])
def test_a_volume_sliced_by_a_source_has_one_mask_stored_as_it_is(
    model: Path, tmp_path: Path, plane: str, axis: int
) -> None:
    affine = np.array([[0, -2.0, 0, 5], [3.0, 0, 0, 1], [0, 0, -4.0, 2], [0, 0, 0, 1]])
    rng = np.random.default_rng(0)
    for name, most in (("v", 8), ("w", 3)):
        values = rng.integers(0, 60, (6, 8, most)).astype(np.float32)
        values[2:, :4] += 180
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / f"{name}.nii")
    (tmp_path / "list.csv").write_text("file\nv.nii\nw.nii\n")
    kind = f"kind: nifti_slices\npath: list.csv\nplane: {plane}\nwindow: [0, 255]\n"
    (tmp_path / "all.yaml").write_text(kind)
    asked = ("--masks", tmp_path / "m", "--out", tmp_path / "p.csv")
    result = predict(model, "--data", tmp_path / "all.yaml", *asked)
    assert result.exit_code == 0, result.output
    assert {row["cells"] for row in read(tmp_path / "p.csv")} == {"m/v.nii.gz", "m/w.nii.gz"}
    loaded = headwater.load(model)
    for name in ("v", "w"):
        own, mask = nibabel.load(tmp_path / f"{name}.nii"), nibabel.load(tmp_path / "m" / f"{name}.nii.gz")
        assert mask.shape == own.shape and np.allclose(mask.affine, own.affine)
        assert np.asarray(mask.dataobj).max() == 1
        # Along the body's axes, each slice as a picture has the same mask, its first row the top or the front.
        whole, found = (np.asarray(nibabel.as_closest_canonical(each).dataobj) for each in (own, mask))
        paths = [tmp_path / f"{name}{at}.png" for at in range(whole.shape[axis])]
        for at, path in enumerate(paths):
            Image.fromarray(np.take(whole, at, axis).T[::-1].astype(np.uint8)).save(path)
        flat = loaded.predict(paths, masks=tmp_path / f"flat-{name}")["cells"]
        for at, path in enumerate(flat):
            assert np.array_equal(np.asarray(Image.open(path)), np.take(found, at, axis).T[::-1])
    (tmp_path / "some.yaml").write_text(f"{kind}max_slices: 2\n")
    loaded.predict(tmp_path / "some.yaml", masks=tmp_path / "s")
    some = np.asarray(nibabel.as_closest_canonical(nibabel.load(tmp_path / "s" / "v.nii.gz")).dataobj)
    seen = [at for at in range(some.shape[axis]) if (np.take(some, at, axis) < 2).all()]
    assert len(seen) == 2 and (np.delete(some, seen, axis) == 255).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: ["--boxes", folder / "b.json"], "--boxes: expected a task that predicts boxes, got cells"),
        (lambda folder: ["--masks", folder / "full"], "expected a new or empty folder, found something there"),
        (lambda folder: ["--masks", folder / "no" / "m"], "expected a folder at"),
        (lambda folder: ["--masks", folder / "m", "--overlays", folder / "m"], "another place than that of --masks"),
        (lambda folder: ["--masks", folder / "m", "--task", "finding"], "a task that predicts masks, got finding"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_read(
    make: Any, said: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = predict(model, "--data", tmp_path, "--out", tmp_path / "p.csv", *make(tmp_path))
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_try_that_fails_leaves_nothing_in_the_way_of_the_next(model: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    loaded = headwater.load(model).model
    tasks = choose_tasks(loaded, ())
    records = open_records(loaded, tmp_path / "scans", tasks=tasks)
    asked = PlacesOutput(tmp_path / "m", None, tmp_path / "o", tmp_path)
    (tmp_path / "m").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def fail(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    output, places = plan_output(tmp_path / "p.csv", force=False), plan_places(asked, loaded, tasks, force=False)
    with pytest.raises(KeyboardInterrupt):
        write_predictions(loaded, records, output, places=places, observe=fail)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "unread").mkdir()
    (tmp_path / "unread" / "broken.png").write_bytes(b"nothing")
    for _ in range(2):
        result = predict(model, "--data", tmp_path / "unread", "--out", tmp_path / "q.csv", "--masks", tmp_path / "m")
        assert result.exit_code == 2 and not any((tmp_path / "m").iterdir())
    write_predictions(loaded, records, output, places=places)
    assert (tmp_path / "p.csv").is_file() and (tmp_path / "m" / "a.png").is_file() and (tmp_path / "o").is_dir()


def test_a_picture_that_is_gone_by_now_costs_its_mask_only(model: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    loaded = headwater.load(model).model
    records = open_records(loaded, tmp_path / "scans", tasks=list(loaded.tasks))
    places = PlacesOutput(tmp_path / "m", None, None, tmp_path)

    (part,) = records.parts
    ((predicted, _),) = list(predict_part(loaded, part))
    with opened_places(places, loaded, records.parts) as writer:
        (tmp_path / "scans" / "b.jpg").unlink()
        done, rejected = writer.write(part, predicted)
        writer.finish()
    assert [sorted(each.results) for each in done] == [["cells", "finding"], ["finding"], ["cells", "finding"]]
    assert [(each.file, each.task) for each in rejected] == [("b.jpg", "cells")]
    assert not (tmp_path / "m" / "b.png").exists()


def test_names_never_leave_the_folder_nor_meet(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        draw(20, 20).save(tmp_path / name / "same.png")
    paths = [tmp_path / "one" / "same.png", tmp_path / "two" / "same.png"]
    table = headwater.load(model).predict(paths, masks=tmp_path / "m")
    assert [Path(cell).name for cell in table["cells"]] == ["same.png", "same.row2.png"]
    draw(20, 20).save(tmp_path / "same.row3.png")
    table = headwater.load(model).predict([tmp_path / "same.row3.png", *paths], masks=tmp_path / "l")
    assert [Path(cell).name for cell in table["cells"]] == ["same.row3.png", "same.png", "same.row3.row3.png"]
    (tmp_path / "list.csv").write_text("path\none/../two/same.png\none/same.png\n")
    table = headwater.load(model).predict(tmp_path / "list.csv", masks=tmp_path / "n")
    assert [str(Path(cell).relative_to(tmp_path)) for cell in table["cells"]] == ["n/same.png", "n/one/same.png"]
    assert strip_suffix("a.1.2.840.NII.GZ") == "a.1.2.840" and strip_suffix("1.2.840") == "1.2.840"
    assert strip_suffix(".png") == ".png"


BOXES = [
    Box("red", 0.1, 0.2, 0.5, 0.6, 0.75),
    Box("white", -0.2, 0.5, 0.25, 1.5, 0.5),
    Box("red", 1.1, 0.2, 1.5, 0.6, 0.9),
]


def test_boxes_are_in_pixels_of_the_picture_and_cut_at_its_edge(model: Path, tmp_path: Path) -> None:
    write_scans(tmp_path / "scans")
    loaded = headwater.load(model).model
    records = open_records(loaded, tmp_path / "scans", tasks=["cells"])
    (part,) = records.parts
    index = part.source.index()
    cells = {"b.jpg": write_boxes(BOXES, 1.0, 1.0), "a.png": write_boxes([], 640, 480)}
    predicted = [
        PredictedRecord(at, record, {"cells": (cells[record.path], np.zeros(1, np.float32))})
        for at, record in enumerate(index)
        if record.path in cells
    ]
    places = PlacesOutput(None, tmp_path / "b.json", tmp_path / "o")
    with opened_places(places, loaded, records.parts) as writer:
        done, rejected = writer.write(part, predicted)
        writer.finish()
    assert not rejected and [each.results["cells"][0] for each in done] == [cells[each.record.path] for each in done]
    found = json.loads((tmp_path / "b.json").read_text())
    pictures = {each["file_name"]: each for each in found["images"]}
    assert (pictures["b.jpg"]["width"], pictures["b.jpg"]["height"]) == (50, 30)
    names = {each["id"]: each["name"] for each in found["categories"]}
    assert [(names[each["category_id"]], each["bbox"], each["score"]) for each in found["annotations"]] == [
        ("red", [5.0, 6.0, 20.0, 12.0], 0.75),
        ("white", [0.0, 15.0, 12.5, 15.0], 0.5),
    ]
    assert {each["image_id"] for each in found["annotations"]} == {pictures["b.jpg"]["id"]}
    assert (tmp_path / "b.json").stat().st_mode & 0o077 == 0
    drawn = np.asarray(Image.open(tmp_path / "o" / "b.png")).astype(int)
    changed = np.abs(drawn - np.asarray(Image.open(tmp_path / "scans" / "b.jpg")).astype(int)).sum(axis=2) > 0
    assert changed[6, 6:23].all() and changed[6:17, 5].all() and not changed[:5].any()
