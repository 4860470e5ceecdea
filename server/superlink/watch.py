"""The progress of a run, shown from its journal while the run lasts. Watching a run does not change it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from common.events import (
    BackboneSent,
    FeaturesReady,
    HeadsEvaluated,
    QuorumAwaited,
    RoundEnded,
    RunEnded,
    RunEvent,
    RunStarted,
    SiteJoined,
    SitePreparedAgain,
    SiteRejected,
    read_run_journal,
)
from common.types import RunFailed, explain_rejection
from server.superlink.control import Control, DaemonUnreachable, RunState

_POLL_S = 0.5
_MAX_SILENCE_S = 90.0

Show = Callable[[str], None]
"""Shows one line to a person."""


def watch(
    control: Control, folder: Path, *, flower_run_id: int, alive: Callable[[], bool], show: Show, skip: int = 0
) -> RunState:
    """Shows the events of a run until its process has ended, and returns the state that Flower reports of it.

    Args:
        control: connection to the daemon.
        folder: folder of the run.
        flower_run_id: Flower's id of the run.
        alive: returns whether the daemon's process exists.
        show: shows one line for each event that matters to a person.
        skip: number of events that an earlier attempt wrote to the journal; they are not shown.

    Raises:
        RunFailed: the daemon's process ended, or did not answer for 90 seconds.
    """
    silent_since: float | None = None
    rounds = 0
    while True:
        events = read_run_journal(folder / "journal.jsonl")
        for event in events[skip:]:
            rounds = event.rounds if isinstance(event, RunStarted) else rounds
            line = describe_event(event, rounds)
            if line:
                show(line)
        skip = len(events)
        try:
            state = next((run for run in control.list_runs() if run.run_id == flower_run_id), None)
            silent_since = None
        except DaemonUnreachable as error:
            silent_since = silent_since or time.monotonic()
            if not alive() or time.monotonic() - silent_since > _MAX_SILENCE_S:
                raise RunFailed(
                    f"run {folder.name}: {error}: it ended while the run was under way; see state/link.log, then "
                    "`headwater coordinator resume` continues after the last whole round"
                ) from error
            state = None
        if state is not None and state.finished and len(read_run_journal(folder / "journal.jsonl")) == skip:
            return state
        time.sleep(_POLL_S)


def describe_event(event: RunEvent, rounds: int) -> str | None:
    """Returns one line about an event of a run that has so many rounds; None where a person need not see it."""
    match event:
        case RunStarted():
            again = " (continued)" if event.resumed else ""
            return f"run {event.run_id}{again}: {', '.join(event.tasks)}; waiting for sites"
        case SiteJoined():
            late = f" from round {event.first_round} of {rounds}" if event.first_round > 1 else ""
            return f"{event.site} joined with {', '.join(event.tasks)}{late}"
        case SiteRejected():
            return f"{event.site} rejected at {event.stage}: {explain_rejection(event.reason)}"
        case SitePreparedAgain():
            again = "prepared again" if event.ready else "was asked to prepare again, and could not"
            return f"{event.site} had lost what it prepared and {again}; nothing was charged for it"
        case BackboneSent():
            return f"{event.site} received {event.backbone}, {event.size_bytes:,} bytes"
        case FeaturesReady():
            return f"sites are ready after {event.seconds:.1f} s"
        case QuorumAwaited():
            missing = "; ".join(f"{site}: {explain_rejection(reason)}" for site, reason in event.sites.items())
            return f"round {event.round} waits for its quorum, {event.seconds:.0f} s at most: {missing}"
        case RoundEnded():
            return _describe_round(event, rounds)
        case HeadsEvaluated():
            without = "; ".join(f"{site}: {explain_rejection(reason)}" for site, reason in event.rejected.items())
            return f"round {event.round}: evaluated on held-out units, noised" + (
                f"; not by {without}" if without else ""
            )
        case RunEnded():
            received = "the" if event.num_sites is None else f"{event.num_received} of {event.num_sites}"
            without = "; ".join(f"{site}: {explain_rejection(reason)}" for site, reason in event.missing.items())
            return f"final heads sent to {received} sites" + (f"; not to {without}" if without else "")
        case _:
            return None


def _describe_round(event: RoundEnded, rounds: int) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in event.num_updates.items())
    unchanged = [name for name in event.num_updates if name not in event.updated]
    kept = f"; not enough for {', '.join(unchanged)}, left unchanged" if unchanged else ""
    sites = ", ".join(
        site if update.round is None else f"{site} (its update of round {update.round}, which came late)"
        for site, update in event.sites.items()
    )
    return f"round {event.round} of {rounds}: {sites or 'no site'}; updates: {counts}{kept}; {event.seconds:.1f} s"
