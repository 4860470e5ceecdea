"""Every source kind found in the folder, each with its own example: a deterministic order, a digest that moves with the
content, and nothing of a record in any repr or error, also where its files are damaged."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from client.data.sources import Source, SourceExample, open_source
from client.data.sources.parts.boundary import try_record
from client.data.sources.parts.masks import LazyCells
from common.inputs import Audio, Several, Text, Volume
from common.plugins import kinds, plugin_class
from common.types import BadInput, BadRecord
from tests.loaded import list_loaded

UNREADABLE = "unreadable"
GARBAGE = b"\x00q7-garbage\xff"


def example_of(kind: str, folder: Path) -> SourceExample:
    cls: Any = plugin_class("client.data.sources", kind)
    found: SourceExample = cls.example(folder)
    return found


KINDS = kinds("client.data.sources")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def example(kind: str, tmp_path: Path) -> SourceExample:
    return example_of(kind, tmp_path)


def opened(example: SourceExample) -> Source:
    return open_source(example.settings, "sources.rows").open()


def plain(item: Any) -> Any:
    """Content that can be compared."""
    if isinstance(item, Image.Image):
        return item.mode, item.size, item.tobytes()
    if isinstance(item, np.ndarray):
        return item.dtype.str, item.shape, item.tobytes()
    if isinstance(item, Several):
        return [plain(part) for part in item.items]
    if isinstance(item, Audio):
        return item.sample_rate, item.samples_T.tobytes()
    if isinstance(item, Text):
        return item.first, item.second
    if isinstance(item, Volume):
        return item.spacing_mm, item.values_XYZ.shape, item.values_XYZ.tobytes()
    return dict(item)


def contents(source: Source) -> list[Any]:
    """Every record's content, or that it has none."""
    found: list[Any] = []
    for position in range(len(source.index())):
        try:
            found.append(plain(source.load(position)))
        except BadRecord:
            found.append(UNREADABLE)
    return found


def drawn(source: Source) -> list[Any]:
    """Every record's labels that have files of their own, or that these cannot be read."""
    return [
        try_record(lambda each=each: dict(each.cells)) for each in source.index() if isinstance(each.cells, LazyCells)
    ]


def damaged(folder: Path) -> Iterator[Path]:
    """The folder with one file changed in one place at a time; restored between and after."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole, status = path.read_bytes(), path.stat()
        places = sorted({len(whole) * step // 16 for step in range(16)})
        flipped = [whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :] for at in places]
        for number, data in enumerate([*flipped, whole[: len(whole) // 2], b"", GARBAGE, GARBAGE + whole]):
            path.write_bytes(data)
            # A clock tick later: two writes within one would look the same.
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (number + 1) * 10**9))
            yield path
        path.unlink()
        yield path
        path.write_bytes(whole)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def shown(error: BaseException) -> str:
    """All that a log would show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


def test_opening_twice_gives_the_same_records_in_the_same_order(example: SourceExample) -> None:
    first, second = opened(example), opened(example)
    assert first.index() == second.index()
    assert first.digest() == second.digest()
    assert contents(first) == contents(second)


def test_the_index_is_complete_and_keys_do_not_depend_on_where_the_data_lie(
    kind: str, example: SourceExample, tmp_path: Path
) -> None:
    index = opened(example).index()
    assert len(index) >= 4
    assert len({record.row for record in index}) == len(index)
    assert all(record.row >= 1 and record.file and record.key for record in index)
    assert all(record.split in (None, "train", "test") for record in index)
    assert all(record.cells and record.cells.keys() == index[0].cells.keys() for record in index)
    assert all(isinstance(cell, str) for record in index for cell in record.cells.values())
    (tmp_path / "elsewhere").mkdir()
    moved = opened(example_of(kind, tmp_path / "elsewhere"))
    assert [dataclasses.replace(record, file="") for record in moved.index()] == [
        dataclasses.replace(record, file="") for record in index
    ]


def test_the_example_shows_different_content(example: SourceExample) -> None:
    source = opened(example)
    assert len({str(item) for item in contents(source)}) >= 4
    assert re.fullmatch("[0-9a-f]{64}", source.digest())


def test_restricting_a_source_to_rows_leaves_index_and_digest_whole(example: SourceExample, tmp_path: Path) -> None:
    restricted = SourceExample({**example.settings, "rows": str(tmp_path / "not-read-here.csv")})
    assert opened(restricted).digest() == opened(example).digest()
    assert opened(restricted).index() == opened(example).index()


def test_the_digest_changes_whenever_any_content_changes(example: SourceExample, tmp_path: Path) -> None:
    before = opened(example)
    digest, whole, labels = before.digest(), contents(before), drawn(before)
    for path in damaged(tmp_path):
        try:
            source = opened(example)
        except BadInput:
            continue
        if contents(source) != whole or drawn(source) != labels:
            assert source.digest() != digest, f"{path.name} was changed"
    assert opened(example).digest() == digest


def test_no_repr_and_no_error_shows_a_record_however_its_files_are_damaged(
    example: SourceExample, tmp_path: Path
) -> None:
    secrets = [*example.secrets, "q7-garbage"]
    kind = open_source(example.settings, "sources.rows")
    for _ in itertools.chain([tmp_path], damaged(tmp_path)):
        errors: list[BaseException] = []
        try:
            source = kind.open()
            index = source.index()
            texts = [repr(source), str(source), *map(repr, index)]
            for position, record in enumerate(index):
                for read in (partial(source.load, position), partial(dict, record.cells)):
                    try:
                        read()
                    except BadRecord as error:
                        errors.append(error)
        except BadInput as error:
            texts = []
            errors.append(error)
        for text in [*texts, *map(shown, errors)]:
            assert not [secret for secret in secrets if secret in text]


def test_an_error_names_the_file_that_is_missing(example: SourceExample, tmp_path: Path) -> None:
    if "path" not in example.settings:
        pytest.skip("this kind reads no file")
    absent = SourceExample({**example.settings, "path": str(tmp_path / "absent.csv")})
    with pytest.raises(BadInput, match=r"absent\.csv: expected"):
        opened(absent)


def test_reading_settings_loads_no_library_that_opens_data(tmp_path: Path) -> None:
    heavy = ("torch", "pandas", "pyarrow", "sklearn", "scipy", "PIL", "datasets", "pydicom", "nibabel", "soundfile")
    settings = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        settings[kind] = dict(example_of(kind, tmp_path / kind).settings)
    code = "from client.data import checks, sources\nread = lambda own: sources.open_source(own, 'own')"
    assert list_loaded(code, settings, heavy) == {kind: [] for kind in KINDS}
