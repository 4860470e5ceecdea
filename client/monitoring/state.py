"""The state of a site at one moment, from its journal, ledger and folders.

It holds no record, and no number of records or of patients.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from client.config import Coordinator, SiteConfig
from client.ledger.history import History
from common.events import (
    ChoiceEnded,
    EncodingContinues,
    HeadsReceived,
    ReplyResent,
    ReplySent,
    RequestDeclined,
    RunJoined,
    RunPrepared,
    SiteEvent,
)
from common.process.lines import describe_duration
from common.types import DeclineReason

MAX_RECENT = 20


@dataclass
class SiteCounts:
    """The numbers of a site's journal.

    Attributes:
        joined: ids of the runs that the site joined.
        answered: purpose -> replies that were computed and charged.
        resent: stored replies that were sent again at no cost.
        declined: reason -> requests that were declined.
        bytes_sent: bytes of all these replies.
        seconds: duration of all charged answers, in seconds.
        last_declined: the last request that was declined, while no reply was sent after it.
        recent: time and description of the last events.
    """

    joined: set[str] = field(default_factory=set)
    answered: Counter[str] = field(default_factory=Counter)
    resent: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    seconds: float = 0.0
    last_declined: RequestDeclined | None = None
    recent: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))

    def add(self, event: SiteEvent) -> None:
        """Adds the next event of the journal."""
        match event:
            case RunJoined():
                self.joined.add(event.run_id)
                line = f"run {event.run_id}: joined"
            case EncodingContinues():
                # The page has no number of records.
                share = 100.0 * event.num_done / max(1, event.num_records)
                left = (event.num_records - event.num_done) / event.rate if event.rate else None
                line = f"run {event.run_id}: encoding, {share:.0f} % of a source"
                line += "" if left is None else f", {describe_duration(left)} left"
                if self.recent and self.recent[-1][1].startswith(f"run {event.run_id}: encoding"):
                    self.recent.pop()  # The newest one alone.
            case RunPrepared():
                line = f"run {event.run_id}: features are ready"
            case ReplySent():
                self.answered[event.purpose] += 1
                self.bytes_sent += event.size_bytes
                self.seconds += event.seconds or 0.0
                self.last_declined = None
                line = (
                    f"run {event.run_id}: round {event.round}, {event.purpose} reply sent, {event.size_bytes:,} bytes"
                )
            case ReplyResent():
                self.resent += 1
                self.bytes_sent += event.size_bytes
                line = f"run {event.run_id}: round {event.round}, stored reply sent again at no cost"
            case RequestDeclined():
                self.declined[event.reason if event.reason in set(DeclineReason) else "other"] += 1
                self.last_declined = event
                line = f"declined a request: {explain_decline(event)}"
            case HeadsReceived():
                line = f"run {event.run_id}: final heads received"
            case ChoiceEnded():
                line = f"run {event.run_id}: {event.chosen} was chosen"
            case _:
                line = event.event_name.replace("_", " ")
        self.recent.append((event.time, line))


def explain_decline(event: RequestDeclined) -> str:
    """Returns the reason for which a request was declined; the detail stays in the journal, which one user can read."""
    known = event.reason in set(DeclineReason)
    return f"{event.reason} ({DeclineReason(event.reason).explanation})" if known else event.reason


@dataclass
class Presence:
    """The connection to the coordinator, noted by the process that holds it.

    Attributes:
        joined: whether the site is joined.
        since: when that changed last, in seconds since 1970.
        last_contact: the last answer of the coordinator, in seconds since 1970; None before the first.
    """

    joined: bool = False
    since: float = field(default_factory=time.time)
    last_contact: float | None = None

    def note(self, joined: bool) -> None:
        """Notes that the coordinator answered, or that the connection is lost."""
        now = time.time()
        if joined:
            self.last_contact = now
        if joined != self.joined:
            self.joined, self.since = joined, now


@dataclass(frozen=True)
class SiteState:
    """The state of a site.

    Attributes:
        time: when this was true, in seconds since 1970.
        config: settings of the site, for one coordinator.
        coordinator: the coordinator.
        site_file: path of the site file, for the commands that the page names.
        version: version of this installation.
        code_digest: digest of its reviewed code.
        presence: the connection.
        counts: numbers of the journal.
        history: what the population has spent; None where its ledger cannot be read.
        ledger_problem: why it cannot be read; empty where it can.
        waiting: names of the runs that wait for the staff's decision.
        authority_days_left: days until the last of the coordinator's authorities expires; None where that is not known.
        free_bytes: free space where the state folder lies.
    """

    time: float
    config: SiteConfig
    coordinator: Coordinator
    site_file: Path
    version: str
    code_digest: str
    presence: Presence
    counts: SiteCounts
    history: History | None
    ledger_problem: str
    waiting: tuple[str, ...]
    authority_days_left: int | None
    free_bytes: int
