"""`budget`: shows what a population has spent and has left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.parts.balance import print_balance
from client.commands.parts.options import Json, Set, SiteFile
from client.config import SiteConfig
from client.protocol import balance as budgets
from client.protocol.site import SiteDeclined
from common.process.console import print_json, reported_errors
from common.run import RunConfig
from common.types import BadInput
from common.yaml import load


def budget(
    site: SiteFile,
    run: Annotated[Path | None, typer.Option(help="Count affordable rounds of this run's plan")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Shows what the site's population has spent, reserved and left, and how many rounds the rest pays for.

    Example: headwater site budget site.yaml --run run.yaml
    """
    with reported_errors():
        config = load(SiteConfig, site, set_ or [])
        wanted = None if run is None else load(RunConfig, run)
        try:
            account = budgets.balance(config, wanted)
        except SiteDeclined as declined:
            raise BadInput(f"{run or 'the last run'}: {declined.detail}") from declined
        if json_:
            print_json(budgets.as_json(account))
        else:
            print_balance(account)
