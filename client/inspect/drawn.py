"""Pictures with masks or boxes: VOC's and COCO's layouts, and masks that are files beside the pictures."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from client.data.drawn import count_drawn, is_drawn
from client.data.sources import open_source
from client.data.sources.image_folder import SUFFIXES as PICTURES
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.tree import MAX_FILE_BYTES, Tree
from client.inspect.finding import FEW, ColumnFacts, Finding
from common.errors import nearest
from common.types import BadInput
from common.yaml import read_names

_MOST_READ = 200
"""Records whose masks or boxes are read, evenly spaced."""

_MOST_NAMED = 5
"""Records that cannot be read whose rows and reasons are shown."""

_FITTING = 0.8
"""Part of a folder's pictures that need a mask, from which the others are masks."""

_PICTURE_ENDS = ("", "_leftImg8bit", "_image", "_img", "_sat")
_MASK_ENDS = ("", "_mask", "-mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_gtFine_labelIds")
_SIDES = {"train": "train", "training": "train", "val": "test", "valid": "test", "validation": "test", "test": "test"}


def find_drawn(path: Path, tree: Tree, task: str | None) -> Finding | None:
    """Returns what a folder or zip of pictures with masks or boxes holds; None where there are none.

    Args:
        path: the folder or zip.
        tree: all its files.
        task: the label column; None for a guess.

    Raises:
        BadInput: its masks or boxes cannot be read, or the source has no such column.
    """
    ways = (_find_voc, _find_coco, _find_yolo, _find_objects, _find_pairs)
    found = next((each for way in ways if (each := way(path, tree)) is not None), None)
    # A folder of classes may hold masks too.
    return None if found is None or task not in (None, *found[1]) else _describe(path, *found, task)


def find_list(path: Path, task: str | None) -> Finding:
    """Returns what one annotation file of COCO's format holds, its pictures in the same folder.

    Raises:
        BadInput: it is none.
    """
    return _describe(path, {"kind": "coco", "path": path}, ("boxes", "mask"), "annotation file in COCO's format", task)


_Found = tuple[dict[str, Any], tuple[str, ...], str]
"""Settings of a source, its columns, and what it is in words."""


def find_masks(path: Path, source: Mapping[str, Any], column: str, what: str) -> Finding:
    """Returns what a table or an array file holds, one of whose columns is of masks.

    Args:
        path: the file.
        source: settings of a source that reads it, its masks too.
        column: name of the column.
        what: what it is in words.

    Raises:
        BadInput: the masks cannot be read.
    """
    return _describe(path, source, (column,), what, None)


def is_mask_name(name: str) -> bool:
    """Returns true for the name of a column, an array or a folder that speaks of masks."""
    return re.search(r"mask|label|seg|gt|truth|annot", name, re.IGNORECASE) is not None


def _find_voc(path: Path, tree: Tree) -> _Found | None:
    folders = {suffixes: _count_folders(tree, suffixes) for suffixes in (frozenset({".xml"}), PICTURES)}
    xml, pictures = folders.values()
    if not xml or not pictures:
        return None
    annotations = max(xml, key=lambda folder: len(xml[folder]))
    images = max(pictures, key=lambda folder: len(pictures[folder] & xml[annotations]))
    if not pictures[images] & xml[annotations]:
        return None
    source: dict[str, Any] = {"kind": "voc", "path": path}
    source |= {"images": images} if images != "JPEGImages" else {}
    source |= {"annotations": annotations} if annotations != "Annotations" else {}
    lists = {
        PurePosixPath(name).stem: name for name in tree.stamps if re.search(r"(^|/)ImageSets/Main/\w+\.txt$", name)
    }
    train = [name for name in ("trainval", "train") if name in lists][:1]
    test = [name for name in ("test", "val") if name in lists and not (name == "val" and train == ["trainval"])][:1]
    if train and test:
        folder = PurePosixPath(lists[train[0]]).parent.as_posix()
        source |= {"lists": folder} if folder != "ImageSets/Main" else {}
        source["sides"] = {"train": train, "test": test}
    return source, ("boxes",), "pictures with an XML file of boxes each"


