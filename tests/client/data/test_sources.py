"""Parquet files and zips as other tools write and as disks damage them: no cell and no name is in a message."""

from __future__ import annotations

import random
import traceback
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from client.data.sources import Source, open_source
from client.data.sources.parts.pictures import write_example_pictures
from common.types import BadInput, BadRecord


def opened(path: Path, **settings: Any) -> Source:
    return open_source({"kind": "table", "path": str(path), "columns": ["a"], **settings}, "sources.rows").open()


def inputs(source: Source) -> list[str]:
    return [source.load(position)["a"] for position in range(len(source.index()))]


def test_an_index_that_pandas_named_is_a_column_like_any_other(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x", "y"]}, index=pd.Index(["ann", "bea"], name="patient"))
    frame.to_parquet(tmp_path / "t.parquet")
    index = opened(tmp_path / "t.parquet", patient="patient").index()
    assert [record.patient for record in index] == ["ann", "bea"]


def test_a_missing_whole_number_leaves_the_others_whole(tmp_path: Path) -> None:
    # Else the patient 12 of this file would be another than the patient 12 of a CSV.
    pyarrow.parquet.write_table(pa.table({"a": [12, None, 2**60 + 1]}), tmp_path / "t.parquet")
    assert inputs(opened(tmp_path / "t.parquet")) == ["12", "", str(2**60 + 1)]


def test_text_that_is_no_text_is_a_bad_record_that_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"a": ["q7-secret", "other"]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"q7-secret", b"q7-s\xffcret"))
    source = opened(path)
    with pytest.raises(BadRecord, match="UTF-8") as caught:
        source.load(0)
    assert "q7" not in "".join(traceback.format_exception(caught.value)) + source.index()[0].fault
    assert source.load(1)["a"] == "other"


def test_a_damaged_file_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path, generator = tmp_path / "t.parquet", random.Random(0)
    pd.DataFrame({"a": ["q7-secret"] * 3, "b": [1, 2, 3], "c": pd.to_datetime(["2020-01-01"] * 3)}).to_parquet(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            opened(path).index()
        except BadInput as error:
            refused += 1
            assert "q7" not in "".join(traceback.format_exception(error))
    assert refused >= 100


PICTURES = ["benign/q7-ann.bmp", "benign/q7-bea.bmp"]


def zipped(folder: Path, names: list[str]) -> Path:
    """A zip with the pictures in the order of `names`, stored under the names of PICTURES."""
    write_example_pictures(folder, PICTURES)
    with zipfile.ZipFile(folder / "scans.zip", "w") as archive:
        for name, stored_as in zip(names, PICTURES, strict=True):
            archive.writestr(stored_as, (folder / name).read_bytes())
    return folder / "scans.zip"


def of_zip(path: Path) -> Source:
    return open_source({"kind": "image_folder", "path": str(path)}, "sources.scans").open()


def test_another_picture_of_equal_size_changes_the_digest_of_a_zip(tmp_path: Path) -> None:
    first, second = (of_zip(zipped(tmp_path, names)) for names in (PICTURES, PICTURES[::-1]))
    assert first.index() == second.index()
    assert first.digest() != second.digest()


def test_no_error_shows_the_name_of_a_damaged_picture_in_a_zip(tmp_path: Path) -> None:
    path = zipped(tmp_path, PICTURES)
    content = (tmp_path / PICTURES[0]).read_bytes()
    path.write_bytes(path.read_bytes().replace(content[-40:], bytes(40), 1))
    with pytest.raises(BadRecord) as caught:
        of_zip(path).load(0)
    assert "q7" not in "".join(traceback.format_exception(caught.value))
