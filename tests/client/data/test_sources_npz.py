"""Arrays: parts, names for numbers, and files that hold something else."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.sources import Source, open_source
from common.inputs import read_mask
from common.types import BadInput

X = np.arange(12, dtype=np.float32).reshape(4, 3)
LABELS = np.array(["a", "b", "a", "b"])


def npz(path: Path, parts: dict[str, Any] | None = None, **settings: Any) -> Source:
    parts = parts or {"all": {"inputs": "x", "labels": {"label": "y"}}}
    return open_source({"kind": "npz", "path": str(path), "parts": parts, **settings}, "sources.rows").open()


def write(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "rows.npz", **arrays)
    return folder / "rows.npz"


def test_parts_follow_each_other_and_state_the_side(tmp_path: Path) -> None:
    path = write(tmp_path, x=X, y=LABELS, more_x=X[:1] + 50, more_y=LABELS[1:2])
    parts = {
        "test": {"inputs": "more_x", "labels": {"label": "more_y"}},
        "train": {"inputs": "x", "labels": {"label": "y"}},
    }
    source = npz(path, parts)
    assert [record.split for record in source.index()] == ["test"] + 4 * ["train"]
    assert [record.row for record in source.index()] == [1, 2, 3, 4, 5]
    assert [record.cells["label"] for record in source.index()] == ["b", *LABELS]
    np.testing.assert_array_equal(source.load(0), X[0] + 50)
    np.testing.assert_array_equal(source.load(4), X[3])


def test_one_part_called_all_states_no_side(tmp_path: Path) -> None:
    assert {record.split for record in npz(write(tmp_path, x=X, y=LABELS)).index()} == {None}


def test_equal_content_has_an_equal_key_wherever_it_stands(tmp_path: Path) -> None:
    first = npz(write(tmp_path, x=X, y=LABELS)).index()
    second = npz(write(tmp_path, x=X[[2, 2, 0]], y=LABELS[:3])).index()
    assert [record.key for record in second] == [first[2].key, first[2].key, first[0].key]


def test_other_content_and_other_inputs_have_another_digest(tmp_path: Path) -> None:
    other = {"all": {"inputs": "z", "labels": {"label": "y"}}}
    digests = {npz(write(tmp_path, x=x, y=LABELS, z=-X)).digest() for x in (X, X + 1)}
    assert len({*digests, npz(tmp_path / "rows.npz", other).digest()}) == 3


def test_a_number_without_a_name_is_a_missing_label_of_that_record_alone(tmp_path: Path) -> None:
    path = write(tmp_path, x=X, y=np.array([0, 2, -1, 1]), n=np.array(["no", "yes"]))
    assert [record.cells["label"] for record in npz(path, names={"label": "n"}).index()] == ["no", "", "", "yes"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([1, 0, 2, 3]), ["1", "0", "2", "3"]),
        (np.array([1.5, np.nan, 0, 2]), ["1.5", "", "0.0", "2.0"]),
        (np.array([b"a", b"b", b"", b"d"]), ["a", "b", "", "d"]),
        (np.array([True, False, True, True]), ["True", "False", "True", "True"]),
        (np.array(["a ", "", "c", "d"]), ["a", "", "c", "d"]),
    ],
)
def test_labels_of_every_type_become_text(tmp_path: Path, values: np.ndarray, expected: list[str]) -> None:
    index = npz(write(tmp_path, x=X, y=values)).index()
    assert [record.cells["label"] for record in index] == expected


@pytest.mark.parametrize(
    ("arrays", "settings", "expected"),
    [
        ({"x": X}, {}, "expected an array 'y', found none"),
        ({"x": X, "y": LABELS[:3]}, {}, "expected 'y' to hold one value for each record of 'x'"),
        ({"x": X, "y": X}, {}, "expected 'y' to hold one value for each record of 'x'"),
        ({"x": np.float32(3), "y": LABELS}, {}, "expected 'x' to hold one image or vector for each record"),
        ({"x": X, "y": LABELS, "n": LABELS[:2]}, {"names": {"label": "n"}}, "expected whole numbers in column 'label'"),
        ({"x": X, "y": np.array([{}, {}, {}, {}])}, {}, "without Python objects, got ValueError"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Any], settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadInput) as caught:
        npz(write(tmp_path, **arrays), **settings)
    assert expected in str(caught.value)


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    files: dict[str, Callable[[Path], object]] = {
        "plain.npz": lambda path: path.write_bytes(pickle.dumps(Payload(mark))),
        "object.npz": lambda path: np.savez(path, x=X, y=np.array([Payload(mark)] * 4, dtype=object)),
        "empty.npz": lambda path: path.write_bytes(b""),
    }
    for name, write_file in files.items():
        write_file(tmp_path / name)
        with pytest.raises(BadInput, match=f"{name}: expected"):
            npz(tmp_path / name)
    assert not mark.exists()


def test_brain_mri_is_read_with_the_names_of_its_classes(assets: Path) -> None:
    parts = {side: {"inputs": f"{side}_images", "labels": {"label": f"{side}_labels"}} for side in ("train", "test")}
    path = assets / "data" / "brain_mri_4class" / "brain_mri_128.npz"
    source = npz(path, parts, names={"label": "classes"})
    index = source.index()
    assert [sum(record.split == side for record in index) for side in ("train", "test")] == [320, 80]
    assert {record.cells["label"] for record in index} == {
        "glioma_tumor",
        "meningioma_tumor",
        "no_tumor",
        "pituitary_tumor",
    }
    assert source.load(399).shape == (128, 128)
    # The asset's split is deduplicated, see its README.
    assert len({record.key for record in index}) == 400


def test_a_file_that_changed_is_read_again_and_one_that_did_not_is_shared(tmp_path: Path) -> None:
    """Whichever rows of it a site has."""
    path = tmp_path / "a.npz"
    parts = {"all": {"inputs": "x", "labels": {}}}
    settings = {"kind": "npz", "path": str(path), "parts": parts}
    np.savez(path, x=np.zeros((2, 3), dtype=np.float32))
    first = open_source(settings, "s").open()
    assert open_source({**settings, "rows": str(tmp_path / "rows.csv")}, "s").open() is first
    np.savez(path, x=np.ones((2, 3), dtype=np.float32))
    again = open_source(settings, "s").open()
    assert again.digest() != first.digest()
    assert again.load(0).tolist() == [1.0, 1.0, 1.0]
    assert [record.key for record in again.index()] != [record.key for record in first.index()]


def test_a_label_that_is_no_text_is_missing_for_its_record_alone(tmp_path: Path) -> None:
    """NumPy stores characters as numbers; this one is beyond Unicode."""
    labels = LABELS.copy()
    labels.view(np.uint32)[2] = 0x7FFFFFFF
    index = npz(write(tmp_path, x=X, y=labels)).index()
    assert [record.cells["label"] for record in index] == ["a", "b", "", "b"]


def test_masks_are_cells_that_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    pictures = np.zeros((3, 4, 5, 3), np.uint8)
    pictures[1:] += np.arange(2, dtype=np.uint8)[:, None, None, None] + 1
    masks = np.arange(60).reshape(3, 4, 5) % 2
    np.savez(tmp_path / "a.npz", x=pictures, mask=masks, kind=np.array([0, 1, 1]))
    parts = {"all": {"inputs": "x", "labels": {"mask": "mask", "kind": "kind"}}}
    spec = {"kind": "npz", "path": str(tmp_path / "a.npz"), "parts": parts}
    records = open_source(spec, "s").open().index()
    assert [record.cells["kind"] for record in records] == ["0", "1", "1"]
    assert set(records[0].cells) == {"mask", "kind"} and len(records[0].cells) == 2
    for record, mask in zip(records, masks, strict=True):
        np.testing.assert_array_equal(read_mask(record.cells["mask"]), mask)
    np.savez(tmp_path / "a.npz", x=pictures, mask=masks[:, :3], kind=np.array([0, 1, 1]))
    with pytest.raises(BadInput, match="expected 'mask' to hold one mask of its size for each record of 'x'"):
        open_source(spec, "s").open()
