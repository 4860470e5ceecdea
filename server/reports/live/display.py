"""One screen that shows a run while it goes on: phase, rounds, pace, time left, newest metrics, sites and epsilon."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.events import JournalView, RunEvent
from common.privacy.accounting import round_up
from common.process.lines import describe_duration, describe_pace
from common.types import explain_rejection
from server.reports.live.progress import NewestMetric, RunProgress

REFRESHES_A_SECOND = 2.0
_METRICS = 3
"""Metrics of a task that are shown: the main one first."""

_MISSING = 4
"""Missing sites that are named."""

_BAR = 16
"""Characters of a bar."""

_FRAME_LINES = 11
"""Lines beside the metrics, so that all fits on a screen."""


@dataclass
class _ObservedStep:
    """A phase that its own code reports: how far it is, and when and where it began."""

    done: int
    total: int
    began: float
    begun_at: int


@final
class LiveRun:
    """A run as a screen shows it.

    It is read by the thread that draws, while the run's own thread reports its phases.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._step: tuple[str, _ObservedStep] | None = None
        self._name = ""
        self._view: JournalView[RunProgress] | None = None
        self._epsilon: tuple[int, float | None] = (-1, None)

    def follow(self, folder: Path) -> None:
        """Shows the run of a folder from now on."""
        self._name = folder.name
        self._view = JournalView(folder / "journal.jsonl", RunEvent, RunProgress, RunProgress.add)

    def observe(self, phase: str, done: int, total: int) -> None:
        """Notes the progress of a phase.

        Args:
            phase: name of what is under way.
            done: number of steps done.
            total: number of steps in all.
        """
        known = self._step
        if known is None or known[0] != phase or done < known[1].done or total != known[1].total:
            self._step = (phase, _ObservedStep(done, total, self._clock(), done))
        else:
            known[1].done = done

    def render(self, height: int = 25) -> RenderableType:
        """Returns the screen now.

        Args:
            height: lines of the terminal.
        """
        progress = self._view.read() if self._view is not None else RunProgress()
        lines = [self._render_head(progress), *self._render_step()]
        if progress.joined:
            lines += [Text(line, overflow="ellipsis", no_wrap=True) for line in _describe_sites(progress)]
        epsilon = self._compute_epsilon(progress)
        if epsilon is not None:
            lines.append(Text(f"epsilon so far: at most {round_up(epsilon):.2f} at any site"))
        if progress.metrics:
            lines.append(_render_metrics(progress, max(1, height - _FRAME_LINES)))
        return Group(*lines)

    def _render_head(self, progress: RunProgress) -> RenderableType:
        ran = describe_duration(self._clock() - self._began).removeprefix("about ")
        if not progress.rounds:
            return Text(f"{self._name or 'run'}: {progress.phase}, for {ran}", overflow="ellipsis", no_wrap=True)
        pace, left = progress.measure_pace(), progress.estimate_seconds_left()
        parts = [f"{self._name}: {progress.phase}"]
        if pace is not None:
            parts.append(f"{pace:.3g} s a round")
        if left:
            parts.append(f"{describe_duration(left)} left")
        parts.append(f"running for {ran}")
        head = Text(", ".join(parts), overflow="ellipsis", no_wrap=True)
        if progress.phase == "sites join and prepare":
            return head
        return Group(head, _make_bar(f"round {progress.round} of {progress.rounds}", progress.round, progress.rounds))

    def _render_step(self) -> Iterator[RenderableType]:
        """Yields the line of the phase that is under way; rounds have a line of their own."""
        if self._step is None or self._step[0] == "rounds" or self._step[1].done >= self._step[1].total:
            return
        phase, step = self._step
        pace = describe_pace(step.done - step.begun_at, step.total - step.done, self._clock() - step.began)
        yield _make_bar(f"{phase}: {step.done:,} of {step.total:,}", step.done, step.total, pace.removeprefix(", "))

    def _compute_epsilon(self, progress: RunProgress) -> float | None:
        """Returns the largest epsilon; computed again where a release was added."""
        if self._epsilon[0] != progress.spent.num_added:
            self._epsilon = (progress.spent.num_added, progress.spent.find_largest())
        return self._epsilon[1]


def _make_bar(label: str, done: int, total: int, note: str = "") -> Table:
    """Returns a line with a bar."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(width=_BAR)
    grid.add_column(no_wrap=True)
    grid.add_row(label, ProgressBar(total=total, completed=done, width=_BAR), note)
    return grid


def _describe_sites(progress: RunProgress) -> list[str]:
    """Returns one or two lines: how many sites take part, and which are missing."""
    words = [f"sites: {len(progress.joined)} joined"]
    if progress.round:
        words.append(f"{len(progress.used)} used in round {progress.round}")
    if progress.awaited:
        words.append(f"waiting for {progress.awaited}")
    if not progress.missing:
        return [", ".join(words)]
    named = [f"{site} ({explain_rejection(reason)})" for site, reason in list(progress.missing.items())[:_MISSING]]
    return [", ".join(words), f"missing: {len(progress.missing)}: {'; '.join(named)}"]


def _render_metrics(progress: RunProgress, room: int) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("after round", justify="right")
    shown = max(1, min(_METRICS, room // len(progress.metrics)))
    rows = [
        (task if at == 0 else "", name, _format(metric), str(round_) if at == 0 else "")
        for task, (round_, _, metrics) in progress.metrics.items()
        for at, (name, metric) in enumerate(list(metrics.items())[:shown])
    ]
    for row in rows[:room]:
        table.add_row(*row)
    noised = any(noised for _, noised, _ in progress.metrics.values())
    note = "noised by the sites, with the 95 % interval of the noise" if noised else "the simulator's own view"
    return Group(table, Text(note, style="dim", overflow="ellipsis", no_wrap=True))


def _format(metric: NewestMetric) -> str:
    if metric.value is None:
        return "not readable"
    interval = "" if metric.interval is None else f"  ({metric.interval[0]:.3f} to {metric.interval[1]:.3f})"
    return f"{metric.value:.3f}{interval}"


@contextmanager
def drawn(run: LiveRun, console: Console) -> Iterator[None]:
    """Draws a run on a terminal until the end of the block; what is printed meanwhile appears above it.

    Args:
        run: the run.
        console: the terminal.
    """
    with Live(
        get_renderable=lambda: run.render(console.height),
        console=console,
        refresh_per_second=REFRESHES_A_SECOND,
        transient=True,
        vertical_overflow="ellipsis",
    ):
        yield
