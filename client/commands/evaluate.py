"""`evaluate`: compares a run's heads with those adapted to this site and with heads trained here alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.commands.parts.options import Coordinator, FinishedModel, Json, SiteFile, load_for
from client.personal.adopt import compare_model
from client.personal.evaluate import Comparison, compare
from client.personal.intervals import Estimate
from client.protocol.site import Site, SiteDeclined
from common.events import FEDERATED, PERSONAL
from common.privacy.noise import os_entropy
from common.process.console import reported_errors
from common.types import BadInput


def evaluate(
    site: SiteFile,
    run: Annotated[
        str | None, typer.Option(help="Id of the run; by default the run whose final heads arrived last")
    ] = None,
    model: FinishedModel = None,
    coordinator: Coordinator = None,
    json_: Json = False,
) -> None:
    """Compares a run's final heads with personal ones and with heads trained here alone. Nothing is sent or spent.

    Example: headwater site evaluate site.yaml
    """
    with reported_errors():
        try:
            own = Site(load_for(site, coordinator, run, model), os_entropy)
            result = compare(own, run) if model is None else compare_model(own, model)
        except SiteDeclined as declined:
            raise BadInput(f"{'the last run' if run is None else f'--run {run}'}: {declined.detail}") from declined
        if json_:
            typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
        else:
            Console(markup=False).print(_make_comparison_table(result))
            for task, taken in result.alignments.items():
                typer.echo(f"this site took for {task}: {taken}")


def _make_comparison_table(result: Comparison) -> Table:
    table = Table(
        title=f"{result.run_id}: {result.num_held_out} held-out unit(s) of this site; nothing was sent or spent\n"
        "below each metric its 95 % interval over the choice of held-out units",
        title_justify="left",
    )
    kinds = list(dict.fromkeys(kind for own in result.tasks.values() for kind in own))
    headings = [f"personal ({result.personal})" if kind == PERSONAL else kind for kind in kinds]
    for name in ("task", "metric", *headings):
        table.add_column(name)
    for task, own in result.tasks.items():
        for position, metric in enumerate(own.get(FEDERATED, ())):
            table.add_row(task if position == 0 else "", metric, *(_format(own[kind].get(metric)) for kind in kinds))
    return table


def _format(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return ""
    interval = estimate.interval
    return f"{estimate.value:.3f}" + ("" if interval is None else f"\n{interval[0]:.3f}..{interval[1]:.3f}")
