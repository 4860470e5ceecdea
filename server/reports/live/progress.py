"""The progress of a run, from its journal alone: phase, rounds, time left, newest metrics, sites, epsilon so far."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from common.events import (
    FeaturesReady,
    HeadsEvaluated,
    Interval,
    QuorumAwaited,
    RepliesAwaited,
    RoundEnded,
    RoundEvaluated,
    RunEnded,
    RunEvent,
    RunFailure,
    RunInterruption,
    RunStarted,
    SiteJoined,
    SiteRejected,
)
from server.reports.live.spent import SpentSoFar

Phase = Literal["waiting to begin", "sites join and prepare", "training", "final steps", "training ended"]

_RECENT = 10
"""Rounds whose pace counts for the time left."""


@dataclass(frozen=True)
class NewestMetric:
    """A task's metric after the newest round that evaluated it.

    Attributes:
        value: None where it is undefined, or not readable for noise.
        interval: 95 % interval of its privacy noise; None where it is exact, or not readable.
    """

    value: float | None
    interval: Interval | None


@dataclass
class RunProgress:
    """The progress of a run, event by event.

    Attributes:
        started: its last start; None before the first.
        joined: names of the sites that joined.
        round: number of the last whole round.
        used: sites whose update the last round used.
        missing: site -> why its reply was not used since the last whole round.
        awaited: number of sites whose replies are awaited now; None where none are.
        metrics: task -> round of the newest metrics, whether they are noised, and the metrics.
        ended: the end of the last attempt; None while it lasts.
        spent: what each site has spent.
    """

    started: RunStarted | None = None
    joined: set[str] = field(default_factory=set)
    round: int = 0
    used: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    awaited: int | None = None
    metrics: dict[str, tuple[int, bool, dict[str, NewestMetric]]] = field(default_factory=dict)
    ended: RunEnded | RunFailure | RunInterruption | None = None
    spent: SpentSoFar = field(default_factory=SpentSoFar)
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT + 1))

    def add(self, event: RunEvent) -> None:
        """Adds the next event of the journal."""
        self.spent.add(event)
        self.awaited = len(event.node_ids) if isinstance(event, RepliesAwaited) else None
        match event:
            case RunStarted():
                self.started, self.ended, self.missing = event, None, {}
                self._times.clear()
            case SiteJoined():
                self.joined.add(event.site)
                self.missing.pop(event.site, None)
            case SiteRejected():
                self.missing[event.site] = event.reason
            case QuorumAwaited():
                self.missing |= event.sites
                self.awaited = len(event.sites)
            case FeaturesReady():
                self._times.append(event.time)
            case RoundEnded():
                self.round, self.used = event.round, tuple(event.sites)
                self.missing = {site: reason for site, reason in self.missing.items() if site not in event.sites}
                self._times.append(event.time)
            case RoundEvaluated():
                exact = {name: NewestMetric(value, None) for name, value in event.pooled.items()}
                self.metrics[event.task] = (event.round, False, exact)
            case HeadsEvaluated():
                for task, result in event.tasks.items():
                    noised = {
                        name: NewestMetric(value, result.compute_interval(name))
                        for name, value in result.metrics.items()
                    }
                    self.metrics[task] = (event.round, True, noised)
            case RunEnded() | RunFailure() | RunInterruption():
                self.ended = event
            case _:
                pass

    @property
    def rounds(self) -> int | None:
        """Number of rounds that the run asks for; None before it started."""
        return self.started.rounds if self.started else None

    @property
    def phase(self) -> Phase:
        """The phase that the run is in."""
        if self.started is None:
            return "waiting to begin"
        if self.ended is not None:
            return "training ended"
        if not self._times:
            return "sites join and prepare"
        return "training" if self.round < self.started.rounds else "final steps"

    def measure_pace(self) -> float | None:
        """Returns seconds a round, evaluations included, over the last rounds; None before this attempt had one."""
        times = list(self._times)
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def estimate_seconds_left(self) -> float | None:
        """Returns the duration of the rounds that are left at the pace of the last ones; None where it is not known."""
        pace = self.measure_pace()
        if pace is None or self.rounds is None or self.ended is not None:
            return None
        return pace * (self.rounds - self.round)
