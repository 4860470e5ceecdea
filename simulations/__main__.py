"""Command line of the simulator: `python -m simulations run | plan | check | resume | sweep | pretrain | sites`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.protocol.plan import LEGEND, as_json, forecast, table
from common.events import Summary
from common.process.console import EXIT_FAILED, reported_errors, shown_progress
from common.types import BadInput
from common.yaml import load
from server.reports.summary import list_failures
from server.reports.tables import render_summary
from simulations.check import check_simulation, list_missing_files
from simulations.config import SimulationConfig
from simulations.experiment import resume as resume_run
from simulations.experiment import run as run_config
from simulations.experiment import write_files
from simulations.partition import build_sites
from simulations.pretrain import pretrain as pretrain_backbone
from simulations.sweep import Row
from simulations.sweep import sweep as run_sweep

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Config = Annotated[Path, typer.Argument(help="A simulation file, such as configs/simulations/demo.yaml")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set run.rounds=5 (repeatable)")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results, new or empty")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout and nothing else")]


@app.command()
def run(config: Config, set_: Set = None, out: Out = None, json_: Json = False) -> None:
    """Run a simulation.

    Example: python -m simulations run configs/simulations/demo.yaml --set run.privacy.target_epsilon=3
    """
    with reported_errors():
        with shown_progress() as observe:
            summary = run_config(config, out=out, overrides=set_ or [], observe=observe)
        _finish(summary, load(SimulationConfig, config, set_ or []), json_)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of an interrupted run")], json_: Json = False
) -> None:
    """Continue an interrupted run from its last whole round.

    Example: python -m simulations resume runs/demo-20260102-030405-abcd
    """
    with reported_errors():
        with shown_progress() as observe:
            summary = resume_run(folder, observe=observe)
        _finish(summary, load(SimulationConfig, folder / "config.yaml"), json_)


@app.command()
def sites(
    config: Config, folder: Annotated[Path, typer.Argument(help="A new or empty folder")], set_: Set = None
) -> None:
    """Write a simulation as a run file and site files, for `flwr run`.

    Example: python -m simulations sites configs/simulations/demo.yaml runs/demo-files
    """
    with reported_errors():
        written = write_files(load(SimulationConfig, config, set_ or []), folder)
        typer.echo(f"{folder}/run.yaml and {len(written)} site files under {folder}/sites")


@app.command()
def check(config: Config, set_: Set = None) -> None:
    """Validate a simulation file without running it, and look whether the files it names are there.

    Example: python -m simulations check configs/simulations/demo.yaml
    """
    with reported_errors():
        loaded = load(SimulationConfig, config, set_ or [])
        check_simulation(loaded)
        absent = list_missing_files(loaded)
        if absent:
            raise BadInput("; ".join(absent))
        typer.echo(f"{config}: valid; {len(loaded.run.tasks)} task(s), {loaded.run.rounds} round(s)")


@app.command()
def plan(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Say what a simulation would cost each site and whether it can be useful; exit code 1 when all would decline.

    Nothing is encoded or spent.

    Example: python -m simulations plan configs/simulations/demo.yaml --set run.privacy.target_epsilon=1
    """
    with reported_errors():
        loaded = load(SimulationConfig, config, set_ or [])
        check_simulation(loaded)
        with TemporaryDirectory() as folder:
            built = build_sites(loaded, Path(folder) / "sites", non_private=loaded.run.requested_privacy is None)
            outlooks = [forecast(site, loaded.run, len(built)) for site in built]
        if json_:
            typer.echo(json.dumps({"sites": [as_json(each) for each in outlooks]}, indent=2, allow_nan=False))
        else:
            Console().print(table(outlooks))
            typer.echo(LEGEND)
            warned: dict[str, list[str]] = {}
            for each in outlooks:
                for warning in each.warnings:
                    warned.setdefault(warning, []).append(each.site)
            for warning, names in warned.items():
                typer.echo(f"warning: {', '.join(names)}: {warning}")
        if all(each.declines for each in outlooks):
            raise typer.Exit(EXIT_FAILED)


@app.command()
def audit(config: Config, set_: Set = None, json_: Json = False) -> None:
    """Audit a simulation's privacy on synthetic records; exit code 1 when something it claims is refuted.

    Example: python -m simulations audit configs/simulations/demo.yaml --json
    """
    # Here: they load a third of a second of statistics.
    from client.audit.audit import make_audit_table
    from simulations.audit import audit_simulation

    with reported_errors():
        loaded = load(SimulationConfig, config, set_ or [])
        check_simulation(loaded)
        with shown_progress() as observe:
            result = audit_simulation(loaded, observe)
        if json_:
            typer.echo(json.dumps(result.model_dump(mode="json"), indent=2))
        else:
            Console().print(make_audit_table(result))
        for reason in result.reasons:
            typer.echo(f"error: {reason}", err=True)
        if not result.passed:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def sweep(config: Config, set_: Set = None, out: Out = None, json_: Json = False) -> None:
    """Run every combination of a file's `sweep` section, once per seed.

    Example: python -m simulations sweep configs/simulations/brain_mri.yaml --out runs/sweep
    """
    with reported_errors():
        with shown_progress() as observe:
            path, rows = run_sweep(config, set_ or [], out, observe)
        if json_:
            typer.echo(json.dumps([vars(row) for row in rows], indent=2))
        else:
            Console().print(_sweep_table(rows))
            typer.echo(f"rows: {path}")


@app.command()
def pretrain(config: Config, set_: Set = None) -> None:
    """Train a simulation's small backbone on its public records; kept when nothing changed.

    Example: python -m simulations pretrain configs/simulations/demo.yaml
    """
    with reported_errors():
        with shown_progress() as observe:
            result = pretrain_backbone(load(SimulationConfig, config, set_ or []), observe)
        if result.cached:
            typer.echo(f"backbone: {result.path} is up to date")
        else:
            typer.echo(
                f"backbone: {result.path} written; accuracy on its own public records {result.train_accuracy:.3f}"
            )


def _finish(summary: Summary, config: SimulationConfig, as_json: bool) -> None:
    if as_json:
        typer.echo(summary.to_json())
    else:
        # A pipe has no width of its own; tables need about a hundred columns.
        Console(width=None if sys.stdout.isatty() else 100).print(render_summary(summary), crop=False)
        typer.echo(f"results: {summary.path}")
    problems = [*list_failures(summary), *_missed(summary, config)]
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(EXIT_FAILED)


def _missed(summary: Summary, config: SimulationConfig) -> list[str]:
    """Expectations of the simulation file that the result does not meet; says so when it does."""
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


def _sweep_table(rows: list[Row]) -> Table:
    table = Table(title="sweep: mean and standard deviation over seeds", title_justify="left")
    for name in (*(rows[0].values if rows else ()), "task", "metric", "mean", "std", "runs"):
        table.add_column(name, overflow="fold")
    for row in rows:
        values = [str(value) for value in row.values.values()]
        table.add_row(*values, row.task, row.metric, f"{row.mean:.3f}", f"{row.std:.3f}", str(row.runs))
    return table


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