def _find_yolo(path: Path, tree: Tree) -> _Found | None:
    """Returns pictures with text files of boxes, of which the layout's own YAML file or list names the classes."""
    texts, pictures = _count_folders(tree, frozenset({".txt"})), _count_folders(tree, PICTURES)
    roots = {folder.split("/")[0] for folder in texts if folder.split("/")[0] == "labels"}
    fitting = sum(len(texts[folder] & pictures.get(f"images{folder[6:]}", set())) for folder in texts if roots)
    if not fitting:
        return None
    names = _read_class_names(tree)
    if not names:
        raise BadInput(
            f"{path}: expected the names of the classes in a file data.yaml (`names`) or classes.txt (a line each), "
            "got none"
        )
    sides: dict[str, list[str]] = {}
    for folder in sorted({folder[7:].split("/")[0] for folder in texts if folder.startswith("labels/")}):
        if folder in _SIDES:
            sides.setdefault(_SIDES[folder], []).append(folder)
    source: dict[str, Any] = {"kind": "yolo", "path": path, "names": names}
    source |= {"sides": sides} if set(sides) == {"train", "test"} else {}
    return source, ("boxes",), "pictures with a text file of boxes each, as YOLO's programs read them"


def _read_class_names(tree: Tree) -> list[str]:
    for name in tree.stamps:
        if "/" in name or not name.lower().endswith((".yaml", ".yml", "classes.txt", ".names")):
            continue
        content, _ = try_record(lambda name=name: tree.read(name, "list").decode("utf-8-sig"))  # type: ignore[misc]
        if content is None:
            continue
        if name.lower().endswith((".yaml", ".yml")):
            found = read_names(content)
        else:
            found = [line.strip() for line in content.splitlines() if line.strip()]
        if found:
            return found
    return []


def _find_objects(path: Path, tree: Tree) -> _Found | None:
    """Returns pictures whose masks have a file for each object: `a/images/a.png` beside `a/masks/*.png`."""
    files = [PurePosixPath(name) for name in tree.stamps]
    masks = Counter(file.parent.parent.as_posix() for file in files if file.parent.name == "masks" and file.parts[:-2])
    pictures = {file.parent.parent.as_posix() for file in files if file.parent.name == "images"}
    both = pictures & set(masks)
    deepest = max((len(PurePosixPath(each).parts) for each in both), default=0)
    # A folder of pictures beside one of as many masks is another layout.
    if len(both) < 2 or "." in both or any(len(PurePosixPath(each).parts) != deepest for each in both):
        return None
    pattern = r"^(?P<name>[^/]+(?:/[^/]+)*)/images/[^/]+$"
    source = {"kind": "image_folder", "path": path, "pattern": pattern, "masks": {"mask": "{name}/masks/*"}}
    return source, ("mask",), "pictures with a folder of masks each, one for each object"


def _count_folders(tree: Tree, suffixes: frozenset[str]) -> dict[str, set[str]]:
    """Returns the stems of the files in each folder."""
    found: dict[str, set[str]] = {}
    for name in tree.stamps:
        file = PurePosixPath(name)
        if file.suffix.lower() in suffixes:
            found.setdefault(file.parent.as_posix(), set()).add(file.stem)
    return found


def _find_coco(path: Path, tree: Tree) -> _Found | None:
    if not path.is_dir():
        return None
    names = [name for name in tree.stamps if name.lower().endswith(".json")]
    # Some sets have a file of other notes for each picture.
    likely = [name for name in names if len(names) <= FEW or re.search("instance|annot|coco", name, re.IGNORECASE)]
    roots = {name: _find_root(path, tree, name) for name in likely[:FEW]}
    lists = {name: root for name, root in roots.items() if root is not None}
    if not lists:
        return None
    sides: dict[str, list[str]] = {}
    for name in lists:
        words = set(re.split(r"[^a-z]+", name.lower()))
        side = next((side for word, side in _SIDES.items() if word in words), None)
        sides.setdefault(side or name, []).append(name)
    if set(sides) == {"train", "test"} and all(len(names) == 1 for names in sides.values()):
        files: Any = {side: path / names[0] for side, names in sides.items()}
        where: Any = {side: path / lists[names[0]] for side, names in sides.items()}
        where = where["train"] if len(set(where.values())) == 1 else where
    elif len(lists) == 1:
        ((name, root),) = lists.items()
        files, where = path / name, path / root
    else:
        raise BadInput(
            f"{path}: expected one annotation file, or one for train and test, got {len(lists)}; inspect one"
        )
    what = "pictures that annotation files in COCO's format list"
    return {"kind": "coco", "path": files, "root": where}, ("boxes", "mask"), what


