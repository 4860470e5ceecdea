"""Series of several channels as monitors export them: with names, with gaps, in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data.sources import open_source
from common.inputs import MAX_CHARS, Text
from common.types import BadInput, BadRecord


def load(folder: Path, text: str, name: str = "a.csv", **changes: Any) -> list[Any]:
    (folder / name).write_text(text, encoding="utf-8")
    (folder / "list.csv").write_text(f"file\n{name}\n", encoding="utf-8")
    settings = {"kind": "manifest", "path": str(folder / "list.csv"), "series": "file", **changes}
    found: list[Any] = open_source(settings, "sources.vitals").open().load(0).tolist()
    return found


@pytest.mark.parametrize(
    "text",
    [
        "I,II\n1,2\n3,4\n",
        "1,2\n3,4\n",
        "I;II\n1;2\n3;4\n",
        "1\t2\n3\t4\n",
        "1 2\n3 4\n",
        "1,2,\n3,4,\n",
        "I,II\r\n1, 2\r\n3, 4",
    ],
)
def test_leads_side_by_side_are_channels_with_or_without_their_names(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == [[1.0, 2.0], [3.0, 4.0]]


GAPPY = "pulse,pressure\n,7\n1,\n2,9\nNaN,\n4,NA\n"


def test_gaps_are_refused_until_the_settings_say_what_they_mean(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="without gaps; write `gaps: hold`"):
        load(tmp_path, GAPPY)
    assert load(tmp_path, GAPPY, gaps="hold") == [[1, 7], [1, 7], [2, 9], [2, 9], [4, 9]]
    assert load(tmp_path, GAPPY, gaps="interpolate") == [[1, 7], [1, 8], [2, 9], [3, 9], [4, 9]]
    nan = np.nan
    kept = [[nan, 7], [1, nan], [2, 9], [nan, nan], [4, nan]]
    np.testing.assert_array_equal(load(tmp_path, GAPPY, gaps="keep"), kept)


def test_a_gap_never_moves_the_values_behind_it_to_another_channel(tmp_path: Path) -> None:
    """One gap in each line, in another column each: read by blanks alone these are whole rows of two channels."""
    text = "1,,3\n,2,3\n1,2,\n"
    with pytest.raises(BadRecord, match="without gaps"):
        load(tmp_path, text)
    assert load(tmp_path, text, gaps="hold") == [[1, 2, 3], [1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize("text", ["a,b\n1,x\n", "1,2\n3\n", "1,5;2,5\n", "", "a,b\n"])
def test_what_is_no_table_of_numbers_is_a_bad_record(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRecord):
        load(tmp_path, text)


def test_a_channel_without_any_value_and_waveforms_of_other_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="a value in each channel"):
        load(tmp_path, "a,b,c\n1,,2\n3,,4\n", gaps="hold")
    np.testing.assert_array_equal(load(tmp_path, "a,b\n1,\n3,\n", gaps="keep"), [[1, np.nan], [3, np.nan]])
    with pytest.raises(BadRecord, match="a series with a value, got empty ones only"):
        load(tmp_path, "a,b\n1,NaN\n".replace("1", "NaN"), gaps="keep")
    with pytest.raises(BadRecord, match="finite numbers"):
        load(tmp_path, "a,b\n1,NaN\n2,1e99\n", gaps="keep")
    with pytest.raises(BadRecord, match="a source of kind waveforms"):
        load(tmp_path, "100 2 360\n", name="100.hea")


def test_rows_of_a_table_have_gaps_too(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("label,a1,a2,b1,b2\nx,1,2,,4\ny,1,2,3,\n", encoding="utf-8")
    settings: dict[str, Any] = {
        "kind": "series",
        "path": str(tmp_path / "rows.csv"),
        "labels": ["label"],
        "channels": 2,
    }
    plain = open_source(settings, "s").open()
    for position in (0, 1):
        with pytest.raises(BadRecord):
            plain.load(position)
    held = open_source({**settings, "gaps": "hold"}, "s").open()
    np.testing.assert_array_equal(held.load(0), [[1, 2], [1, 4]])
    np.testing.assert_array_equal(held.load(1), [[1, 2], [3, 2]])
    assert held.digest() != plain.digest()


def test_gaps_are_of_series_alone(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="gaps: expected it beside `series`"):
        open_source({"kind": "manifest", "path": str(tmp_path / "x.csv"), "gaps": "hold"}, "s")


def test_a_text_longer_than_the_public_limit_is_a_bad_record() -> None:
    assert len(Text("a" * MAX_CHARS).first) == MAX_CHARS
    for first, second in (("a" * (MAX_CHARS + 1), None), ("a", "b" * (MAX_CHARS + 1))):
        with pytest.raises(BadRecord, match=f"at most {MAX_CHARS} characters"):
            Text(first, second)
