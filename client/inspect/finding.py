"""The facts about a user's data, and the guesses at patients and labels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from common.errors import nearest
from common.inputs import find_name, parse_number
from common.types import BadInput

MISSING = tuple(
    ["?", "NA", "N/A", "n/a", "n.a.", "#N/A", "NaN", "nan", "NULL", "null", "None", "-", ".", "missing", "k.A.", "k.A"]
)
"""Cells that mean nothing in many exports, beside the empty one."""

FEW = 20
"""Most distinct values of a category, and of the labels of a classification."""

_FEW_NUMBERS = 10
"""Most distinct whole numbers that are taken for codes rather than amounts."""

_WORDS = 4
"""Words of a cell on average, from which a column is text."""

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}.*|\d{1,2}[./]\d{1,2}[./]\d{2,4}.*")
_CODE = re.compile(r"0\d+")
"""Digits behind a zero: a code or an id, whose zeros count, and no amount."""

_PATIENT = re.compile(r"patient|subject|person|participant|pidnum|^pid$|^mrn$|case_?id", re.IGNORECASE)
_ID = re.compile(r"^$|(^|[_ ])(id|uid|key|index)$|^unnamed", re.IGNORECASE)
_SPLIT = re.compile(r"^(split|fold|set|subset|side)$", re.IGNORECASE)
_TRANSCRIPT = re.compile(r"transcript|transcription|sentence|text|utterance|said|words", re.IGNORECASE)
_LABELS = (
    "label", "labels", "target", "class", "diagnosis", "outcome", "finding", "findings", "disease", "report",
    "sentiment", "category", "result", "grade", "y",
)  # fmt: skip

Modality = Literal["table", "image", "audio", "text", "vector", "series"]


@dataclass(frozen=True)
class ColumnFacts:
    """The facts about one column.

    Attributes:
        name: name of the column.
        kind: what its cells are.
        distinct: number of distinct cells that are not missing.
        missing: number of cells that are empty or mean nothing.
        values: the distinct cells, sorted, where there are few; else none; of masks and boxes the names in them.
        observed: lowest and highest number; for the screen only.
        marks: texts in it that stand for a missing cell.
    """

    name: str
    kind: Literal[
        "number",
        "category",
        "several",
        "text",
        "path",
        "date",
        "id",
        "constant",
        "empty",
        "mask",
        "boxes",
        "transcript",
        "translation",
    ]
    distinct: int
    missing: int
    values: tuple[str, ...] = ()
    observed: tuple[float, float] | None = None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A user's data as they were found.

    Attributes:
        path: the file or folder.
        what: what it is, in words.
        modality: what a record is.
        records: number of records.
        columns: facts about its columns.
        source: settings of a data source that reads it.
        label: name of the label column.
        patient: name of the column of patient ids; None where there is none, "" where the source has them otherwise.
        has_split: whether the source says what is held out.
        features: names of the columns that a backbone is given, of a table.
        dim: length of the vectors, where a record is one; number of channels, where it is a series.
        patients: number of patients that the source itself knows.
        notes: sentences for whoever reads the file that is written.
    """

    path: Path
    what: str
    modality: Modality
    records: int
    columns: tuple[ColumnFacts, ...]
    source: Mapping[str, Any]
    label: str
    patient: str | None = None
    has_split: bool = False
    features: tuple[str, ...] = ()
    dim: int | None = None
    patients: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def label_facts(self) -> ColumnFacts:
        """The facts about the label column."""
        return next(column for column in self.columns if column.name == self.label)


