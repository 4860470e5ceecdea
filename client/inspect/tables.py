"""A table as a user has it: its separator, encoding, decimal sign and first line, and what its columns hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.data.sources import open_source
from client.data.sources.image_folder import SUFFIXES as PICTURES
from client.data.sources.parts.dicom.files import is_marked
from client.data.sources.parts.frame import FAULT, read_frame
from client.data.sources.parts.recordings import SUFFIXES as RECORDINGS
from client.data.sources.parts.tables.sheets import SUFFIXES as SHEETS
from client.inspect.drawn import find_masks, is_mask_name
from client.inspect.finding import (
    FEW,
    ColumnFacts,
    Finding,
    choose_label,
    describe_column,
    guess_patient,
    guess_split,
    guess_transcript,
    mark_transcript,
)
from client.inspect.form import DICOM, TextForm, sniff, sniff_sheet
from client.inspect.pairs import guess_translation, mark_translation
from client.inspect.series import FILES as SERIES
from client.inspect.series import describe_waveforms, find_rows, find_sides, is_waveform, probe_files
from client.inspect.steps import find_steps
from common.types import BadInput, BadRecord

_SAMPLE_SCANS = 20
"""Cells that are looked up as folders of DICOM files."""


def inspect_table(path: Path, task: str | None, sheet: int | str | None = None) -> Finding:
    """Returns what a CSV, text table, Parquet file or spreadsheet holds.

    Args:
        path: the file.
        task: the label column; None for a guess.
        sheet: name or 1-based number of a spreadsheet's sheet; None where only one holds anything.

    Raises:
        BadInput: it cannot be read, or has no column that can be the label.
    """
    form = _find_form(path, sheet)
    frame = _read(path, form)
    rows = [row for row in frame.to_dict("records") if not row[FAULT]]
    if not rows:
        raise BadInput(f"{path}: expected a table with records, got none")
    names = [str(name) for name in frame.columns if name != FAULT]
    suffixes = (*PICTURES, *RECORDINGS, *DICOM, *SERIES)
    cells = {name: [_point(row[name], form) for row in rows] for name in names}
    columns = tuple(describe_column(name, cells[name], suffixes) for name in names)
    if (scans := _find_scans(path.parent, cells, columns)) is not None:
        columns = tuple(
            replace(each, kind="path", values=(), observed=None) if each is scans else each for each in columns
        )
    what = form.describe() if form else "Parquet table"
    bad = len(frame) - len(rows)
    what += f", {bad} unreadable row(s)" if bad else ""
    series = None if form is None else find_rows(path, form, cells, columns, task)
    series = series or find_steps(path, form, cells, columns, task)
    if series is not None:
        return replace(series, what=f"{series.what}, {bad} unreadable row(s)" if bad else series.what)
    patient, split = guess_patient(columns, len(rows)), guess_split(columns)
    masks = [column.name for column in columns if column.kind == "path" and is_mask_name(column.name)]
    plain = [
        column for column in columns if column.kind in ("category", "several") and column.name not in (patient, split)
    ]
    if task in masks or (task is None and masks and not plain):
        finding = _find(path, form, columns, task or masks[0], _Guesses(patient, split, len(rows), what))
        drawn = find_masks(path, {**finding.source, "masks": [finding.label]}, finding.label, what)
        shown = tuple(drawn.label_facts if each.name == finding.label else each for each in columns)
        return replace(finding, source=drawn.source, columns=shown, notes=(*finding.notes, *drawn.notes))
    heard = any(
        column.kind == "path" and _first_cell(path, form, column.name).lower().endswith(tuple(RECORDINGS))
        for column in columns
    )
    said = guess_transcript(columns, task) if heard else None
    if said is not None:
        finding = _find(path, form, columns, said, _Guesses(patient, split, len(rows), what))
        return replace(finding, columns=tuple(mark_transcript(each, said) for each in columns))
    written = guess_translation(columns, task)
    if written is not None:
        return mark_translation(_find(path, form, columns, written, _Guesses(None, None, len(rows), what)))
    label = choose_label(columns, task, (patient, split), path)
    return _find(path, form, columns, label, _Guesses(patient, split, len(rows), what))


@dataclass(frozen=True)
class _Guesses:
    patient: str | None
    split: str | None
    records: int
    what: str


def _find(path: Path, form: TextForm | None, columns: Sequence[ColumnFacts], label: str, found: _Guesses) -> Finding:
    patient = None if found.patient == label else found.patient
    others = [column for column in columns if column.name not in (label, patient, found.split)]
    paths = [column for column in others if column.kind == "path"]
    texts = [column for column in others if column.kind == "text"]
    features = [column.name for column in others if column.kind == "number" or _is_category(column)]
    people: dict[str, Any] = {"patient": patient, "split": found.split}
    source: dict[str, Any]
    notes: list[str] = []
    has_split, patients, dim = found.split is not None, None, None
    is_text = form is not None and not form.is_sheet
    shape: dict[str, Any] = {}
    if form is not None:
        shape = {"sheet": form.sheet} if form.is_sheet else {"separator": form.separator, "encoding": form.encoding}
        shape |= {"comment": form.comment, "skip_lines": form.skip_lines}
    if paths:
        first = _first_cell(path, form, paths[0].name)
        kind, key, modality = _listed(first.lower())
        if is_wave := is_waveform(path.parent, first):
            kind, key, modality = "waveforms", "record", "series"
        elif _has_tiles(path.parent / first):
            kind, key, modality = "slides", "file", "image"
        source = {"kind": kind, "path": path, key: paths[0].name, **shape, **people}
        if form is not None and is_text:
            source["header"] = form.names or True
        features = []
        if kind == "dicom":
            own, patients = _probe_dicom(source)
            source |= own
            patient = "" if patients else patient
        if modality == "series":
            listed, source["gaps"] = list(_read(path, form)[paths[0].name]), "keep"
            source |= describe_waveforms(path.parent, listed) if is_wave else {}
            dim = len(source["channels"]) if is_wave else probe_files(path.parent, listed)
            if is_wave:
                notes.append("`channels` and `rate_hz` are those of the first record: name channels that all have.")
    elif texts and len(features) <= 2:
        modality, features = "text", []
        sides = find_sides(path)
        source = {"kind": "text", "path": sides or path, **shape, "text": texts[0].name, **people}
        source["separator"] = shape.get("separator", ",")
        if form is not None and is_text:
            source |= {"quotes": form.quotes, "header": form.names or True}
        if sides:
            has_split, source["split"] = True, None
    elif features:
        modality = "table"
        marks = sorted({mark for column in columns for mark in column.marks})
        source = {"kind": "table", "path": path, **shape}
        if form is not None:
            source |= {"decimal": form.decimal, "thousands": form.thousands}
        if form is not None and is_text:
            source["header"] = form.names or True
        source |= {"columns": features, **people, "missing_values": ["", *marks]}
        left = [column.name for column in others if column.name not in features]
        if left:
            notes.append(f"Not used: {', '.join(left)} (ids, dates, texts, or one value only).")
    else:
        raise BadInput(f"{path}: expected columns beside the label that a model can use, got none; look at --task")
    return Finding(
        path=path,
        what=found.what,
        modality=modality,
        records=found.records,
        columns=tuple(columns),
        source={key: value for key, value in source.items() if not _is_default(key, value)},
        label=label,
        patient=patient,
        has_split=has_split,
        features=tuple(features),
        patients=patients,
        dim=dim,
        notes=tuple(notes),
    )


def _find_scans(root: Path, cells: Mapping[str, Sequence[str]], columns: Sequence[ColumnFacts]) -> ColumnFacts | None:
    """Returns the column that names folders of DICOM series or tiles, or DICOM files or WFDB records without a suffix.

    Args:
        root: folder of the table.
        cells: cells of each column.
        columns: facts about the columns.
    """
    if any(column.kind == "path" for column in columns):
        return None
    for column in columns:
        named = dict.fromkeys(cell for cell in cells[column.name] if cell.strip(" ./"))
        sample = [root / cell for cell, _ in zip(named, range(_SAMPLE_SCANS), strict=False)]
        if sample and 2 * sum(map(_is_scan, sample)) > len(sample):
            return column
    return None


def _is_scan(path: Path) -> bool:
    """Returns whether a path is a DICOM file that says so at its beginning, a folder of such or of tiles, or WFDB's."""
    try:
        if path.with_name(f"{path.name}.hea").is_file() or _has_tiles(path):
            return True
        files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
        return any(is_marked(file) for file in files if file.is_file())
    except (OSError, ValueError):
        return False


