"""Read a picture, or say why not, without a word of its name or content."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from common.types import BadRecord

if TYPE_CHECKING:
    from PIL import Image

# Pillow's decoders raise many things on arbitrary bytes; one that is missed would end a whole preparation.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


_ORIENTATION = 0x0112
MAX_MEGAPIXELS = 178
"""Pixels of a picture that are decoded at most, in millions: Pillow's own limit."""


def read_picture(file: IO[bytes]) -> Image.Image:
    """A fully decoded picture, turned as its EXIF says. Raises BadRecord: not a picture, or truncated."""
    from PIL.ImageOps import exif_transpose

    with _opened(file) as opened:
        opened.load()
        turned: Image.Image = exif_transpose(opened)
        return turned


def read_size(file: IO[bytes]) -> tuple[int, int]:
    """Returns width and height of a picture, turned as its EXIF says; nothing is decoded. Raises BadRecord."""
    with _opened(file) as opened:
        width, height = opened.size
        # Values from 5 turn by a quarter.
        return (height, width) if opened.getexif().get(_ORIENTATION, 1) in range(5, 9) else (width, height)


@contextlib.contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    from PIL import Image

    try:
        # Pillow's warnings describe the file, and a picture with doubtful EXIF is still a picture.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
            yield opened
    except Image.DecompressionBombError:
        # Raised before anything is decoded. From None: Pillow's own messages may name the file, and so a patient.
        raise BadRecord(f"expected a picture of at most {MAX_MEGAPIXELS} million pixels") from None
    except _UNREADABLE:
        raise BadRecord("unreadable image") from None


def write_example_pictures(folder: Path, names: list[str]) -> None:
    """Small different PNG pictures, the same on every call."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