def _find_root(path: Path, tree: Tree, name: str) -> str | None:
    """Returns the folder below which the pictures of an annotation file lie, None where it is none."""
    try:
        if (path / name).stat().st_size > MAX_FILE_BYTES:
            return None
        content = json.loads((path / name).read_bytes())
        first = content["images"][0]["file_name"]
        if not isinstance(content["annotations"], list) or not isinstance(first, str):
            return None
    except (OSError, ValueError, KeyError, TypeError, LookupError, RecursionError):
        return None
    ends = [each for each in tree.stamps if each == first or each.endswith(f"/{first}")]
    side = [each for each in ends if PurePosixPath(each).parts[0] in name]
    return (side or ends)[0].removesuffix(first).rstrip("/") if ends else PurePosixPath(name).parent.as_posix()


def _find_pairs(path: Path, tree: Tree) -> _Found | None:
    """Returns pictures with masks of the same names in a folder beside them, or with other ends in the same one."""
    files = [PurePosixPath(name) for name in tree.stamps]
    groups: dict[str, dict[str, PurePosixPath]] = {"": {}}
    for file in files:
        if file.suffix.lower() in PICTURES or file.suffix.lower() == ".npy":
            first = file.parts[0] if len(file.parts) > 1 else ""
            groups.setdefault(first, {})[file.relative_to(first).with_suffix("").as_posix()] = file
            groups[""][file.with_suffix("").as_posix()] = file
    best: tuple[float, str, str, str, str] | None = None
    for images, masks in [("", ""), *((one, other) for one in groups for other in groups if is_mask_name(other))]:
        for end, other in [(end, other) for end in _PICTURE_ENDS for other in _MASK_ENDS]:
            # Within one folder only their ends tell masks from pictures.
            is_one = images == masks
            if (is_one and (masks or not other or other == end)) or (not is_one and not images):
                continue
            stems = [stem.removesuffix(end) for stem in groups[images] if stem.endswith(end)]
            others = {stem.removesuffix(other) for stem in groups[masks] if stem.endswith(other)}
            # Masks in the same folder are no pictures.
            plain = [stem for stem in stems if images != masks or not other or not stem.endswith(other)]
            fitting = sum(stem in others for stem in plain)
            if plain and fitting >= max(2, _FITTING * len(plain)) and (best is None or fitting > best[0]):
                best = (fitting, images, masks, end, other)
    if best is None:
        return None
    _, images, masks, end, other = best
    masked = [file for stem, file in groups[masks].items() if stem.endswith(other)]
    pictured = [
        file for stem, file in groups[images].items() if stem.endswith(end) and not (other and stem.endswith(other))
    ]
    suffix = Counter(file.suffix for file in masked).most_common(1)[0][0]
    suffixes = sorted({file.suffix for file in pictured})
    sides = {file.relative_to(images).parts[0] for file in pictured}
    has_sides = sides <= set(_SIDES) and {_SIDES[side] for side in sides} == {"train", "test"}
    in_folder, beside = (f"{folder}/" if folder else "" for folder in (images, masks))
    side = f"(?P<side>{'|'.join(sorted(sides))})/" if has_sides else ""
    other_end = f"(?<!{re.escape(other)})" if images == masks else ""
    ending = "|".join(map(re.escape, suffixes))
    depth = len(PurePosixPath(images).parts) + 1 + has_sides
    is_flat = all(len(file.parts) == depth for file in pictured)
    mark = find_first_part([file.stem.removesuffix(end) for file in pictured]) if is_flat else None
    named = "(?P<name>.+)" if mark is None else f"(?P<patient>[^{mark}/]+){mark}(?P<name>.+)"
    same = "{name}" if mark is None else f"{{patient}}{mark}{{name}}"
    pattern = f"^{re.escape(in_folder)}{side}{named}{other_end}{re.escape(end)}({ending})$"
    source: dict[str, Any] = {"kind": "image_folder", "path": path, "pattern": pattern}
    source["masks"] = {"mask": f"{beside}{'{side}/' if has_sides else ''}{same}{other}{suffix}"}
    source |= {} if mark is None else {"patient": "patient"}
    if has_sides:
        source["test"] = {"side": sorted(side for side in sides if _SIDES[side] == "test")}
    return source, ("mask",), f"pictures with masks {'beside them' if images == masks else f'in {masks}'}"


