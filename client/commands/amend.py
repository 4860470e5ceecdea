"""`amend`: changes the ledger's terms to those of the site file."""

from __future__ import annotations

from client.commands.parts.balance import print_balance
from client.commands.parts.options import Reason, SiteFile, check_reason
from client.config import SiteConfig
from client.ledger.ledger import amend as amend_ledger
from client.ledger.place import locate_ledgers
from client.protocol import balance as budgets
from common.process.console import reported_errors
from common.yaml import load


def amend(site: SiteFile, reason: Reason = "") -> None:
    """Changes the ledger's cap, delta or unit to those of the site file. The change is logged and nothing is reset.

    Example: headwater site amend site.yaml --reason "cap raised to 12 by the data protection board"
    """
    with reported_errors():
        config = load(SiteConfig, site)
        amend_ledger(
            locate_ledgers(config),
            population=config.registry,
            unit=config.unit,
            epsilon_cap=config.budget.epsilon,
            delta=config.budget.delta,
            filter=config.budget.filter,
            reason=check_reason(reason),
        )
        print_balance(budgets.balance(config))
