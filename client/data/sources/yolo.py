"""Pictures with the objects on them, in the layout that YOLO's programs read: a text file for each picture.

A line is an object: the number of its class, then the middle's x and y, the width and the height, as fractions of the
picture; or the corners of a polygon, of which the rectangle around it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field

from client.data.sources import SourceExample
from client.data.sources.image_folder import SUFFIXES
from client.data.sources.parts.base import SourceSettings
from client.data.sources.parts.masks import AnnotatedPicture, AnnotatedPictures
from client.data.sources.parts.named import OneGroup
from client.data.sources.parts.pictures import write_example_pictures
from client.data.sources.parts.tree import open_tree
from common.inputs import MAX_BOXES, Box, CellName, write_boxes
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

_LINE = "expected lines of a class's number and four numbers, or the corners of a polygon, got something else"
_MAX_BYTES = 1 << 22


class Yolo(SourceSettings):
    """Settings: where pictures and text files are. Their one column is `boxes`.

    A picture's file has its path, `labels/a.txt` of `images/a.jpg`, also in folders below. An empty file is of a
    picture without objects.

    Attributes:
        path: a folder or zip.
        names: the classes in the order of their numbers, as `names` of the layout's `data.yaml` lists them.
        images: folder of the pictures in it; `.` is `path` itself.
        labels: folder of the text files.
        sides: `train` and `test` -> folders below `images`, such as `{train: [train], test: [val]}`. Pictures in none
            of them are left out. Without it the source states no split.
        without_file: what a picture without a text file shows: `unknown`, so that it has no label, or `nothing`, as
            YOLO's programs take it.
        patient_pattern: regular expression, searched in the picture's file name; its one group is the patient id.
    """

    kind: Literal["yolo"]
    path: LocalPath
    names: Annotated[list[CellName], Field(min_length=1)]
    images: str = "images"
    labels: str = "labels"
    sides: Annotated[dict[Literal["train", "test"], list[str]], Field(min_length=1)] | None = None
    without_file: Literal["unknown", "nothing"] = "unknown"
    patient_pattern: OneGroup | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four pictures of three patients: two objects, one, none, and without a file."""
        names = ["q7-ann-1", "q7-ann-2", "q7-bea-1", "q7-cem-1"]
        write_example_pictures(folder / "yolo" / "images", [f"{name}.png" for name in names])
        lines = ["0 0.25 0.2 0.5 0.3\n1 0.6 0.6 0.8 0.8\n", "0 0.6 0.6 0.5 0.5\n", "\n"]
        (folder / "yolo" / "labels").mkdir(exist_ok=True)
        for name, text in zip(names, lines, strict=False):
            (folder / "yolo" / "labels" / f"{name}.txt").write_text(text, encoding="utf-8")
        settings = {"kind": "yolo", "path": str(folder / "yolo"), "names": ["z-cell", "z-other"]}
        return SourceExample({**settings, "patient_pattern": r"^(.*)-\d"}, ["q7-", "z-cell", "z-other"])

    def open(self) -> AnnotatedPictures:
        """The opened folder. Raises BadInput: missing, or without a picture or a text file."""
        tree = open_tree(self.path, "pictures and text files").chosen(lambda name: True)
        images = tree.group_by_stem(self.images, SUFFIXES)
        files = {stem: names[0] for stem, names in tree.group_by_stem(self.labels, frozenset({".txt"})).items()}
        for found, folder, what in ((images, self.images, "images"), (files, self.labels, ".txt files")):
            if not found:
                raise BadInput(f"{self.path}: expected {what} in its folder {folder!r}, got none")
        nothing: tuple[Box, ...] | None = () if self.without_file == "nothing" else None
        entries = [
            AnnotatedPicture(stem, image, files.get(stem), side, nothing)
            # A text file without a picture may be a list of names.
            for stem, names in sorted(images.items())
            for image in names
            for side in (self._find_side(stem),)
            if side is not None or self.sides is None
        ]
        if not entries:
            raise BadInput(f"{self.path}: expected pictures in the folders of `sides`, got none")
        used = {name for each in entries for name in (each.image, each.annotation)}
        own = tree.chosen(lambda name: name.as_posix() in used)
        about = (*self.names, self.without_file)
        make_cell = partial(_make_cell, names=self.names)
        return AnnotatedPictures(self.path, self.patient_pattern, own, tuple(entries), make_cell, about)

    def _find_side(self, stem: str) -> str | None:
        """Returns the side of a picture by its folder; None where none is listed. One on both is trained on."""
        for side in ("train", "test"):
            if any(PurePosixPath(stem).is_relative_to(folder) for folder in (self.sides or {}).get(side, ())):
                return side
        return None


def _make_cell(image: bytes, annotation: bytes, names: Sequence[str]) -> str:
    del image  # All numbers are fractions of it, whatever its size.
    return write_boxes(read_lines(annotation, names), 1, 1)


def read_lines(data: bytes, names: Sequence[str]) -> list[Box]:
    """Returns the boxes of a text file, as fractions of the picture.

    Args:
        data: the file's bytes.
        names: the classes in the order of their numbers.

    Raises:
        BadRecord: it is too large, or has a line that is none of an object, or of a class that is not listed.
    """
    if len(data) > _MAX_BYTES:
        raise BadRecord(f"expected a file of at most {_MAX_BYTES >> 20} MiB")
    try:
        lines = [line.split() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        # From None: the message quotes the file.
        raise BadRecord(_LINE) from None
    boxes = [_read_line(line, names) for line in lines if line]
    if len(boxes) > MAX_BOXES:
        raise BadRecord(f"expected at most {MAX_BOXES} objects on a picture")
    return boxes


def _read_line(words: Sequence[str], names: Sequence[str]) -> Box:
    try:
        number, *values = (float(word) for word in words)
    except ValueError:
        raise BadRecord(_LINE) from None
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    if not all(map(math.isfinite, (number, *values))) or not (is_polygon or len(values) == 4):
        raise BadRecord(_LINE)
    if number != int(number) or not 0 <= number < len(names):
        raise BadRecord("expected the number of a class that `names` lists, got another one")
    name = names[int(number)]
    if is_polygon:
        return Box(name, min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    x, y, width, height = values
    return Box(name, x - width / 2.0, y - height / 2.0, x + width / 2.0, y + height / 2.0)
