"""`evaluate`: compares a run's heads with heads trained at this site alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.commands.parts.options import Coordinator, Json, SiteFile
from client.config import SiteConfig
from client.personal.evaluate import FEDERATED, Comparison, compare
from client.protocol.site import Site, SiteDeclined
from common.privacy.noise import os_entropy
from common.process.console import reported_errors
from common.types import BadInput
from common.yaml import load


def evaluate(
    site: SiteFile,
    run: Annotated[
        str | None, typer.Option(help="Id of the run; by default the run whose final heads arrived last")
    ] = None,
    coordinator: Coordinator = None,
    json_: Json = False,
) -> None:
    """Compares a run's final heads with heads trained here alone, on held-out units. Nothing is sent or spent.

    Example: headwater site evaluate site.yaml
    """
    with reported_errors():
        try:
            result = compare(Site(load(SiteConfig, site).select(coordinator), os_entropy), run)
        except SiteDeclined as declined:
            raise BadInput(f"{'the last run' if run is None else f'--run {run}'}: {declined.detail}") from declined
        if json_:
            typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
        else:
            Console().print(_make_comparison_table(result))


def _make_comparison_table(result: Comparison) -> Table:
    table = Table(
        title=f"{result.run_id}: {result.num_held_out} held-out unit(s) of this site; nothing was sent or spent",
        title_justify="left",
    )
    columns = list(next(iter(result.tasks.values())))
    for name in ("task", "metric", *columns):
        table.add_column(name)
    for task, own in result.tasks.items():
        for position, metric in enumerate(own[FEDERATED]):
            values = [own[who].get(metric) for who in columns]
            shown = ["" if value is None else f"{value:.3f}" for value in values]
            table.add_row(task if position == 0 else "", metric, *shown)
    return table
