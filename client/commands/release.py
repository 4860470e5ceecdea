"""`release`: gives back what is held for a run that will not go on."""

from __future__ import annotations

from typing import Annotated

import typer

from client.commands.parts.balance import print_balance
from client.commands.parts.options import SiteFile
from client.config import SiteConfig
from client.ledger.ledger import Ledger
from client.ledger.place import locate_ledgers
from client.protocol import balance as budgets
from common.process.console import reported_errors
from common.types import BadInput
from common.yaml import load


def release(
    site: SiteFile, run: Annotated[str, typer.Argument(metavar="RUN", help="Id of the run, as `budget` prints it")]
) -> None:
    """Gives back what is held of the budget for a run that will not go on. What was spent stays spent.

    A run that ends releases it by itself; one that goes on all the same is charged as long as there is enough.

    Example: headwater site release site.yaml chest-1
    """
    with reported_errors():
        config = load(SiteConfig, site)
        ledger = Ledger.find(locate_ledgers(config), config.registry)
        if ledger is None or not ledger.release(run):
            raise BadInput(
                f"expected a run for which something is held, got {run!r}; `headwater site budget` lists them"
            )
        print_balance(budgets.balance(config))
