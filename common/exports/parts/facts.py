"""Facts that the folder of a run holds beside its model: who took part, who judged the model on what, and the audit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from common.errors import instead
from common.events import Intervals, MetricsEvaluated, SiteJoined, Summary, read_run_journal, select_events
from common.serving.folder import find_model
from common.types import BadInput


@dataclass(frozen=True)
class RunFacts:
    """A run as its coordinator or simulator journalled it.

    Attributes:
        summary: result and cost of the run.
        public_sizes: site -> task -> declared number of units.
        intervals: task -> metric -> 95 % interval over the choice of held-out units, of a simulation.
        errors: task -> metrics that are the better the smaller they are.
        environment: versions and code digest that the run was made with; empty where they are not known.
    """

    summary: Summary
    public_sizes: Mapping[str, Mapping[str, int]]
    intervals: Mapping[str, Intervals] = field(default_factory=dict)
    errors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


def read_run_facts(path: Path) -> RunFacts | None:
    """Returns the facts of the run that a model is the result of; None where its folder is not around the model.

    Args:
        path: folder of the model, or of its run.

    Raises:
        BadInput: there is no model, or the run's summary or journal is damaged.
    """
    folder = find_model(path).parent
    if not (folder / "summary.json").is_file() or not (folder / "journal.jsonl").is_file():
        return None
    try:
        summary = Summary.model_validate_json((folder / "summary.json").read_bytes())
        environment = folder / "environment.json"
        versions = json.loads(environment.read_bytes()) if environment.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        detail = "" if isinstance(error, ValidationError) else instead(error)
        raise BadInput(f"{folder}: expected the summary and versions of a finished run{detail}") from error
    events = read_run_journal(folder / "journal.jsonl")
    metrics = {event.task: event for event in select_events(events, MetricsEvaluated)}
    return RunFacts(
        summary=summary,
        public_sizes={event.site: dict(event.tasks) for event in select_events(events, SiteJoined)},
        intervals={task: event.pooled_intervals for task, event in metrics.items()},
        errors={task: event.errors for task, event in metrics.items()},
        environment=versions if isinstance(versions, dict) else {},
    )
