"""Pictures with the objects on them, as COCO's annotation files list them: boxes, and masks of polygons or run lengths.

Run lengths go down the columns (Lin et al. 2014, arXiv 1405.0312, and its MaskApi). A place is on an object where its
centre is within the polygon; where objects overlap, the later one has it.

# Shapes: H rows and W columns of a picture, P corners of a polygon, N runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from client.data.sources import SourceExample, SourceRecord
from client.data.sources.parts.base import FilesOfSides, Side, SourceSettings, digest, list_files
from client.data.sources.parts.masks import LazyCells, write_boxes_of
from client.data.sources.parts.named import OneGroup, find_patient
from client.data.sources.parts.pictures import read_picture, read_size, write_example_pictures
from client.data.sources.parts.tree import MAX_FILE_BYTES, Tree, make_readable, open_tree
from common.errors import instead
from common.inputs import MAX_BOXES, Box, CellName, write_mask
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from PIL import Image

_Value = TypeVar("_Value")
_FARTHEST = 1e6
"""Largest coordinate of a polygon, in pixels."""

MAX_CORNERS = 1 << 17
MAX_DRAWN = 1 << 33
"""Corners of all polygons of a picture, and places within all polygons' rectangles and run lengths, at most: a few
bytes of an annotation may otherwise ask for any amount of time."""


class Coco(SourceSettings):
    """Settings: the annotation files and where the pictures are. Columns are `boxes` and `mask`.

    A picture without annotations is one without objects. The boxes of crowds, and of annotations with `ignore`, are
    ignored: a head is neither trained to find something there nor to find nothing, and an evaluation counts neither.
    The places of a crowd have no label in a mask.

    Attributes:
        path: the JSON file, or `train` and `test` -> its file.
        root: folder or zip of the pictures, in which `file_name` is looked up; or one for each side. By default the
            annotation file's own folder.
        background: name of the places of a mask that are on no object.
        patient_pattern: regular expression, searched in the picture's file name; its one group is the patient id.
    """

    kind: Literal["coco"]
    path: FilesOfSides
    root: FilesOfSides | None = None
    background: CellName = "background"
    patient_pattern: OneGroup | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four pictures of three patients, one without objects."""
        names = ["q7-ann-1.png", "q7-ann-2.png", "q7-bea-1.png", "q7-cem-1.png"]
        write_example_pictures(folder / "pictures", names)
        objects: list[dict[str, Any]] = [
            {"image_id": 1, "bbox": [0, 0, 3, 2], "segmentation": [[0, 0, 3, 0, 3, 2, 0, 2]]},
            {"image_id": 1, "bbox": [4, 4, 2, 2], "segmentation": {"size": [6, 6], "counts": [28, 2, 4, 2]}},
            {"image_id": 3, "bbox": [0, 0, 1, 6], "segmentation": {"size": [6, 6], "counts": "06n0"}},
        ]
        content = {
            "images": [{"id": n, "file_name": name, "width": 6, "height": 6} for n, name in enumerate(names, start=1)],
            "categories": [{"id": 1, "name": "z-cell"}, {"id": 7, "name": "z-other"}],
            "annotations": [
                {"id": n, "category_id": 7 if n == 1 else 1, "iscrowd": 0, **each} for n, each in enumerate(objects)
            ],
        }
        (folder / "objects.json").write_text(json.dumps(content), encoding="utf-8")
        settings = {"kind": "coco", "path": str(folder / "objects.json"), "root": str(folder / "pictures")}
        return SourceExample({**settings, "patient_pattern": r"^(.*)-\d"}, ["q7-", "z-cell", "z-other"])

    def open(self) -> ListedPictures:
        """The opened files. Raises BadInput: missing, no annotation file, or without the folder of its pictures."""
        files = list_files(self.path)
        roots: Mapping[Side, Path] = {side: path.parent for side, path in files.items()}
        if self.root is not None:
            roots = dict.fromkeys(files, self.root) if isinstance(self.root, Path) else self.root
        if set(roots) != set(files):
            raise BadInput("root: expected one folder, or one for each side of `path`")
        parts = []
        for side, path in files.items():
            listed = _open_list(path)
            wanted = {each.name for each in listed.pictures}
            tree = open_tree(roots[side], "pictures").chosen(lambda name, wanted=wanted: name.as_posix() in wanted)  # type: ignore[misc]
            parts += [_Place(None if side == "all" else side, tree, listed, each) for each in listed.pictures]
        return ListedPictures(self, tuple(parts))