def _has_tiles(path: Path) -> bool:
    """Returns whether a path is a folder with pictures in it."""
    return path.is_dir() and any(file.suffix.lower() in PICTURES for file in path.iterdir())


def _probe_dicom(source: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Returns further settings of listed DICOM files, and the number of patients where their tags say it.

    Without a window of its own a file is shown from its lowest to its highest value.
    """
    has_column = source["patient"] is not None
    values = {key: value for key, value in source.items() if value is not None}
    opened = open_source({**values, "patient_from_tag": not has_column}, "sources.records").open()
    patients = {record.patient for record in opened.index()}
    own: dict[str, Any] = {}
    try:
        opened.load(0)
    except BadRecord as error:
        own = {"window": "full"} if "window" in str(error) else {}
    if has_column or "" in patients:
        return own, None
    return {**own, "patient_from_tag": True}, len(patients)


def _listed(cell: str) -> tuple[str, str, Any]:
    if cell.endswith(DICOM):
        return "dicom", "file", "image"
    if cell.endswith(tuple(RECORDINGS)):
        return "manifest", "audio", "audio"
    if cell.endswith(SERIES):
        return "manifest", "series", "series"
    # Without a suffix it is a DICOM file, or a folder of a series: `_find_scans` looked inside.
    return ("manifest", "image", "image") if cell.endswith(tuple(PICTURES)) else ("dicom", "file", "image")


def _is_default(key: str, value: Any) -> bool:
    usual: dict[str, Any] = {
        "separator": None,
        "encoding": "utf-8",
        "decimal": ".",
        "patient": None,
        "split": None,
        "header": True,
    }
    usual |= {"thousands": None, "comment": None, "skip_lines": 0, "sheet": None}
    return (key in usual and value == usual[key]) or (key == "missing_values" and value == [""])


def _is_category(column: ColumnFacts) -> bool:
    return column.kind == "category" and 2 <= column.distinct <= FEW


def _find_form(path: Path, sheet: int | str | None) -> TextForm | None:
    """Returns the form of a text file or spreadsheet; None of a Parquet file. Raises BadInput."""
    if path.suffix.lower() in SHEETS:
        return sniff_sheet(path, sheet)
    if sheet is not None:
        raise BadInput(f"--sheet: expected a spreadsheet ({', '.join(sorted(SHEETS))}), got {path}")
    return None if path.suffix.lower() == ".parquet" else sniff(path)


def _first_cell(path: Path, form: TextForm | None, name: str) -> str:
    return next((str(cell) for cell in _read(path, form)[name] if cell), "")


def _point(cell: str, form: TextForm | None) -> str:
    return cell if form is None else form.read_number(cell)


def _read(path: Path, form: TextForm | None) -> Any:
    if form is None:
        return read_frame(path)
    names, layout = form.names, form.layout
    return read_frame(path, form.separator, names, quotes=form.quotes, encoding=form.encoding, layout=layout)
