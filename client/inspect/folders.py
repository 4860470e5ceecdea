"""Folders, zips and array files: pictures, recordings or DICOM files, by what their folders, names and lists say."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from client.data.sources.image_folder import SUFFIXES as PICTURES
from client.data.sources.parts.recordings import SUFFIXES as RECORDINGS
from client.data.sources.parts.recordings import find_text
from client.data.sources.parts.tables.sheets import SUFFIXES as SHEETS
from client.data.sources.parts.tree import Tree, make_readable, open_tree
from client.inspect.drawn import find_drawn, find_list, find_masks, is_mask_name
from client.inspect.finding import FEW, ColumnFacts, Finding, Modality, choose_label, describe_column, guess_patient
from client.inspect.pairs import find_pairs
from client.inspect.patients import describe_patients, find_patients
from client.inspect.series import FILES as SERIES
from client.inspect.steps import is_of_steps
from client.inspect.tables import inspect_table
from common.errors import instead, nearest
from common.types import BadInput

_DICOM = frozenset({".dcm", ".dicom"})
_LISTS = frozenset({".csv", ".tsv", ".txt", ".parquet"}) | SHEETS
_SIDES = {"train", "test"}
_SAMPLE_BYTES, _FEW_TABLES = 1 << 16, 10
"""Bytes of tables that are looked at for the names of others, and tables that are read for what they hold."""


def inspect(path: Path, task: str | None, sheet: int | str | None = None) -> Finding:
    """Returns what a file or folder holds.

    Args:
        path: the file or folder.
        task: the label column; None for a guess.
        sheet: name or 1-based number of a spreadsheet's sheet; None where only one holds anything.

    Raises:
        BadInput: it is missing, empty, of no known kind, or has no column that can be the label.
    """
    if not path.exists():
        raise BadInput(f"{path}: there is no such file or folder")
    if not path.is_dir():
        if path.suffix.lower() == ".npz":
            return _inspect_npz(path, task)
        if path.suffix.lower() == ".json":
            return find_list(path, task)
        if path.suffix.lower() == ".duckdb":
            return describe_patients(path, "omop", task)
        if path.suffix.lower() in PICTURES | RECORDINGS | _DICOM:
            raise BadInput(f"{path}: expected a folder of such files, or a table that lists them, got one file")
        if path.suffix.lower() not in _LISTS and zipfile.is_zipfile(path):
            return _inspect_tree(path, task)
        return inspect_table(path, task, sheet)
    return _inspect_tree(path, task, sheet)


def _inspect_tree(path: Path, task: str | None, sheet: int | str | None = None) -> Finding:
    everything = open_tree(path, "files").chosen(lambda name: True)
    known = find_patients(path, everything, task)
    if known is not None:
        return known
    drawn = find_drawn(path, everything, task)
    if drawn is not None:
        return drawn
    kinds: dict[str, frozenset[str]] = {"pictures": PICTURES, "recordings": RECORDINGS, "DICOM files": _DICOM}
    counts = {
        kind: sum(PurePosixPath(name).suffix.lower() in suffixes for name in everything.stamps)
        for kind, suffixes in kinds.items()
    }
    lists = [name for name in everything.stamps if PurePosixPath(name).suffix.lower() in _LISTS and "/" not in name]
    kind = max(counts, key=lambda name: counts[name])
    if not any(counts.values()) and (pairs := find_pairs(path, everything)) is not None:
        return pairs
    if kind == "recordings" and (spoken := _find_spoken(path, everything)) is not None:
        return spoken
    if path.is_dir() and lists and (counts[kind] == 0 or len(lists) == 1):
        if len(lists) > 1 and (name := _find_main(path, lists)) is not None:
            return inspect_table(path / name, task, sheet)
        if len(lists) > 1:
            raise BadInput(
                f"{path}: expected one table, got {len(lists)}; inspect one of them: {', '.join(lists[:5])}; or, where "
                "each holds one series, write a CSV beside them with a first line such as file,finding that lists them"
            )
        return inspect_table(path / lists[0], task, sheet)
    series = sum(PurePosixPath(name).suffix.lower() in SERIES for name in everything.stamps)
    if counts[kind] == 0 and series:
        raise BadInput(
            f"{path}: expected a CSV in it that lists its {series} file(s) of series (a column of their paths, one of "
            "labels); write one with a first line such as file,finding and inspect that"
        )
    if counts[kind] == 0:
        said = "nothing that is known" if everything.stamps else "an empty one"
        raise BadInput(f"{path}: expected a folder with a table, pictures, recordings or DICOM files, got {said}")
    tree = everything.chosen(lambda name: name.suffix.lower() in kinds[kind])
    if kind == "DICOM files":
        raise BadInput(
            f"{path}: expected a CSV beside the {counts[kind]} DICOM files that lists them (a column of their paths, "
            "one of labels); write one with a first line such as file,finding and inspect that"
        )
    return _find_named(path, tree, "image" if kind == "pictures" else "audio", kind, task)


def _find_main(root: Path, lists: Sequence[str]) -> str | None:
    """Returns the one of several tables that lists the others, or whose labels are in another; None where none does."""
    for name in lists:
        with (root / name).open("rb") as file:
            beginning = file.read(_SAMPLE_BYTES)
        if sum(other.encode() in beginning for other in lists if other != name) > 1:
            return name
    if len(lists) > _FEW_TABLES:
        return None
    return next((name for name in lists if is_of_steps(root / name)), None)


def _find_spoken(path: Path, tree: Tree) -> Finding | None:
    """Returns recordings of which most have a text file beside them; None where that is not so."""
    heard = [PurePosixPath(name) for name in tree.stamps if PurePosixPath(name).suffix.lower() in RECORDINGS]
    beside = [find_text(tree, str(name)) is not None for name in heard]
    if 2 * sum(beside) <= len(heard):
        return None
    return Finding(
        path=path,
        what=f"recordings, {sum(beside)} of them with a text beside",
        modality="audio",
        records=len(heard),
        columns=(ColumnFacts("transcript", "transcript", sum(beside), len(heard) - sum(beside)),),
        source={"kind": "audio", "path": path, "pattern": r"(?P<name>[^/]+)\.\w+$", "transcript": "transcript"},
        label="transcript",
        notes=("Where a name says who speaks, let `pattern` read it and write `patient`.",),
    )


def _find_named(path: Path, tree: Tree, modality: Modality, kind: str, task: str | None) -> Finding:
    """Returns what the names of files and their folders say."""
    names = [make_readable(name) for name in tree.stamps]
    parts = [PurePosixPath(name).parts for name in names]
    source: dict[str, Any] = {"kind": "image_folder" if modality == "image" else "audio", "path": path}
    depth, number = Counter(map(len, parts)).most_common(1)[0]
    has_split = depth == 3 and {each[0] for each in parts if len(each) == 3} == _SIDES
    notes: tuple[str, ...] = ()
    if depth == 2 or has_split:
        fitting = [each for each in parts if len(each) == depth]
        columns: Sequence[ColumnFacts] = (describe_column("label", [each[-2] for each in fitting]),)
        if columns[0].kind != "category":
            raise BadInput(f"{path}: expected from 2 to {FEW} folders, one for each class, got {columns[0].distinct}")
        if modality == "image":
            source |= {"splits": True} if has_split else {}
        else:
            source["pattern"] = r"(?P<label>[^/]+)/[^/]+$"
            if has_split:
                source["pattern"] = r"^(?P<side>train|test)/(?P<label>[^/]+)/[^/]+$"
                source["test"] = {"side": ["test"]}
        if len(fitting) < len(parts):
            notes = (f"{len(parts) - len(fitting)} file(s) lie at another depth and are not read.",)
        layout = "split/class/file" if has_split else "class/file"
    elif depth == 1:
        pattern, columns = _read_names(path, names)
        source["pattern"] = pattern
        layout, fitting = f"names read as {pattern}", parts
    else:
        raise BadInput(f"{path}: expected {kind} as class/file or train|test/class/file, got folders {depth} deep")
    del number
    patient = guess_patient(columns, len(fitting)) if depth == 1 else None
    if task is not None and task not in [column.name for column in columns]:
        raise BadInput(f"--task {task}: {path} has no such column{nearest(task, [c.name for c in columns])}")
    label = "label" if depth > 1 else _choose_part(columns, task, path)
    what = f"{'folder' if path.is_dir() else 'zip'} of {kind}, {layout}"
    return Finding(path, what, modality, len(fitting), tuple(columns), source, label, patient, has_split, notes=notes)


def _read_names(path: Path, names: Sequence[str]) -> tuple[str, list[ColumnFacts]]:
    """Returns a pattern for names such as `7_jackson_32.wav`, and the facts about its parts."""
    stems = [PurePosixPath(name).stem for name in names]
    for mark in ("_", "-", " "):
        cells = [stem.split(mark) for stem in stems]
        width = len(cells[0])
        if width > 1 and all(len(each) == width for each in cells):
            groups = [f"part{number}" for number in range(1, width + 1)]
            inner = re.escape(mark).join(f"(?P<{group}>[^{mark}/]+)" for group in groups)
            columns = [describe_column(group, [each[at] for each in cells]) for at, group in enumerate(groups)]
            return rf"^{inner}\.[^./]+$", columns
    raise BadInput(
        f"{path}: expected a folder for each class, a CSV that lists the files with their labels, or names such as "
        "LABEL_patient_number; got files without either"
    )


def _choose_part(columns: Sequence[ColumnFacts], task: str | None, path: Path) -> str:
    if task is None:
        few = next((column.name for column in columns if column.kind == "category" and len(column.values) > 1), None)
        if few is not None:
            return few
    return choose_label(columns, task, (), path)


# --- arrays ----------------------------------------------------------------------------------------------------------


def _inspect_npz(path: Path, task: str | None) -> Finding:
    """Returns what the arrays of an .npz file hold."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: _flatten(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: expected a readable .npz file without Python objects{instead(error)}") from None
    inputs = [name for name, array in arrays.items() if array.ndim >= 2 and array.dtype.kind in "uif"]
    masked = [(name, other) for name in inputs for other in _list_masks(name, arrays) if task in (None, other)]
    if masked and (task is not None or not any(_list_labels(name, arrays) for name in inputs)):
        return _find_masks(path, *next((pair for pair in masked if "test" not in pair[0].lower()), masked[0]), arrays)
    pairs = {name: _list_labels(name, arrays) for name in inputs}
    inputs = [name for name in inputs if pairs[name]]
    if not inputs:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in list(arrays.items())[:6])
        raise BadInput(f"{path}: expected an array of inputs, and one of labels of the same length; got {shapes}")
    main = _choose_inputs(inputs, arrays)
    names = _choose_label_array(pairs[main], arrays, task, path)
    label = re.sub(r"^(train|test|x|y)[_-]|[_-](train|test)$", "", names) or "label"
    parts = _pair_sides(main, names, arrays) or {"all": (main, names)}
    values = [_read_label(value) for _, name in parts.values() for value in arrays[name]]
    columns = (describe_column(label, values),)
    found = next((n for n, a in arrays.items() if a.ndim == 1 and a.dtype.kind == "U" and n not in pairs[main]), None)
    source: dict[str, Any] = {
        "kind": "npz",
        "path": path,
        "parts": {side: {"inputs": one, "labels": {label: other}} for side, (one, other) in parts.items()},
    }
    if found is not None and all(value.isdigit() and int(value) < len(arrays[found]) for value in set(values)):
        source["names"] = {label: found}
        columns = (describe_column(label, [str(arrays[found][int(value)]) for value in values]),)
    patients = {side: _find_patients(one, other, arrays) for side, (one, other) in parts.items()}
    known = {side: name for side, name in patients.items() if name is not None and None not in patients.values()}
    for side, name in known.items():
        source["parts"][side]["patient"] = name
    array = arrays[main]
    if array.ndim == 2:
        modality, dim = "vector", array.shape[1]
    elif array.dtype == np.uint8 and (array.ndim == 3 or array.shape[-1] in (1, 3)):
        modality, dim = "image", None
    else:
        raise BadInput(
            f"{path}: expected vectors [records, length] or 8-bit pictures [records, height, width (, 3)], got "
            f"{array.dtype} {array.shape} in {main!r}"
        )
    return Finding(
        path=path,
        what=f"npz of {len(arrays)} arrays; inputs {', '.join(one for one, _ in parts.values())} {array.shape[1:]}",
        modality=modality,  # type: ignore[arg-type]
        records=len(values),
        columns=columns,
        source=source,
        label=label,
        patient=next(iter(known.values()), None),
        patients=len({str(value) for name in known.values() for value in arrays[name]}) if known else None,
        has_split=len(parts) == 2,
        dim=dim,
        notes=tuple(f"Patients are told apart by the array {name!r}: a guess." for name in sorted({*known.values()})),
    )


