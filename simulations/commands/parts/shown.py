"""The display of a simulation that runs, and the trackers that follow it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from common.process.console import shown_progress
from common.process.lines import Level
from server.reports.live.display import LiveRun, drawn
from server.reports.trackers import Tracker
from server.reports.trackers.parts.follow import tracked
from server.rounds.messenger import Observe
from simulations.experiment import Watch


@dataclass(frozen=True)
class ShownRun:
    """Two functions by which a simulation is shown.

    Attributes:
        observe: receives its progress.
        watch: watches its folder.
    """

    observe: Observe
    watch: Watch


@contextmanager
def shown_run(trackers: Sequence[Tracker], tracker_dir: Path | None) -> Iterator[ShownRun]:
    """Yields what shows a simulation until the end of the block: one screen on a terminal, lines on a pipe.

    Args:
        trackers: trackers that follow it.
        tracker_dir: folder of their files; None for one in the run's folder.
    """
    console, live = Console(stderr=True, highlight=False), LiveRun()

    @contextmanager
    def watch(folder: Path) -> Iterator[None]:
        live.follow(folder)
        with tracked(folder, trackers, tracker_dir, show=show_on_stderr):
            yield

    if console.is_terminal:
        with drawn(live, console):
            yield ShownRun(live.observe, watch)
    else:
        with shown_progress() as observe:
            yield ShownRun(observe, watch)


def show_on_stderr(
    line: str, *, event: str = "message", level: Level = "info", fields: Mapping[str, Any] | None = None
) -> None:
    """Shows a line on stderr: stdout is the result's.

    Args:
        line: the text.
        event: one word for programs; not shown.
        level: warning or error is written before the line.
        fields: not shown.
    """
    del event, fields
    typer.echo(line if level == "info" else f"{level}: {line}", file=sys.stderr)
