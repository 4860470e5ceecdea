"""Checks of a simulation file before anything runs: every setting, the files that it names, and their columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from client.aligners import open_aligners
from client.data.checks import check_drawn
from client.data.records import check_values
from client.data.sources import SourceRecord, open_source
from client.protocol.requirements import untrained_modules
from client.solvers import SummingSolver, open_solver
from common.backbones import Kind, ReadsBags
from common.model.moments import has_classes, list_parts
from common.plugins import Spec, resolve
from common.run import RunConfig, resolve_backbone_paths
from common.tasks import NamedParts, Task, open_task
from common.types import BadInput, Unit
from server.rounds.aggregators import check_trust, open_aggregator
from simulations.config import RUN_PREFIX, SimulatedTask, SimulationConfig
from simulations.executors.gathered import check_gathered
from simulations.partition import list_sources

MAX_LOOKED_AT = 1000
"""Records of a source whose masks or boxes are read, evenly spaced."""


def check_simulation(config: SimulationConfig) -> Mapping[str, Task]:
    """Resolves every plug-in that a simulation names, without running anything, and returns its tasks by name.

    Raises:
        BadInput: a setting is wrong; the first one is named.
    """
    run = config.run
    if run.choice is not None:
        raise BadInput("run.choice: expected none in a simulation; `headwater simulate choose` has its sites vote")
    resolve_backbone_paths(run, RUN_PREFIX)  # Resolves every backbone.
    tasks = {name: open_task(spec, f"{RUN_PREFIX}tasks.{name}") for name, spec in run.tasks.items()}
    for key, spec in list_sources(config).items():
        open_source(spec, key)
    solver = open_solver(run.solver, f"{RUN_PREFIX}solver")
    for name in (None, *run.tasks):
        open_aggregator(run.aggregation_of(name), f"{RUN_PREFIX}aggregation")
    check_trust(run, f"{RUN_PREFIX}aggregation")
    if run.trust is not None and not isinstance(solver, SummingSolver):
        raise BadInput(f"run.solver.kind: expected head_sum with `trust: secure_sum`, got {solver.kind}")
    privacy = run.requested_privacy
    if privacy is not None and privacy.unit != config.unit:
        raise BadInput(f"run.privacy.unit: expected the sites' unit {config.unit.value!r}, got {privacy.unit.value!r}")
    solver.plan(privacy, config.unit, run.rounds)
    solver.check_modules(untrained_modules(run, tasks))
    list_parts(run, tasks)
    for name, task in tasks.items():
        check_values(name, task, config.tasks[name])
    if run.audit == "required" and privacy is None:
        raise BadInput("run.audit: expected a private run where an audit is required, got privacy: non_private")
    open_aligners(config.aligners, "aligners")
    if config.leave_out is not None and config.personal == "tied":
        raise BadInput("personal: expected none, prior, fit or adapt beside `leave_out`: that site releases nothing")
    if config.leave_out is not None and config.personal != "none" and run.trainable:
        raise BadInput("personal: expected none beside `leave_out` where a backbone trains")
    if config.personal == "adapt":
        _check_adaptable(run, tasks)
    if config.executor.kind == "batched":
        check_gathered(config)
    if config.non_private_solver is not None:
        other = open_solver(config.non_private_solver, "non_private_solver")
        if other.private:
            raise BadInput(f"non_private_solver.kind: expected a solver without privacy, got {other.kind!r}")
    return tasks


def _check_adaptable(run: RunConfig, tasks: Mapping[str, Task]) -> None:
    if not any(has_classes(task) for task in tasks.values()):
        raise BadInput("personal: expected a task of kind classification for `adapt`; `fit` takes any task")
    for key in ("classes", "scatter"):
        if run.moments is None or not getattr(run.moments, key):
            raise BadInput(
                f"run.moments.{key}: expected a share above 0 for `personal: adapt`, as in `moments: {{classes: 0.1, "
                "scatter: 0.05}` beside `solver: {kind: auto}`; got none"
            )


def list_missing_files(config: SimulationConfig) -> list[str]:
    """Returns one sentence for each file or folder that a simulation names and that does not exist.

    No file is opened. Weights that `simulations pretrain` is to write are not looked for; files that a table lists are
    looked for when a run prepares its records.
    """
    run = config.run
    named: list[tuple[str, Path]] = []
    for key, spec in list_sources(config).items():
        named += _find_paths(open_source(spec, key), key)
    for position, spec in enumerate([] if config.pretrain is None else config.pretrain.sources):
        key = f"pretrain.sources.{position}"
        named += _find_paths(open_source(spec, key), key)
    for name, spec in run.backbone_specs.items():
        if name != config.pretrained_backbone():
            key = f"{RUN_PREFIX}{run.backbone_key(name)}"
            kind: Kind = resolve("common.backbones", spec, key)
            named += _find_paths(kind, key)
            if isinstance(kind, ReadsBags):
                named += _find_paths(kind.open_encoder(), f"{key}.encoder")
    # Several sites may name the same path: it is reported once, under the first key.
    missing = {path: key for key, path in reversed(named) if not path.exists()}
    return [f"{key}: {path} is missing" for path, key in reversed(missing.items())]


def check_sources(config: SimulationConfig, tasks: Mapping[str, Task]) -> Iterator[str]:
    """Opens every source, and yields one sentence for each thing that may be wrong with masks or boxes.

    Of other labels the columns are looked for, and no cell is read.

    Args:
        config: the simulation.
        tasks: its tasks by name.

    Raises:
        BadInput: a source cannot be opened, lacks a column of labels, or has no patients where they are the unit.
    """
    for key, spec in list_sources(config).items():
        index = _open_index(spec, key)
        if config.unit is Unit.PATIENT and index and all(record.patient is None for record in index):
            raise BadInput(f"{key}: expected patients, because `unit` is patient; name their column as `patient`")
        for name, task in tasks.items():
            own = config.tasks[name]
            if key.rpartition(".")[2] != own.source:
                continue
            _check_columns(index, own.columns, f"{key}: tasks.{name}.label")
            if isinstance(task, NamedParts):
                yield from _list_drawn_warnings(index, own, task, f"{key}: tasks.{name}", name)
    if config.pretrain is not None:
        for position, spec in enumerate(config.pretrain.sources):
            index = _open_index(spec, f"pretrain.sources.{position}")
            if config.pretrain.label is not None:
                _check_columns(index, [config.pretrain.label], f"pretrain.sources.{position}: pretrain.label")


def _open_index(spec: Spec, key: str) -> Sequence[SourceRecord]:
    opened = open_source(spec, key)
    try:
        return opened.open().index()
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from error


def _check_columns(index: Sequence[SourceRecord], columns: Sequence[str], key: str) -> None:
    """Raises BadInput where records lack a column. No other column is named: a file may have no line of names."""
    absent = [column for column in columns if index and not any(column in record.cells for record in index)]
    if absent:
        raise BadInput(f"{key}: expected a column of the source, got {absent[0]!r}, which it does not have")


def _list_drawn_warnings(
    index: Sequence[SourceRecord], own: SimulatedTask, task: Task, key: str, name: str
) -> Iterator[str]:
    records = _spread(index)
    some = f" ({len(records)} of {len(index)} records were read)" if len(records) < len(index) else ""
    for _, outcome, detail, remedy in check_drawn(name, own, task, records):
        if outcome != "pass":
            yield f"{key}: {detail}{some}; {remedy}"


def _spread(index: Sequence[SourceRecord]) -> list[SourceRecord]:
    positions = {round(at) for at in np.linspace(0, len(index) - 1, MAX_LOOKED_AT)} if index else set()
    return [index[position] for position in sorted(positions)]


def _find_paths(value: Any, key: str) -> Iterator[tuple[str, Path]]:
    """Yields every path in some settings with its key; `key` is the key of the settings themselves."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _find_paths(getattr(value, name), f"{key}.{name}")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _find_paths(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            yield from _find_paths(inner, f"{key}.{position}")
