"""A run's progress, told from its journal: per round and site while it lasts. Watching changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from common.events import (
    BackboneSent,
    FeaturesReady,
    HeadsEvaluated,
    RoundEnded,
    RunEnded,
    RunEvent,
    RunStarted,
    SiteJoined,
    SiteRejected,
    read_run_journal,
)
from common.types import RunFailed, explain_rejection
from server.superlink.control import Control, DaemonUnreachable, RunState

_LOOK_S = 0.5
_SILENCE_S = 90.0

Show = Callable[[str], None]


def watch(
    control: Control, folder: Path, *, engine_run: int, alive: Callable[[], bool], show: Show, skip: int = 0
) -> RunState:
    """Follow a run until its process has ended.

    Args:
        control: line to the link.
        folder: the run's.
        engine_run: the engine's number for the run.
        alive: whether the link's process is there.
        show: is told in one line what happens.
        skip: journal lines that are old: of an interrupted run that continues.

    Raises:
        RunFailed: the link does not answer any more.
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
            state = next((run for run in control.list_runs() if run.run_id == engine_run), None)
            silent_since = None
        except DaemonUnreachable as error:
            silent_since = silent_since or time.monotonic()
            if not alive() or time.monotonic() - silent_since > _SILENCE_S:
                raise RunFailed(
                    f"run {folder.name}: {error}: it ended while the run was under way; see state/link.log, then "
                    "`python -m server resume` continues after the last whole round"
                ) from error
            state = None
        if state is not None and state.finished and len(read_run_journal(folder / "journal.jsonl")) == skip:
            return state
        time.sleep(_LOOK_S)


def describe_event(event: RunEvent, rounds: int) -> str | None:
    """Returns one line about an event of a run that has so many rounds; None where a person need not see it."""
    match event:
        case RunStarted():
            again = " (continued)" if event.resumed else ""
            return f"run {event.run_id}{again}: {', '.join(event.tasks)}; waiting for sites"
        case SiteJoined():
            return f"{event.site} joined with {', '.join(event.tasks)}"
        case SiteRejected():
            return f"{event.site} rejected at {event.stage}: {explain_rejection(event.reason)}"
        case BackboneSent():
            return f"{event.site} received {event.backbone}, {event.size_bytes:,} bytes"
        case FeaturesReady():
            return f"sites are ready after {event.seconds:.1f} s"
        case RoundEnded():
            return _describe_round(event, rounds)
        case HeadsEvaluated():
            return f"round {event.round}: evaluated on held-out units, noised"
        case RunEnded():
            received = "the" if event.num_sites is None else f"{event.num_received} of {event.num_sites}"
            return f"final heads sent to {received} sites"
        case _:
            return None


def _describe_round(event: RoundEnded, rounds: int) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in event.num_updates.items())
    unchanged = [name for name in event.num_updates if name not in event.updated]
    kept = f"; not enough for {', '.join(unchanged)}, left unchanged" if unchanged else ""
    sites = ", ".join(event.sites) or "no site"
    return f"round {event.round} of {rounds}: {sites}; updates: {counts}{kept}; {event.seconds:.1f} s"
