"""First contact with a user's data: what is found in it, the file that is written, and what is refused."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from client.data.sources import open_source
from client.inspect.finding import describe_column
from client.inspect.folders import inspect
from client.inspect.form import sniff
from client.inspect.tables import inspect_table
from common.inputs import Several, Text
from common.types import BadInput
from common.yaml import load
from headwater.__main__ import make_app
from simulations.check import check_simulation, list_missing_files
from simulations.config import SimulationConfig


def run(*arguments: object) -> str:
    result = CliRunner().invoke(make_app(), ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(*arguments: object) -> str:
    result = CliRunner().invoke(make_app(), ["inspect", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def check(path: Path) -> SimulationConfig:
    config = load(SimulationConfig, path)
    check_simulation(config)
    assert list_missing_files(config) == []
    return config


def write_rows(path: Path, separator: str = ",", comma: bool = False, encoding: str = "utf-8") -> Path:
    """Writes 60 visits of 30 patients: two numbers, a category, a note with a quoted end of line, a finding."""
    rng = random.Random(1)
    lines = [separator.join(["patient", "größe", "dose", "sex", "note", "finding"])]
    for number in range(60):
        numbers = [f"{rng.uniform(1, 2):.3f}", "" if number == 7 else f"{rng.uniform(10, 99):.2f}"]
        numbers = [text.replace(".", ",") for text in numbers] if comma else numbers
        note = f'"a note of several words {number};\nand ""more"", of it"'
        cells = [f"p{number // 2}", *numbers, "fm"[number % 2], note, ["gut", "böse"][number % 3 // 2]]
        lines.append(separator.join(cells))
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode(encoding))
    return path


def fill_in(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace("FILL_IN,FILL_IN", "0,100"), encoding="utf-8")


@pytest.mark.parametrize(
    ("separator", "comma", "encoding", "sniffed"),
    [
        (",", False, "utf-8", "utf-8"),
        (";", True, "latin-1", "latin-1"),
        (";", True, "utf-8-sig", "utf-8"),
        ("\t", True, "utf-8", "utf-8"),
        ("|", False, "utf-8", "utf-8"),
    ],
)
def test_a_table_in_any_dialect_becomes_a_simulation_that_reads_it(
    tmp_path: Path, separator: str, comma: bool, encoding: str, sniffed: str
) -> None:
    path = write_rows(tmp_path / "visits.csv", separator, comma, encoding)
    form = sniff(path)
    assert (form.separator, form.is_comma, form.encoding, form.names) == (separator, comma, sniffed, None)
    out = tmp_path / "visits.yaml"
    assert run(path, "--out", out).splitlines()[-1] == f"next: headwater simulate check {out}"
    with pytest.raises(BadInput, match="in every cell, got FILL_IN in column 'größe' .lowest"):
        check(out)
    fill_in(tmp_path / "visits.ranges.csv")
    config = check(out)
    (columns,) = [spec.settings()["columns"] for spec in config.run.backbone_specs.values()]
    assert [column["name"] for column in columns] == ["größe", "dose", "sex"]
    assert columns[2]["levels"] == ["f", "m"]
    assert config.unit == "patient" and config.run.tasks["finding"].settings()["labels"] == ["böse", "gut"]
    from client.data.sources import open_source

    source = open_source(config.sources["records"], "sources.records").open()
    index = source.index()
    assert len(index) == 60 and {record.fault for record in index} == {""}
    assert len({record.patient for record in index}) == 30
    assert all(1 <= float(source.load(position)["größe"]) <= 2 for position in range(60))


def test_no_number_of_a_record_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [f"{number + 31337},{number % 2}" for number in range(60)]
    path.write_text("\n".join(["dose,outcome", *rows]), encoding="utf-8")
    shown = run(path, "--out", tmp_path / "a.yaml")
    assert "31337 to 31396" in shown
    written = "".join(file.read_text() for file in (tmp_path / "a.yaml", tmp_path / "a.ranges.csv"))
    assert "313" not in written and "dose,FILL_IN,FILL_IN,,middle," in written


def test_a_title_above_the_column_names_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Export of May\nage,finding\n" + "44,no\n50,yes\n" * 5, encoding="utf-8")
    form = sniff(path)
    assert (form.skip_lines, form.names) == (1, None)
    assert [column.name for column in inspect_table(path, None).columns] == ["age", "finding"]


def test_many_numbers_are_a_regression_whose_range_is_to_be_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["dose,weight", *(f"{n / 7:.3f},{n * n}" for n in range(60))]), encoding="utf-8")
    out = tmp_path / "a.yaml"
    assert "fill in: run.tasks.weight.range in a.yaml" in run(path, "--task", "weight", "--out", out)
    fill_in(tmp_path / "a.ranges.csv")
    with pytest.raises(BadInput, match="FILL_IN"):
        check(out)
    out.write_text(out.read_text().replace("[FILL_IN, FILL_IN]", "[0, 4000]"))
    assert "non_private" in check(out).baselines


def test_cells_with_bars_are_several_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cells = ["oedema|effusion", "effusion", "mass|oedema", "mass"]
    path.write_text("\n".join(["dose,findings", *(f"{n}.5,{cells[n % 4]}" for n in range(60))]), encoding="utf-8")
    run(path, "--out", tmp_path / "a.yaml")
    fill_in(tmp_path / "a.ranges.csv")
    task = check(tmp_path / "a.yaml").run.tasks["findings"]
    assert task.kind == "multilabel" and task.settings()["labels"] == ["effusion", "mass", "oedema"]


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(path)


def test_a_folder_for_each_class_needs_nothing_filled_in(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / "scans" / ["absent", "present"][number % 2] / f"{number}.png")
    out = tmp_path / "scans.yaml"
    assert "fill in" not in run(tmp_path / "scans", "--out", out)
    config = check(out)
    assert config.sources["records"].kind == "image_folder" and config.partition.split == "hash"


def test_sides_above_the_classes_are_the_split(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / "scans" / ["train", "test"][number % 3 // 2] / ["a", "b"][number % 2] / f"{number}.png")
    run(tmp_path / "scans", "--out", tmp_path / "scans.yaml")
    config = check(tmp_path / "scans.yaml")
    assert config.sources["records"].settings()["splits"] is True and config.partition.split == "source"


def test_pictures_beside_a_list_are_read_by_it(tmp_path: Path) -> None:
    lines = ["file,patient,finding"]
    for number in range(12):
        draw(tmp_path / "scans" / "files" / f"{number}.png")
        lines.append(f"files/{number}.png,p{number // 2},{'ab'[number % 2]}")
    (tmp_path / "scans" / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    run(tmp_path / "scans", "--out", tmp_path / "scans.yaml")
    config = check(tmp_path / "scans.yaml")
    settings = config.sources["records"].settings()
    assert (settings["kind"], settings["image"], settings["patient"]) == ("manifest", "file", "patient")


def test_dicom_files_say_their_patients_and_windows(tmp_path: Path) -> None:
    from client.data.sources.dicom import write_dicom

    lines = ["file,finding"]
    for number in range(12):
        pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
        write_dicom(tmp_path / f"{number}.dcm", pixels, PatientID=f"p{number // 2}")
        lines.append(f"{number}.dcm,{'ab'[number % 2]}")
    assert "expected a CSV beside the 12 DICOM files" in refuse(tmp_path, "--out", tmp_path / "a.yaml")
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    run(tmp_path, "--out", tmp_path / "a.yaml")
    config = check(tmp_path / "a.yaml")
    settings = config.sources["records"].settings()
    assert (settings["window"], settings["patient_from_tag"], config.unit) == ("full", True, "patient")


@pytest.mark.parametrize("names", ["scan{:02}", "{}"])
def test_a_list_of_folders_names_a_series_in_each(tmp_path: Path, names: str) -> None:
    from client.data.sources.dicom import write_dicom

    lines = ["folder,finding"]
    for number in range(12):
        series = tmp_path / names.format(number)
        series.mkdir()
        (series / "report.txt").write_text("no picture", encoding="utf-8")
        for slice_number in range(2):
            pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
            write_dicom(series / f"IM{slice_number}", pixels, PatientID=f"p{number // 2}")
        lines.append(f"{series.name},{'ab'[number % 2]}")
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    run(tmp_path, "--out", tmp_path / "a.yaml")
    config = check(tmp_path / "a.yaml")
    settings = config.sources["records"].settings()
    assert (settings["kind"], settings["file"], config.unit) == ("dicom", "folder", "patient")
    opened = open_source({**settings, "path": str(tmp_path / "list.csv")}, "sources.records").open()
    record = opened.load(3)
    assert isinstance(record, Several) and (len(record.items), record.passed_over) == (2, 1)


def test_a_list_of_folders_of_tiles_becomes_bags(tmp_path: Path) -> None:
    lines = ["slide,hospital,grade"]
    for number in range(12):
        slide = tmp_path / f"slide{number:02}"
        slide.mkdir()
        for tile in range(2):
            Image.new("RGB", (8, 8)).save(slide / f"{tile}.png")
        lines.append(f"{slide.name},{'xyz'[number % 3]},{'ab'[number % 2]}")
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    run(tmp_path, "--out", tmp_path / "a.yaml", "--task", "grade")
    config = check(tmp_path / "a.yaml")
    settings = config.sources["records"].settings()
    assert (settings["kind"], settings["file"]) == ("slides", "slide")
    draft = yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8"))["run"]
    assert (draft["backbone"]["kind"], draft["backbone"]["encoder"]["kind"]) == ("bag", "torchvision")
    assert draft["tasks"]["grade"]["head"] == {"pooling": "attention"}


def test_folders_without_a_dicom_file_are_no_scans(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"scan{number}").mkdir()
        (tmp_path / f"scan{number}" / "report.txt").write_text("no picture", encoding="utf-8")
    lines = ["folder,finding", *(f"scan{number},{'ab'[number % 2]}" for number in range(12))]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    assert "columns beside the label" in refuse(tmp_path / "list.csv", "--out", tmp_path / "a.yaml")


def test_a_sheet_with_a_title_and_decimal_commas_is_read_as_a_text_file_is(tmp_path: Path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "2025"
    for row in [["Results of the year"], [], ["patient", "dose", "age", "finding"]]:
        sheet.append(row)
    for number in range(60):
        sheet.append([f"{number // 2:04}", f"{10 + number},5", 40 + number, "ab"[number % 2]])
    book.create_sheet("notes")["A1"] = "see above"
    book.save(tmp_path / "a.xlsx")
    assert "--sheet" in refuse(tmp_path / "a.xlsx", "--out", tmp_path / "a.yaml")
    shown = run(tmp_path / "a.xlsx", "--sheet", "2025", "--out", tmp_path / "a.yaml")
    assert "decimal comma" in shown and "10.5 to 69.5" in shown
    settings = yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8"))["sources"]["records"]
    assert (settings["sheet"], settings["skip_lines"], settings["decimal"]) == ("2025", 1, ",")
    opened = open_source({**settings, "path": str(tmp_path / "a.xlsx")}, "sources.records").open()
    assert opened.load(0) == {"dose": "10.5", "age": "40"}
    assert opened.index()[0].cells["finding"] == "a"
    again = run(tmp_path / "a.xlsx", "--sheet", "1", "--out", tmp_path / "b.yaml")
    assert " ".join(again.split()).count("decimal comma") == 1  # A long path breaks the line elsewhere.
    (tmp_path / "a.csv").write_text("x,y\n1,a\n2,b\n", encoding="utf-8")
    assert "expected a spreadsheet" in refuse(tmp_path / "a.csv", "--sheet", "1", "--out", tmp_path / "c.yaml")


def test_a_published_folder_or_onnx_file_is_named_by_its_own_kind(tmp_path: Path) -> None:
    for number in range(12):
        draw(tmp_path / "scans" / "ab"[number % 2] / f"{number}.png")
    published = {"timm": '{"architecture": "resnet10t"}', "transformers": '{"model_type": "vit"}'}
    for kind, content in published.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(content, encoding="utf-8")
        run(tmp_path / "scans", "--backbone", tmp_path / kind, "--out", tmp_path / f"{kind}.yaml")
        backbone = yaml.safe_load((tmp_path / f"{kind}.yaml").read_text(encoding="utf-8"))["run"]["backbone"]
        assert (backbone["kind"], backbone["folder"]) == (kind, f"./{kind}")
    for name, kind in {"net.onnx": "onnx", "net.pt2": "torch_export"}.items():
        (tmp_path / name).write_bytes(b"")
        run(tmp_path / "scans", "--backbone", tmp_path / name, "--out", tmp_path / f"{kind}.yaml")
        backbone = yaml.safe_load((tmp_path / f"{kind}.yaml").read_text(encoding="utf-8"))["run"]["backbone"]
        assert (backbone["kind"], backbone["weights"], list(backbone["reads"])) == (kind, f"./{name}", ["pictures"])
    (tmp_path / "net.py").write_text("", encoding="utf-8")
    assert ".safetensors" in refuse(tmp_path / "scans", "--backbone", tmp_path / "net.py", "--out", tmp_path / "o.yaml")
    (tmp_path / "other").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"model_type": "patchtst"}', encoding="utf-8")
    told = refuse(tmp_path / "scans", "--backbone", tmp_path / "timm", "--out", tmp_path / "o.yaml")
    assert "got one of time series" in told
    assert "config.json" in refuse(tmp_path / "scans", "--backbone", tmp_path / "other", "--out", tmp_path / "o.yaml")


def test_names_of_recordings_are_read_as_columns(tmp_path: Path) -> None:
    from scipy.io import wavfile

    folder = tmp_path / "words"
    folder.mkdir()
    for number in range(12):
        wavfile.write(folder / f"{number % 3}_{'ab'[number % 2]}_{number}.wav", 8000, np.zeros(800, dtype=np.int16))
    run(folder, "--task", "part2", "--out", tmp_path / "words.yaml")
    config = check(tmp_path / "words.yaml")
    assert config.sources["records"].kind == "audio" and config.tasks["part2"].label == "part2"
    assert "nearest: 'part2'" in refuse(folder, "--task", "part22", "--out", tmp_path / "other.yaml")


@pytest.mark.parametrize("form", ["tsv", "two columns", "txt", "srt"])
def test_transcripts_beside_recordings_become_a_file_to_which_only_public_symbols_are_added(
    tmp_path: Path, form: str
) -> None:
    from scipy.io import wavfile

    folder = tmp_path / "speech"
    folder.mkdir()
    lines, rng = ["file\tspeaker\tsentence"], random.Random(0)
    for number in range(30):
        wavfile.write(folder / f"u{number}.wav", 8000, np.zeros(800, dtype=np.int16))
        said = " ".join(rng.choice(["seldom", "often", "again"]) for _ in range(5)) + f" {number}"
        lines.append(f"u{number}.wav\t{'ab'[number % 2]}\t{said}")
        if form == "txt":
            (folder / f"u{number}.txt").write_text(said)
        if form == "srt":
            (folder / f"u{number}.srt").write_text(f"1\n00:00:00,000 --> 00:00:00,100\n{said}\n")
    if form == "tsv":
        (folder / "list.tsv").write_text("\n".join(lines))
    if form == "two columns":
        pairs = [line.split("\t")[::2] for line in lines[1:]]
        (folder / "list.tsv").write_text("\n".join(map("\t".join, pairs)))
    shown = run(folder, "--out", tmp_path / "speech.yaml")
    text = (tmp_path / "speech.yaml").read_text()
    for word in ("seldom", "often", "again"):
        assert word not in shown and word not in text
    name = {"tsv": "sentence", "two columns": "column2"}.get(form, "transcript")
    assert f"fill in: run.tasks.{name}.symbols and max_symbols in speech.yaml" in shown
    text = text.replace("[FILL_IN]", "[seldom, often, again]").replace("max_symbols: FILL_IN", "max_symbols: 8")
    (tmp_path / "speech.yaml").write_text(text)
    config = load(SimulationConfig, tmp_path / "speech.yaml")
    assert config.run.tasks[name].kind == "ctc" and config.tasks[name].label == name
    source = config.sources["records"].settings()
    listed = {"tsv": "file", "two columns": "column1"}
    assert source["audio"] == listed[form] if form in listed else source["transcript"] == name
    assert len(open_source(config.sources["records"], "records").open().index()) == 30
    backbone = config.run.backbone_specs["backbone"].settings()
    assert backbone["pooling"] == "frames" and backbone["model"] == "openai/whisper-tiny.en"


@pytest.mark.parametrize("form", ["files", "sides", "tsv"])
def test_texts_and_their_translations_become_a_file_to_which_public_pairs_are_added(tmp_path: Path, form: str) -> None:
    rng, folder = random.Random(0), tmp_path / "texts"
    folder.mkdir()
    pairs = []
    for number in range(30):
        texts = [" ".join(rng.choice(words) for _ in range(7)) for words in (["seldom", "often"], ["oft", "nie"])]
        pairs.append([f"{text} {number}" for text in texts])
    if form == "tsv":
        (folder / "pairs.tsv").write_text("\n".join(map("\t".join, [["english", "german"], *pairs])))
    else:
        sides = {"captions": pairs} if form == "files" else {"train": pairs[:20], "test": pairs[20:]}
        for side, own in sides.items():
            for language, lines in zip(("en", "de"), zip(*own, strict=True), strict=True):
                (folder / f"{side}.{language}").write_text("\n".join(lines) + "\n")
    shown = run(folder, "--out", tmp_path / "texts.yaml")
    text = (tmp_path / "texts.yaml").read_text()
    for word in ("seldom", "often", "oft", "nie"):
        assert word not in shown and word not in text
    assert "fill in: pretrain.sources in texts.yaml" in shown
    (tmp_path / "texts.yaml").write_text(text.replace("FILL_IN", "public"))
    config = load(SimulationConfig, tmp_path / "texts.yaml")
    ((name, own),) = config.tasks.items()
    assert config.run.tasks[name].kind == "seq2seq" and config.run.backbone_specs["backbone"].kind == "seq2seq"
    assert own.label == {"tsv": "german"}.get(form, "target")
    opened = open_source(config.sources["records"], "records").open()
    first = opened.load(0)
    assert isinstance(first, Text) and [first.first, first.second] in pairs and len(opened.index()) == 30
    assert config.partition.split == ("source" if form == "sides" else "hash")


def test_arrays_with_sides_and_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "a.npz",
        train_x=rng.normal(size=(20, 5)),
        train_y=np.arange(20) % 2,
        test_x=rng.normal(size=(6, 5)),
        test_y=np.arange(6) % 2,
        names=np.array(["healthy", "ill"]),
    )
    run(tmp_path / "a.npz", "--out", tmp_path / "a.yaml")
    config = check(tmp_path / "a.yaml")
    assert set(config.sources["records"].settings()["parts"]) == {"train", "test"}
    assert next(iter(config.run.tasks.values())).settings()["labels"] == ["healthy", "ill"]
    assert config.run.backbone_specs["backbone"].settings()["dim"] == 5


def test_an_array_of_patients_makes_them_the_unit(tmp_path: Path) -> None:
    """Otherwise a patient of several records would have less protection than one record has, without a word."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(40, 5)), y=np.arange(40) % 2, pid=np.arange(40) // 4)
    run(tmp_path / "a.npz", "--out", tmp_path / "a.yaml")
    config = check(tmp_path / "a.yaml")
    assert config.unit == "patient"
    index = open_source(config.sources["records"], "records").open().index()
    assert len({record.patient for record in index}) == 10