@dataclass(frozen=True)
class _Entry:
    """One entry of `images`: its path, "" where it has none, its annotations, and why it cannot be used."""

    name: str
    size: tuple[Any, Any]
    annotations: Sequence[Mapping[str, Any]]
    fault: str


@dataclass(frozen=True)
class _List:
    """An annotation file: its digest, its pictures, and the names of its categories by id, in the file's order."""

    file: str
    sha: str
    pictures: tuple[_Entry, ...] = field(repr=False)
    categories: Mapping[int, str] = field(repr=False)


@dataclass(frozen=True)
class _Place:
    """A picture and where it is."""

    side: str | None
    tree: Tree
    listed: _List
    entry: _Entry

    def read(self) -> bytes:
        """Returns its bytes. Raises BadRecord."""
        if self.entry.fault or self.entry.name not in self.tree.stamps:
            raise BadRecord(self.entry.fault or "missing image")
        return self.tree.read(self.entry.name, "image")


@dataclass(frozen=True)
class ListedPictures:
    """Opened annotation files."""

    settings: Coco = field(repr=False)
    places: tuple[_Place, ...] = field(repr=False)

    def digest(self) -> str:
        """Over the annotation files' bytes, and every picture's path, size and time of change, or checksum in a zip."""
        found = {id(each.tree): f"{each.listed.sha} {each.tree.digest()}" for each in self.places}
        return digest(text.encode() for text in (self.settings.background, *found.values()))

    def index(self) -> list[SourceRecord]:
        """Pictures in the files' order, file by file; `row` counts on from file to file."""
        return [
            SourceRecord(
                row=number,
                file=each.listed.file,
                key=each.entry.name or f"image {number}",
                patient=find_patient(self.settings.patient_pattern, PurePosixPath(make_readable(each.entry.name)).name),
                split=each.side,
                cells=self._cells(each),
                fault=each.entry.fault,
                path=each.entry.name,
            )
            for number, each in enumerate(self.places, start=1)
        ]

    def load(self, position: int) -> Image.Image:
        """One picture."""
        return read_picture(io.BytesIO(self.places[position].read()))

    def _cells(self, place: _Place) -> Mapping[str, str]:
        if place.entry.fault:
            return {"boxes": "", "mask": ""}
        return LazyCells({}, {"boxes": partial(_read_boxes, place), "mask": partial(self._read_mask, place)})

    def _read_mask(self, place: _Place) -> str:
        width, height = read_size(io.BytesIO(place.read()))
        _check_size(place.entry, width, height)
        categories = place.listed.categories
        value_of = {id: value for value, id in enumerate(categories, start=1)}
        values_HW = draw_mask(place.entry.annotations, value_of, (height, width))
        known = {0: self.settings.background, **dict(enumerate(categories.values(), start=1)), len(categories) + 1: ""}
        return write_mask(values_HW, {value: known[value] for value in np.unique(values_HW).tolist()})


def _open_list(path: Path) -> _List:
    try:
        found = path.stat()
        if found.st_size > MAX_FILE_BYTES:
            raise BadInput(f"{path}: expected a file of at most {MAX_FILE_BYTES >> 20} MiB")
        return _read_list(path, (found.st_ino, found.st_size, found.st_mtime_ns))
    except OSError as error:
        raise BadInput(f"{path}: expected a readable annotation file{instead(error)}") from None


@lru_cache(maxsize=2)
def _read_list(path: Path, state: tuple[int, int, int]) -> _List:
    """The last files that were opened, while they have the same inode, size and time: simulated sites share them."""
    del state
    data = path.read_bytes()
    try:
        content = json.loads(data)
        images, annotations = content["images"], content["annotations"]
        categories = {each["id"]: each["name"].strip() for each in content["categories"]}
        sound = isinstance(images, list) and isinstance(annotations, list)
        if not sound or not images or len(categories) < len(content["categories"]) or not all(categories.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # From None: the messages quote the file.
        raise BadInput(
            f"{path}: expected a COCO annotation file, JSON with lists `images`, `annotations` and `categories` with "
            "an id and a name each, got another one"
        ) from None
    of_image: dict[Any, list[Mapping[str, Any]]] = {}
    for each in annotations:
        # One that names no picture is no record's.
        if isinstance(each, dict) and isinstance(each.get("image_id"), int | str):
            of_image.setdefault(each["image_id"], []).append(each)
    ids = [_get(each, "id", int | str) for each in images]
    counts = Counter(ids)
    pictures = tuple(
        _read_entry(each, of_image.get(id, []), counts[id] > 1) for each, id in zip(images, ids, strict=True)
    )
    return _List(path.name, hashlib.sha256(data).hexdigest(), pictures, categories)


def _get(entry: Any, key: str, kind: Any) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, kind) else None


