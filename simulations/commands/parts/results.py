"""The result of a simulation, printed."""

from __future__ import annotations

import typer

from common.events import Summary
from common.process.console import EXIT_FAILED, make_console
from server.reports.summary import list_failures
from server.reports.tables import render_summary
from simulations.config import SimulationConfig


def print_results(summary: Summary, config: SimulationConfig, as_json: bool) -> None:
    """Prints a result; exits with 1 where a task missed its quorum or an expectation of the file.

    Args:
        summary: the finished simulation's summary.
        config: its file, which holds the expectations.
        as_json: prints the summary as JSON on stdout and nothing else.
    """
    if as_json:
        typer.echo(summary.to_json())
    else:
        make_console().print(render_summary(summary), crop=False)
        typer.echo(f"results: {summary.path}")
    problems = [*list_failures(summary), *_find_missed_expectations(summary, config)]
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(EXIT_FAILED)


def _find_missed_expectations(summary: Summary, config: SimulationConfig) -> list[str]:
    """Returns a sentence for each expectation of the file that the result does not meet; prints those that it meets."""
    missed = []
    for task in config.expect:
        result = summary.tasks[task]
        metric = next(iter(result.metrics), "")
        got, random = result.metrics.get(metric), result.baselines.get("random_backbone", {}).get(metric)
        if got is None or random is None:
            missed.append(f"task {task}: there is no result to compare with a random backbone")
            continue
        verdict = f"task {task}: transfer reaches {metric} {got:.3f}, a random backbone {random:.3f}"
        if got > random:
            typer.echo(verdict, err=True)
        else:
            missed.append(f"{verdict}: transfer does not beat the random backbone")
    return missed