def test_rows_of_numbers_without_names_are_series(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for side in ("TRAIN", "TEST"):
        rows = np.column_stack([np.arange(20) % 2, rng.normal(size=(20, 30))])
        np.savetxt(tmp_path / f"Beats_{side}.txt", rows)
    run(tmp_path / "Beats_TRAIN.txt", "--out", tmp_path / "a.yaml")
    config = check(tmp_path / "a.yaml")
    assert config.sources["records"].kind == "series" and config.partition.split == "source"
    assert config.run.backbone_specs["backbone"].settings()["dim"] == 30


def test_texts_without_a_first_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.tsv"
    path.write_text("".join(f'a "note of some words {n}\t{n % 2}\n' for n in range(40)), encoding="utf-8")
    run(path, "--out", tmp_path / "a.yaml")
    settings = check(tmp_path / "a.yaml").sources["records"].settings()
    assert settings["kind"] == "text" and settings["header"] == ["column1", "column2"] and settings["quotes"] is False


def test_the_parts_of_a_site_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "visits.csv")
    assert "simulate" not in run(path, "--site", "--out", tmp_path / "site.yaml").splitlines()[-1]
    text = (tmp_path / "site.yaml").read_text(encoding="utf-8")
    assert "sources:" in text and "public_size:" in text and "run:" not in text and "partition" not in text
    assert not (tmp_path / "site.ranges.csv").exists()
    # The lines are copied to a file elsewhere.
    assert f"path: {path.resolve()}" in text


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out.yaml"
    (tmp_path / "empty").mkdir()
    assert "got an empty one" in refuse(tmp_path / "empty", "--out", out)
    assert "there is no such file or folder" in refuse(tmp_path / "none.csv", "--out", out)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    assert "got a binary file of another kind" in refuse(tmp_path / "binary.csv", "--out", out)
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    assert "expected a readable table" in refuse(tmp_path / "damaged.parquet", "--out", out)
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    assert "expected a readable .npz file" in refuse(tmp_path / "damaged.npz", "--out", out)
    rows = write_rows(tmp_path / "rows.csv")
    assert "has no such column (nearest: 'finding')" in refuse(rows, "--task", "findings", "--out", out)
    assert "expected a column of few values" in refuse(rows, "--task", "note", "--out", out)
    assert "there is no such file" in refuse(rows, "--backbone", "./none.safetensors", "--out", out)
    (tmp_path / "plain.csv").write_text("\n".join(["a,b", *(f"{n / 3},{n / 7}" for n in range(40))]), encoding="utf-8")
    assert "say which with --task COLUMN" in refuse(tmp_path / "plain.csv", "--out", out)
    assert not out.exists()
    out.write_text("mine", encoding="utf-8")
    assert "it is there already" in refuse(rows, "--out", out)
    assert out.read_text() == "mine"


