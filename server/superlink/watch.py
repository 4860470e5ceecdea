"""The progress of a run, shown from its journal while the run lasts. Watching a run does not change it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from common.errors import explain_os_error
from common.events import (
    BackboneSent,
    FeaturesReady,
    HeadsEvaluated,
    MomentsMeasured,
    QuorumAwaited,
    RoundEnded,
    RunEnded,
    RunEvent,
    RunStarted,
    SiteJoined,
    SitePreparedAgain,
    SiteRejected,
    VotesCounted,
    read_run_journal,
)
from common.files import check_room
from common.types import RunFailed, explain_rejection
from server.deployment.federation import ROOM_BYTES
from server.rounds.replies import MAY_CHANGE
from server.superlink.queue import PENDING, describe_run, is_worked_on

_POLL_S = 0.5
_ENDING_S = 3.0
"""Time after the daemon's end in which the run's process ends too."""

Show = Callable[[str], None]
"""Shows one line to a person."""


def watch(folder: Path, *, alive: Callable[[], bool], show: Show) -> None:
    """Shows the events of a run since it was last asked for, until it has ended and no process works on it.

    Args:
        folder: folder of the run.
        alive: returns whether the daemon's process exists.
        show: shows one line for each event that matters to a person.

    Raises:
        RunFailed: the daemon's process ended before the run did.
    """
    rounds, shown, said = 0, describe_run(folder).order.skip, ""
    last_alive = time.monotonic()
    while True:
        if alive():
            last_alive = time.monotonic()
        run = describe_run(folder)
        events = read_run_journal(folder / "journal.jsonl")
        for event in events[shown:]:
            rounds = event.rounds if isinstance(event, RunStarted) else rounds
            line = describe_event(event, rounds)
            if line:
                show(line)
        shown = len(events)
        if run.state not in PENDING and not is_worked_on(folder):
            return
        problem = _find_lack_of_room(folder) if run.order.attempts and not is_worked_on(folder) else ""
        if problem and problem != said:
            show(f"run {run.id} waits: {problem}; the coordinator then goes on with it by itself")
        said = problem
        if time.monotonic() - last_alive > _ENDING_S:
            raise RunFailed(
                f"run {run.id}: the coordinator ended while the run was {run.state}; see state/link.log; "
                f"`headwater coordinator serve {folder.parents[1]}` goes on with it"
            )
        time.sleep(_POLL_S)


def _find_lack_of_room(folder: Path) -> str:
    """Returns in a sentence that the disk is nearly full; an empty text where it is not."""
    try:
        check_room(folder, ROOM_BYTES)
    except OSError as error:
        return explain_os_error(error)
    return ""


def describe_event(event: RunEvent, rounds: int) -> str | None:
    """Returns one line about an event of a run that has so many rounds; None where a person need not see it."""
    match event:
        case RunStarted():
            again = " (continued)" if event.resumed else ""
            what = ", ".join(event.tasks) or f"a vote on {len(event.backbones)} backbones"
            return f"run {event.run_id}{again}: {what}; waiting for sites"
        case SiteJoined():
            late = f" from round {event.first_round} of {rounds}" if event.first_round > 1 else ""
            return f"{event.site} joined with {', '.join(event.tasks)}{late}"
        case SiteRejected() if event.stage == "join" and event.reason in MAY_CHANGE:
            # It is asked again while sites may join.
            return f"{event.site} has not joined so far: {explain_rejection(event.reason)}"
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
        case MomentsMeasured():
            return f"features and labels measured at {', '.join(event.noise_multipliers)}  [{event.seconds:.1f} s]"
        case VotesCounted():
            return _describe_votes(event)
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
            sent = "final heads sent" if event.updates else "the result was sent"
            return f"{sent} to {received} sites" + (f"; not to {without}" if without else "")
        case _:
            return None


def _describe_votes(event: VotesCounted) -> str:
    votes = ", ".join(f"{site} for {vote}" for site, vote in event.votes.items())
    few = (
        f"; not asked, with fewer than {event.min_size} units: {', '.join(event.abstained)}" if event.abstained else ""
    )
    return f"votes, noised: {votes}; {event.chosen} is chosen{few}  [{event.seconds:.1f} s]"


def _describe_round(event: RoundEnded, rounds: int) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in event.num_updates.items())
    unchanged = [name for name in event.num_updates if name not in event.updated]
    kept = f"; not enough for {', '.join(unchanged)}, left unchanged" if unchanged else ""
    sites = ", ".join(
        site if update.round is None else f"{site} (its update of round {update.round}, which came late)"
        for site, update in event.sites.items()
    )
    return f"round {event.round} of {rounds}: {sites or 'no site'}; updates: {counts}{kept}; {event.seconds:.1f} s"
