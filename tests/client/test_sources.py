"""Parquet files as other tools write and as disks damage them: every cell is text, no cell is in a message."""

from __future__ import annotations

import random
import traceback
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from client.sources import Source, open_source
from common.types import BadInput


def opened(path: Path, **settings: Any) -> Source:
    return open_source({"kind": "table", "path": str(path), "inputs": ["a"], **settings}, "sources.rows").open()


def inputs(source: Source) -> list[str]:
    return [source.load(position)["a"] for position in range(len(source.index()))]


def test_an_index_that_pandas_named_is_a_column_like_any_other(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x", "y"]}, index=pd.Index(["ann", "bea"], name="patient"))
    frame.to_parquet(tmp_path / "t.parquet")
    index = opened(tmp_path / "t.parquet", patient_column="patient").index()
    assert [record.patient for record in index] == ["ann", "bea"]


def test_a_missing_whole_number_leaves_the_others_whole(tmp_path: Path) -> None:
    # Else the patient 12 of this file would be another than the patient 12 of a CSV.
    pyarrow.parquet.write_table(pa.table({"a": [12, None, 2**60 + 1]}), tmp_path / "t.parquet")
    assert inputs(opened(tmp_path / "t.parquet")) == ["12", "", str(2**60 + 1)]


def test_text_that_is_no_text_is_refused_without_being_quoted(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table({"a": ["q7-secret"] * 3}), path, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"q7-secret", b"q7-s\xffcret"))
    with pytest.raises(BadInput, match=r"t\.parquet: expected a readable table") as caught:
        opened(path)
    assert "q7" not in "".join(traceback.format_exception(caught.value))


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
