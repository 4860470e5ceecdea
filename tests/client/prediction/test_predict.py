"""A row of the output is what the model says of that record, whatever stands beside it; bad input is one sentence."""

from __future__ import annotations

import csv
import errno
import gc
import json
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from PIL import Image
from pyarrow import parquet
from scipy.io import wavfile
from typer.testing import CliRunner

import headwater
from client.data.sources.dicom import write_dicom
from client.data.sources.nifti import Nifti
from client.data.sources.parts.recordings import example_recordings
from client.prediction.data import choose_tasks, open_records
from client.prediction.output import plan_output
from client.prediction.predict import write_predictions
from common.backbones.series_cnn import SeriesCnn
from common.inputs import Audio, Text
from common.types import BadInput
from headwater.__main__ import make_app
from tests.client.prediction.conftest import FINDING, SIDE, MakeModel, write_pictures
from tests.finished import write_finished

ON_PICTURES = {"finding": {**FINDING, "backbone": "pictures"}}
ON_ROWS = {"finding": {**FINDING, "backbone": "rows"}}
ON_TEXTS = {"finding": {**FINDING, "backbone": "texts"}}


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["predict", *map(str, arguments)])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_pictures_gives_a_row_for_each_that_the_model_gives_alone(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model, pictures = make_model(ON_PICTURES), write_pictures(tmp_path / "scans", 5)
    (tmp_path / "scans" / "broken.png").write_bytes(b"nothing")
    (tmp_path / "scans" / "list.csv").write_text("a,b\n")
    result = predict(model, "--data", tmp_path / "scans", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    rows, loaded = read(tmp_path / "p.csv"), headwater.load(model)
    assert [row["file"] for row in rows] == [path.name for path in pictures]
    for row, path in zip(rows, pictures, strict=True):
        (alone,) = loaded([Image.open(path)])["finding"].tolist()
        assert [float(row[f"finding.{label}"]) for label in ("normal", "ill")] == pytest.approx(alone, abs=1e-6)
        assert row["finding"] == ("normal", "ill")[int(np.argmax(alone))]
    assert read(tmp_path / "p.rejected.csv") == [
        {"file": "broken.png", "row": "1", "task": "", "reason": "unreadable image"}
    ]
    assert "p.rejected.csv: 1 record(s) that could not be used" in result.stdout
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in ("p.csv", "p.rejected.csv"))


def test_a_table_may_list_series_as_text_and_one_with_a_gap_costs_itself(tmp_path: Path) -> None:
    example = SeriesCnn.example(tmp_path)
    model = write_finished(tmp_path / "model", example.settings)
    values = np.sin(np.arange(40) / 3).astype(np.float32)[:, None]
    np.savetxt(tmp_path / "a.csv", values, fmt="%.9g")
    (tmp_path / "b.csv").write_text("0.5\nNaN\n2\n", encoding="utf-8")
    (tmp_path / "list.csv").write_text("path\na.csv\nb.csv\n", encoding="utf-8")
    result = predict(model, "--data", tmp_path / "list.csv", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    (row,), ((alone),) = read(tmp_path / "p.csv"), headwater.load(model)([values])["finding"].tolist()
    assert [float(row[f"finding.{label}"]) for label in ("none", "glioma", "meningioma")] == pytest.approx(
        alone, abs=1e-6
    )
    assert "gaps" in read(tmp_path / "p.rejected.csv")[0]["reason"]


def test_a_records_row_does_not_depend_on_the_others(make_model: MakeModel, tmp_path: Path) -> None:
    model, pictures = make_model(ON_PICTURES), write_pictures(tmp_path / "scans", 9)
    loaded = headwater.load(model)
    together = loaded.predict(tmp_path / "scans")
    for number in (0, 4, 8):
        alone = loaded.predict([pictures[number]])
        assert alone.iloc[0, 2:].tolist() == together.iloc[number, 2:].tolist(), "to the bit"


def test_all_formats_hold_the_same(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_PICTURES)
    write_pictures(tmp_path / "scans", 3)
    for name in ("p.csv", "p.jsonl", "p.parquet"):
        assert predict(model, "--data", tmp_path / "scans", "--out", tmp_path / name).exit_code == 0
    rows = read(tmp_path / "p.csv")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert len(rows) == 3
    for row, line, entry in zip(rows, lines, table, strict=True):
        assert list(row) == list(line) == list(entry)
        for name, text in row.items():
            values = [text, line[name], entry[name]]
            assert values == [text] * 3 or np.allclose(np.array(values, dtype=float), float(text), atol=1e-6)


def test_an_earlier_output_is_kept_unless_force_says_otherwise(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_PICTURES)
    write_pictures(tmp_path / "scans", 2)
    out = tmp_path / "p.csv"
    out.write_text("kept")
    assert predict(model, "--data", tmp_path / "scans", "--out", out).exit_code == 2
    assert out.read_text() == "kept"
    (tmp_path / "p.rejected.csv").write_text("of an earlier prediction")
    assert predict(model, "--data", tmp_path / "scans", "--out", out, "--force").exit_code == 0
    assert len(read(out)) == 2 and not (tmp_path / "p.rejected.csv").exists()


def test_a_try_that_could_use_no_record_is_not_in_the_way_of_the_next(make_model: MakeModel, tmp_path: Path) -> None:
    model, listed = make_model(ON_PICTURES), tmp_path / "p.rejected.csv"
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "broken.png").write_bytes(b"nothing")
    asked = ("--data", tmp_path / "scans", "--out", tmp_path / "p.csv")
    for _ in range(2):
        result = predict(model, *asked)
        assert result.exit_code == 2 and "p.rejected.csv lists them" in result.stderr
        assert [row["file"] for row in read(listed)] == ["broken.png"]
    write_pictures(tmp_path / "scans", 1)
    (tmp_path / "p.jsonl").write_text("predictions that the list is of")
    assert predict(model, *asked).exit_code == 2
    (tmp_path / "p.jsonl").unlink()
    assert predict(model, *asked).exit_code == 0
    (tmp_path / "p.csv").unlink()
    listed.write_text("a file of one's own")
    result = predict(model, *asked)
    assert result.exit_code == 2 and "p.rejected.csv already; --force replaces it" in " ".join(result.stderr.split())
    assert listed.read_text() == "a file of one's own"


def test_a_prediction_that_fails_on_the_way_leaves_no_half_output(make_model: MakeModel, tmp_path: Path) -> None:
    loaded = headwater.load(make_model(ON_PICTURES)).model
    write_pictures(tmp_path / "scans", 2)
    records = open_records(loaded, tmp_path / "scans", tasks=choose_tasks(loaded, ()))
    before = sorted(tmp_path.iterdir())

    def fail(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(loaded, records, plan_output(tmp_path / "p.csv", force=False), observe=fail)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_read_by_the_models_own_columns(make_model: MakeModel, tmp_path: Path, separator: str) -> None:
    model = make_model(ON_ROWS)
    lines = [["name", "sex", "age"], ["ann", "f", "41"], ["bob", "m", "old"], ["cem", "m", "63"]]
    table = tmp_path / "rows.csv"
    table.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    result = predict(model, "--data", table, "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    assert [row["row"] for row in read(tmp_path / "p.csv")] == ["1", "3"]
    (rejected,) = read(tmp_path / "p.rejected.csv")
    assert rejected["row"] == "2" and rejected["reason"].startswith(
        "column 'age': expected a number with a decimal point"
    )
    shown = result.output.replace(str(tmp_path), "")
    written = (tmp_path / "p.csv").read_text() + (tmp_path / "p.rejected.csv").read_text() + shown
    assert not any(word in written for word in ("ann", "bob", "old", "41"))


def test_a_table_with_decimal_commas_is_read_as_the_one_with_points(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_ROWS)
    (tmp_path / "points.csv").write_text("sex,age\nf,41.5\nm,63.25\n")
    (tmp_path / "commas.csv").write_bytes("sex;age;stadt\nf;41,5;K\u00f6ln\nm;63,25;Bonn\n".encode("latin-1"))
    (tmp_path / "quoted.csv").write_text('sex,age\nf,"41,5"\nm,"63,25"\n')
    for name in ("points", "commas", "quoted"):
        result = predict(model, "--data", tmp_path / f"{name}.csv", "--out", tmp_path / f"{name}.out.csv")
        assert result.exit_code == 0, result.output
    points, *others = (read(tmp_path / f"{name}.out.csv") for name in ("points", "commas", "quoted"))
    for found in others:
        assert [{**row, "file": ""} for row in points] == [{**row, "file": ""} for row in found] and len(found) == 2


def test_numbers_beyond_the_models_range_are_counted_on_the_screen(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_ROWS)
    (tmp_path / "rows.csv").write_text("sex,age\nf,41000\nm,63\nf,99000\nm,\n")
    result = predict(model, "--data", tmp_path / "rows.csv", "--out", tmp_path / "p.csv")
    assert "column age: 2 of 4 numbers lie beyond the model's range, and are clipped" in result.stderr
    assert "41000" not in result.output
    (tmp_path / "rows.csv").write_text("sex,age\nf,41\n")
    assert "beyond" not in predict(model, "--data", tmp_path / "rows.csv", "--out", tmp_path / "q.csv").stderr


def test_a_table_in_memory_keeps_its_index(make_model: MakeModel) -> None:
    loaded = headwater.load(make_model(ON_ROWS))
    frame = pd.DataFrame({"sex": ["f", "m", "x"], "age": [41.0, 63.5, 5.0]}, index=["a", "b", "c"])
    with pytest.warns(UserWarning, match="1 record"):
        found = loaded.predict(frame)
    assert list(found.index) == ["a", "b"]
    assert found.attrs["rejected"] == [
        {"file": "table", "row": 3, "task": "", "reason": "column 'sex': expected one of the declared levels"}
    ]
    items = [{"sex": "f", "age": "41"}, {"sex": "m", "age": "63.5"}]
    assert np.allclose(found[["finding.normal", "finding.ill"]], loaded(items)["finding"].numpy(), atol=1e-6)


def test_texts_are_read_from_a_column_and_from_files(make_model: MakeModel, tmp_path: Path) -> None:
    loaded = headwater.load(make_model(ON_TEXTS))
    texts = ["the scan shows no tumour .", "an edema .", "the scan shows an edema ."]
    expected = loaded([Text(text) for text in texts])["finding"].numpy()
    pd.DataFrame({"who": ["a", "b", "c"], "report": texts}).to_csv(tmp_path / "t.csv")
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    for found in (loaded.predict(tmp_path / "t.csv", columns=["report"]), loaded.predict(str(tmp_path / "notes"))):
        assert np.allclose(found[["finding.normal", "finding.ill"]], expected, atol=1e-6)
    with pytest.raises(BadInput, match="column of texts called text, sentence, note, or one named with --column"):
        loaded.predict(tmp_path / "t.csv")
    pairs = loaded.predict(tmp_path / "t.csv", columns=["report", "report"])
    both = loaded([Text(text, text) for text in texts])["finding"].numpy()
    assert np.allclose(pairs[["finding.normal", "finding.ill"]], both, atol=1e-6)


def test_a_table_lists_files_beside_it_and_no_others(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_PICTURES)
    write_pictures(tmp_path / "scans", 2)
    table = tmp_path / "scans" / "list.csv"
    table.write_text("path,who\nscan001.png,ann\n../weights/config.json,bob\nscan000.png,cem\n")
    loaded = headwater.load(model)
    with pytest.warns(UserWarning, match="1 record"):
        found = loaded.predict(table)
    assert found["file"].tolist() == ["scan001.png", "scan000.png"] and found["row"].tolist() == [1, 3]
    assert (
        found.attrs["rejected"][0]["reason"] == "file path is empty or leaves the folder (`root`, or the table's own)"
    )


def test_recordings_are_read_from_a_folder_and_from_a_zip(make_model: MakeModel, tmp_path: Path) -> None:
    loaded = headwater.load(make_model({"finding": {**FINDING, "backbone": "sounds"}}))
    (tmp_path / "clips" / "ward").mkdir(parents=True)
    tones = [tone.astype(np.float32) / 32768 for tone in example_recordings(3)]
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for number, tone in enumerate(tones):
            path = tmp_path / "clips" / "ward" / f"{number}.wav"
            wavfile.write(path, 8000, (tone * 32768).astype(np.int16))
            archive.write(path, f"ward/{number}.wav")
    expected = loaded([Audio(tone, 8000) for tone in tones])["finding"].numpy()
    for data in (tmp_path / "clips", tmp_path / "clips.zip"):
        found = loaded.predict(data)
        assert found["file"].tolist() == ["ward/0.wav", "ward/1.wav", "ward/2.wav"]
        assert np.allclose(found[["finding.normal", "finding.ill"]], expected, atol=1e-6)


def test_scans_are_read_from_a_folder(make_model: MakeModel, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    loaded = headwater.load(make_model(ON_PICTURES))
    rng = np.random.default_rng(0)
    for folder in ("dicom", "nifti"):
        (tmp_path / folder).mkdir()
    pictures = rng.integers(0, 256, (2, SIDE, SIDE), dtype=np.uint16)
    tags = {"WindowCenter": 128, "WindowWidth": 256, "PatientID": "q7-ann"}
    write_dicom(tmp_path / "dicom" / "0.dcm", pictures[0], **tags)
    write_dicom(tmp_path / "dicom" / "1", pictures[1], **tags)
    write_dicom(tmp_path / "dicom" / "2.dcm", pictures[1])
    (tmp_path / "dicom" / "README").write_text("no suffix, no DICOM file")
    with pytest.warns(UserWarning, match="1 record"):
        found = loaded.predict(tmp_path / "dicom")
    assert found["file"].tolist() == ["0.dcm", "1"] and "q7-ann" not in str(found)
    assert "without a window of its own" in found.attrs["rejected"][0]["reason"]
    expected = loaded(list(pictures.astype(np.uint8)))["finding"].numpy()
    assert np.allclose(found[["finding.normal", "finding.ill"]], expected, atol=1e-6)
    volume = nibabel.Nifti1Image(rng.normal(size=(SIDE, SIDE, 3)).astype(np.float32), np.eye(4))
    nibabel.save(volume, tmp_path / "nifti" / "a.nii.gz")
    slices = Nifti(kind="nifti", path=tmp_path / "nifti").read(tmp_path / "nifti" / "a.nii.gz")
    expected = loaded([slices])["finding"].numpy()
    found = loaded.predict(tmp_path / "nifti" / "a.nii.gz")
    assert np.allclose(found[["finding.normal", "finding.ill"]], expected, atol=1e-6)


def test_arrays_are_read_from_the_one_that_holds_records(make_model: MakeModel, tmp_path: Path) -> None:
    loaded = headwater.load(make_model(ON_PICTURES))
    pictures = np.stack([np.asarray(Image.open(path)) for path in write_pictures(tmp_path / "scans", 3)])
    expected = loaded.predict(tmp_path / "scans").iloc[:, 2:]
    np.savez(tmp_path / "named.npz", images=pictures, labels=np.zeros(3))
    np.savez(tmp_path / "other.npz", scans=pictures, labels=np.zeros(3))
    assert loaded.predict(tmp_path / "named.npz").iloc[:, 2:].equals(expected)
    assert loaded.predict(tmp_path / "other.npz", columns=["scans"]).iloc[:, 2:].equals(expected)
    with pytest.raises(BadInput, match="or one named with --column, among its 2 array"):
        loaded.predict(tmp_path / "other.npz")


def test_the_settings_of_a_source_say_how_it_is_read(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_ROWS)
    (tmp_path / "rows.txt").write_text("f 41 ann\nm 63 bob\nm 70 ann\n")
    (tmp_path / "use.csv").write_text("row,split\n3,\n1,\n9,\n")
    settings = {
        "kind": "table",
        "path": "rows.txt",
        "separator": "whitespace",
        "header": ["sex", "age", "patient"],
        "columns": ["age", "sex"],
        "patient": "patient",
    }
    (tmp_path / "source.yaml").write_text(json.dumps({**settings, "rows": "use.csv"}))
    result = predict(model, "--data", tmp_path / "source.yaml", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    assert [(row["row"], row["patient"]) for row in read(tmp_path / "p.csv")] == [("1", "ann"), ("3", "ann")]
    assert [(row["file"], row["row"]) for row in read(tmp_path / "p.rejected.csv")] == [("use.csv", "3")]
    several = {"sources": {"clinic": settings, "ward": settings}}
    (tmp_path / "several.yaml").write_text(json.dumps(several))
    assert "expected one of clinic, ward" in predict(model, "--data", tmp_path / "several.yaml").stderr
    assert "got 'attic'" in predict(model, "--data", tmp_path / "several.yaml", "--source", "attic").stderr
    chosen = ("--data", tmp_path / "several.yaml", "--source", "ward", "--out", tmp_path / "w.csv")
    assert predict(model, *chosen).exit_code == 0
    (tmp_path / "several.yaml").write_text(json.dumps({**several, "tasks": {"finding": {"source": "clinic"}}}))
    assert predict(model, "--data", tmp_path / "several.yaml", "--out", tmp_path / "c.csv").exit_code == 0
    assert read(tmp_path / "c.csv") == read(tmp_path / "w.csv")
    (tmp_path / "site.yaml").write_text(json.dumps({**several, "registry": "r", "state_dir": "s"}))
    assert "got a site file; --site" in predict(model, "--data", tmp_path / "site.yaml").stderr


def test_tasks_on_several_backbones_are_told_of_the_records_that_these_take(
    make_model: MakeModel, tmp_path: Path
) -> None:
    tasks = {
        "finding": {**FINDING, "backbone": "pictures"},
        "signs": {"kind": "multilabel", "labels": ["edema", "tumour"], "none": "none", "backbone": "pictures"},
        "report": {**FINDING, "backbone": "texts"},
    }
    model = make_model(tasks)
    write_pictures(tmp_path / "scans", 3)
    result = predict(model, "--data", tmp_path / "scans", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0, result.output
    assert "task report: left out, its backbone takes other records" in result.stderr
    for row in read(tmp_path / "p.csv"):
        present = [name for name in ("edema", "tumour") if float(row[f"signs.{name}"]) > 0.5]
        assert row["signs"] == ("|".join(present) or "none")


def test_a_record_that_one_backbone_cannot_use_keeps_what_another_says_in_every_block(
    make_model: MakeModel, tmp_path: Path
) -> None:
    loaded = headwater.load(make_model({"a": {**FINDING, "backbone": "rows"}, "b": {**FINDING, "backbone": "ages"}}))
    # More rows than are encoded by one backbone after the other.
    rows = pd.DataFrame({"age": [str(at % 100) for at in range(5000)], "sex": ["f"] * 5000})
    rows.loc[[10, 4500], "sex"] = "?"
    rows.to_csv(tmp_path / "rows.csv", index=False)
    settings = {"kind": "table", "path": str(tmp_path / "rows.csv"), "columns": ["age", "sex"]}
    (tmp_path / "source.yaml").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="2 record"):
        found = loaded.predict(tmp_path / "source.yaml")
    assert len(found) == 5000 and found["b"].notna().all()
    assert found["row"][found["a"].isna()].tolist() == [11, 4501]
    with pytest.warns(UserWarning, match="2 record"):
        alone = loaded.predict(tmp_path / "source.yaml", tasks=["a"])
    assert found["a.ill"].dropna().tolist() == alone["a.ill"].tolist()


def test_what_is_said_of_probabilities_is_calibrated(make_model: MakeModel, tmp_path: Path) -> None:
    write_pictures(tmp_path / "scans", 4)
    plain = headwater.load(make_model(ON_PICTURES)).predict(tmp_path / "scans")["finding.ill"].astype(float)
    divided = headwater.load(make_model(ON_PICTURES, temperature=3.0)).predict(tmp_path / "scans")
    logits = np.log(plain / (1 - plain)) / 3.0
    assert np.allclose(divided["finding.ill"].astype(float), 1 / (1 + np.exp(-logits)), atol=1e-4)


def make_wrong(folder: Path, model: Path, what: str) -> list[object]:
    data: Any = folder / "scans"
    if what == "empty":
        data = folder / "nothing"
        data.mkdir()
    elif what == "other files":
        data = folder / "other"
        data.mkdir()
        (data / "a.docx").write_bytes(b"x")
    elif what == "missing":
        data = folder / "gone"
    elif what == "texts":
        data = folder / "texts"
        data.mkdir()
        for name in ("b.txt", "c.txt"):
            (data / name).write_text("q7-ann")
        (data / "a.txt").write_bytes(b"\xff")
    elif what == "columns":
        data = folder / "rows.csv"
        data.write_text("q7-ann,q7-bob\n1,2\n")
    elif what == "changed":
        path = model / "heads" / "finding.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    elif what == "no backbone":
        (model / "backbones" / "pictures.safetensors").unlink()
    elif what == "half written":
        (model / "config.json").unlink()
        (model / "journal.jsonl").write_text("")
    elif what == "suffix":
        return [model, "--data", data, "--out", folder / "p.xlsx"]
    elif what == "no folder":
        return [model, "--data", data, "--out", folder / "away" / "p.csv"]
    elif what == "task":
        return [model, "--data", data, "--out", folder / "p.csv", "--task", "findin"]
    elif what == "column":
        return [model, "--data", data, "--source", "a", "--out", folder / "p.csv"]
    elif what == "no data":
        return [model, "--out", folder / "p.csv"]
    return [model, "--data", data, "--out", folder / "p.csv"]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("empty", "expected files that a model can read"),
        ("other files", "expected files that a model can read"),
        ("missing", "expected a file or folder of records, found nothing there"),
        ("texts", "of which it can use none, most because: expected"),
        ("columns", "expected a column of paths of files called path, file"),
        ("changed", "the file was changed since the model was written"),
        ("no backbone", "expected the weights of backbone pictures, found no file"),
        ("half written", "it failed, or has not ended yet"),
        ("suffix", "expected a name that ends in .csv, .jsonl, .ndjson, .parquet, got '.xlsx'"),
        ("no folder", "expected a folder at"),
        ("task", "task: expected one of finding, got 'findin'"),
        ("column", "--source: expected it beside a file that names sources"),
        ("no data", "--data"),
    ],
)
def test_bad_input_is_one_sentence(make_model: MakeModel, tmp_path: Path, what: str, sentence: str) -> None:
    model = make_model(ON_PICTURES)
    write_pictures(tmp_path / "scans", 2)
    result = predict(*make_wrong(tmp_path, model, what))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert sentence in line and "Traceback" not in result.output and "q7-" not in result.output
    assert not (tmp_path / "p.csv").exists()


def test_the_columns_that_a_table_lacks_are_named_as_the_model_names_them(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(ON_ROWS)
    (tmp_path / "rows.csv").write_text("q7-age,sex\n1,f\n")
    result = predict(model, "--data", tmp_path / "rows.csv", "--out", tmp_path / "p.csv")
    assert result.exit_code == 2 and "q7-" not in result.output
    assert "expected the model's 2 feature columns, found no column age" in result.stderr


def test_what_a_stranger_named_is_shown_and_not_obeyed(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(ON_PICTURES)
    (tmp_path / "labelled").mkdir()
    write_pictures(tmp_path / "labelled" / "ill", 2)
    settings = {"sources": {"[/b]": {"kind": "image_folder", "path": str(tmp_path / "labelled")}}}
    (tmp_path / "data.yaml").write_text(json.dumps(settings))
    result = predict(model, "--data", tmp_path / "data.yaml", "--out", tmp_path / "p.csv")
    assert result.exit_code == 0 and "predicting [/b]: 2 of 2" in result.stderr, result.output
    result = predict("\x1b[2Jmodel", "--data", tmp_path, "--out", tmp_path / "q.csv")
    assert result.exit_code == 2 and "?[2Jmodel: expected" in result.stderr


def test_no_cell_of_a_csv_file_is_a_formula_and_no_number_is_changed(make_model: MakeModel, tmp_path: Path) -> None:
    labels = ['=HYPERLINK("http://x")', "@SUM(1)"]
    model = make_model({"finding": {**FINDING, "labels": labels, "backbone": "pictures"}})
    write_pictures(tmp_path / "scans", 2)
    (tmp_path / "scans" / "scan000.png").rename(tmp_path / "scans" / "=1+1.png")
    (tmp_path / "scans" / "-1+cmd.png").write_bytes(b"nothing")
    for name in ("p.csv", "p.jsonl"):
        assert predict(model, "--data", tmp_path / "scans", "--out", tmp_path / name, "--force").exit_code == 0
    texts = [*read(tmp_path / "p.csv"), *read(tmp_path / "p.rejected.csv")]
    cells = [cell for row in texts for pair in row.items() for cell in pair]
    assert "'=1+1.png" in cells and "'-1+cmd.png" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    (line, _) = (tmp_path / "p.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "=1+1.png"


def test_a_negative_number_is_no_formula(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model({"age": {"kind": "regression", "range": [-90, -10], "backbone": "pictures"}})
    write_pictures(tmp_path / "scans", 2)
    assert predict(model, "--data", tmp_path / "scans", "--out", tmp_path / "p.csv").exit_code == 0
    assert all(float(row["age"]) < 0 for row in read(tmp_path / "p.csv"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_task_called_like_a_column_hides_no_record_s_file(make_model: MakeModel, tmp_path: Path, suffix: str) -> None:
    model = make_model({"file": {**FINDING, "backbone": "pictures"}})
    write_pictures(tmp_path / "scans", 1)
    out = tmp_path / f"p{suffix}"
    assert predict(model, "--data", tmp_path / "scans", "--out", out).exit_code == 0
    match suffix:
        case ".csv":
            (row,) = read(out)
        case ".jsonl":
            row = json.loads(out.read_text())
        case _:
            (row,) = parquet.read_table(out).to_pylist()
    assert row["file"] == "scan000.png" and row["task.file"] in ("normal", "ill")


def test_a_parquet_file_that_fails_on_the_way_says_so_once(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, unraisable = headwater.load(make_model(ON_PICTURES)).model, list[Any]()
    write_pictures(tmp_path / "scans", 2)
    records = open_records(loaded, tmp_path / "scans", tasks=choose_tasks(loaded, ()))
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    def fail(what: str, done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with suppress(OSError):
        write_predictions(loaded, records, plan_output(tmp_path / "p.parquet", force=False), observe=fail)
    gc.collect()
    assert not unraisable and not list(tmp_path.glob("*p.parquet*"))
