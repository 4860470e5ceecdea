"""A running coordinator, as the verbs see it: brought up to date, started, and followed through a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from common.events import RunFailure, RunInterruption, Summary
from common.process.console import EXIT_FAILED, EXIT_INTERRUPTED, make_console
from common.process.lines import Level
from common.types import RunFailed, RunInterrupted
from server.choice.outcome import RESULT, read_choice
from server.choice.table import show_choice
from server.deployment.federation import Federation
from server.reports.live.display import LiveRun, drawn
from server.reports.results import has_results
from server.reports.summary import list_failures
from server.reports.tables import render_summary
from server.superlink import operate
from server.superlink.control import Control
from server.superlink.daemon import find_daemon_pid
from server.superlink.node_ids import synchronise_nodes
from server.superlink.queue import PENDING, describe_run, list_runs
from server.superlink.watch import watch


def update_daemon(federation: Federation) -> None:
    """Applies the list of admitted sites to a running coordinator at once; its request filter reads the file anyway."""
    if find_daemon_pid(federation) is not None:
        with Control(federation) as control:
            synchronise_nodes(control, federation)


def start_daemon(federation: Federation) -> None:
    """Starts the daemon where it does not run yet, and says where it listens."""
    started = operate.ensure_daemon(federation)
    what = "listening" if started else "running already, listening"
    show_line(f"{what} on {federation.config.bind} for {federation.config.address}")


def stop_run(federation: Federation, folder: Path) -> None:
    """Ends the process of a run, where the coordinator works on it now."""
    if find_daemon_pid(federation) is None:
        return
    with Control(federation) as control:
        busy = control.find_current_run() if control.is_answering() else None
        if busy is not None and Path(busy.folder) == folder:
            control.stop_run(busy.run_id)


def follow_run(federation: Federation, folder: Path, *, as_json: bool = False) -> None:
    """Shows a run's progress until it ends, then its result; exits with 130 where Ctrl-C ends the display.

    Args:
        federation: the run's federation.
        folder: the run's folder.
        as_json: whether the result of a choice is printed as JSON.
    """
    before = [run.id for run in list_runs(federation) if run.state in PENDING and run.folder != folder]
    if before:
        show_line(f"run {folder.name} is queued behind {', '.join(before)}")
    try:
        with shown_live(folder) as show:
            watch(folder, alive=lambda: find_daemon_pid(federation) is not None, show=show)
    except KeyboardInterrupt:
        typer.echo(f"the run continues: `headwater coordinator runs {federation.folder}`, or `stop`", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    report_end_of_run(folder, as_json=as_json)


@contextmanager
def shown_live(folder: Path) -> Iterator[Callable[[str], None]]:
    """Yields what shows a run's lines; on a terminal one screen with its progress stands below them.

    Args:
        folder: the run's folder.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield show_line
        return
    live = LiveRun()
    live.follow(folder)
    with drawn(live, console):
        yield lambda line: console.print(line, markup=False, soft_wrap=True)


def report_end_of_run(path: Path, *, as_json: bool = False) -> None:
    """Prints a run's result, from its journal and summary; exits with 1 where a task missed its quorum.

    Args:
        path: the run's folder.
        as_json: whether the result of a choice is printed as JSON.

    Raises:
        RunFailed: the run failed, was interrupted or stopped.
    """
    run = describe_run(path)
    resume = f"`headwater coordinator resume {path.parents[1]} {run.id}`"
    if isinstance(run.end, RunFailure):
        raise RunFailed(f"run {run.id}: {run.end.reason}")
    if isinstance(run.end, RunInterruption):
        raise RunInterrupted(
            f"run {run.id} was interrupted: {run.end.reason}; {resume} continues it after its last whole round"
        )
    if run.end is None:
        # Its process wrote no end: it was stopped, or died too often.
        raise RunFailed(f"run {run.id}: {run.reason or run.state}; {resume} continues it after its last whole round")
    if not has_results(path, run.end.updates):
        raise RunInterrupted(f"run {run.id}: its process ended before it had written all results; {resume} writes them")
    if (path / RESULT).exists():
        show_choice(read_choice(path), path / RESULT, as_json=as_json)
        return
    summary = Summary.model_validate_json((path / "summary.json").read_bytes())
    make_console().print(render_summary(summary), crop=False)
    typer.echo(f"results: {path}")
    if run.end.missing:
        typer.echo(
            f"{resume} sends the final heads again, once these sites are back: {', '.join(run.end.missing)}", err=True
        )
    problems = list(list_failures(summary))
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(EXIT_FAILED)


def show_line(line: str) -> None:
    """Prints a line of progress on stderr."""
    typer.echo(line, err=True)


def warn(
    line: str, *, event: str = "message", level: Level = "warning", fields: Mapping[str, Any] | None = None
) -> None:
    """Prints a line on stderr beside the progress.

    Args:
        line: the text.
        event: one word for programs; not shown.
        level: written before the line.
        fields: not shown.
    """
    del event, fields
    show_line(f"{level}: {line}")
