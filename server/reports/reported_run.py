"""A run as its folder tells of it: the events of its journal, its settings, and the versions it was made with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.errors import instead
from common.events import (
    HeadsEvaluated,
    MomentsMeasured,
    RunEvent,
    RunStarted,
    SiteJoined,
    Summary,
    read_run_journal,
    select_events,
)
from common.privacy.accounting import Mechanism, compute_epsilon
from common.types import BadInput
from common.yaml import read_yaml
from server.reports.summary import DEPLOYMENT, FLOWER_APP, select_rounds, summarize

JOURNAL = "journal.jsonl"
_SWEEP = "sweep.csv"


@dataclass(frozen=True)
class ReportedRun:
    """A run as its folder tells of it.

    Attributes:
        folder: the run's folder.
        events: the events of its journal, in order.
        summary: what follows from them.
        environment: versions, digest of the code and seeds; empty where nothing is kept of them.
        settings: key path -> value of the run's own file; empty where none is kept.
    """

    folder: Path
    events: Sequence[RunEvent]
    summary: Summary
    environment: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def started(self) -> RunStarted:
        """The run's last start."""
        return select_events(self.events, RunStarted)[-1]

    @property
    def is_deployed(self) -> bool:
        """True where the coordinator saw no record: it knows only what sites released."""
        return self.summary.executor in (DEPLOYMENT, FLOWER_APP)

    @property
    def is_private(self) -> bool:
        """True where some site released something with noise, and nothing without."""
        return any(site.epsilon is not None and math.isfinite(site.epsilon) for site in self.summary.sites.values())

    @property
    def joined(self) -> dict[str, SiteJoined]:
        """Site -> its last agreement."""
        return {event.site: event for event in select_events(self.events, SiteJoined)}


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """Returns the runs in some folders; the folder of a sweep stands for all its runs.

    Raises:
        BadInput: a folder is not there, or is none of a run, or its journal cannot be read.
    """
    listed: list[Path] = []
    for folder in folders:
        swept = sorted(path.parent for path in folder.glob(f"*/{JOURNAL}")) if (folder / _SWEEP).is_file() else []
        listed += swept or [folder]
    return [read_run(folder) for folder in listed]


def read_run(folder: Path) -> ReportedRun:
    """Returns the run in a folder, ended or not.

    Raises:
        BadInput: the folder is not there, or is none of a run, or its journal cannot be read.
    """
    if not folder.exists():
        raise BadInput(f"{folder}: expected the folder of a run, but there is no such folder")
    path = folder / JOURNAL
    if not path.is_file():
        raise BadInput(f"{folder}: expected the folder of a run, found no {JOURNAL} in it")
    try:
        events = read_run_journal(path)
    except OSError as error:
        raise BadInput(f"{path}: expected a run's journal{instead(error)}") from error
    if not events:
        raise BadInput(f"{path}: expected a run's journal, found no event in it that can be read")
    if not select_events(events, RunStarted):
        raise BadInput(f"{path}: expected a run's journal, found events but not the beginning of a run")
    return ReportedRun(
        folder, events, summarize(events), _read_json(folder / "environment.json"), _read_settings(folder)
    )


def trace_epsilons(run: ReportedRun) -> dict[str, list[tuple[int, float]]]:
    """Returns for each site that joined the rounds after which it released something, and epsilon from then on.

    Round 0 stands for what is released before the first. An upper bound: it is the one that is computed at once, and
    the summary's may be smaller where records are sampled. Sites whose releases have no noise are left out.
    """
    rounds = select_rounds(run.events)
    moments = select_events(run.events, MomentsMeasured)[-1:]
    evaluations = {event.round: event for event in select_events(run.events, HeadsEvaluated)}
    traced: dict[str, list[tuple[int, float]]] = {}
    for site, joined in run.joined.items():
        counts: dict[Mechanism, int] = {}
        points: list[tuple[int, float]] = []
        for number in sorted({0, *rounds, *evaluations}):
            update = rounds[number].sites.get(site) if number in rounds else None
            found = [Mechanism.of(update.plan)] if update is not None else []
            others: Sequence[MomentsMeasured | HeadsEvaluated]
            others = moments if number == 0 else [evaluations[number]] if number in evaluations else []
            for event in others:
                noise = event.noise_multipliers.get(site, 0.0)
                found += [Mechanism("gaussian", noise, 1.0, 1, 1.0)] if noise > 0.0 else []
            for mechanism in found:
                kind = replace(mechanism, steps=1)
                counts[kind] = counts.get(kind, 0) + mechanism.steps
            if found:
                together = [replace(kind, steps=count) for kind, count in counts.items()]
                points.append((number, compute_epsilon(together, joined.delta, quick=True)))
        if points and math.isfinite(points[-1][1]):
            traced[site] = points
    return traced


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_settings(folder: Path) -> dict[str, str]:
    """Returns the settings of the run's file by their dotted keys."""
    try:
        values = read_yaml(folder / "config.yaml")
    except BadInput:
        return {}
    found: dict[str, str] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, each in value.items():
                add(f"{key}.{name}" if key else str(name), each)
        else:
            found[key] = str(value)

    add("", values)
    return found
