"""Folders of patients' events: FHIR files and tables of an OMOP model. The most frequent codes become columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from client.data.sources import open_source
from client.data.sources.parts.tables.events import CodeCount, ListsEvents, count_codes
from client.data.sources.parts.tree import Tree
from client.inspect.finding import Finding, describe_column
from common.errors import nearest
from common.types import BadInput, BadRecord

_MOST_COLUMNS = 12
"""Most codes that become columns of a draft."""

_LEAST_PART = 0.1
"""Least part of the patients who have a code that becomes a column."""

_START = 1 << 16
"""Bytes of a .json file in which a resource says its type."""


def find_patients(path: Path, tree: Tree, task: str | None) -> Finding | None:
    """Returns what FHIR files or OMOP tables hold; None where a folder is neither.

    Args:
        path: the folder or zip.
        tree: its files.
        task: the code that is the label; None for a guess.

    Raises:
        BadInput: they hold no patients, or no code that can be the label.
    """
    kind = "fhir" if _is_fhir(tree) else "omop" if path.is_dir() and _is_omop(tree) else None
    return None if kind is None else describe_patients(path, kind, task)


def _is_fhir(tree: Tree) -> bool:
    suffixes = {PurePosixPath(name).suffix.lower(): name for name in tree.stamps}
    if ".ndjson" in suffixes:
        return True
    try:
        return ".json" in suffixes and b'"resourceType"' in tree.read(suffixes[".json"], "file")[:_START]
    except BadRecord:
        return False


def _is_omop(tree: Tree) -> bool:
    return bool({"person.csv", "person.parquet"} & {name.lower() for name in tree.stamps})


def describe_patients(path: Path, kind: str, task: str | None) -> Finding:
    """Returns the finding of a source of patients.

    Args:
        path: the files.
        kind: kind of the source.
        task: the code that is the label; None for a guess.

    Raises:
        BadInput: see `find_patients`.
    """
    plain: dict[str, Any] = {"kind": kind, "path": str(path), "codes": {}, "columns": ["sex"]}
    empty = open_source(plain, "records")
    assert isinstance(empty, ListsEvents)  # Both kinds are.
    num_patients = sum(not record.fault for record in empty.open().index())
    counts = count_codes(empty.list_events())
    label = _choose_label(path, counts, num_patients, task)
    usual = [each for each in counts if each.code != label.code and each.patients >= _LEAST_PART * num_patients]
    chosen = usual[:_MOST_COLUMNS]
    codes = {_name(each): _take(each) for each in [*chosen, label]}
    source = {"kind": kind, "path": path, "codes": codes, "columns": ["sex", *map(_name, chosen)]}
    opened = open_source({**source, "path": str(path)}, "records").open()
    index = [record for record in opened.index() if not record.fault]
    columns = [describe_column(name, [record.cells[name] for record in index]) for name in ["sex", *codes]]
    features = tuple(each.name for each in columns if each.name != _name(label) and each.kind in ("number", "category"))
    source["columns"] = list(features)
    source["codes"] = {name: value for name, value in codes.items() if name in (*features, _name(label))}
    return Finding(
        path=path,
        what="FHIR files" if kind == "fhir" else "tables of an OMOP model",
        modality="table",
        records=len(index),
        columns=tuple(columns),
        source=source,
        label=_name(label),
        patient="",
        patients=num_patients,
        features=features,
        notes=_NOTES,
    )


_NOTES = (
    "Columns are the most frequent codes; the label is whether a patient has its code. Name others in `codes`.",
    "Without `index`, what was measured after the label counts too: write `index` (a date or a code), and `when`.",
)


def _choose_label(path: Path, counts: Sequence[CodeCount], num_patients: int, task: str | None) -> CodeCount:
    by_code = {each.code: each for each in counts}
    if task is not None:
        if task not in by_code:
            raise BadInput(f"--task {task}: {path} has no such code{nearest(task, by_code)}")
        return by_code[task]
    able = [each for each in counts if not each.is_number and each.patients < num_patients]
    if not able:
        raise BadInput(
            f"{path}: expected a code that some patients have and others do not, to be the label; say which with "
            "--task CODE"
        )
    return able[0]


def _name(count: CodeCount) -> str:
    """Returns the name of a code's column, which YAML takes for no number."""
    return f"code_{re.sub('[^A-Za-z0-9]+', '_', count.code)}"


def _take(count: CodeCount) -> Mapping[str, Any]:
    """Returns the settings of a column: the latest number, or whether there is an event."""
    if not count.is_number:
        return {"code": count.code, "take": "any"}
    return {"code": count.code, "take": "latest", **({"unit": count.unit} if count.unit else {})}
