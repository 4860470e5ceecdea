"""Masks that a manifest lists: read as labels, and each bad one refused by itself."""

from __future__ import annotations

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