def describe_column(name: str, cells: Sequence[str], suffixes: Sequence[str] = ()) -> ColumnFacts:
    """Returns the facts about a column.

    Args:
        name: name of the column.
        cells: its cells.
        suffixes: endings of the files that a cell may name.
    """
    counts = Counter(cell.strip() for cell in cells)
    filled = {cell: number for cell, number in counts.items() if cell and cell not in MISSING}
    total = sum(filled.values())
    marks = tuple(sorted(cell for cell in counts if cell and cell in MISSING))
    distinct, missing = len(filled), len(cells) - total
    values = tuple(sorted(filled, key=_sort_key)) if distinct <= FEW else ()

    def make(kind: Any, observed: tuple[float, float] | None = None) -> ColumnFacts:
        return ColumnFacts(name, kind, distinct, missing, values, observed, marks)

    if distinct == 0:
        return make("empty")
    if distinct == 1:
        return make("constant")
    numbers = {cell: parse_number(cell) for cell in filled}
    found = [number for number in numbers.values() if number is not None]
    if len(found) == distinct and not any(_CODE.fullmatch(cell) for cell in filled):
        observed = (min(found), max(found))
        is_whole = all(number.is_integer() for number in found)
        distinct_numbers = len(set(found))
        values = tuple(sorted({_shorten(cell) for cell in filled}, key=_sort_key)) if distinct <= FEW else ()
        if is_whole and distinct_numbers == total and distinct_numbers > FEW and _ID.search(name):
            return make("id")
        # Few whole numbers may be codes; few other numbers of many records are amounts that were rounded.
        return make(
            "category" if is_whole and distinct_numbers <= min(_FEW_NUMBERS, total // 2) else "number", observed
        )
    if sum(number for cell, number in filled.items() if cell.lower().endswith(tuple(suffixes))) > 0.9 * total:
        return make("path")
    if sum(number for cell, number in filled.items() if _DATE.fullmatch(cell)) > 0.9 * total:
        return make("date")
    parts = {part.strip() for cell in filled for part in cell.split("|")}
    if any("|" in cell for cell in filled) and 2 <= len(parts) <= 4 * FEW:
        values = tuple(sorted(parts - {""}, key=_sort_key))
        return make("several")
    if sum(len(cell.split()) * number for cell, number in filled.items()) >= _WORDS * total and distinct > FEW:
        return make("text")
    if distinct <= FEW and (distinct <= max(2, total // 2)):
        return make("category")
    return make("id")


def _shorten(cell: str) -> str:
    number = parse_number(cell)
    return cell if number is None or not number.is_integer() or abs(number) > 1e15 else str(int(number))


def _sort_key(cell: str) -> tuple[bool, float, str]:
    number = parse_number(cell)
    return number is None, number or 0.0, cell


def guess_patient(columns: Sequence[ColumnFacts], records: int) -> str | None:
    """Returns the column whose name speaks of patients, or of ids that repeat; None where there is none."""
    for column in columns:
        if _PATIENT.search(column.name) and column.distinct > 1 and column.kind != "several":
            return column.name
    repeated = [
        column.name
        for column in columns
        if _ID.search(column.name) and records / 20 < column.distinct < records - column.missing
    ]
    return repeated[0] if repeated else None


def guess_transcript(columns: Sequence[ColumnFacts], task: str | None) -> str | None:
    """Returns the column of what is said in recordings: the one that was asked for, or one that is named so.

    Args:
        columns: facts about all columns.
        task: the label column that was asked for; None for a guess.
    """
    found = [column.name for column in columns if column.kind in ("text", "id") or column.name == task]
    named = [name for name in found if _TRANSCRIPT.search(name) and task in (None, name)]
    # A list of two columns without a line of names: recordings and what is said in them.
    if not named and task is None and len(columns) == 2 and len(found) == 1:
        named = found
    texts = [column.name for column in columns if column.kind == "text" and column.name == task]
    return next(iter([*texts, *named]), None)


def mark_transcript(column: ColumnFacts, name: str) -> ColumnFacts:
    """Returns the facts about a column; of the one of that name that it holds transcripts, none of which is shown.

    Args:
        column: facts about a column.
        name: name of the column of transcripts.
    """
    return column if column.name != name else replace(column, kind="transcript", values=(), observed=None)


def guess_split(columns: Sequence[ColumnFacts]) -> str | None:
    """Returns the column that says which records are held out; None where there is none."""
    sides = {"train", "test"}
    return next((c.name for c in columns if _SPLIT.match(c.name) and set(c.values) == sides), None)


def choose_label(columns: Sequence[ColumnFacts], task: str | None, taken: Sequence[str | None], path: Path) -> str:
    """Returns the label column: the one that was asked for, or a guess by names and numbers of values.

    Args:
        columns: facts about all columns.
        task: the column that was asked for; None for a guess.
        taken: columns that are no labels.
        path: the file, for messages.

    Raises:
        BadInput: there is no such column, it cannot be a label, or no guess can be made.
    """
    by_name = {column.name: column for column in columns}
    if task is not None:
        if task not in by_name:
            raise BadInput(f"--task {task}: {path} has no such column{nearest(task, by_name)}")
        if by_name[task].kind in ("empty", "constant", "path", "date", "id", "text"):
            raise BadInput(
                f"--task {task}: expected a column of few values, of numbers, or of several labels with `|` between, "
                f"got {_SAID[by_name[task].kind]}"
            )
        return task
    able = [c for c in columns if c.kind in ("category", "several") and c.name not in taken]
    for name in _LABELS:
        found = next((c.name for c in able if c.name.lower() == name), None)
        if found:
            return found
    for name in _LABELS[:-1]:
        found = next((c.name for c in able if name in re.split(r"[\W_]+", c.name.lower())), None)
        if found:
            return found
    if able and columns[-1] is able[-1]:
        return able[-1].name
    close = ", ".join([c.name for c in columns if c.kind in ("category", "several", "number")][:8])
    raise BadInput(
        f"{path}: no column is plainly the label; say which with --task COLUMN" + (f" ({close})" * bool(close))
    )


_SAID = {
    "empty": "an empty one",
    "constant": "one value in all records",
    "path": "paths of files",
    "date": "dates",
    "id": "ids, or more than 20 different words",
    "text": "texts",
}


def list_levels(column: ColumnFacts) -> list[str]:
    """Returns the values of a category as levels, distinct also as numbers."""
    levels: list[str] = []
    for value in column.values:
        if find_name(value, levels) is None:
            levels.append(value)
    return levels
