"""`audit`: audits a simulation's privacy."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from common.process.console import EXIT_FAILED, reported_errors, shown_progress
from common.yaml import load
from simulations.check import check_simulation
from simulations.commands.parts.options import Json, Set, SimulationFile
from simulations.config import SimulationConfig


def audit(config: SimulationFile, set_: Set = None, json_: Json = False) -> None:
    """Audits a simulation's privacy on synthetic records; exit code 1 when a privacy claim fails.

    Example: headwater simulate audit demo.yaml --json
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
