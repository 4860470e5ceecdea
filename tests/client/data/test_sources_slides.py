"""Slides become bags of tiles: by folders of pictures, and from files of several levels, without background."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from client.data.sources import open_source
from client.data.sources.parts.bags.tiles import compute_otsu, find_tissue_tiles
from client.data.sources.parts.pictures import write_example_pictures
from common.inputs import Several
from common.types import BadInput, BadRecord

SIDE = 64
"""Side of the tiles in which a file is stored."""

SIZE = 512


def write_tiff(path: Path, levels: list[NDArray[np.uint8]]) -> None:
    """Writes a tiled TIFF of plain colours, each level a directory of its own: what any microscope's program reads."""
    data, directories = bytearray(b"II*\0\0\0\0\0"), []
    for number, picture in enumerate(levels):
        height, width = picture.shape[:2]
        offsets = []
        for top in range(0, height, SIDE):
            for left in range(0, width, SIDE):
                tile = np.full((SIDE, SIDE, 3), 255, np.uint8)
                part = picture[top : top + SIDE, left : left + SIDE]
                tile[: part.shape[0], : part.shape[1]] = part
                offsets.append(len(data))
                data += tile.tobytes()
        lists = []
        for values in (offsets, [SIDE * SIDE * 3] * len(offsets)):
            lists.append(len(data) if len(values) > 1 else values[0])
            data += struct.pack(f"<{len(values)}I", *values)
        bits = len(data)
        data += struct.pack("<3H", 8, 8, 8)
        sizes = [(254, 4, 1, int(number > 0)), (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits)]
        colours = [(259, 3, 1, 1), (262, 3, 1, 2), (277, 3, 1, 3), (284, 3, 1, 1)]
        tiles = [(322, 4, 1, SIDE), (323, 4, 1, SIDE)]
        tiles += [(324, 4, len(offsets), lists[0]), (325, 4, len(offsets), lists[1])]
        directories.append([*sizes, *colours, *tiles])
    link = 4
    for entries in directories:
        data += b"\0" * (len(data) % 2)
        data[link : link + 4] = struct.pack("<I", len(data))
        data += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        link = len(data)
        data += b"\0\0\0\0"
    path.write_bytes(data)


def paint_slide() -> NDArray[np.uint8]:
    """Returns glass with a pink square of tissue: columns 128 to 320, rows 64 to 192, each pixel telling its place."""
    slide = np.full((SIZE, SIZE, 3), 242, np.uint8)
    slide[64:192, 128:320] = [200, 40, 150]
    slide[..., 2] -= (np.arange(SIZE) // 64).astype(np.uint8)[None, :]
    return slide


def opened(folder: Path, names: list[str], **changes: Any) -> Any:
    (folder / "list.csv").write_text("file,grade\n" + "".join(f"{name},low\n" for name in names), encoding="utf-8")
    settings = {"kind": "slides", "path": str(folder / "list.csv"), "tile": 64, **changes}
    return open_source(settings, "sources.slides").open()


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    pytest.importorskip("openslide")
    picture = paint_slide()
    write_tiff(tmp_path / "q7-ann.tif", [picture, picture[::4, ::4]])
    return tmp_path


def test_tiles_with_tissue_are_read_row_by_row_and_no_others(slide: Path) -> None:
    item = opened(slide, ["q7-ann.tif"]).load(0)
    assert isinstance(item, Several)
    tiles = [np.asarray(tile) for tile in item.items]
    assert [tile.shape for tile in tiles] == [(64, 64, 3)] * 6
    picture = paint_slide()
    expected = [picture[row : row + 64, column : column + 64] for row in (64, 128) for column in (128, 192, 256)]
    for tile, own in zip(tiles, expected, strict=True):
        np.testing.assert_array_equal(tile, own)


def test_a_coarser_level_has_fewer_tiles_and_its_own_pixels(slide: Path) -> None:
    # At a quarter of the size the tissue lies in columns 32 to 80 and rows 16 to 48.
    items = opened(slide, ["q7-ann.tif"], level=1, tile=16).load(0).items
    assert len(items) == 6
    np.testing.assert_array_equal(np.asarray(items[0]), paint_slide()[::4, ::4][16:32, 32:48])


def test_too_many_tiles_are_evenly_spread_over_all(slide: Path) -> None:
    whole, some = (opened(slide, ["q7-ann.tif"], max_tiles=most).load(0).items for most in (100, 2))
    assert len(some) == 2
    for at, tile in zip((1, 4), some, strict=True):
        np.testing.assert_array_equal(np.asarray(tile), np.asarray(whole[at]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"level": 2}, "expected a slide with level 2, got one of 2 level"),
        ({"tile": 1024}, "at least one tile of 1024 pixels"),
        ({"tissue": 1.0, "tile": 256}, "expected a slide with tissue, got background alone"),
    ],
)
def test_a_slide_without_what_is_asked_for_is_a_bad_record(slide: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRecord, match=said):
        opened(slide, ["q7-ann.tif"], **changes).load(0)


