"""Time series: tables with a row for each of them, files of one each, and the backbone that reads them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from client.data.sources.parts.series import read_series
from client.data.sources.waveforms import list_channels, require_readers
from client.inspect.finding import (
    FEW,
    ColumnFacts,
    Finding,
    choose_label,
    guess_patient,
    guess_split,
)
from client.inspect.form import TextForm
from common.types import BadInput, BadRecord
from common.yaml import FILL_IN

WAVEFORMS = (".hea", ".edf", ".bdf")
FILES = (".npy", ".csv", ".tsv", *WAVEFORMS)
"""Endings of files that hold one series each."""

_FEWEST_COLUMNS = 16
"""Columns of numbers without names, or of counted steps, from which a row is a time series."""

_COUNTED = re.compile(r"(t|time|step|sample|tick|point|ms|s|sec|min|h|hour|v|val|value)?[ _.-]*([0-9]+)", re.IGNORECASE)


# --- a row for each series -------------------------------------------------------------------------------------------


def find_rows(
    path: Path, form: TextForm, cells: Mapping[str, Sequence[str]], columns: Sequence[ColumnFacts], task: str | None
) -> Finding | None:
    """Returns what a table with a series in each row holds; None where it is another.

    Args:
        path: the file.
        form: its form.
        cells: cells of each column.
        columns: facts about its columns.
        task: the label column; None for a guess.
    """
    if form.names is not None:
        if len(columns) > _FEWEST_COLUMNS and columns[0].distinct <= FEW and all(c.observed for c in columns):
            first = ColumnFacts("label", "category", columns[0].distinct, columns[0].missing, columns[0].values)
            guessed = "the first column has few values and is taken for the label, the other"
            return _describe_rows(path, form, (first,), list(columns[1:]), f"{form.describe()}: {guessed}", cells)
        return None
    found = [_COUNTED.fullmatch(column.name) for column in columns]
    steps = [column for column, match in zip(columns, found, strict=True) if match]
    numbers = [int(match[2]) for match in found if match]
    names = {(match[1] or "").lower() for match in found if match}
    if len(steps) < _FEWEST_COLUMNS or len(names) > 1 or numbers != list(range(numbers[0], numbers[-1] + 1)):
        return None
    others = [column for column in columns if column not in steps]
    patient, split = guess_patient(others, len(cells[steps[0].name])), guess_split(others)
    label = choose_label(others, task, (patient, split), path)
    finding = _describe_rows(path, form, others, steps, f"{form.describe()}: its other", cells)
    people = {"patient": patient, "split": split}
    source = {**finding.source, "labels": [column.name for column in others], **people}
    source = {key: value for key, value in source.items() if value is not None}
    return replace(finding, source=source, label=label, patient=patient, has_split=split is not None)


def _describe_rows(
    path: Path,
    form: TextForm,
    labels: Sequence[ColumnFacts],
    steps: Sequence[ColumnFacts],
    what: str,
    cells: Mapping[str, Sequence[str]],
) -> Finding:
    """Returns the finding; where a series has gaps or ends early, features need a model that reads series.

    Args:
        path: the file.
        form: its form.
        labels: columns that are no time steps.
        steps: columns of time steps.
        what: the beginning of what it is, in words.
        cells: cells of each column.
    """
    sides = find_sides(path)
    source: dict[str, Any] = {"kind": "series", "path": sides or path, "separator": form.separator}
    has_gaps = any(column.missing for column in steps)
    return Finding(
        path=path,
        what=f"{what} {len(steps)} for the steps of a time series",
        modality="series" if has_gaps else "vector",
        records=len(cells[steps[0].name]),
        columns=tuple(labels),
        source={**source, "labels": {"label": 1}, **({"gaps": "keep"} if has_gaps else {})},
        label="label",
        has_split=sides is not None,
        dim=len(steps),
    )


def find_sides(path: Path) -> dict[str, Path] | None:
    """Returns `train` and `test` -> file, where a file's name says so and another lies beside it."""
    for word, other in (("train", "test"), ("TRAIN", "TEST"), ("Train", "Test")):
        twin = path.with_name(path.name.replace(word, other))
        if word in path.stem and twin.is_file():
            return {"train": path, "test": twin}
    return None


# --- files of series, and the backbone -------------------------------------------------------------------------------


def probe_files(root: Path, cells: Sequence[str]) -> int:
    """Returns the number of channels of listed files of series.

    Args:
        root: folder of the table that lists them.
        cells: their paths.

    Raises:
        BadInput: the first ones cannot be read.
    """
    first = [cell for cell in cells if cell][:5]
    for cell in first:
        path = root / cell
        try:
            series = read_series(path.read_bytes(), path.suffix, "keep")
        except (OSError, BadRecord):
            continue
        return 1 if series.ndim == 1 else int(series.shape[1])
    raise BadInput(
        f"{root}: expected files with a series each, .npy or text with one time step a line; none of the "
        f"first {len(first)} that are listed can be read"
    )


def is_waveform(root: Path, cell: str) -> bool:
    """Returns whether a cell names a WFDB record, with or without its header's ending, or a file of EDF or BDF.

    Args:
        root: folder of the table.
        cell: the cell.
    """
    try:
        return cell.lower().endswith(WAVEFORMS) or (bool(cell) and (root / f"{cell}.hea").is_file())
    except (OSError, ValueError):
        return False


def describe_waveforms(root: Path, cells: Sequence[str]) -> dict[str, Any]:
    """Returns the settings that the first readable waveform gives: its channels and its rate.

    Args:
        root: folder of the table that lists them.
        cells: their paths.

    Raises:
        BadInput: the first ones cannot be read, or the packages for it are not installed.
    """
    require_readers()
    first = [cell for cell in cells if cell][:5]
    for cell in first:
        with contextlib.suppress(OSError, BadRecord):
            channels, rate_hz = list_channels(root / cell)
            if channels:
                return {"channels": channels, "rate_hz": rate_hz}
    raise BadInput(
        f"{root}: expected WFDB records or EDF files; none of the first {len(first)} that are listed can be read"
    )


def draft_backbone(finding: Finding, wanted: str | None, where: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the settings of a backbone that reads series with gaps, and comments on them.

    Args:
        finding: the data.
        wanted: folder that was asked for; None for none.
        where: its path as the file will have it.

    Raises:
        BadInput: it is no folder of a model.
    """
    if wanted is not None and not (Path(wanted).expanduser() / "config.json").is_file():
        raise BadInput(
            f"--backbone {wanted}: expected the folder of a PatchTST, PatchTSMixer, Chronos-Bolt or MOMENT, with its "
            "config.json, for series"
        )
    channels = finding.dim if finding.modality == "series" and finding.source["kind"] != "series" else 1
    settings: dict[str, Any] = {"kind": "time_series", "folder": FILL_IN if where is None else where}
    settings |= {"num_channels": channels, "channels": "apart"} if channels and channels > 1 else {}
    comments = {"folder": "   # of a PatchTST, PatchTSMixer, Chronos-Bolt or MOMENT; or --backbone FOLDER"}
    comments["projection"] = "   # `length` reads fewer time steps and is faster, see docs/reference/kinds.md"
    return {**settings, "projection": {"normalize": True}}, comments if where is None else {}
