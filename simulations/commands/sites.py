"""`sites`: writes a simulation as a run file and site files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.yaml import load
from simulations.commands.parts.options import Set, SimulationFile
from simulations.config import SimulationConfig
from simulations.experiment import write_files


def sites(
    config: SimulationFile, folder: Annotated[Path, typer.Argument(help="A new or empty folder")], set_: Set = None
) -> None:
    """Writes a simulation as a run file and site files, for `flwr run`.

    Example: headwater simulate sites demo.yaml demo-files
    """
    with reported_errors():
        written = write_files(load(SimulationConfig, config, set_ or []), folder)
        typer.echo(f"{folder}/run.yaml and {len(written)} site files under {folder}/sites")
