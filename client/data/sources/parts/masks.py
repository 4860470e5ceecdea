"""Label cells that are read when somebody asks for them: masks and boxes, which have files or arrays of their own."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from client.data.sources import SourceRecord
from client.data.sources.parts.base import digest
from client.data.sources.parts.named import find_patient
from client.data.sources.parts.pictures import read_picture, read_size, read_values
from client.data.sources.parts.tree import Tree, make_readable, read_file
from common.inputs import MAX_ITEMS, Box, Several, encode_text, read_mask, write_boxes, write_mask
from common.types import BadRecord

if TYPE_CHECKING:
    from PIL import Image

_UNREADABLE = "missing or unreadable mask"
_NO_IMAGE = "there is no image to its annotation"


@final
class LazyCells(Mapping[str, str]):
    """A record's cells, some of which are read each time they are asked for.

    Reading one may raise BadRecord, as loading the record may.
    """

    def __init__(self, cells: Mapping[str, str], read: Mapping[str, Callable[[], str]]) -> None:
        """Joins cells.

        Args:
            cells: column -> text.
            read: column -> what reads it.
        """
        self._cells, self._read = cells, read

    def __getitem__(self, column: str) -> str:
        return self._read[column]() if column in self._read else self._cells[column]

    def __contains__(self, column: object) -> bool:
        return column in self._read or column in self._cells

    def __iter__(self) -> Iterator[str]:
        return iter({**self._cells, **self._read})

    def __len__(self) -> int:
        return len({**self._cells, **self._read})


def read_mask_file(path: Path, picture: Any) -> str:
    """Returns a mask's file as a cell (`common.inputs.write_mask`).

    Args:
        path: see `decode_mask`.
        picture: the picture that it is of, as its source loads it.

    Raises:
        BadRecord: it is missing, unreadable, no mask, or of another size than the picture.
    """
    try:
        data = read_file(path, "mask")
    except (OSError, ValueError):
        # From None: these messages name the file, and so perhaps a patient.
        raise BadRecord(_UNREADABLE) from None
    if isinstance(picture, Several):
        raise BadRecord("expected a mask of one picture, got one of several")
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
    return decode_mask(data, path.suffix, (width, height))


def decode_mask(data: bytes, suffix: str, size: tuple[int, int]) -> str:
    """Returns a mask as a cell (`common.inputs.write_mask`).

    Args:
        data: a grey, black-and-white or indexed picture, or a .npy array, of whole numbers from 0; of an array also one
            for each label, with a single 1 at each place.
        suffix: that of its file.
        size: width and height of the picture that it is of.

    Raises:
        BadRecord: it is unreadable, no mask, or of another size.
    """
    try:
        values = find_indices(_read_array(data)) if suffix.lower() == ".npy" else _read_values(data)
    except (OSError, ValueError, EOFError):
        raise BadRecord(_UNREADABLE) from None
    if values.shape != size[::-1]:
        raise BadRecord("expected a mask of its picture's size, got one of another")
    return write_mask(values)


def join_masks(cells: Iterable[str]) -> str:
    """Returns masks of single objects as one: 1 where any of them is not 0.

    Args:
        cells: masks of one size, at least one, read one at a time.

    Raises:
        BadRecord: they are more than a record may have.
    """
    joined: NDArray[np.bool_] | None = None
    for number, cell in enumerate(cells):
        if number == MAX_ITEMS:
            raise BadRecord(f"expected at most {MAX_ITEMS} masks of a picture's objects")
        own = read_mask(cell) != 0
        joined = own if joined is None else joined | own
    if joined is None:
        raise BadRecord(_UNREADABLE)
    return write_mask(joined.astype(np.uint8))


@final
@dataclass(frozen=True)
class AnnotatedPictures:
    """An opened folder or zip of pictures, each with a file of its boxes.

    Attributes:
        path: the folder or zip.
        patient_pattern: regular expression whose one group is the patient id in a picture's file name.
        tree: its files.
        pictures: the pictures.
        make_cell: a picture's bytes and its annotation's -> the cell of boxes; raises BadRecord.
    """

    path: Path
    patient_pattern: str | None
    tree: Tree = field(repr=False)
    pictures: tuple[AnnotatedPicture, ...] = field(repr=False)
    make_cell: Callable[[bytes, bytes], str] = field(repr=False)
    about: tuple[str, ...] = field(default=(), repr=False)

    def digest(self) -> str:
        """Over path, size and time of change, or checksum in a zip, of every picture and annotation."""
        own = self.tree.digest()
        return digest(encode_text(text) for text in (own, *self.about)) if self.about else own

    def index(self) -> list[SourceRecord]:
        """Pictures in the order of their names; `row` counts in this order."""
        return [
            SourceRecord(
                row=number,
                file=self.path.name,
                key=each.image or f"{each.annotation}",
                patient=find_patient(self.patient_pattern, PurePosixPath(make_readable(each.stem)).name),
                split=each.side,
                cells=self._cells(each),
                fault="" if each.image else _NO_IMAGE,
                path=each.image or "",
            )
            for number, each in enumerate(self.pictures, start=1)
        ]

    def load(self, position: int) -> Image.Image:
        """One picture."""
        return read_picture(io.BytesIO(self._read_image(self.pictures[position])))

    def _cells(self, picture: AnnotatedPicture) -> Mapping[str, str]:
        if picture.image is None:
            return {"boxes": ""}
        if picture.annotation is None:
            return {"boxes": "" if picture.boxes is None else write_boxes(picture.boxes, 1, 1)}
        return LazyCells({}, {"boxes": partial(self._read_boxes, picture, picture.annotation)})

    def _read_image(self, picture: AnnotatedPicture) -> bytes:
        if picture.image is None:
            raise BadRecord(_NO_IMAGE)
        return self.tree.read(picture.image, "image")

    def _read_boxes(self, picture: AnnotatedPicture, annotation: str) -> str:
        return self.make_cell(self._read_image(picture), self.tree.read(annotation, "annotation"))


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and the file of its boxes.

    Attributes:
        stem: the path that both have, without suffix.
        image: path of the picture; None where there is only an annotation.
        annotation: path of the annotation; None where there is none.
        side: `train` or `test`, where the source says it.
        boxes: what is known of a picture without an annotation; None where nothing is.
    """

    stem: str
    image: str | None
    annotation: str | None
    side: str | None
    boxes: tuple[Box, ...] | None = None


