"""A table as a user has it: its separator, encoding, decimal sign and first line, and what its columns hold."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.data.sources import open_source
from client.data.sources.image_folder import SUFFIXES as PICTURES
from client.data.sources.parts.frame import FAULT, WHITESPACE, Encoding, Surroundings, read_frame
from client.data.sources.parts.recordings import SUFFIXES as RECORDINGS
from client.data.sources.parts.tables.numbers import Decimal, Thousands, convert_number
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
from client.inspect.pairs import guess_translation, mark_translation
from common.errors import instead
from common.inputs import parse_number
from common.types import BadInput, BadRecord

_SAMPLE_BYTES = 1 << 18
_SAMPLE_ROWS = 200
_SEPARATORS = (";", "\t", "|", ",")
_FEWEST_STEPS = 16
"""Columns of numbers without names, from which a row is a time series."""

_COMMA = re.compile(r"[+-]?\d*,\d+")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_THOUSANDS_POINT = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+\.\d+")
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+,\d+")
_POINT = re.compile(r"[+-]?\d*\.\d+")
_ONE_GROUP = re.compile(r"[+-]?[1-9]\d{0,2}\.\d{3}")
_APOSTROPHES = re.compile(r"[+-]?[1-9]\d{0,2}(['\u2019]\d{3})+(\.\d+)?")
_WIDE = (b"\xff\xfe", b"\xfe\xff")
"""Marks in front of UTF-16."""

_DICOM = (".dcm", ".dicom")


@dataclass(frozen=True)
class TextForm:
    """The form of a text file.

    Attributes:
        separator: of its cells.
        encoding: its characters.
        names: names made up for a file without a line of them; None where it has one.
        quotes: whether quotes enclose cells.
        is_comma: whether the decimal sign is a comma.
        thousands: the mark between thousands; None where there is none.
        comment: beginning of the lines that are none of the table's; None where there are no such lines.
        skip_lines: number of lines above the table.
    """

    separator: str
    encoding: Encoding
    names: list[str] | None
    quotes: bool
    is_comma: bool
    thousands: Thousands | None = None
    comment: str | None = None
    skip_lines: int = 0

    @property
    def decimal(self) -> Decimal:
        """The decimal sign."""
        return "," if self.is_comma else "."

    @property
    def layout(self) -> Surroundings:
        """The parts of the file that are not the table."""
        return Surroundings(self.comment, self.skip_lines)

    def read_number(self, cell: str) -> str:
        """Returns a number with a decimal point; other texts as they are."""
        return convert_number(cell, self.decimal, self.thousands)

    def describe(self) -> str:
        """Returns the form in words."""
        separator = {"\t": "tab", WHITESPACE: "white space"}.get(self.separator, repr(self.separator))
        header = "its first line names the columns" if self.names is None else "no line of names"
        comma = ", decimal comma" if self.is_comma else ""
        comma += f", {self.thousands!r} between thousands" if self.thousands not in (None, "none") else ""
        around = f", {self.skip_lines} line(s) above it" if self.skip_lines else ""
        around += f", comments after {self.comment!r}" if self.comment else ""
        return f"text table, separator {separator}, {self.encoding}{comma}{around}, {header}"


def inspect_table(path: Path, task: str | None) -> Finding:
    """Returns what a CSV, text table or Parquet file holds.

    Args:
        path: the file.
        task: the label column; None for a guess.

    Raises:
        BadInput: it cannot be read, or has no column that can be the label.
    """
    form = None if path.suffix.lower() in {".parquet", *SHEETS} else sniff(path)
    frame = _read(path, form)
    rows = [row for row in frame.to_dict("records") if not row[FAULT]]
    if not rows:
        raise BadInput(f"{path}: expected a table with records, got none")
    names = [str(name) for name in frame.columns if name != FAULT]
    suffixes = (*PICTURES, *RECORDINGS, *_DICOM)
    cells = {name: [_point(row[name], form) for row in rows] for name in names}
    columns = tuple(describe_column(name, cells[name], suffixes) for name in names)
    what = form.describe() if form else "spreadsheet" if path.suffix.lower() in SHEETS else "Parquet table"
    bad = len(frame) - len(rows)
    what += f", {bad} unreadable row(s)" if bad else ""
    if form is not None and _is_series(form, columns):
        return _find_series(path, form, columns, len(rows), what)
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
    has_split, patients = found.split is not None, None
    shape: dict[str, Any] = {} if form is None else {"separator": form.separator, "encoding": form.encoding}
    if form is not None:
        shape |= {"comment": form.comment, "skip_lines": form.skip_lines}
    if paths:
        cell = _first_cell(path, form, paths[0].name).lower()
        kind, key, modality = _listed(cell)
        source = {"kind": kind, "path": path, key: paths[0].name, **shape, **people}
        if form is not None:
            source["header"] = form.names or True
        features = []
        if kind == "dicom":
            own, patients = _probe_dicom(source)
            source |= own
            patient = "" if patients else patient
    elif texts and len(features) <= 2:
        modality, features = "text", []
        sides = _find_sides(path)
        source = {"kind": "text", "path": sides or path, **shape, "text": texts[0].name, **people}
        source["separator"] = shape.get("separator", ",")
        if form is not None:
            source |= {"quotes": form.quotes, "header": form.names or True}
        if sides:
            has_split, source["split"] = True, None
    elif features:
        modality = "table"
        marks = sorted({mark for column in columns for mark in column.marks})
        source = {"kind": "table", "path": path, **shape}
        if form is not None:
            source |= {"decimal": form.decimal, "thousands": form.thousands, "header": form.names or True}
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
        notes=tuple(notes),
    )


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
    if cell.endswith(_DICOM):
        return "dicom", "file", "image"
    return ("manifest", "audio", "audio") if cell.endswith(tuple(RECORDINGS)) else ("manifest", "image", "image")


def _is_default(key: str, value: Any) -> bool:
    usual: dict[str, Any] = {
        "separator": None,
        "encoding": "utf-8",
        "decimal": ".",
        "patient": None,
        "split": None,
        "header": True,
    }
    usual |= {"thousands": None, "comment": None, "skip_lines": 0}
    return (key in usual and value == usual[key]) or (key == "missing_values" and value == [""])


def _is_category(column: ColumnFacts) -> bool:
    return column.kind == "category" and 2 <= column.distinct <= FEW


def _first_cell(path: Path, form: TextForm | None, name: str) -> str:
    return next((str(cell) for cell in _read(path, form)[name] if cell), "")


def _point(cell: str, form: TextForm | None) -> str:
    return cell if form is None else form.read_number(cell)


def _read(path: Path, form: TextForm | None) -> Any:
    if form is None:
        return read_frame(path)
    names, layout = form.names, form.layout
    return read_frame(path, form.separator, names, quotes=form.quotes, encoding=form.encoding, layout=layout)


# --- time series -----------------------------------------------------------------------------------------------------


def _is_series(form: TextForm, columns: Sequence[ColumnFacts]) -> bool:
    return (
        form.names is not None
        and len(columns) > _FEWEST_STEPS
        and columns[0].distinct <= FEW
        and all(column.observed is not None for column in columns)
    )


def _find_series(path: Path, form: TextForm, columns: Sequence[ColumnFacts], records: int, what: str) -> Finding:
    label = ColumnFacts("label", "category", columns[0].distinct, columns[0].missing, columns[0].values)
    sides = _find_sides(path)
    source: dict[str, Any] = {"kind": "series", "path": sides or path, "separator": form.separator}
    return Finding(
        path=path,
        what=f"{what}: the first column has few values and is taken for the label, the other {len(columns) - 1} for "
        "the steps of a time series",
        modality="vector",
        records=records,
        columns=(label,),
        source={**source, "labels": {"label": 1}},
        label="label",
        has_split=sides is not None,
        dim=len(columns) - 1,
    )


def _find_sides(path: Path) -> dict[str, Path] | None:
    """Returns `train` and `test` -> file, where a file's name says so and another lies beside it."""
    for word, other in (("train", "test"), ("TRAIN", "TEST"), ("Train", "Test")):
        twin = path.with_name(path.name.replace(word, other))
        if word in path.stem and twin.is_file():
            return {"train": path, "test": twin}
    return None


