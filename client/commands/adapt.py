"""`adapt`: adapts a run's final heads to this site."""

from __future__ import annotations

from typing import Annotated

import typer

from client.aligners.parts.head import list_alignments
from client.commands.parts.options import Coordinator, FinishedModel, SiteFile, load_for
from client.personal.adopt import adapt_model, adopt_model
from client.personal.evaluate import adapt as adapt_heads
from client.personal.personal_heads import MAY_LEAVE
from client.protocol.site import PERSONAL_HEADS, Site, SiteDeclined
from common.privacy.noise import os_entropy
from common.process.console import reported_errors
from common.serving.folder import NEVER_LEAVES
from common.types import BadInput


def adapt(
    site: SiteFile,
    run: Annotated[
        str | None, typer.Option(help="Id of the run; by default the run whose final heads arrived last")
    ] = None,
    model: FinishedModel = None,
    coordinator: Coordinator = None,
) -> None:
    """Adapts a run's final heads to this site, as `personal` in the site file says. Nothing is sent or spent.

    Example: headwater site adapt site.yaml
    """
    with reported_errors():
        try:
            config = load_for(site, coordinator, run, model)
            own = Site(config, os_entropy)
            if model is None:
                heads, place = adapt_heads(own, run), "the run's folder"
            else:
                adopted = adopt_model(own, model)
                heads, place = adapt_model(own, adopted), str(adopted.folder)
        except SiteDeclined as declined:
            raise BadInput(f"{'the last run' if run is None else f'--run {run}'}: {declined.detail}") from declined
        leaving = MAY_LEAVE if config.personal == "tied" else NEVER_LEAVES
        taken = list_alignments(heads)
        listed = ", ".join(f"{name} ({taken[name]})" if name in taken else name for name in heads)
        typer.echo(f"adapted: {listed}; {PERSONAL_HEADS} in {place}: {leaving}")
