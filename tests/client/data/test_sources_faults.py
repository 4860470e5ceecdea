"""One faulty file among good ones: the others are read as before, the fault is one bad record, and nothing waits."""

from __future__ import annotations

import csv
import io
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.records import RejectedRecord, find_usable
from client.data.sources import Source, open_source
from client.data.sources.dicom import write_dicom
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.recordings import example_recordings
from client.data.sources.parts.tree import MAX_FILE_BYTES
from common.types import BadInput, Unit

GOOD = 3
LATIN = b"L\xfcbeck"


def picture(path: Path) -> None:
    Image.new("RGB", (8, 8), (90, 20, 30)).save(path, format="PNG")


def bomb(path: Path) -> None:
    """A picture whose header says 10^9 pixels."""
    picture(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(bytes(data))


def recording(path: Path) -> None:
    from scipy.io import wavfile

    wavfile.write(path, 8000, example_recordings(1)[0])


def endless_recording(path: Path) -> None:
    """A header that says one sample a second, which a model's rate would make an hour of sound."""
    from scipy.io import wavfile

    wavfile.write(path, 1, example_recordings(1)[0])


def series(path: Path) -> None:
    path.write_text("1\n2\n3\n")


def scan(path: Path) -> None:
    write_dicom(path, np.arange(30, dtype=np.uint16).reshape(6, 5))


def absurd_scan(path: Path) -> None:
    write_dicom(path, np.arange(30, dtype=np.uint16).reshape(6, 5), NumberOfFrames=10**9)


def volume(path: Path) -> None:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.eye(4)), path)


def absurd_volume(path: Path) -> None:
    volume(path)
    data = bytearray(path.read_bytes())
    # dim[1] to dim[3] of the header.
    data[42:48] = np.array([32000, 32000, 32000], dtype="<i2").tobytes()
    path.write_bytes(bytes(data))


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nulls(path: Path) -> None:
    path.write_bytes(bytes(1000))


def missing(path: Path) -> None:
    del path


def halved(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        make(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


LISTED: dict[str, tuple[str, Callable[[Path], None], list[Callable[[Path], None]], dict[str, Any]]] = {
    "image": (".png", picture, [bomb, halved(picture)], {"kind": "manifest", "image": "file"}),
    "audio": (".wav", recording, [endless_recording], {"kind": "manifest", "audio": "file"}),
    "series": (".csv", series, [], {"kind": "manifest", "series": "file"}),
    "dicom": (".dcm", scan, [absurd_scan, halved(scan)], {"kind": "dicom", "window": "full"}),
    "nifti": (".nii", volume, [absurd_volume, halved(volume)], {"kind": "nifti"}),
}
FAULTS = [folder, pipe, unix_socket, loop, empty, nulls, missing]


def outcomes(source: Source) -> list[bool]:
    """True for every record that loads."""
    return [try_record(lambda at=at: source.load(at))[1] is None for at in range(len(source.index()))]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("content", "fault"), [(name, fault) for name, (_, _, own, _) in LISTED.items() for fault in [*FAULTS, *own]]
)
def test_a_faulty_file_of_a_list_is_one_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, fault: Callable[[Path], None]
) -> None:
    # A socket's path has at most 107 bytes.
    monkeypatch.chdir(tmp_path)
    suffix, make, _, settings = LISTED[content]
    for number in range(GOOD):
        make(Path(f"{number}{suffix}"))
    fault(Path(f"bad{suffix}"))
    with open("list.csv", "w", newline="") as file:
        names = [f"0{suffix}", f"bad{suffix}", *(f"{number}{suffix}" for number in range(1, GOOD))]
        csv.writer(file).writerows([["file", "label"], *([name, "a"] for name in names), [f"a\0b{suffix}", "a"]])
    source = open_source({**settings, "path": str(tmp_path / "list.csv")}, "s").open()
    assert outcomes(source)[: GOOD + 1] == [True, False, True, True]
    assert len(source.digest()) == 64


@pytest.mark.parametrize("kind", ["image_folder", "audio"])
@pytest.mark.parametrize("fault", [folder, pipe, unix_socket, loop, empty, nulls])
def test_a_faulty_file_of_a_folder_is_one_bad_record_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: Callable[[Path], None]
) -> None:
    suffix, make = (".png", picture) if kind == "image_folder" else (".wav", recording)
    (tmp_path / "all" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "all" / "a")
    for number in range(GOOD):
        make(Path(f"{number}{suffix}"))
    settings = {"kind": kind, "path": str(tmp_path / "all")} | ({"pattern": "(?P<n>.)"} if kind == "audio" else {})
    whole = open_source(settings, "s").open()
    fault(Path(f"bad{suffix}"))
    source = open_source(settings, "s").open()
    assert [ok for ok in outcomes(source) if ok] == [True] * GOOD
    assert len(source.index()) - GOOD == (fault in (loop, empty, nulls))
    assert [record.key for record in source.index()][:GOOD] == [record.key for record in whole.index()]


@pytest.mark.parametrize("kind", ["image_folder", "audio"])
def test_names_that_are_not_utf_8_are_read_and_their_columns_can_be_written_down(tmp_path: Path, kind: str) -> None:
    suffix, make = (".png", picture) if kind == "image_folder" else (".wav", recording)
    place = os.fsencode(tmp_path / "all") + b"/" + LATIN
    os.makedirs(place)
    make(tmp_path / "plain")
    os.rename(tmp_path / "plain", place + b"/" + LATIN + os.fsencode(f"_1{suffix}"))
    pattern = r"(?P<label>[^/]+)/(?P<patient>[^/]+)_\d"
    settings = {"kind": kind, "path": str(tmp_path / "all"), "pattern": pattern, "patient": "patient"}
    source = open_source(settings, "s").open()
    [record] = source.index()
    assert (record.cells["label"], record.patient) == ("Lübeck", "Lübeck")
    assert outcomes(source) == [True]
    assert len(source.digest()) == 64
    if kind == "image_folder":
        [record] = open_source({"kind": kind, "path": str(tmp_path / "all")}, "s").open().index()
        assert record.cells == {"label": "Lübeck"}


