"""Read a picture, or say why not, without a word of its name or content."""

from __future__ import annotations

from typing import IO

from PIL import Image, UnidentifiedImageError
from PIL.ImageOps import exif_transpose

from common.types import BadRecord


def read_picture(file: IO[bytes]) -> Image.Image:
    """A fully decoded picture, turned as its EXIF says. Raises BadRecord: not a picture, or truncated."""
    try:
        with Image.open(file) as opened:
            opened.load()
            turned: Image.Image = exif_transpose(opened)
            return turned
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadRecord("unreadable image") from error
