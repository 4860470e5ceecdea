"""`sweep`: runs every combination of listed values."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from common.process.console import reported_errors, shown_progress
from server.reports.trackers import open_trackers
from server.reports.trackers.parts.follow import tracked
from simulations.commands.parts.options import Json, Out, Set, SimulationFile, TrackerDir, TrackerKind
from simulations.commands.parts.shown import show_on_stderr
from simulations.sweep import Row
from simulations.sweep import sweep as run_sweep


def sweep(
    config: SimulationFile,
    set_: Set = None,
    out: Out = None,
    tracker: TrackerKind = None,
    tracker_dir: TrackerDir = None,
    json_: Json = False,
) -> None:
    """Runs every combination of a file's `sweep` section, once per seed.

    Example: headwater simulate sweep brain_mri.yaml --out sweep
    """
    with reported_errors():
        trackers = open_trackers(tracker or [])

        def watch(folder: Path) -> AbstractContextManager[None]:
            # The folders of one sweep are numbers.
            return tracked(
                folder, trackers, tracker_dir, name=f"{folder.parent.name}-{folder.name}", show=show_on_stderr
            )

        with shown_progress() as observe:
            path, rows = run_sweep(config, set_ or [], out, observe, watch)
        if json_:
            typer.echo(json.dumps([vars(row) for row in rows], indent=2))
        else:
            Console().print(_make_sweep_table(rows))
            typer.echo(f"rows: {path}")


def _make_sweep_table(rows: list[Row]) -> Table:
    table = Table(title="sweep: mean and standard deviation over seeds", title_justify="left")
    for name in (*(rows[0].values if rows else ()), "task", "metric", "mean", "std", "runs"):
        table.add_column(name, overflow="fold")
    for row in rows:
        values = [str(value) for value in row.values.values()]
        table.add_row(*values, row.task, row.metric, f"{row.mean:.3f}", f"{row.std:.3f}", str(row.runs))
    return table