@pytest.mark.parametrize("keep", [0, 100, 5000, 400_000])
def test_a_damaged_slide_is_a_bad_record_without_its_name(slide: Path, keep: int) -> None:
    path = slide / "q7-ann.tif"
    path.write_bytes(path.read_bytes()[:keep])
    source = opened(slide, ["q7-ann.tif"])
    with pytest.raises(BadRecord) as error:
        [np.asarray(tile) for tile in source.load(0).items]
    assert "q7" not in str(error.value)


def test_a_slide_that_claims_huge_tiles_is_a_bad_record_and_does_not_end_the_process(slide: Path) -> None:
    path = slide / "q7-ann.tif"
    data = path.read_bytes()
    for tag in (322, 323):  # Width and length of a tile, of the first level alone.
        data = data.replace(struct.pack("<HHII", tag, 4, 1, SIDE), struct.pack("<HHII", tag, 4, 1, 1 << 20), 1)
    path.write_bytes(data)
    with pytest.raises(BadRecord, match="stored in tiles of at most 178 million pixels"):
        opened(slide, ["q7-ann.tif"]).load(0)


def test_the_numbers_that_choose_tiles_are_in_the_digest(slide: Path) -> None:
    digests = {
        opened(slide, ["q7-ann.tif"], **changes).digest()
        for changes in ({}, {"level": 1}, {"tile": 32}, {"tissue": 0.5}, {"max_tiles": 3})
    }
    assert len(digests) == 5


def test_a_folders_pictures_are_tiles_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_example_pictures(tmp_path, [f"s1/{at}.png" for at in range(4)])
    (tmp_path / "s1" / "notes.txt").write_text("none", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    source = opened(tmp_path, ["s1", "empty", "s1/0.txt"], max_tiles=2)
    item = source.load(0)
    assert item.passed_over == 1
    for name, tile in zip(("1.png", "3.png"), item.items, strict=True):
        np.testing.assert_array_equal(np.asarray(tile), np.asarray(Image.open(tmp_path / "s1" / name)))
    with pytest.raises(BadRecord, match="got none with a picture"):
        source.load(1)
    (tmp_path / "s1" / "1.png").write_bytes(b"none")
    with pytest.raises(BadRecord, match="one of its 2 items: unreadable image"):
        list(source.load(0).items)


def test_without_openslide_folders_are_read_and_files_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python's own mark of a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "openslide", None)
    write_example_pictures(tmp_path, ["s1/1.png"])
    assert len(opened(tmp_path, ["s1"]).load(0).items) == 1
    (tmp_path / "q7.svs").write_bytes(b"")
    with pytest.raises(BadInput, match=r"^sources: expected the packages openslide-python and openslide-bin; install"):
        opened(tmp_path, ["q7.svs"])


def test_otsus_threshold_is_the_one_that_most_sets_two_classes_apart() -> None:
    values = np.random.default_rng(0).integers(0, 256, 500).astype(np.uint8)

    def part(threshold: int) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0.0

    assert compute_otsu(values) == max(range(256), key=part)


def test_a_slide_full_of_tissue_has_no_background_and_paper_is_none() -> None:
    rng = np.random.default_rng(0)
    full = Image.fromarray(
        np.stack([rng.integers(180, 220, (64, 64)), *2 * [rng.integers(40, 90, (64, 64))]], 2).astype(np.uint8)
    )
    paper = Image.fromarray(rng.integers(238, 242, (64, 64, 3)).astype(np.uint8))
    for copy, count in ((full, 16), (paper, 0)):
        assert len(find_tissue_tiles(copy, (64.0, 64.0), (4, 4), 0.25)) == count
