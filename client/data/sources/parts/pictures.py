"""Read a picture, or say why not, without a word of its name or content.

What a network is given has 8 bits per value and nothing transparent: a file that says neither how its intensities are
shown, nor what is behind it, is refused until the source's settings say so.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.data.sources.parts.scans import MAX_VALUES, windowed
from common.inputs import MAX_ITEMS, Several
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
_SUBFILE = 254
"""TIFF tag whose bits say that a page is a smaller copy of another (1) or its mask (4)."""

_PHOTOMETRIC = 262
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})
_COLOURS = frozenset({"P", "PA", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
MAX_MEGAPIXELS = 178
"""Pixels of a picture that are decoded at most, in millions: Pillow's own limit."""

Intensities = tuple[float, float] | Literal["full"]
Background = Literal["black", "white"]


@dataclass(frozen=True)
class Look:
    """The part of how a picture is to be seen that its file does not say.

    Attributes:
        window: lowest and highest intensity of pictures with more than 8 bits, or `full` for each picture's own; None
            refuses them.
        background: what is behind transparent parts; None refuses pictures that have some.
    """

    window: Intensities | None = None
    background: Background | None = None


def read_picture(file: IO[bytes], look: Look | None = None) -> Image.Image:
    """Returns a fully decoded picture of 8 bits, grey or in colours, turned as its EXIF says.

    Args:
        file: the file.
        look: see `Look`.

    Raises:
        BadRecord: not a picture, truncated, several of them, or of a kind that needs a look.
    """
    found = read_pictures(file, look)
    if isinstance(found, Several):
        raise BadRecord(f"expected one picture, got a file of {len(found.items)} pages")
    return found


def read_pictures(file: IO[bytes], look: Look | None = None) -> Image.Image | Several:
    """Returns a file's picture as `read_picture` does, or the pages of a TIFF file; smaller copies are passed over."""
    with _opened(file) as opened:
        pages = _list_pages(opened)
        pictures = []
        for page in pages:
            opened.seek(page)
            pictures.append(_show(_decode(opened), look or Look(), _is_turned(opened)))
        return pictures[0] if len(pictures) == 1 else Several(pictures)


def read_values(file: IO[bytes], what: str = "image") -> NDArray[Any]:
    """Returns a picture's numbers as they are stored, turned as its EXIF says.

    Args:
        file: the file.
        what: the name of such a file in messages.

    Raises:
        BadRecord: not a picture, truncated, or several of them.
    """
    with _opened(file, what) as opened:
        if len(_list_pages(opened)) > 1:
            raise BadRecord("expected one picture, got a file of several pages")
        return np.asarray(_decode(opened))


def read_size(file: IO[bytes]) -> tuple[int, int]:
    """Returns width and height of a picture, turned as its EXIF says; nothing is decoded. Raises BadRecord."""
    with _opened(file) as opened:
        width, height = opened.size
        # Values from 5 turn by a quarter.
        return (height, width) if opened.getexif().get(_ORIENTATION, 1) in range(5, 9) else (width, height)


def _list_pages(opened: Image.Image) -> list[int]:
    """Returns the numbers of a file's pages that are pictures of their own. Raises BadRecord: it is no stack."""
    count = int(getattr(opened, "n_frames", 1))
    # A phone's second picture is a preview or a depth map.
    if count == 1 or opened.format == "MPO":
        return [0]
    if opened.format != "TIFF":
        raise BadRecord(f"expected one picture, got an animation of {count}")
    if count > MAX_ITEMS:
        raise BadRecord(f"expected at most {MAX_ITEMS} pages")
    pages, sizes = [], set()
    for page in range(count):
        opened.seek(page)
        kind = opened.tag_v2.get(_SUBFILE, 0)  # type: ignore[attr-defined]
        if not kind & 5:
            pages.append(page)
            sizes.add(opened.size)
    if len(sizes) != 1:
        raise BadRecord("expected pages of one size, got others, such as previews or the levels of a slide")
    width, height = next(iter(sizes))
    if len(pages) * width * height > MAX_VALUES:
        raise BadRecord(f"expected pages of at most {MAX_VALUES >> 20} million pixels together")
    return pages


def _decode(opened: Image.Image) -> Image.Image:
    from PIL.ImageOps import exif_transpose

    opened.load()
    turned: Image.Image = exif_transpose(opened)
    return turned


def _is_turned(opened: Image.Image) -> bool:
    """Returns whether a TIFF page of more than 8 bits says that its lowest value is white; Pillow turns others."""
    return opened.format == "TIFF" and opened.mode in _DEEP and opened.tag_v2.get(_PHOTOMETRIC) == 0  # type: ignore[attr-defined]


def _show(picture: Image.Image, look: Look, is_turned: bool) -> Image.Image:
    """Returns a picture of 8 bits: grey, or in colours without transparent parts."""
    from PIL import Image

    if picture.mode in _DEEP:
        if look.window is None:
            raise BadRecord(
                "expected a picture of 8 bits per value; write `window: [lowest, highest]` or `full` (sources "
                "manifest and image_folder), or convert it"
            )
        values = np.asarray(picture)
        low, high = (values.min(), values.max()) if look.window == "full" else look.window
        pixels = windowed(values, float(low), float(high))
        return Image.fromarray(255 - pixels if is_turned else pixels)
    if picture.mode not in _COLOURS | {"1", "L", "RGB"}:
        raise BadRecord(f"expected a picture that is grey, RGB, CMYK, YCbCr or has a palette, got {picture.mode}")
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        if clear.getchannel("A").getextrema()[0] == 255:
            return clear.convert("RGB")
        if look.background is None:
            raise BadRecord(
                "expected a picture without transparent parts; write `background: black` or `white` (sources manifest "
                "and image_folder), or convert it"
            )
        behind = Image.new("RGBA", picture.size, look.background)
        return Image.alpha_composite(behind, clear).convert("RGB")
    wanted = "RGB" if picture.mode in _COLOURS else "L" if picture.mode == "1" else picture.mode
    return picture.convert(wanted)


@contextlib.contextmanager
def _opened(file: IO[bytes], what: str = "image") -> Iterator[Image.Image]:
    from PIL import Image

    try:
        # Pillow's warnings describe the file, and a picture with doubtful EXIF is still a picture.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
            yield opened
    except Image.DecompressionBombError:
        # Raised before anything is decoded. From None: Pillow's own messages may name the file, and so a patient.
        named = "picture" if what == "image" else what
        raise BadRecord(f"expected a {named} of at most {MAX_MEGAPIXELS} million pixels") from None
    except _UNREADABLE:
        raise BadRecord(f"unreadable {what}") from None


def write_example_pictures(folder: Path, names: list[str]) -> None:
    """Small different PNG pictures, the same on every call."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(path)
