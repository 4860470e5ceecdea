"""`distance`: measures how far the site's records are from a backbone's home sample and from other sites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from client.commands.parts.options import Coordinator, Json, SiteFile
from client.config import SiteConfig
from common.process.console import make_console, print_json, reported_errors, shown_progress
from common.types import BadInput, DigestMismatch
from common.yaml import load

if TYPE_CHECKING:
    from client.prediction.distance import OwnDistance


def distance(
    site: SiteFile,
    to: Annotated[
        list[Path] | None,
        typer.Option("--to", help="A home file, or means.safetensors of a run (or its folder); repeatable"),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Id of the run; by default the run whose final heads arrived last")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, for a site that took part in no run: records are encoded")
    ] = None,
    coordinator: Coordinator = None,
    json_: Json = False,
) -> None:
    """Measures how far this site's training records are from the records behind some means. Nothing is sent or spent.

    The site's side is exact; a mean that other sites released has noise, whose deviation is shown. Where the model
    holds the moments of classes of all its sites, the distance from those is shown without --to.

    Example: headwater site distance site.yaml --to home.safetensors --to means.safetensors
    """
    with reported_errors():
        from client.prediction.distance import measure_distances
        from client.protocol.site import Site, SiteDeclined
        from common.privacy.noise import os_entropy
        from common.serving.similarity import WARNING

        if run is not None and model is not None:
            raise BadInput("--run, --model: expected one of them, got both")
        try:
            with shown_progress() as observe:
                opened = Site(load(SiteConfig, site).select(coordinator), os_entropy)
                opened = replace(opened, progress=lambda done, total: observe("encoding", done, total))
                found = measure_distances(opened, to or [], run_id=run, model=model)
        except SiteDeclined as declined:
            raise BadInput(f"{'the last run' if run is None else f'--run {run}'}: {declined.detail}") from declined
        except DigestMismatch as error:
            raise BadInput(str(error)) from error
        if json_:
            print_json({"distances": [_describe(each) for each in found], "warning": WARNING})
            return
        make_console().print(_make_table(found))
        typer.echo(WARNING)


def _make_table(found: list[OwnDistance]) -> Table:
    table = Table(title="distance of this site's training records; nothing was sent or spent", title_justify="left")
    for name in ("from", "distance", "noise", "units", "of"):
        table.add_column(name, overflow="fold")
    for each in found:
        noise = f"± {each.distance.error:.3f}" if each.distance.error else "none"
        name, source = escape(each.mean.name), escape(each.mean.source)
        table.add_row(name, f"{each.distance.shown:.3f}", noise, f"{each.mean.units:g}", source)
    return table


def _describe(found: OwnDistance) -> dict[str, object]:
    return {
        "from": found.mean.name,
        "backbone": found.mean.digest,
        "units": found.mean.units,
        "source": found.mean.source,
        "distance": found.distance.shown,
        "debiased": found.distance.value,
        "noise": found.distance.error,
    }