def _find_patients(inputs: str, labels: str, arrays: Mapping[str, Any]) -> str | None:
    """Returns the array that tells patients of some inputs apart; None where none looks like it."""
    count = len(arrays[inputs])
    fitting = [name for name, array in arrays.items() if array.shape == (count,) and name not in (inputs, labels)]
    columns = [describe_column(name, [str(value) for value in arrays[name]]) for name in fitting]
    return guess_patient(columns, count)


def _flatten(array: Any) -> Any:
    """Returns labels that are written as N x 1 as N; other arrays as they are."""
    is_column = array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "iuUb"
    return array.reshape(-1) if is_column else array


def _list_masks(name: str, arrays: dict[str, Any]) -> list[str]:
    """Returns the arrays that may hold a mask of each picture of an array."""
    if arrays[name].ndim not in (3, 4) or is_mask_name(name):
        return []
    return [
        other
        for other, array in arrays.items()
        if is_mask_name(other) and array.dtype.kind in "bui" and array.ndim in (3, 4)
        if array.shape[:3] == arrays[name].shape[:3]
    ]


def _find_masks(path: Path, main: str, masks: str, arrays: dict[str, Any]) -> Finding:
    label = re.sub(r"^(train|test|x|y)[_-]|[_-](train|test)$", "", masks)
    parts = _pair_sides(main, masks, arrays) or {"all": (main, masks)}
    source = {
        "kind": "npz",
        "path": path,
        "parts": {side: {"inputs": one, "labels": {label: other}} for side, (one, other) in parts.items()},
    }
    return find_masks(path, source, label, f"npz of {len(arrays)} arrays; pictures {main} {arrays[main].shape[1:]}")


