"""Pictures with the objects on them, in the layout of PASCAL VOC: an XML file for each picture.

An annotation is read when somebody asks for its boxes, within the boundary around a record. It is bounded, and one with
a document type, which could define entities without end, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal, final
from xml.etree import ElementTree

from pydantic import Field

from client.data.sources import SourceExample
from client.data.sources.image_folder import SUFFIXES
from client.data.sources.parts.base import SourceSettings
from client.data.sources.parts.masks import AnnotatedPicture, AnnotatedPictures, write_boxes_of
from client.data.sources.parts.named import OneGroup
from client.data.sources.parts.pictures import write_example_pictures
from client.data.sources.parts.tree import Tree, open_tree
from common.inputs import Box
from common.plugins import LocalPath
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    pass

MAX_BYTES = 1 << 22
"""Bytes of an annotation that are parsed at most."""

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Voc(SourceSettings):
    """Settings: where pictures and annotations are. Their one column is `boxes`.

    A picture's annotation has its name; a picture without one has no label, and one whose annotation lists no object is
    a picture without objects. Objects that are marked as difficult are ignored: a head is neither trained to find them
    nor to leave them out, and an evaluation counts neither.

    Attributes:
        path: a folder or zip.
        images: folder of the pictures in it; `.` is `path` itself.
        annotations: folder of the XML files.
        lists: folder of the lists of names.
        sides: `train` and `test` -> names of lists, such as `{train: [trainval], test: [test]}`. Pictures on none of
            them are left out; one on both sides is trained on. Without it every picture is a record, and the source
            states no split.
        patient_pattern: regular expression, searched in the picture's file name; its one group is the patient id.
    """

    kind: Literal["voc"]
    path: LocalPath
    images: str = "JPEGImages"
    annotations: str = "Annotations"
    lists: str = "ImageSets/Main"
    sides: Annotated[dict[Literal["train", "test"], list[str]], Field(min_length=1)] | None = None
    patient_pattern: OneGroup | None = None

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four pictures of three patients: two objects, one, none, and without an annotation."""
        names = ["q7-ann-1", "q7-ann-2", "q7-bea-1", "q7-cem-1"]
        write_example_pictures(folder / "voc" / "JPEGImages", [f"{name}.png" for name in names])
        objects = [[("z-cell", 0, 0, 3, 2), ("z-other", 1, 1, 6, 6)], [("z-cell", 2, 2, 5, 5)], []]
        (folder / "voc" / "Annotations").mkdir(exist_ok=True)
        for name, boxes in zip(names, objects, strict=False):
            (folder / "voc" / "Annotations" / f"{name}.xml").write_text(write_annotation(6, 6, boxes), encoding="utf-8")
        settings = {"kind": "voc", "path": str(folder / "voc"), "patient_pattern": r"^(.*)-\d"}
        return SourceExample(settings, ["q7-", "z-cell", "z-other"])

    def open(self) -> AnnotatedPictures:
        """The opened folder. Raises BadInput: missing, or without a picture, an annotation or a list."""
        tree = open_tree(self.path, "pictures and annotations").chosen(lambda name: True)
        images = tree.group_by_stem(self.images, SUFFIXES)
        xml = tree.group_by_stem(self.annotations, frozenset({".xml"}))
        annotations = {stem: names[0] for stem, names in xml.items()}
        for found, folder, what in ((images, self.images, "images"), (annotations, self.annotations, ".xml files")):
            if not found:
                raise BadInput(f"{self.path}: expected {what} in its folder {folder!r}, got none")
        side_of = None if self.sides is None else self._read_sides(tree, self.sides)
        entries = [
            AnnotatedPicture(stem, image, annotations.get(stem), None if side_of is None else side_of[stem])
            for stem in sorted({*images, *annotations})
            for image in images.get(stem, [None])
            if side_of is None or stem in side_of
        ]
        if not entries:
            raise BadInput(f"{self.path}: expected names of its images in the lists of `sides`, got none")
        used = {name for each in entries for name in (each.image, each.annotation)}
        own = tree.chosen(lambda name: name.as_posix() in used)
        return AnnotatedPictures(self.path, self.patient_pattern, own, tuple(entries), _make_cell)

    def _read_sides(self, tree: Tree, sides: Mapping[Literal["train", "test"], list[str]]) -> dict[str, str]:
        """Returns the side of each listed name."""
        side_of: dict[str, str] = {}
        for side in ("test", "train"):  # Later ones win.
            for name in sides.get(side, []):
                path = (PurePosixPath(self.lists) / f"{name}.txt").as_posix()
                try:
                    text = tree.read(path, "list").decode("utf-8-sig", "surrogateescape")
                except BadRecord:
                    raise BadInput(f"{self.path}: expected a list {path} as `sides` says, got none") from None
                # Lists of one class have 1, 0 or -1 behind each name.
                side_of |= {re.sub(r"\s+(-1|0|1)$", "", line.strip()): side for line in text.splitlines()}
        return side_of


def _make_cell(image: bytes, annotation: bytes) -> str:
    size, boxes = read_annotation(annotation)
    return write_boxes_of(image, boxes, size)


def read_annotation(data: bytes) -> tuple[tuple[float, float] | None, list[Box]]:
    """Returns width and height that an annotation says, None where it says none, and its boxes in pixels.

    Raises:
        BadRecord: it is no such XML, too large, has a document type, or an object without a name and four numbers.
    """
    if len(data) > MAX_BYTES:
        raise BadRecord(f"expected an annotation of at most {MAX_BYTES >> 20} MiB")
    try:
        root = ElementTree.XML(data, ElementTree.XMLParser(target=_WithoutDocumentType()))
    except (ElementTree.ParseError, ValueError, LookupError):
        # From None: these messages quote the file.
        raise BadRecord("expected an annotation in XML, got a file that cannot be read as such") from None
    width, height = (_read_number(root, f"size/{name}") for name in ("width", "height"))
    boxes = []
    for found in root.iter("object"):
        name = (found.findtext("name") or "").strip()
        sides = [_read_number(found, f"bndbox/{side}") for side in _SIDES]
        numbers = [side for side in sides if side is not None]
        if not name or len(numbers) < len(sides):
            raise BadRecord("expected a name and the numbers xmin, ymin, xmax and ymax of each object of an annotation")
        left, top, right, bottom = numbers
        boxes.append(Box(name, left, top, right, bottom, ignored=_read_number(found, "difficult") == 1))
    return (width, height) if width and height else None, boxes


def _read_number(element: ElementTree.Element, path: str) -> float | None:
    try:
        number = float(element.findtext(path) or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


@final
class _WithoutDocumentType(ElementTree.TreeBuilder):
    def doctype(self, *declaration: object) -> None:
        """Refuses it before any of its entities is read."""
        raise BadRecord("expected an annotation without a document type")


def write_annotation(width: int, height: int, boxes: Sequence[tuple[str, float, float, float, float]]) -> str:
    """Returns the XML of a picture's boxes, for examples and tests.

    Args:
        width: of the picture, in pixels.
        height: of the picture.
        boxes: name, xmin, ymin, xmax and ymax of each.
    """
    objects = "".join(
        f"<object><name>{name}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(_SIDES, sides, strict=True))
        + "</bndbox></object>"
        for name, *sides in boxes
    )
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"
