"""`pretrain`: trains a simulation's backbone on public records."""

from __future__ import annotations

import typer

from common.process.console import reported_errors, shown_progress
from common.yaml import load
from simulations.commands.parts.options import Set, SimulationFile
from simulations.config import SimulationConfig
from simulations.public.pretrain import pretrain as pretrain_backbone


def pretrain(config: SimulationFile, set_: Set = None) -> None:
    """Trains a simulation's small backbone on its public records; keeps the present one when nothing changed.

    Example: headwater simulate pretrain demo.yaml
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
