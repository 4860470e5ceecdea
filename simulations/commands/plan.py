"""`plan`: shows what a simulation would cost each site."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from client.protocol.plan import LEGEND, as_json, describe_forecasts, table
from common.errors import list_some
from common.process.console import EXIT_FAILED, reported_errors
from common.yaml import load
from simulations.commands.parts.options import Anyway, Json, Set, SimulationFile
from simulations.config import SimulationConfig
from simulations.plan import plan_simulation


def plan(config: SimulationFile, set_: Set = None, anyway: Anyway = False, json_: Json = False) -> None:
    """Shows what a simulation would cost each site and how well it can work.

    Exit code 1 when all sites would decline, or when no task can be better than guessing.

    No features are computed and nothing is spent.

    Example: headwater simulate plan demo.yaml --set run.privacy.target_epsilon=1
    """
    with reported_errors():
        loaded = load(SimulationConfig, config, set_ or [])
        outlooks = plan_simulation(loaded)
        if json_:
            typer.echo(json.dumps({"sites": [as_json(each) for each in outlooks]}, indent=2, allow_nan=False))
        else:
            for reason in loaded.run.chosen:
                typer.echo(f"chosen: {reason}")
            for name, stated in loaded.run.stated_weights.items():
                typer.echo(f"{loaded.run.backbone_key(name)}: {stated.reason or f'compared with {stated.digest}'}")
            Console().print(table(outlooks))
            typer.echo(LEGEND)
            for line in describe_forecasts(outlooks):
                typer.echo(line)
            warned: dict[str, list[str]] = {}
            for each in outlooks:
                for warning in each.warnings:
                    warned.setdefault(warning, []).append(each.site)
            for warning, names in warned.items():
                typer.echo(f"warning: {list_some(names)}: {warning}")
        hopeless = all(each.hopeless for each in outlooks) and not anyway
        if hopeless or all(each.declines for each in outlooks):
            raise typer.Exit(EXIT_FAILED)
