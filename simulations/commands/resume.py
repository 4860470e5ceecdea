"""`resume`: continues an interrupted simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors, shown_progress
from common.yaml import load
from simulations.commands.parts.options import Json
from simulations.commands.parts.results import print_results
from simulations.config import SimulationConfig
from simulations.experiment import resume as resume_run


def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of an interrupted run")], json_: Json = False
) -> None:
    """Continues an interrupted run from its last complete round.

    Example: headwater simulate resume runs/demo-20260102-030405-abcd
    """
    with reported_errors():
        with shown_progress() as observe:
            summary = resume_run(folder, observe=observe)
        print_results(summary, load(SimulationConfig, folder / "config.yaml"), json_)
