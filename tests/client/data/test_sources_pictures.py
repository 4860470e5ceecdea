"""Picture files of every kind: 8 bits and nothing transparent come out, or a sentence that says what is missing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.sources import open_source
from client.data.sources.parts.masks import decode_mask
from client.data.sources.parts.pictures import Look, read_picture, read_pictures
from common.inputs import Several, read_mask
from common.types import BadRecord

GREY = np.array([[0, 51], [102, 255]], dtype=np.uint8)
DEEP = GREY.astype(np.uint16) * 257


def saved(image: Image.Image, form: str = "PNG", **settings: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **settings)
    file.seek(0)
    return file


def shown(file: io.BytesIO, look: Look | None = None) -> Any:
    picture = read_picture(file, look)
    return picture.mode, np.asarray(picture).tolist()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_more_than_8_bits_need_a_window(form: str) -> None:
    with pytest.raises(BadRecord, match=r"window: \[lowest, highest\]"):
        read_picture(saved(Image.fromarray(DEEP), form))
    assert shown(saved(Image.fromarray(DEEP), form), Look(window=(0, 65535))) == ("L", GREY.tolist())
    half = Image.fromarray((DEEP >> 4) + 100)
    assert shown(saved(half, form), Look(window="full")) == ("L", GREY.tolist())


def test_a_tiff_of_fractions_or_with_white_lowest_is_read() -> None:
    fractions = saved(Image.fromarray(GREY.astype(np.float32) / 255 - 1), "TIFF")
    assert shown(fractions, Look(window=(-1, 0))) == ("L", GREY.tolist())
    turned = saved(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0})
    with Image.open(turned) as opened:
        assert opened.tag_v2[262] == 0  # type: ignore[attr-defined]
    turned.seek(0)
    assert shown(turned, Look(window=(0, 65535))) == ("L", (255 - GREY).tolist())


def test_transparent_parts_need_a_background() -> None:
    clear = Image.new("RGBA", (2, 1), (200, 100, 0, 255))
    assert shown(saved(clear)) == ("RGB", [[[200, 100, 0]] * 2])
    clear.putpixel((1, 0), (200, 100, 0, 0))
    with pytest.raises(BadRecord, match="background: black"):
        read_picture(saved(clear))
    for name, value in (("black", 0), ("white", 255)):
        assert shown(saved(clear), Look(background=name)) == ("RGB", [[[200, 100, 0], [value] * 3]])  # type: ignore[arg-type]
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.putpixel((1, 0), 1)
    assert shown(saved(indexed)) == ("RGB", [[[10, 20, 30], [40, 50, 60]]])
    seen = shown(saved(indexed, transparency=0), Look(background="white"))
    assert seen == ("RGB", [[[255, 255, 255], [40, 50, 60]]])


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_printers_colours_become_red_green_and_blue(form: str) -> None:
    red = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), form)
    mode, pixels = shown(red)
    assert mode == "RGB" and np.abs(np.array(pixels) - [255, 0, 0]).max() <= 3


def test_other_colours_are_refused_by_name() -> None:
    with pytest.raises(BadRecord, match="got LAB"):
        read_picture(saved(Image.new("LAB", (2, 2)), "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_a_picture_is_turned_as_its_file_says(form: str, value: int) -> None:
    # A white upper left quarter; values as in the EXIF standard: where the first row and column of the file lie.
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = value
    file = saved(Image.fromarray(stored), form, exif=exif)
    seen = np.asarray(read_picture(file)).astype(int)
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}
    expected = np.rot90(stored, turns[value])
    if value in (2, 4, 7, 5):
        expected = expected[:, ::-1] if value in (2, 4) else expected[::-1]
    assert seen.shape == expected.shape and np.abs(seen - expected).max() < 40


def stack(*pages: Image.Image, **settings: Any) -> io.BytesIO:
    return saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], **settings)


def test_all_pages_of_a_tiff_are_one_record() -> None:
    black, white = (Image.new("L", (4, 4), value) for value in (0, 255))
    found = read_pictures(stack(black, white, white))
    assert isinstance(found, Several)
    assert [np.asarray(page).max() for page in found.items] == [0, 255, 255]
    with pytest.raises(BadRecord, match="file of 3 pages"):
        read_picture(stack(black, white, white))
    with pytest.raises(BadRecord, match="pages of one size"):
        read_pictures(stack(black, Image.new("L", (2, 2))))


def test_a_smaller_copy_in_a_tiff_is_no_page() -> None:
    from PIL.TiffImagePlugin import AppendingTiffWriter

    file = io.BytesIO()
    with AppendingTiffWriter(file, new=True) as writer:
        for size, value, kind in ((8, 9, 0), (2, 1, 1)):
            Image.new("L", (size, size), value).save(writer, "TIFF", tiffinfo={254: kind})
            writer.newFrame()
    file.seek(0)
    found = read_pictures(file)
    assert not isinstance(found, Several) and found.size == (8, 8)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_refused(form: str) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 120, 255)]
    with pytest.raises(BadRecord, match="animation of 3"):
        read_picture(saved(frames[0], form, save_all=True, append_images=frames[1:]))


def test_the_second_picture_of_a_phone_is_passed_over() -> None:
    frames = [Image.new("L", (8, 8), value) for value in (200, 0)]
    file = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.asarray(read_picture(file)).min() > 190


def test_a_mask_keeps_its_numbers() -> None:
    for values in (GREY, DEEP):
        cell = decode_mask(saved(Image.fromarray(values)).getvalue(), ".png", (2, 2))
        assert read_mask(cell).tolist() == values.tolist()


def test_the_sources_take_a_window_and_a_background(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    Image.fromarray(DEEP).save(tmp_path / "z" / "a.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "z" / "b.png")
    (tmp_path / "z" / "notes.txt").write_text("by a colleague")
    (tmp_path / "list.csv").write_text("image,finding\nz/a.png,z\nz/b.png,z\n")
    sources = {"manifest": tmp_path / "list.csv", "image_folder": tmp_path}
    for kind, path in sources.items():
        look = {"window": [0, 65535], "background": "white"}
        plain = open_source({"kind": kind, "path": str(path)}, "sources.x").open()
        source = open_source({"kind": kind, "path": str(path), **look}, "sources.x").open()
        assert source.digest() != plain.digest()
        assert np.asarray(source.load(0)).tolist() == GREY.tolist()
        assert np.asarray(source.load(1)).min() == 255
    assert source.passed_over == 2  # type: ignore[attr-defined]


def test_a_table_of_another_system_names_its_files_otherwise(tmp_path: Path) -> None:
    (tmp_path / "ward").mkdir()
    names = {"ward\\a.png": "ward/a.png", "ward/fu\u0308r.png": "ward/f\u00fcr.png", "d\u00fcr.png": "du\u0308r.png"}
    for number, name in enumerate(names.values()):
        Image.new("L", (2, 2), number).save(tmp_path / name)
    (tmp_path / "list.csv").write_text("image,finding\n" + "".join(f"{name},z\n" for name in (*names, "..\\a.png")))
    source = open_source({"kind": "manifest", "path": str(tmp_path / "list.csv")}, "sources.x").open()
    assert [np.asarray(source.load(position)).max() for position in range(3)] == [0, 1, 2]
    with pytest.raises(BadRecord, match="missing image|leaves the folder"):
        source.load(3)