def test_no_file_is_written_where_the_ranges_are_there_already(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv")
    (tmp_path / "a.ranges.csv").write_text("mine", encoding="utf-8")
    assert "a.ranges.csv: it is there already" in refuse(rows, "--out", tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


def test_a_table_is_inspected_without_torch(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv")
    code = (
        "import sys; from headwater.commands.inspect import inspect; from pathlib import Path;"
        f"inspect(Path({str(rows)!r}), None, False, Path({str(tmp_path / 'a.yaml')!r}), None);"
        "assert not {'torch', 'scipy', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "0"] * 20, "category"),
        (["1.0", "0", "?", ""] * 20, "category"),
        ([f"{n / 3:.3f}" for n in range(40)], "number"),
        (["f", "m"] * 20, "category"),
        ([f"p{n}" for n in range(40)], "id"),
        (["2024-01-02", "2024-01-03"] * 20, "date"),
        ([f"scans/{n}.png" for n in range(40)], "path"),
        (["x"] * 40, "constant"),
        (["", "NA"] * 20, "empty"),
    ],
)
def test_kinds_of_columns(cells: list[str], kind: str) -> None:
    assert describe_column("a", cells, [".png"]).kind == kind


def test_an_id_that_repeats_is_a_patient(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["id,dose,y", *(f"{n // 2 + 100},{n / 3},{n % 2}" for n in range(60))]), encoding="utf-8")
    assert inspect(path, None).patient == "id"
    path.write_text("\n".join(["id,dose,y", *(f"{n + 100},{n / 3},{n % 2}" for n in range(60))]), encoding="utf-8")
    found = inspect(path, None)
    assert found.patient is None and found.features == ("dose",)


def test_the_screen_shows_no_patient_and_no_note_of_a_small_file(tmp_path: Path) -> None:
    rows = enumerate("abcdefgh")
    lines = [f"q7-{name};{30 + number};q7-note {number} of a visit;{number % 2}" for number, name in rows]
    (tmp_path / "few.csv").write_text("\n".join(["patient;age;note;finding", *lines]) + "\n")
    shown = run(tmp_path / "few.csv", "--task", "finding", "--out", tmp_path / "few.yaml")
    assert "30 to 37" in shown or "30, 31" in shown
    assert "q7-" not in shown