def _read_entry(entry: Any, annotations: Sequence[Mapping[str, Any]], repeated: bool) -> _Entry:
    name = _get(entry, "file_name", str)
    if not name or _get(entry, "id", int | str) is None:
        return _Entry("", (None, None), (), "expected an id and a file_name of each image")
    fault = "another image has its id too" if repeated else ""
    size = (_get(entry, "width", int | float), _get(entry, "height", int | float))
    return _Entry(PurePosixPath(name).as_posix(), size, () if repeated else annotations, fault)


def _check_size(entry: _Entry, width: int, height: int) -> None:
    for said, found in zip(entry.size, (width, height), strict=True):
        if said and said != found:
            raise BadRecord("expected objects of a picture of its size, got those of another size")


def _check_count(annotations: Sequence[Any]) -> None:
    if len(annotations) > MAX_BOXES:
        raise BadRecord(f"expected at most {MAX_BOXES} objects on a picture")


def _read_boxes(place: _Place) -> str:
    entry, categories = place.entry, place.listed.categories
    _check_count(entry.annotations)
    boxes = []
    for each in entry.annotations:
        ignored = bool(each.get("iscrowd") or each.get("ignore"))
        left, top, width, height = _read_numbers(each.get("bbox"), 4)
        boxes.append(Box(_find_category(each, categories), left, top, left + width, top + height, ignored=ignored))
    size = (entry.size[0], entry.size[1]) if all(entry.size) else None
    return write_boxes_of(place.read(), boxes, size)


def _find_category(annotation: Mapping[str, Any], categories: Mapping[int, _Value]) -> _Value:
    id = _get(annotation, "category_id", int | str)
    if id not in categories:
        raise BadRecord("expected a category that the file names, got another one")
    return categories[id]


def _read_numbers(values: Any, count: int | None = None) -> list[float]:
    is_list = isinstance(values, list) and (
        len(values) == count if count else len(values) >= 6 and len(values) % 2 == 0
    )
    # No number, and not NaN, is beyond it.
    if not is_list or not all(isinstance(each, int | float) and abs(each) <= _FARTHEST for each in values):
        what = f"{count} numbers of a box" if count else "the corners of a polygon, x and y of each"
        raise BadRecord(f"expected {what} in pixels, got something else")
    return [float(each) for each in values]


@final
@dataclass
class _Work:
    """The corners and places of a picture's objects that were drawn so far."""

    corners: int = 0
    drawn: int = 0

    def add(self, *, corners: int = 0, drawn: int = 0) -> None:
        """Raises BadRecord where it becomes too much."""
        self.corners += corners
        self.drawn += drawn
        if self.corners > MAX_CORNERS or self.drawn > MAX_DRAWN:
            raise BadRecord("expected fewer or smaller objects on a picture, or polygons of fewer corners")


# --- masks -----------------------------------------------------------------------------------------------------------


def draw_mask(
    annotations: Sequence[Mapping[str, Any]], value_of: Mapping[int, int], size: tuple[int, int]
) -> NDArray[np.uint16]:
    """Returns values_HW of a picture, 0 on no object; crowds have the value behind those of all categories.

    Args:
        annotations: the picture's objects, in the file's order.
        value_of: id of each category -> its value, from 1.
        size: H and W.

    Raises:
        BadRecord: an object without a category or a segmentation that can be read.
    """
    _check_count(annotations)
    values_HW, work = np.zeros(size, np.uint16), _Work()
    for each in annotations:
        value = len(value_of) + 1 if each.get("iscrowd") else _find_category(each, value_of)
        found = each.get("segmentation")
        if isinstance(found, dict):
            work.add(drawn=math.prod(size))
            values_HW[decode_runs(found, size)] = value
        elif isinstance(found, list) and found:
            for polygon in found:
                corner_P2 = np.array(_read_numbers(polygon)).reshape(-1, 2)
                work.add(corners=len(corner_P2), drawn=_fill_polygon(values_HW, corner_P2, value))
        else:
            raise BadRecord("expected polygons or run lengths of each object, got something else")
    return values_HW


