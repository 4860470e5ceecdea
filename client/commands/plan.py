"""`plan`: shows what a run would cost at this site."""

from __future__ import annotations

import typer
from rich.console import Console

from client.commands.parts.options import Json, RunFile, Set, SiteFile
from client.config import SiteConfig
from client.protocol import plan as forecasts
from client.protocol.site import SiteDeclined
from common.process.console import EXIT_FAILED, print_json, reported_errors
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load


def plan(site: SiteFile, run: RunFile, set_: Set = None, json_: Json = False) -> None:
    """Shows what a run would cost here and how well it can work; exit code 1 when it would be declined.

    No record is opened and nothing is spent.

    Example: headwater site plan site.yaml run.yaml
    """
    with reported_errors():
        config, wanted = load(SiteConfig, site, set_ or []), load(RunConfig, run)
        try:
            outlook = forecasts.plan_run(config, wanted, wanted.cohort.min_sites)
        except SiteDeclined as declined:
            raise BadInput(f"{run}: {declined.detail}") from declined
        if json_:
            print_json(forecasts.as_json(outlook))
        else:
            for reason in wanted.chosen:
                typer.echo(f"chosen: {reason}")
            Console().print(forecasts.table([outlook]))
            typer.echo(forecasts.LEGEND)
            for line in forecasts.describe_forecasts([outlook]):
                typer.echo(line)
            for warning in outlook.warnings:
                typer.echo(f"warning: {outlook.site}: {warning}")
        if outlook.declines:
            raise typer.Exit(EXIT_FAILED)