def find_indices(values: NDArray[Any]) -> NDArray[Any]:
    """Returns whole numbers H x W of a mask that may be H x W x K, with a single 1 among zeros at each place.

    Raises:
        BadRecord: a place with something else.
    """
    if values.ndim != 3:
        return values
    if values.dtype.kind not in "buif" or not (
        ((values == 0) | (values == 1)).all() and (values.sum(axis=2) == 1).all()
    ):
        raise BadRecord("expected a mask with a single 1 for each place among zeros, one number for each label")
    return np.asarray(values.argmax(axis=2))


def _read_array(data: bytes) -> NDArray[Any]:
    file = io.BytesIO(data)
    read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    # A damaged header may ask for any amount of memory.
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError
    file.seek(0)
    return np.asarray(np.load(file, allow_pickle=False))


def _read_values(data: bytes) -> NDArray[Any]:
    values = read_values(io.BytesIO(data), "mask")
    if values.ndim == 3:
        colours = values[..., :3]
        if values.shape[2] not in (3, 4) or (colours != colours[..., :1]).any():
            raise BadRecord("expected a mask with one whole number for each place, got a picture in colours")
        values = colours[..., 0]
    return values


def write_boxes_of(picture: bytes, boxes: Sequence[Box], size: tuple[float, float] | None = None) -> str:
    """Returns the boxes of a picture as a cell (`common.inputs.write_boxes`).

    Args:
        picture: bytes of the picture's file.
        boxes: boxes in pixels.
        size: width and height that their file says the picture has; None where it says none.

    Raises:
        BadRecord: the picture is unreadable, or of another size than their file says.
    """
    found = read_size(io.BytesIO(picture))
    if size is not None and size != found:
        raise BadRecord("expected boxes of a picture of its size, got those of another size")
    return write_boxes(boxes, *found)
