"""The tiles of a slide: where they lie follows from the slide alone, and each is read when it is asked for.

# Shapes: H x W of a small copy of a slide, R rows and C columns of its tiles.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.data.sources.parts.bags.items import Items
from client.data.sources.parts.pictures import MAX_MEGAPIXELS, read_picture
from client.data.sources.parts.tree import read_file, require_file
from common.inputs import MAX_ITEMS, Several, spread
from common.types import BadInput, BadRecord

if TYPE_CHECKING:
    from PIL import Image

MAX_TILE = 4096
"""Largest side of a tile in pixels."""

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
_PIXELS_OF_TILE = 8
"""Side of a tile in the small copy in which tissue is looked for."""

_LEAST, _MOST = 8, 40
"""Ends of the saturation above which a pixel is tissue: paper is never quite grey, and a slide that is full of tissue
has no background that Otsu's rule could tell from it."""


@dataclass(frozen=True)
class TileRule:
    """The public numbers from which the tiles of a slide follow (see `client.data.sources.slides.Slides`)."""

    level: int
    tile: int
    tissue: float
    max_tiles: int


def require_openslide() -> None:
    """Raises BadInput where the packages that read slide files are not installed."""
    try:
        import openslide  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: its library of C is missing.
        raise BadInput(
            "sources: expected the packages openslide-python and openslide-bin; install headwater[slides], or list "
            "folders of tiles"
        ) from error


def list_folder_tiles(folder: Path, max_tiles: int) -> Several:
    """Returns the pictures of a folder as tiles, in the order of their names, evenly spread where there are too many.

    Args:
        folder: the folder; what is no picture in it is passed over.
        max_tiles: largest number of tiles.

    Raises:
        BadRecord: there is no picture.
    """
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    tiles = [path for path in files if path.suffix.lower() in _SUFFIXES]
    if not tiles:
        raise BadRecord("expected a folder with the tiles of a slide, got none with a picture")

    def read(at: int) -> Image.Image:
        try:
            return read_picture(io.BytesIO(read_file(tiles[at], "tile")))
        except OSError:
            # From None: the message names the file, and so perhaps a patient.
            raise BadRecord("missing tile") from None

    return Several(Items(spread(len(tiles), max_tiles), read), len(files) - len(tiles))


def list_slide_tiles(path: Path, rule: TileRule) -> Several:
    """Returns the tiles of a slide file on which there is tissue.

    Args:
        path: the file.
        rule: level, size and number of tiles, and the least tissue.

    Raises:
        BadRecord: it is no slide, has not that level, no small copy, or no tissue.
        OSError: it is missing.
    """
    import openslide

    require_file(path, "slide")
    try:
        slide: Any = openslide.OpenSlide(path)
        _check_stored_tiles(slide.properties)
        places = _find_tissue(slide, rule)
    except openslide.OpenSlideError:
        # From None: its messages may name the file.
        raise BadRecord("not a slide that can be read") from None
    if not places:
        raise BadRecord("expected a slide with tissue, got background alone")
    scale = slide.level_downsamples[rule.level]

    def read(at: int) -> Image.Image:
        row, column = places[at]
        corner = (round(column * rule.tile * scale), round(row * rule.tile * scale))
        try:
            return _lay_on_white(slide.read_region(corner, rule.level, (rule.tile, rule.tile)))
        except openslide.OpenSlideError:
            raise BadRecord("a tile that cannot be read") from None

    return Several(Items(spread(len(places), min(rule.max_tiles, MAX_ITEMS)), read))


def _check_stored_tiles(properties: Mapping[str, str]) -> None:
    """Refuses a file that claims huge tiles of its own: openslide ends the process where memory does not suffice."""
    for level in range(int(properties["openslide.level-count"])):
        sizes = [properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height")]
        if int(sizes[0]) * int(sizes[1]) > MAX_MEGAPIXELS * 10**6:
            raise BadRecord(f"expected a slide stored in tiles of at most {MAX_MEGAPIXELS} million pixels")


def _find_tissue(slide: Any, rule: TileRule) -> list[tuple[int, int]]:
    """Returns row and column of each tile with tissue. Raises BadRecord."""
    if rule.level >= slide.level_count:
        raise BadRecord(f"expected a slide with level {rule.level}, got one of {slide.level_count} level(s)")
    width, height = slide.level_dimensions[rule.level]
    columns, rows = width // rule.tile, height // rule.tile
    if not columns * rows:
        raise BadRecord(f"expected a slide of at least one tile of {rule.tile} pixels at level {rule.level}")
    if columns * rows * _PIXELS_OF_TILE**2 > MAX_MEGAPIXELS * 10**6:
        raise BadRecord("expected a slide of fewer tiles; write larger ones, or a coarser level")
    shrunk = rule.tile * slide.level_downsamples[rule.level] / _PIXELS_OF_TILE
    small = slide.get_best_level_for_downsample(shrunk)
    if np.prod(slide.level_dimensions[small], dtype=np.float64) > MAX_MEGAPIXELS * 10**6:
        raise BadRecord(f"expected a slide with a small copy of at most {MAX_MEGAPIXELS} million pixels")
    copy = _lay_on_white(slide.read_region((0, 0), small, slide.level_dimensions[small]))
    # The part of the copy that whole tiles cover.
    covered = [
        count * rule.tile * slide.level_downsamples[rule.level] / slide.level_downsamples[small]
        for count in (columns, rows)
    ]
    return find_tissue_tiles(copy, (covered[0], covered[1]), (columns, rows), rule.tissue)


def find_tissue_tiles(
    copy: Image.Image, covered: tuple[float, float], counts: tuple[int, int], least: float
) -> list[tuple[int, int]]:
    """Returns row and column of each tile of which at least a part is tissue, row by row.

    Args:
        copy: a small copy of the slide.
        covered: width and height, in its pixels, of what tiles cover.
        counts: number of columns and rows of tiles.
        least: the part.
    """
    from PIL import Image

    columns, rows = counts
    box = (0.0, 0.0, min(covered[0], copy.width), min(covered[1], copy.height))
    size = (columns * _PIXELS_OF_TILE, rows * _PIXELS_OF_TILE)
    saturation_HW = np.asarray(copy.resize(size, Image.Resampling.BOX, box).convert("HSV"))[..., 1]
    is_tissue_HW = saturation_HW > min(max(compute_otsu(saturation_HW), _LEAST), _MOST)
    part_RC = is_tissue_HW.reshape(rows, _PIXELS_OF_TILE, columns, _PIXELS_OF_TILE).mean(axis=(1, 3))
    return [(int(row), int(column)) for row, column in np.argwhere(part_RC >= least)]


def compute_otsu(values: NDArray[np.uint8]) -> int:
    """Returns the value up to which numbers are one class, such that both are as far apart as possible (Otsu 1979)."""
    counts_V = np.bincount(values.reshape(-1), minlength=256).astype(np.float64)
    below_V = counts_V.cumsum()
    sums_V = (counts_V * np.arange(256)).cumsum()
    above_V = below_V[-1] - below_V
    mean_below = np.divide(sums_V, below_V, out=np.zeros(256), where=below_V > 0)
    mean_above = np.divide(sums_V[-1] - sums_V, above_V, out=np.zeros(256), where=above_V > 0)
    return int(np.argmax(below_V * above_V * (mean_below - mean_above) ** 2))


def _lay_on_white(region: Image.Image) -> Image.Image:
    """Returns a region in colours; what was not scanned is transparent, and becomes white as glass is."""
    from PIL import Image

    behind = Image.new("RGBA", region.size, "white")
    return Image.alpha_composite(behind, region.convert("RGBA")).convert("RGB")
