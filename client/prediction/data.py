"""The records that a model is to predict: a file's sources by its settings, or data without any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.data.records import RejectedRecord, select_rows
from client.data.sources import Source, open_source
from client.data.sources.parts.boundary import try_record
from client.data.trial import list_clipped
from client.prediction.plain import open_plain, takes
from client.prediction.records import Chosen, Part
from common.backbones import ReadsColumns
from common.plugins import Spec
from common.serving.network import Model
from common.types import BadInput
from common.yaml import parse, read_yaml

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Records:
    """All records that a model is to predict.

    Attributes:
        parts: them, source by source.
        notes: how they are read, and what is left out, in words; nothing of their content.
        rejected: rows that name no record.
    """

    parts: Sequence[Part]
    notes: Sequence[str]
    rejected: Sequence[RejectedRecord] = field(default=(), repr=False)

    @property
    def num_records(self) -> int:
        """The number of records."""
        return sum(len(part.source.index()) for part in self.parts)


def choose_tasks(model: Model, names: Iterable[str]) -> list[str]:
    """Returns the named tasks of a model, or all. Raises BadInput where it has no such task."""
    wanted = list(dict.fromkeys(names))
    return [model.choose_task(name) for name in wanted] or list(model.tasks)


def open_records(
    model: Model,
    data: Path | pd.DataFrame | Sequence[str | Path],
    *,
    tasks: Sequence[str],
    columns: Sequence[str] = (),
    source: str | None = None,
) -> Records:
    """Returns the records of data that some of a model's tasks can be predicted of.

    Args:
        model: the model.
        data: a YAML file with the settings of a source or with sources, any other file or a folder, a table in memory,
            or paths of files.
        tasks: names of tasks.
        columns: of a table the column of texts or paths, and of pairs of texts the second one too; of an .npz file the
            array; empty where it is to be found.
        source: name of one of the file's sources, for all tasks.

    Raises:
        BadInput: there is nothing that can be read, or nothing that the model's backbones take.
    """
    if isinstance(data, Path) and data.suffix.lower() in SETTINGS:
        if columns:
            raise BadInput(f"--column: expected none beside the settings of {data}, which name the columns")
        return _open_settings(model, data, tasks, source)
    if source is not None:
        raise BadInput("--source: expected it beside a file that names sources (.yaml, or --site)")
    return _open_without_settings(model, data, tasks, columns)


def describe_clipped(model: Model, records: Records) -> list[str]:
    """Returns a sentence for each column with numbers beyond the range that the model declares."""
    lines = []
    for part in records.parts:
        counts, positions = Counter[str](), range(len(part.source.index()))
        for name in dict.fromkeys(model.config.tasks[task].backbone for task in part.tasks):
            kind = model.backbones[name].kind
            if not isinstance(kind, ReadsColumns):
                continue
            for position in positions:
                found, _ = try_record(partial(list_clipped, kind, part.source, position))
                counts.update(found or ())
        lines += [
            f"column {column}: {count} of {len(positions)} numbers lie beyond the model's range, and are clipped"
            for column, count in counts.items()
        ]
    return lines


def _open_settings(model: Model, path: Path, tasks: Sequence[str], source: str | None) -> Records:
    values = read_yaml(path)
    if "kind" in values:
        return _open_one(model, path, tasks, values)
    sources = values.get("sources")
    if not isinstance(sources, Mapping) or not sources:
        raise BadInput(f"{path}: expected `kind` and the other settings of one source, or `sources`, found neither")
    if {"registry", "state_dir"} <= set(values):
        raise BadInput(
            f"{path}: expected data, got a site file; --site {path} reads its sources, and leaves out whom it must"
        )
    chosen = dict.fromkeys(tasks, source) if source is not None else _find_sources(values, tasks, list(sources))
    unknown = sorted({name for name in chosen.values() if name not in sources}, key=str)
    if unknown:
        raise BadInput(f"--source: expected one of {', '.join(sources)}, got {unknown[0]!r}")
    parts, rejected = [], []
    for name in dict.fromkeys(name for name in sources if name in chosen.values()):
        opened, others = _open_spec(path, sources[name], f"sources.{name}")
        parts.append(Part(name, opened, [task for task in tasks if chosen.get(task) == name]))
        rejected += others
    left_out = [f"task {task}: left out, no source of the file is for it" for task in tasks if task not in chosen]
    return Records(parts, [*(f"source {part.name}: {', '.join(part.tasks)}" for part in parts), *left_out], rejected)


def _find_sources(values: Mapping[str, Any], tasks: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """Returns the source of each task as a file states it; of a file with one source, that one for all."""
    stated = values.get("tasks")
    stated = stated if isinstance(stated, Mapping) else {}
    found = {task: stated[task].get("source") for task in tasks if isinstance(stated.get(task), Mapping)}
    if not found and len(sources) == 1:
        return dict.fromkeys(tasks, sources[0])
    if not found:
        raise BadInput(f"--source: expected one of {', '.join(sources)}, because the file says of no task where it is")
    return found


def _open_one(model: Model, path: Path, tasks: Sequence[str], values: Mapping[str, Any]) -> Records:
    opened, rejected = _open_spec(path, values, "data")
    kept = list(tasks)
    if len({model.config.tasks[task].backbone for task in tasks}) > 1:
        kept = [task for task in tasks if takes(model.backbones[model.config.tasks[task].backbone], opened)]
        if not kept:
            raise BadInput(f"{path}: expected records that a backbone of the model takes, got others")
    return Records([Part("", opened, kept)], [f"source of {path.name}", *_describe_left_out(tasks, kept)], rejected)


def _open_spec(path: Path, values: Any, key: str) -> tuple[Source, list[RejectedRecord]]:
    spec = parse(Spec, values if isinstance(values, Mapping) else {}, base=path.resolve().parent)
    kind = open_source(spec, key)
    source = kind.open()
    if kind.rows is None:
        return source, []
    sides, rejected = select_rows(kind.rows, source.index())
    return Chosen(source, sorted(sides)), rejected


def _open_without_settings(
    model: Model, data: Path | pd.DataFrame | Sequence[str | Path], tasks: Sequence[str], columns: Sequence[str]
) -> Records:
    """Returns data as each backbone reads it; tasks on backbones that read the same share a part."""
    backbones = list(dict.fromkeys(model.config.tasks[task].backbone for task in tasks))
    parts: dict[str, Part] = {}
    notes: list[str] = []
    refused: BadInput | None = None
    for name in backbones:
        own = [task for task in tasks if model.config.tasks[task].backbone == name]
        try:
            opened = open_plain(data, model.backbones[name], columns)
        except BadInput as error:
            refused = refused or error
            continue
        if len(backbones) > 1 and not takes(model.backbones[name], opened.source):
            continue
        digest = opened.source.digest() if len(backbones) > 1 else ""
        if digest not in parts:
            notes.append(opened.how)
        before = parts.get(digest, Part("", opened.source, []))
        parts[digest] = replace(before, tasks=[*before.tasks, *own])
    if not parts:
        raise refused or BadInput("data: expected records that a backbone of the model takes, got others")
    kept = [task for part in parts.values() for task in part.tasks]
    named = list(parts.values())
    if len(named) > 1:
        named = [replace(part, name=", ".join(part.tasks)) for part in named]
    return Records(named, [*notes, *_describe_left_out(tasks, kept)])


def _describe_left_out(tasks: Sequence[str], kept: Sequence[str]) -> list[str]:
    return [f"task {task}: left out, its backbone takes other records" for task in tasks if task not in kept]
