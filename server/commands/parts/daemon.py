"""A running coordinator, as the verbs see it: brought up to date, started, and followed through a run."""

from __future__ import annotations

from pathlib import Path

import typer

from common.events import RunEnded, RunFailure, RunInterruption, RunStarted, Summary, read_run_journal
from common.process.console import EXIT_FAILED, EXIT_INTERRUPTED, make_console
from common.types import RunFailed, RunInterrupted
from server.deployment.federation import Federation
from server.reports.summary import list_failures
from server.reports.tables import render_summary
from server.superlink import operate
from server.superlink.control import Control, RunState
from server.superlink.daemon import find_daemon_pid
from server.superlink.node_ids import synchronise_nodes
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


def follow_run(federation: Federation, control: Control, run: tuple[Path, int], *, skip: int) -> None:
    """Shows a run's progress until it ends, then its result; exits with 130 where Ctrl-C ends the display.

    Args:
        federation: the run's federation.
        control: a connection to the running daemon.
        run: the run's folder and Flower's id of it.
        skip: number of the journal's events that are not shown, because an earlier process wrote them.
    """
    path, engine_run = run
    try:
        state = watch(
            control,
            path,
            flower_run_id=engine_run,
            alive=lambda: find_daemon_pid(federation) is not None,
            show=show_line,
            skip=skip,
        )
    except KeyboardInterrupt:
        typer.echo(f"the run continues: `headwater coordinator status {federation.folder}`, or `stop`", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    report_end_of_run(path, state)


def report_end_of_run(path: Path, state: RunState) -> None:
    """Prints a run's result, from its journal and summary; exits with 1 where a task missed its quorum.

    Raises:
        RunFailed: the run failed, or its process ended without writing an end.
    """
    journal = read_run_journal(path / "journal.jsonl")
    # An earlier attempt's end says nothing of this one. By position: attempts within a millisecond are equal events.
    starts = [position for position, event in enumerate(journal) if isinstance(event, RunStarted)]
    last = journal[starts[-1] :] if starts else []
    ends = [event for event in last if isinstance(event, RunEnded | RunInterruption | RunFailure)]
    resume = f"`headwater coordinator resume {path.parent.parent} {path.name}`"
    if not ends:
        # Its process wrote no end: it died, or was stopped.
        raise RunFailed(f"run {path.name}: {_explain_end(state)}; {resume} continues it after its last whole round")
    if isinstance(ends[-1], RunInterruption):
        raise RunInterrupted(
            f"run {path.name} was interrupted: {ends[-1].reason}; {resume} continues it after its last whole round"
        )
    if isinstance(ends[-1], RunFailure):
        raise RunFailed(f"run {path.name}: {ends[-1].reason}")
    summary = Summary.model_validate_json((path / "summary.json").read_bytes())
    make_console().print(render_summary(summary), crop=False)
    typer.echo(f"results: {path}")
    if ends[-1].missing:
        typer.echo(
            f"{resume} sends the final heads again, once these sites are back: {', '.join(ends[-1].missing)}", err=True
        )
    problems = list(list_failures(summary))
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(EXIT_FAILED)


def _explain_end(state: RunState) -> str:
    """Returns why a run's process wrote no end, in words for a person."""
    if "heartbeat" in state.details:
        return "the process that worked on it died"
    return state.details or state.outcome


def show_line(line: str) -> None:
    """Prints a line of progress on stderr."""
    typer.echo(line, err=True)