# --- the form of a text file -----------------------------------------------------------------------------------------


def sniff(path: Path) -> TextForm:
    """Returns the form of a text file. Raises BadInput where it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise BadInput(f"{path}: expected a readable table{instead(error)}") from None
    if not data.strip():
        raise BadInput(f"{path}: expected a table, got an empty file")
    if b"\0" in data and not data.startswith(_WIDE):
        raise BadInput(
            f"{path}: expected a CSV, Parquet, .xlsx, .ods or npz file, a zip, or a folder of pictures, recordings or "
            "DICOM files; got a binary file of another kind"
        )
    encoding = _find_encoding(data if len(data) < _SAMPLE_BYTES else data[: data.rfind(b"\n") + 1 or None])
    text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding, "replace")
    stated, text = _take_stated(text)
    comment = "#" if text.startswith("#") and any(not line.startswith("#") for line in text.splitlines()) else None
    if comment:
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(comment))
    separator, rows = (stated, _take_rows(text, stated)) if stated else _find_separator(text)
    skip_lines = 0 if separator == WHITESPACE else _count_titles(text, separator)
    text = "".join(text.splitlines(keepends=True)[skip_lines:])
    rows = _take_rows(text, separator) if skip_lines else rows
    quotes = separator != WHITESPACE and _has_quoted_cells(text, separator, rows)
    if not quotes and separator != WHITESPACE:
        rows = _split_lines(text, separator)
    if len(rows[0]) < 2:
        raise BadInput(f"{path}: expected a table of several columns, got lines without a separator")
    first = [cell.strip() for cell in rows[0]]
    is_comma, thousands = _find_marks([cell.strip() for row in rows for cell in row], separator)
    form = TextForm(separator, encoding, None, quotes, is_comma, thousands, comment, skip_lines)
    has_numbers = any(parse_number(form.read_number(cell)) is not None for cell in first)
    has_files = any(cell.lower().endswith((*PICTURES, *RECORDINGS, *_DICOM)) for cell in first)
    is_named = all(first) and not has_numbers and not has_files and len(set(first)) == len(first)
    # Spreadsheets leave the name of a column of row numbers empty, and end each line with a separator.
    is_named = is_named or (not has_numbers and len(rows) > 1 and sum(not cell for cell in first) == 1)
    names = None if is_named else [f"column{number}" for number, _ in enumerate(first, start=1)]
    return replace(form, names=names)


def _take_stated(text: str) -> tuple[str | None, str]:
    """Returns the separator that a line `sep=;` in front names, and what follows the line."""
    found = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)
    return (found[1], text[found.end() :]) if found else (None, text)


def _count_titles(text: str, separator: str) -> int:
    """Returns the number of lines in front of the first that has several cells."""
    lines = text.splitlines()[:_SAMPLE_ROWS]
    # A title has no separator, or nothing but separators behind it.
    inner = [line.rstrip(f"{separator} ").count(separator) for line in lines]
    return next((number for number, count in enumerate(inner) if count), 0)


def _find_marks(cells: Sequence[str], separator: str) -> tuple[bool, Thousands | None]:
    """Returns whether the decimal sign is a comma, and the mark between thousands."""
    # Between commas, a quoted 1,234 may as well be a thousand.
    is_comma = any(_COMMA.fullmatch(cell) and (separator != "," or not _THOUSANDS.fullmatch(cell)) for cell in cells)
    is_comma |= any(_GROUPED.fullmatch(cell) for cell in cells)
    is_comma &= not any(_THOUSANDS_POINT.fullmatch(cell) for cell in cells)
    if is_comma:
        points = [cell for cell in cells if _POINT.fullmatch(cell)]
        if any(_GROUPED.fullmatch(cell) for cell in cells):
            return True, "."
        return True, "none" if any(not _ONE_GROUP.fullmatch(cell) for cell in points) else None
    if any(_THOUSANDS_POINT.fullmatch(cell) or (_THOUSANDS.fullmatch(cell) and separator == ",") for cell in cells):
        return False, ","
    return False, "'" if any(_APOSTROPHES.fullmatch(cell) for cell in cells) else None


def _find_encoding(data: bytes) -> Encoding:
    if data.startswith(_WIDE):
        return "utf-16"
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in data) else "latin-1"


def _find_separator(text: str) -> tuple[str, list[list[str]]]:
    """Returns the separator that divides nearly all rows into as many cells, and the first rows."""
    best: tuple[float, int, str, list[list[str]]] = (0.0, 1, ",", [[text.split("\n")[0]]])
    for separator in _SEPARATORS:
        try:
            rows = _take_rows(text, separator)
        except csv.Error:
            continue
        width, number = Counter(map(len, rows)).most_common(1)[0]
        share = number / len(rows)
        if width > 1 and share > best[0] + 0.05:
            best = (share, width, separator, rows)
    if best[0] >= 0.8:
        return best[2], best[3]
    lines = [line.split() for line in text.splitlines()[:_SAMPLE_ROWS] if line.strip()]
    width, number = Counter(map(len, lines)).most_common(1)[0]
    # Words of a sentence are no cells.
    if width > 1 and number > 0.95 * len(lines) and sum(parse_number(c) is not None for c in lines[-1]) > width / 2:
        return WHITESPACE, lines
    return best[2], best[3]


def _take_rows(text: str, separator: str) -> list[list[str]]:
    csv.field_size_limit(1 << 24)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows = [row for row, _ in zip((row for row in reader if any(row)), range(_SAMPLE_ROWS), strict=False)]
    return rows or [[""]]


def _has_quoted_cells(text: str, separator: str, rows: Sequence[Sequence[str]]) -> bool:
    """Returns whether quotes enclose cells: where none opens one, or rows fall apart so, they belong to the text."""
    if '"' not in text:
        return separator != "\t"
    if not re.search(f'(?:^|{re.escape(separator)})"', text, re.MULTILINE):
        return False
    return _share_width(rows) >= _share_width(_split_lines(text, separator))


def _split_lines(text: str, separator: str) -> list[list[str]]:
    return [line.split(separator) for line in text.splitlines()[:_SAMPLE_ROWS] if line.strip()]


def _share_width(rows: Sequence[Sequence[str]]) -> float:
    """Returns the part of the rows that have the most frequent number of cells."""
    return Counter(map(len, rows)).most_common(1)[0][1] / len(rows)
