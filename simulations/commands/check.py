"""`check`: validates a simulation file."""

from __future__ import annotations

import typer

from common.process.console import reported_errors
from common.types import BadInput
from common.yaml import load
from simulations.check import check_simulation, check_sources, list_missing_files
from simulations.commands.parts.options import Set, SimulationFile
from simulations.config import SimulationConfig


def check(config: SimulationFile, set_: Set = None) -> None:
    """Validates a simulation file and checks that the files it names are there, with the columns it names.

    Masks and boxes are read, and what may be wrong with them is counted. Nothing is trained.

    Example: headwater simulate check demo.yaml
    """
    with reported_errors():
        loaded = load(SimulationConfig, config, set_ or [])
        tasks = check_simulation(loaded)
        absent = list_missing_files(loaded)
        if absent:
            raise BadInput("; ".join(absent))
        for warning in check_sources(loaded, tasks):
            typer.echo(f"warning: {warning}", err=True)
        typer.echo(f"{config}: valid; {len(loaded.run.tasks)} task(s), {loaded.run.rounds} round(s)")
