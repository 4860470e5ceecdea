"""The numbers of a run's journal as points of curves, round by round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import final

from common.events import (
    BaselineEvaluated,
    Event,
    FeaturesReady,
    HeadsEvaluated,
    Metrics,
    MetricsEvaluated,
    RoundEnded,
    RoundEvaluated,
    RunEvent,
    RunStarted,
)
from server.reports.live.spent import SpentSoFar
from server.reports.trackers import Point

_EPSILON = "epsilon/largest of all sites"


@final
class PointMaker:
    """Makes the points of a journal, event by event."""

    def __init__(self) -> None:
        self._round, self._spent = 0, SpentSoFar()

    def make(self, event: RunEvent) -> list[Point]:
        """Returns the points of the next event; none where it has no number that is a curve."""
        self._spent.add(event)
        if isinstance(event, RoundEnded | RoundEvaluated | HeadsEvaluated):
            self._round = event.round
        named = [(curve, value) for curve, value in self._list_values(event) if value is not None]
        return [Point(curve, self._round, value, event.time) for curve, value in named if math.isfinite(value)]

    def _list_values(self, event: Event) -> Iterator[tuple[str, float | None]]:
        match event:
            case FeaturesReady():
                yield "seconds/features", event.seconds
            case RoundEnded():
                yield "seconds/round", event.seconds
                yield "sites/updates used", float(len(event.sites))
                yield "bytes/to sites", float(sum(each.bytes_down for each in event.sites.values()))
                yield "bytes/from sites", float(sum(each.bytes_up for each in event.sites.values()))
                yield _EPSILON, self._spent.find_largest()
            case RoundEvaluated():
                yield from _name(event.task, event.pooled)
            case HeadsEvaluated():
                yield _EPSILON, self._spent.find_largest()
                for task, result in event.tasks.items():
                    yield from _name(f"{task}/noised", result.metrics)
                    intervals = {metric: result.compute_interval(metric) for metric in result.metrics}
                    for metric, interval in intervals.items():
                        if interval is not None:
                            yield f"{task}/noised/{metric} low", interval[0]
                            yield f"{task}/noised/{metric} high", interval[1]
            case MetricsEvaluated():
                yield from _name(f"{event.task}/final", event.pooled)
            case BaselineEvaluated():
                for task, metrics in event.metrics.items():
                    yield from _name(f"{task}/{event.name}", metrics)
            case _:
                pass


def describe_settings(started: RunStarted) -> dict[str, str]:
    """Returns the facts of a run that are no numbers."""
    facts = {
        "name": started.name,
        "executor": started.executor,
        "path": started.path,
        "rounds": str(started.rounds),
        "tasks": ", ".join(f"{name} ({kind})" for name, kind in started.tasks.items()),
        "backbones": ", ".join(f"{name} {facts.digest}" for name, facts in started.backbones.items()),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _name(prefix: str, metrics: Metrics) -> Iterable[tuple[str, float | None]]:
    return ((f"{prefix}/{metric}", value) for metric, value in metrics.items())