def test_a_folder_in_a_zip_whose_name_ends_like_a_picture_is_no_record(tmp_path: Path) -> None:
    picture(tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.mkdir("a/b.png")
        archive.write(tmp_path / "plain", "a/1.png")
    source = open_source({"kind": "image_folder", "path": str(tmp_path / "all.zip")}, "s").open()
    assert outcomes(source) == [True]


def refuse_too_large(path: Path) -> None:
    source = open_source({"kind": "image_folder", "path": str(path)}, "s").open()
    made, reason = try_record(lambda: source.load(0))
    assert made is None
    assert reason == "expected a file of at most 1024 MiB"


def test_a_file_beyond_the_bound_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "all" / "a").mkdir(parents=True)
    with (tmp_path / "all" / "a" / "1.png").open("wb") as sparse:
        sparse.truncate(MAX_FILE_BYTES + 1)
    refuse_too_large(tmp_path / "all")


@pytest.mark.slow
def test_a_file_of_a_zip_that_inflates_beyond_the_bound_is_a_bad_record(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("a/1.png", "w", force_zip64=True) as file:
        for _ in range(MAX_FILE_BYTES >> 20):
            file.write(bytes(1 << 20))
        file.write(b"x")
    refuse_too_large(tmp_path / "all.zip")


def test_a_list_of_problems_is_written_whatever_a_file_is_called(tmp_path: Path) -> None:
    from client.data.prepare import _write_rejected

    _write_rejected(tmp_path / "problems.csv", [RejectedRecord(os.fsdecode(LATIN), 1, "unreadable image")])
    assert (tmp_path / "problems.csv").read_text(encoding="utf-8").splitlines()[1] == r"L\udcfcbeck,1,,unreadable image"


ROWS = [
    ["k1", "train", "one", "a"],
    ["k2", "train", 'two "quoted", words\nin two lines', "b"],
    ["k3", "test", "3", "a"],
]
BAD_ROWS = {
    "too long": (b"k9,train,x,a,b,c", "more cells"),
    "a lone quote": (b'k9,train,"x,a', "quote"),
    "a lone quote at its end": (b'k9,train,x,"', "quote"),
    "another encoding": (b"k9,train,L\xfcbeck,a", "UTF-8"),
    "a null character": (b"k9,train,x\0y,a", "null"),
    "another encoding in quotes": (b'k9,train,"L\xfcbeck",a', "UTF-8"),
}


@pytest.mark.parametrize("kind", ["table", "text", "manifest"])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_read_is_one_bad_record(
    tmp_path: Path, kind: str, at: int, line: bytes, reason: str
) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([["key", "split", "note", "label"], *ROWS])
    before = text.getvalue().encode().split(b"\r\n")
    (tmp_path / "rows.csv").write_bytes(b"\r\n".join([*before[: at + 1], line, *before[at + 1 :]]))
    settings: dict[str, Any] = {
        "table": {"path": str(tmp_path / "rows.csv"), "columns": ["note"], "complete": ["note"]},
        "text": {"path": str(tmp_path / "rows.csv"), "text": "note", "separator": ",", "quotes": True},
        "manifest": {"path": str(tmp_path / "rows.csv"), "text": "note"},
    }[kind]
    columns = {"patient": "key", "split": "split"}
    source = open_source({"kind": kind, **settings, **columns}, "s").open()
    index = source.index()
    assert [record.row for record in index] == [1, 2, 3, 4]
    assert reason in index[at].fault
    assert [ok for ok in outcomes(source)] == [number != at for number in range(4)]
    good = [record for number, record in enumerate(index) if number != at]
    assert [[record.patient, record.split, record.cells["note"], record.cells["label"]] for record in good] == ROWS
    assert not any(record.fault for record in good)
    usable, rejected = find_usable("s", index, dict.fromkeys(range(4)), {}, Unit.EXAMPLE)
    assert [each.record for each in usable] == good
    assert [each.row for each in rejected] == [at + 1]


def test_a_row_of_empty_cells_is_a_row_and_a_blank_line_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n\n1,2\n,\n  \n3\n4,5,,\n")
    source = open_source({"kind": "table", "path": str(tmp_path / "rows.csv"), "columns": ["a", "b"]}, "s").open()
    cells = [[record.cells["a"], record.cells["b"]] for record in source.index()]
    assert cells == [["1", "2"], ["", ""], ["3", ""], ["4", "5"]]


def test_text_in_utf_16_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(BadInput, match=r"rows\.csv: expected text in UTF-8, got UTF-16; save it as CSV UTF-8"):
        open_source({"kind": "table", "path": str(tmp_path / "rows.csv"), "columns": ["a"]}, "s").open()


def test_a_quote_in_a_table_of_white_space_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text('a b\n1 5"\n')
    settings = {"kind": "table", "path": str(tmp_path / "rows.txt"), "columns": ["a", "b"], "separator": "whitespace"}
    assert outcomes(open_source(settings, "s").open()) == [True]


def test_an_archive_with_a_name_that_is_no_text_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/\u00e9.png", b"x")
    path.write_bytes(path.read_bytes().replace("\u00e9".encode(), b"\xff\xfe"))
    with pytest.raises(BadInput, match="expected a folder or zip of images"):
        open_source({"kind": "image_folder", "path": str(path)}, "sources.rows").open()