def find_first_part(names: Sequence[str]) -> str | None:
    """Returns the mark behind the first part of names such as `p007_a`, where these look like ids of patients.

    They do where each has a figure, and some but not all stand in several names.

    Args:
        names: names of files without their ends.

    Returns:
        `_` or `-`; None where no first parts look so.
    """
    for mark in ("_", "-"):
        firsts = [name.split(mark, 1)[0] for name in names if mark in name.strip(mark)]
        has_figures = all(re.search(r"\d", first) for first in firsts)
        are_several = max(1, len(names) / 20) < len(set(firsts)) < len(names)
        if len(firsts) == len(names) and has_figures and are_several:
            return mark
    return None


def _describe(path: Path, source: Mapping[str, Any], columns: Sequence[str], what: str, task: str | None) -> Finding:
    """Returns the facts about the columns of a source, some of whose records are read."""
    if task is not None and task not in columns:
        raise BadInput(f"--task {task}: {path} has no such column{nearest(task, columns)}")
    index = open_source(dict(source), "sources.records").open().index()
    facts, notes = [], []
    for column in columns:
        read = list(_read(index, column))
        facts.append(describe_drawn(column, {row: cell for row, cell, reason in read if reason is None}))
        bad = [f"row {row}: {reason}" for row, _, reason in read if reason is not None]
        if column == (task or columns[0]):
            counts = count_drawn((row, cell) for row, cell, _ in read if is_drawn(cell))
            notes += [f"{column}: {warning}; {remedy}." for warning, remedy in counts.list_warnings()]
        if bad and column == (task or columns[0]):
            more = f"; and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
            notes.append(f"{column}: {len(bad)} of {len(read)} cannot be read ({'; '.join(bad[:_MOST_NAMED])}{more}).")
    number = len(_spread(index))
    if number < len(index):
        notes.append(f"{number} of {len(index)} records were looked at: further names may follow.")
    label = task or next((each.name for each in facts if each.values), columns[0])
    chosen = next(each for each in facts if each.name == label)
    if not chosen.values:
        raise BadInput(
            f"{path}: expected {label} with an object, got none in the {number} records that were looked at"
            + "".join(f"; {note}" for note in notes[:1])
        )
    if chosen.kind == "mask" and len(chosen.values) > FEW and chosen.values[0].isdigit():
        raise BadInput(
            f"{path}: expected masks with at most {FEW} numbers, one for each label, got {len(chosen.values)}: do they "
            "number the objects?"
        )
    has_split = any(record.split is not None for record in index)
    place = "folder" if path.is_dir() else "zip" if path.suffix.lower() == ".zip" else "file"
    what = f"{place} of {what}" if place != "file" else what
    patient = source.get("patient")
    patients = len({record.patient for record in index}) if patient else None
    if patient and patient in source.get("pattern", ""):
        notes.append(f"The first part of the names is taken for the patient: {patients} of them.")
    return Finding(
        path=path,
        what=what,
        modality="image",
        records=len(index),
        columns=tuple(facts),
        source=source,
        label=label,
        patient=patient,
        has_split=has_split,
        patients=patients,
        notes=tuple(notes),
    )


def _spread(index: Sequence[Any]) -> list[Any]:
    positions = sorted({round(at) for at in np.linspace(0, len(index) - 1, _MOST_READ)})
    return [index[position] for position in positions]


def _read(index: Sequence[Any], column: str) -> Iterable[tuple[int, str, str | None]]:
    for record in _spread(index):
        cell, reason = try_record(lambda record=record: record.cells[column])  # type: ignore[misc]
        yield record.row, cell or "", reason


def describe_drawn(column: str, cells: Mapping[int, str]) -> ColumnFacts:
    """Returns the facts about a column of masks or boxes.

    Args:
        column: its name.
        cells: row -> cell, of those that can be read.
    """
    drawn = {row: cell for row, cell in cells.items() if is_drawn(cell)}
    counts = count_drawn(drawn.items())
    kind = "mask" if any(cell.startswith("mask") for cell in drawn.values()) else "boxes"
    names = tuple(
        sorted(filter(None, counts.parts), key=lambda name: (int(name), "") if name.isdigit() else (-1, name))
    )
    return ColumnFacts(column, kind, len(names), len(cells) - len(drawn), names)  # type: ignore[arg-type]
