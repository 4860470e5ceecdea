"""First contact with time series: one in each row, in each file, or a time step in each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from client.data.sources import open_source
from tests.client.inspect.test_inspect import refuse, run


def draft(path: Path, *arguments: object) -> dict[str, Any]:
    """Returns the drafted simulation."""
    run(path, *arguments, "--out", path.parent / "draft.yaml")
    found: dict[str, Any] = yaml.safe_load((path.parent / "draft.yaml").read_text(encoding="utf-8"))
    return found


def load(draft: dict[str, Any], folder: Path, position: int = 0) -> Any:
    """Returns one record of the drafted source."""
    settings = draft["sources"]["records"]
    for key in ("path", "records"):
        settings |= {key: str(folder / settings[key])} if key in settings else {}
    return open_source(settings, "sources.records").open().load(position)


def write_long(folder: Path, dated: bool = False) -> Path:
    """Writes twelve stays of ten hours, a value in each row, their labels in another table."""
    lines, stays = ["stay_id;charttime;itemname;valuenum"], ["stay_id;subject_id;outcome"]
    for stay in range(12):
        stays.append(f"{stay};s{stay // 2};{'ab'[stay % 2]}")
        for hour in range(10):
            for name in ("heart rate", "pressure")[: 1 + hour % 2]:
                time = f"2024-01-01 {hour:02d}:{7 * stay % 60:02d}" if dated else str(hour)
                lines.append(f"{stay};{time};{name};{stay},{hour}")
    (folder / "stays.csv").write_text("\n".join(stays) + "\n", encoding="utf-8")
    (folder / "events.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "events.csv"


@pytest.mark.parametrize("dated", [False, True])
def test_a_value_in_each_row_is_a_series_of_each_stay_with_labels_of_the_table_beside(
    dated: bool, tmp_path: Path
) -> None:
    found = draft(write_long(tmp_path, dated))
    source = dict(found["sources"]["records"])
    assert (source["kind"], source["record"], source["time"]) == ("steps", "stay_id", "charttime")
    assert (source["name"], source["value"], source["columns"]) == ("itemname", "valuenum", ["heart rate", "pressure"])
    assert (source["records"], source["patient"], source["gaps"]) == ("./stays.csv", "subject_id", "keep")
    assert source["every"] == (3600 if dated else 1.0)
    assert found["run"]["backbone"] == {
        "kind": "time_series",
        "folder": "FILL_IN",
        "num_channels": 2,
        "channels": "apart",
        "projection": {"normalize": True},
    }
    assert found["tasks"]["outcome"]["label"] == "outcome" and found["unit"] == "patient"
    first = load(found, tmp_path)
    assert first.shape == (10, 2) and np.isnan(first[0, 1]) and first[3, 1] == np.float32(0.3)


def test_a_folder_of_both_tables_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "icu").mkdir()
    write_long(tmp_path / "icu")
    found = draft(tmp_path / "icu")
    assert found["sources"]["records"]["path"] == "./icu/events.csv"
    assert found["sources"]["records"]["records"] == "./icu/stays.csv"


def test_columns_of_values_are_channels_and_a_column_that_stays_the_same_is_the_label(tmp_path: Path) -> None:
    rows = ["patient,hour,pulse,pressure,died"]
    rows += [f"p{n},{h},{60 + n + h / 10},{70 - h if h % 2 else ''},{n % 2}" for n in range(20) for h in range(9)]
    path = tmp_path / "vitals.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    model = tmp_path / "bolt"
    model.mkdir()
    assert "folder of a PatchTST" in refuse(path, "--task", "died", "--backbone", model, "--out", tmp_path / "a.yaml")
    (model / "config.json").write_text("{}", encoding="utf-8")
    found = draft(path, "--task", "died", "--backbone", model)
    source = found["sources"]["records"]
    assert (source["record"], source["time"], source["columns"]) == ("patient", "hour", ["pulse", "pressure"])
    assert (source["labels"], source["patient"], "every" in source) == (["died"], "patient", False)
    assert found["run"]["backbone"]["folder"] == "./bolt"
    np.testing.assert_allclose(load(found, tmp_path)[:2], [[60, np.nan], [60.1, 69]], rtol=1e-6)


def test_time_steps_without_anything_to_predict_are_refused(tmp_path: Path) -> None:
    path = write_long(tmp_path)
    (tmp_path / "stays.csv").unlink()
    assert "expected something to predict of each series" in refuse(path, "--out", tmp_path / "a.yaml")


def test_visits_are_no_time_steps(tmp_path: Path) -> None:
    rows = ["patient,date,dose,weight,outcome"]
    rows += [f"p{n},2024-01-{v + 1:02d},{n + v}.5,{60 + v}.25,{'ab'[n % 2]}" for n in range(20) for v in range(4)]
    (tmp_path / "visits.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert draft(tmp_path / "visits.csv")["sources"]["records"]["kind"] == "table"


@pytest.mark.parametrize("gap", [False, True])
def test_counted_columns_are_the_steps_of_a_series_in_each_row(gap: bool, tmp_path: Path) -> None:
    rows = ["patient,rhythm," + ",".join(f"t{step}" for step in range(20))]
    for n in range(40):
        values = [f"{n + step / 7:.3f}" for step in range(20)]
        values[3] = "" if gap and n == 5 else values[3]
        rows.append(f"p{n},{['sinus', 'flutter'][n % 2]}," + ",".join(values))
    path = tmp_path / "beats.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = draft(path)
    source = found["sources"]["records"]
    assert (source["kind"], source["labels"], source["patient"]) == ("series", ["patient", "rhythm"], "patient")
    assert source.get("gaps") == ("keep" if gap else None)
    assert found["run"]["backbone"]["kind"] == ("time_series" if gap else "identity")
    assert len(load(found, tmp_path)) == 20


def test_files_of_series_are_read_from_the_table_that_lists_them(tmp_path: Path) -> None:
    folder = tmp_path / "monitors"
    folder.mkdir()
    for n in range(24):
        (folder / f"m{n}.csv").write_text("pulse,pressure\n60,\n61,70\n", encoding="utf-8")
    assert "expected one table, got 24" in refuse(folder, "--out", tmp_path / "a.yaml")
    listed = [f"m{n}.csv,{['well', 'ill'][n % 2]}" for n in range(24)]
    (folder / "labels.csv").write_text("\n".join(["file,finding", *listed]) + "\n", encoding="utf-8")
    found = draft(folder)
    source = found["sources"]["records"]
    assert (source["kind"], source["series"], source["gaps"]) == ("manifest", "file", "keep")
    assert found["run"]["backbone"]["num_channels"] == 2
    np.testing.assert_array_equal(load(found, tmp_path), [[60, np.nan], [61, 70]])
    (folder / "labels.csv").write_text("\n".join(["file,finding", *listed]).replace("m", "n"), encoding="utf-8")
    assert "none of the first 5 that are listed" in refuse(folder / "labels.csv", "--out", tmp_path / "a.yaml")
    (tmp_path / "arrays" / "ill").mkdir(parents=True)
    np.save(tmp_path / "arrays" / "ill" / "a.npy", np.zeros(9))
    assert "a CSV in it that lists its 1 file(s) of series" in refuse(tmp_path / "arrays", "--out", tmp_path / "a.yaml")


@pytest.mark.parametrize("ending", ["", ".hea"])
def test_a_list_of_wfdb_records_names_their_channels_and_rate(ending: str, tmp_path: Path) -> None:
    wfdb = pytest.importorskip("wfdb")
    for n in range(24):
        leads_TC = np.stack([np.sin(np.arange(100) / (n + 3)), np.cos(np.arange(100) / 9)], axis=1)
        kept = {"units": ["mV"] * 2, "sig_name": ["I", "V5"], "fmt": ["16"] * 2, "write_dir": str(tmp_path)}
        wfdb.wrsamp(f"r{n}", 250, p_signal=leads_TC, **kept)
    rows = [f"r{n}{ending},p{n},{['sinus', 'flutter'][n % 2]}" for n in range(24)]
    (tmp_path / "ecg.csv").write_text("\n".join(["recording,patient,rhythm", *rows]) + "\n", encoding="utf-8")
    found = draft(tmp_path / "ecg.csv")
    source = found["sources"]["records"]
    assert (source["kind"], source["record"], source["patient"]) == ("waveforms", "recording", "patient")
    assert (source["channels"], source["rate_hz"], source["gaps"]) == (["I", "V5"], 250.0, "keep")
    assert found["run"]["backbone"]["num_channels"] == 2
    assert load(found, tmp_path).shape == (100, 2)
    for file in tmp_path.glob("*.hea"):
        file.write_text("broken", encoding="utf-8")
    assert "none of the first 5 that are listed" in refuse(tmp_path / "ecg.csv", "--out", tmp_path / "a.yaml")
