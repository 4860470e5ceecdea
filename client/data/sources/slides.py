"""Whole slides that a table lists, as bags of tiles: slide files (.svs, .ndpi, .tif, ...), or folders of tile images.

Which tiles of a slide are read follows from that slide and public settings alone: whole tiles of one level in rows from
the upper left corner, without background, evenly spread where there are more than `max_tiles`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from client.data.sources import Source, SourceExample
from client.data.sources.parts.bags.tiles import (
    MAX_TILE,
    TileRule,
    list_folder_tiles,
    list_slide_tiles,
    require_openslide,
)
from client.data.sources.parts.listing import ListedFiles, Reader, open_listing
from client.data.sources.parts.pictures import write_example_pictures
from common.inputs import MAX_ITEMS, Several


class Slides(ListedFiles):
    """Settings of listed slides. A slide that cannot be read, or has no tissue, is a bad record.

    Attributes:
        file: column of paths of slide files, or of folders that hold a slide's tiles as pictures; a folder's pictures
            are all tiles, in the order of their names.
        level: level of a slide file; 0 is the finest.
        tile: side of a tile in pixels of that level.
        tissue: least part of a tile that is tissue: pixels whose saturation in a small copy of the slide lies above
            Otsu's threshold for that copy, which is taken as at least 8 and at most 40 of 255.
        max_tiles: largest number of tiles of a slide.
    """

    kind: Literal["slides"]
    file: str = "file"
    level: Annotated[int, Field(ge=0, le=63)] = 0
    tile: Annotated[int, Field(ge=8, le=MAX_TILE)] = 224
    tissue: Annotated[float, Field(ge=0, le=1)] = 0.25
    max_tiles: Annotated[int, Field(ge=1, le=MAX_ITEMS)] = 256

    @classmethod
    def example(cls, folder: Path) -> SourceExample:
        """Four slides of one or two tiles, of three patients."""
        names = ["q7-s1", "q7-s2", "q7-s3", "q7-s4"]
        write_example_pictures(
            folder, [f"{name}/{tile}.png" for name in names for tile in range(1 + int(name[-1]) % 2)]
        )
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [(name, f"q7-pat{number // 2}", f"z-{number % 2}") for number, name in enumerate(names)]
            csv.writer(file).writerows([("file", "patient", "finding"), *rows])
        settings = {"kind": "slides", "path": str(folder / "list.csv"), "patient": "patient"}
        return SourceExample(settings, ["q7-", "z-0", "z-1"])

    def open(self) -> Source:
        """The opened table. Raises BadInput: missing, without a named column, or openslide is not installed."""
        settings = f"slides {self.level} {self.tile} {self.tissue} {self.max_tiles}"
        listing = open_listing(self, Reader(self.file, self.read, "slide", settings))
        if any((listing.root / row[self.file]).is_file() for row in listing.rows if "\0" not in row[self.file]):
            require_openslide()
        return listing

    def read(self, path: Path) -> Several:
        """Returns a slide's tiles, each read when it is asked for. Raises BadRecord, OSError."""
        if path.is_dir():
            return list_folder_tiles(path, self.max_tiles)
        return list_slide_tiles(path, TileRule(self.level, self.tile, self.tissue, self.max_tiles))
