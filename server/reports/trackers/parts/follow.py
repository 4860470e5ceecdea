"""Feeds trackers from a run's journal, in a thread of its own while the run goes on.

Invariant: nothing that happens to a tracker reaches the run. One that fails is named in one line and given up; one that
hangs is left alone when the run has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

from common.errors import plain
from common.events import JournalView, RunEnded, RunEvent, RunFailure, RunInterruption, RunStarted
from common.process.lines import Show, show_line
from server.reports.trackers import Point, TrackedRun, Tracker
from server.reports.trackers.parts.points import PointMaker, describe_settings

FOLDER = "trackers"
"""Folder of a run's trackers in the run's own, where no other is asked for."""

_POLL_S = 1.0
_log = logging.getLogger(__name__)


@contextmanager
def tracked(
    run_folder: Path,
    trackers: Sequence[Tracker],
    folder: Path | None = None,
    *,
    name: str | None = None,
    show: Show = show_line,
    patience_s: float = 60.0,
) -> Iterator[None]:
    """Feeds trackers from a run's journal until the end of the block.

    Args:
        run_folder: folder of the run.
        trackers: the trackers; none is fed where there are none.
        folder: folder of the trackers' files, one for each kind in it; by default `trackers` in the run's folder.
        name: name of the run at the trackers; by default that of its folder.
        show: shows the line by which a tracker is given up.
        patience_s: longest wait for a tracker after the end of the run, in seconds.
    """
    ended = threading.Event()
    place = folder or run_folder / FOLDER
    followers = [Follower(run_folder, name or run_folder.name, each, place / each.kind, show) for each in trackers]
    threads = [
        threading.Thread(target=follower.run, args=(ended,), name="tracker", daemon=True) for follower in followers
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for follower, thread in zip(followers, threads, strict=True):
            thread.join(patience_s)
            if thread.is_alive():
                follower.give_up(f"it did not end within {patience_s:g} s of the run")


@final
class Follower:
    """One tracker that follows one journal."""

    def __init__(self, run_folder: Path, name: str, tracker: Tracker, folder: Path, show: Show = show_line) -> None:
        """Reads nothing yet.

        Args:
            run_folder: folder of the run.
            name: name of the run at the tracker.
            tracker: the tracker.
            folder: folder of its files.
            show: shows the line by which it is given up.
        """
        self._name, self._tracker, self._folder, self._show = name, tracker, folder, show
        self._points, self._new = PointMaker(), list[Point]()
        self._started: RunStarted | None = None
        self._completed, self._given_up, self._has_ended = False, False, False
        self._at_tracker: TrackedRun | None = None
        self._view = JournalView(run_folder / "journal.jsonl", RunEvent, lambda: self, Follower.add)

    @property
    def is_active(self) -> bool:
        """True until the tracker is given up."""
        return not self._given_up

    @property
    def has_ended(self) -> bool:
        """True once the end of the last attempt of the run is read."""
        return self._has_ended

    def run(self, ended: threading.Event) -> None:
        """Feeds the tracker until the run has ended and all of its journal is read, or the tracker fails."""
        while self.is_active:
            last = ended.wait(_POLL_S)
            self.step(last=last)
            if last:
                return

    def step(self, *, last: bool) -> None:
        """Feeds what is new in the journal.

        Args:
            last: whether the run has ended.
        """
        if self._given_up:
            return
        try:
            self._view.read()
            if self._at_tracker is None and self._started is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                settings = describe_settings(self._started)
                self._at_tracker = self._tracker.begin(self._folder, self._name, settings)
            if self._at_tracker is not None:
                if self._new:
                    self._at_tracker.add(self._new)
                    self._new.clear()
                if last:
                    self._at_tracker.end(completed=self._completed)
        except Exception as error:  # noqa: BLE001 - code of others, which must not end a run
            _log.debug("a tracker failed", exc_info=True)
            self.give_up(f"{type(error).__name__}: {plain(str(error), 200)}")

    def add(self, event: RunEvent) -> None:
        """Takes the next event of the journal."""
        self._new += self._points.make(event)
        if isinstance(event, RunStarted):
            self._started, self._has_ended = event, False
        if isinstance(event, RunEnded | RunFailure | RunInterruption):
            self._completed, self._has_ended = isinstance(event, RunEnded), True

    def give_up(self, reason: str) -> None:
        """Feeds the tracker no more, and says so."""
        self._given_up = True
        self._show(
            f"--tracker {self._tracker.kind}: given up, the run goes on: {reason}",
            event="tracker_failed",
            level="warning",
        )