def decode_runs(found: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Returns inside_HW of run lengths: `size`, and `counts` as a list or as MaskApi's text.

    Args:
        found: the segmentation.
        size: H and W of the picture.

    Raises:
        BadRecord: of another size, or runs that do not fill it.
    """
    counts = found.get("counts")
    runs = decode_counts(counts) if isinstance(counts, str) else counts if isinstance(counts, list) else []
    whole = all(isinstance(run, int) and 0 <= run <= math.prod(size) for run in runs)
    if found.get("size") != list(size) or not whole or sum(runs) != math.prod(size):
        raise BadRecord("expected run lengths that fill their picture, got others")
    runs_N = np.array(runs, dtype=np.int64)
    inside_HW: NDArray[np.bool_] = np.repeat(np.arange(len(runs_N)) % 2 == 1, runs_N).reshape(size[::-1]).T
    return inside_HW


def decode_counts(text: str) -> list[int]:
    """Returns the run lengths of MaskApi's text; some may be negative where it is damaged.

    Each is written as its difference to the one two before, from the third on, in groups of five bits, the lowest
    first, with a sixth that says that more follow.

    Raises:
        BadRecord: it ends within a number, or has a character or a number beyond what it can hold.
    """
    runs: list[int] = []
    number, shift = 0, 0
    for char in text:
        code = ord(char) - 48
        if not 0 <= code < 64 or shift > 35:
            raise BadRecord("expected run lengths that can be read, got others")
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        number -= (1 << shift) * (code >> 4 & 1)
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, shift = 0, 0
    if shift:
        raise BadRecord("expected run lengths that can be read, got others")
    return runs


def encode_runs(inside_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """Returns the run lengths of a mask, down its columns, as `decode_runs` reads them: `size`, and MaskApi's text.

    Args:
        inside_HW: true inside.
    """
    flat_N = inside_HW.T.ravel()
    ends = np.flatnonzero(np.diff(flat_N)) + 1
    # The first run is outside; where the first place is inside, it is empty.
    edges = [0, *([0] if flat_N.size and flat_N[0] else []), *ends.tolist(), flat_N.size]
    return {"size": list(inside_HW.shape), "counts": _encode_counts(np.diff(edges).tolist())}


def _encode_counts(runs: Sequence[int]) -> str:
    """Returns run lengths as `decode_counts` reads them."""
    chars = []
    for at, run in enumerate(runs):
        number = run - (runs[at - 2] if at > 2 else 0)
        more = True
        while more:
            bits, number = number & 31, number >> 5
            # The last group's highest bit is the sign of all that follow.
            more = number != (-1 if bits & 16 else 0)
            chars.append(chr(48 + bits + (32 if more else 0)))
    return "".join(chars)


def _fill_polygon(values_HW: NDArray[np.uint16], corner_P2: NDArray[np.float64], value: int) -> int:
    """Sets the places whose centres are within a polygon: to the right of an odd number of its edges.

    Returns:
        The number of places in the rectangle around it.
    """
    ends = [(corner_P2[:, axis].min(), corner_P2[:, axis].max()) for axis in (1, 0)]
    (first, last), (left, right) = (
        (max(0, math.ceil(least - 0.5)), min(count, math.ceil(most - 0.5)))
        for (least, most), count in zip(ends, values_HW.shape, strict=True)
    )
    if first >= last or left >= right or len(corner_P2) > MAX_CORNERS:
        return 0
    crossed = np.zeros((last - first, right - left + 1), bool)
    for one, other in zip(corner_P2, np.roll(corner_P2, -1, axis=0), strict=True):
        (x, y), (end_x, end_y) = (one, other) if one[1] <= other[1] else (other, one)
        rows = np.arange(max(first, math.ceil(y - 0.5)), min(last, math.ceil(end_y - 0.5)))
        if len(rows):
            # Divided last: a centre that lies on an edge is then met exactly.
            across = x + (rows + 0.5 - y) * (end_x - x) / (end_y - y)
            # Each row once: an edge crosses it in one place.
            crossed[rows - first, np.clip(np.ceil(across - 0.5), left, right).astype(np.int64) - left] ^= True
    values_HW[first:last, left:right][np.logical_xor.accumulate(crossed[:, :-1], axis=1)] = value
    return crossed.size
