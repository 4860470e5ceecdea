"""Trackers: programs of others that show the numbers of a run's journal as curves. One file is one kind.

A tracker is fed from a journal and from nothing else, beside the run: whatever happens to it, the run goes on
(`server.reports.trackers.parts.follow`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from common.plugins import refuse_unknown_kind, resolve
from common.types import BadInput

PACKAGE = "server.reports.trackers"


@dataclass(frozen=True)
class Point:
    """A number of a curve.

    Attributes:
        curve: name of the curve, its parts separated by "/".
        step: number of the round.
        value: finite.
        time: when it was journalled, in seconds since 1970.
    """

    curve: str
    step: int
    value: float
    time: float


class TrackedRun(Protocol):
    """One run at a tracker."""

    def add(self, points: Sequence[Point]) -> None:
        """Adds numbers; they are in the tracker's files once this returns."""

    def end(self, *, completed: bool) -> None:
        """Ends the run at the tracker."""


class Tracker(Protocol):
    """The members that every plug-in file's class must have.

    Law (tests/contracts/test_trackers.py): every point that is added can be read back with the program's own reader,
    unchanged; files appear in the given folder only; nothing is sent over a network; torch is not loaded.

    Attributes:
        kind: file name of the plug-in.
        packages: packages that it needs besides Headwater's own.
        extra: the extra of Headwater's installation that brings them.
    """

    kind: str
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]

    def begin(self, folder: Path, run_id: str, settings: Mapping[str, str]) -> TrackedRun:
        """Begins a run, or goes on with one of the same id.

        Args:
            folder: folder of the tracker's files, which exists; several runs may share it.
            run_id: id of the run.
            settings: facts of the run that are no numbers.
        """


def open_trackers(kinds: Sequence[str]) -> list[Tracker]:
    """Returns trackers by their names.

    Raises:
        BadInput: there is none of a name, or a package that it needs is not installed.
    """
    opened: list[Tracker] = []
    for kind in dict.fromkeys(kinds):
        refuse_unknown_kind(PACKAGE, kind, "--tracker")
        tracker: Tracker = resolve(PACKAGE, {"kind": kind}, "--tracker")
        missing = [package for package in tracker.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise BadInput(
                f"--tracker {kind}: expected the package {', '.join(missing)}, which "
                f"`pip install 'headwater[{tracker.extra}]'` installs"
            )
        opened.append(tracker)
    return opened