def _list_labels(name: str, arrays: dict[str, Any]) -> list[str]:
    length = len(arrays[name])
    return [
        other
        for other, array in arrays.items()
        if array.ndim == 1 and len(array) == length and array.dtype.kind in "iufUb" and length > 1
    ]


def _choose_inputs(inputs: Sequence[str], arrays: dict[str, Any]) -> str:
    """Returns the largest array of training inputs; of equal ones that which is named like inputs."""
    liked = [name for name in inputs if "test" not in name.lower() and "val" not in name.lower()] or list(inputs)
    named = [name for name in liked if re.search(r"image|input|pixel|feature|^x|x$|vector", name, re.IGNORECASE)]
    return max(named or liked, key=lambda name: arrays[name].size)


def _choose_label_array(names: Sequence[str], arrays: dict[str, Any], task: str | None, path: Path) -> str:
    if task is not None:
        if task not in names:
            raise BadInput(f"--task {task}: {path} has no such array of labels{nearest(task, names)}")
        return task
    facts = [describe_column(name, [_read_label(value) for value in arrays[name]]) for name in names]
    liked = [f.name for f in facts if re.search(r"label|target|class|^y|y$", f.name, re.IGNORECASE)]
    return liked[0] if liked else choose_label(facts, None, (), path)


def _pair_sides(main: str, label: str, arrays: dict[str, Any]) -> dict[str, tuple[str, str]] | None:
    for word, other in (("train", "test"), ("Train", "Test")):
        twins = main.replace(word, other), label.replace(word, other)
        if word in main and word in label and twins[0] in arrays and twins[1] in arrays:
            return {"train": (main, label), "test": twins}
    return None


def _read_label(value: Any) -> str:
    return str(int(value)) if isinstance(value, np.bool_ | np.integer) else str(value)
