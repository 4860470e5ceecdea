"""Trackers of a standing coordinator: every run that goes on while it serves is followed by its journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.files import stamp_file
from server.deployment.federation import Federation
from server.reports.trackers import Tracker
from server.reports.trackers.parts.follow import FOLDER, Follower

_POLL_S = 2.0
_END_S = 10.0


@contextmanager
def tracked_runs(federation: Federation, trackers: Sequence[Tracker], folder: Path | None) -> Iterator[None]:
    """Feeds trackers from the journal of every run that changes until the end of the block.

    Args:
        federation: the federation.
        trackers: the trackers; without one nothing is done.
        folder: folder of their files, one for each kind in it; by default `trackers` in each run's folder.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(federation.runs, trackers, folder, ended), name="trackers", daemon=True
    )
    if trackers:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if trackers:
            thread.join(_END_S)


def _follow(runs: Path, trackers: Sequence[Tracker], folder: Path | None, ended: threading.Event) -> None:
    began, seen = time.time(), dict[Path, tuple[int, ...]]()
    following: dict[Path, list[Follower]] = {}
    while True:
        stopped = ended.wait(_POLL_S)
        for journal in sorted(runs.glob("*/journal.jsonl")):
            try:
                stamp, changed_at = stamp_file(journal), journal.stat().st_mtime
            except OSError:
                continue  # Its run was removed.
            if changed_at < began or seen.get(journal) == stamp:
                continue
            seen[journal] = stamp
            place = folder or journal.parent / FOLDER
            new = [Follower(journal.parent, journal.parent.name, each, place / each.kind) for each in trackers]
            followers = following.setdefault(journal, new)
            for follower in followers:
                follower.step(last=False)
            if all(follower.has_ended for follower in followers):
                # A run that is resumed later is followed from its beginning: its journal has all of it.
                _end(following.pop(journal))
        if stopped:
            for followers in following.values():
                _end(followers)
            return


def _end(followers: Sequence[Follower]) -> None:
    for follower in followers:
        follower.step(last=True)
