"""A table of public ranges in place of columns: what it becomes, what is refused, and who may name one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.plugins import resolve
from common.run import RunConfig, resolve_backbone_paths
from common.types import BadInput
from common.yaml import load, parse

TABLE = "column,lowest,highest,levels,missing,indicator\nage,20,60,,middle,yes\nsex,,,f|m,refuse,\n"
COLUMNS = [
    {"name": "age", "range": [20, 60], "missing": 40, "indicator": True},
    {"name": "sex", "levels": ["f", "m"], "missing": "refuse"},
]


def write_run(folder: Path, backbone: dict[str, Any]) -> Path:
    run = {
        "name": "tabular",
        "seed": 1,
        "backbone": {"kind": "identity", **backbone},
        "tasks": {"finding": {"kind": "classification", "labels": ["a", "b"]}},
        "solver": {"kind": "auto"},
        "privacy": {"unit": "example", "delta": 1e-5, "target_epsilon": 3.0},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def open_run(folder: Path, table: str | bytes = TABLE) -> RunConfig:
    (folder / "ranges.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    return load(RunConfig, write_run(folder, {"ranges": "ranges.csv"}))


def test_a_table_is_the_same_run_as_its_columns(tmp_path: Path) -> None:
    written = resolve_backbone_paths(load(RunConfig, write_run(tmp_path, {"columns": COLUMNS})))
    read = resolve_backbone_paths(open_run(tmp_path))
    assert read.model_dump(mode="json") == written.model_dump(mode="json")
    assert "ranges" not in json.dumps(read.model_dump(mode="json"))


def test_a_spreadsheet_may_write_semicolons_and_decimal_commas(tmp_path: Path) -> None:
    table = "\ufeff" + TABLE.replace(",", ";").replace("60", "60,5").replace("\n", "\r\n")
    assert resolve("common.backbones", open_run(tmp_path, table).backbone_specs["backbone"], "").columns[0].range == (
        20,
        60.5,
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("20", "FILL_IN", r"backbone\.ranges: .*in every cell, got FILL_IN in column 'age' .lowest.;"),
        ("20", "twenty", "column 'age': expected a number in the cell lowest, got 'twenty'"),
        ("20", "60", "expected .lowest, highest."),
        ("middle", "99", "missing: expected 'refuse', a value in the range"),
        ("yes", "perhaps", "expected yes or no in the cell indicator"),
        ("f|m", "", "exactly one of range and levels for column 'sex'"),
        ("f|m", "f", "levels"),
        ("column,lowest", "name,low", "expected a first line column,lowest,highest"),
        ("refuse,", "refuse,,,", "line 2 below the first: expected 6 cells, got 8"),
    ],
)
def test_a_wrong_table_is_refused_with_the_column(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        open_run(tmp_path, TABLE.replace(old, new))


@pytest.mark.parametrize("table", [b"", TABLE.splitlines()[0].encode(), b"\xff\xfe\x00", b"column\0"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, table: bytes) -> None:
    with pytest.raises(BadInput, match=r"backbone\.ranges"):
        open_run(tmp_path, table)


def test_a_missing_table_and_both_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no such file"):
        load(RunConfig, write_run(tmp_path, {"ranges": "none.csv"}))
    with pytest.raises(BadInput, match="either it or `columns`, got both"):
        load(RunConfig, write_run(tmp_path, {"ranges": "ranges.csv", "columns": COLUMNS}))


def test_an_offer_cannot_have_a_table_of_the_site_read(tmp_path: Path) -> None:
    secret = tmp_path / "ranges.csv"
    secret.write_text(TABLE, encoding="utf-8")
    values = json.loads(write_run(tmp_path, {"ranges": str(secret)}).read_text())
    run = parse(RunConfig, values, base=tmp_path)
    assert run.backbone_specs["backbone"].settings() == values["backbone"], "the table was read"
    with pytest.raises(BadInput, match="in a run file or simulation file only"):
        resolve_backbone_paths(run)
