"""The numbers in a run's journal, added up event by event, so that a long journal is read only once."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from common.events import (
    BackboneSent,
    QuorumAwaited,
    RepliesAwaited,
    RoundEnded,
    RunEvent,
    RunStarted,
    SiteJoined,
    SiteRejected,
)
from common.types import DECLINED, DeclineReason
from server.reports.live.spent import SpentSoFar
from server.rounds.replies import NO_REPLY, NOT_REACHED, UNREADABLE
from server.superlink.watch import describe_event

MAX_RECENT = 20
_CLASSES = {NO_REPLY: "no_reply", NOT_REACHED: "not_reached", UNREADABLE: "unreadable"}


@dataclass
class RunCounts:
    """The numbers of one run's journal.

    Attributes:
        started: its last start; None before the first.
        rounds: numbers of the rounds that ended.
        seconds: duration of all rounds.
        last_seconds: duration of the last one.
        joined: site -> its last agreement.
        accepted: site -> updates that were used.
        rejected: site, stage and class of the reason -> replies that were not used.
        bytes_down: site -> bytes sent to it in rounds, and backbones.
        bytes_up: site -> bytes of its updates that were used.
        spent: what each site has spent.
        waiting: the last request whose replies were awaited, or the quorum that was, while nothing came after it.
        last_rejected: site -> its last rejection.
        last_time: time of the last event, in seconds since 1970; None before the first.
        recent: time and description of the last events.
    """

    started: RunStarted | None = None
    rounds: set[int] = field(default_factory=set)
    seconds: float = 0.0
    last_seconds: float | None = None
    joined: dict[str, SiteJoined] = field(default_factory=dict)
    accepted: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    bytes_down: Counter[str] = field(default_factory=Counter)
    bytes_up: Counter[str] = field(default_factory=Counter)
    spent: SpentSoFar = field(default_factory=SpentSoFar)
    waiting: RepliesAwaited | QuorumAwaited | None = None
    last_rejected: dict[str, SiteRejected] = field(default_factory=dict)
    last_time: float | None = None
    recent: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))

    def add(self, event: RunEvent) -> None:
        """Adds the next event of the journal."""
        self.last_time = event.time
        self.spent.add(event)
        self.waiting = event if isinstance(event, RepliesAwaited | QuorumAwaited) else None
        match event:
            case RunStarted():
                self.started = event
            case SiteJoined():
                self.joined[event.site] = event
            case SiteRejected():
                self.rejected[event.site, event.stage, classify_reason(event.reason)] += 1
                self.last_rejected[event.site] = event
            case BackboneSent():
                self.bytes_down[event.site] += event.size_bytes
            case RoundEnded():
                self._add_round(event)
            case _:
                pass
        line = describe_event(event, self.num_rounds or 0)
        if line:
            self.recent.append((event.time, line))

    @property
    def num_rounds(self) -> int | None:
        """Number of rounds that the run asks for; None before it started."""
        return self.started.rounds if self.started else None

    def compute_epsilon(self, site: str) -> float | None:
        """Returns an upper bound on epsilon of a site's used updates and evaluations; None where it did not join.

        From the public numbers that the site declared. It is the bound that is computed at once: a run's results say a
        smaller one where records are sampled.
        """
        return self.spent.compute_epsilon(site)

    def _add_round(self, event: RoundEnded) -> None:
        self.rounds.add(event.round)
        self.seconds += event.seconds
        self.last_seconds = event.seconds
        for site, update in event.sites.items():
            self.accepted[site] += 1
            self.bytes_down[site] += update.bytes_down
            self.bytes_up[site] += update.bytes_up


def classify_reason(reason: str) -> str:
    """Returns the class of a reason for which a reply was not used: one of a fixed list, for a metric's label."""
    word = reason.removeprefix(DECLINED)
    if word != reason:
        return f"declined_{word}" if word in set(DeclineReason) else "declined_other"
    if "(error " in reason or reason.startswith("error "):
        return "lost"
    return _CLASSES.get(reason, "invalid")
