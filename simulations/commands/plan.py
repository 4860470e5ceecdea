"""`plan`: shows what a simulation would cost each site."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from rich.console import Console

from client.protocol.plan import LEGEND, as_json, forecast, table
from common.process.console import EXIT_FAILED, reported_errors
from common.yaml import load
from simulations.check import check_simulation
from simulations.commands.parts.options import Json, Set, SimulationFile
from simulations.config import SimulationConfig
from simulations.partition import build_sites


def plan(config: SimulationFile, set_: Set = None, json_: Json = False) -> None:
    """Shows what a simulation would cost each site and how well it can work; exit code 1 when all would decline.

    No features are computed and nothing is spent.

    Example: headwater simulate plan demo.yaml --set run.privacy.target_epsilon=1
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
