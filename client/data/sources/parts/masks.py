"""Label cells that are read when somebody asks for them: masks and boxes, which have files or arrays of their own."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from client.data.sources.parts.pictures import read_size, read_values
from client.data.sources.parts.tree import read_file
from common.inputs import Box, Several, write_boxes, write_mask
from common.types import BadRecord

_UNREADABLE = "missing or unreadable mask"


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
    values = read_values(io.BytesIO(data))
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
