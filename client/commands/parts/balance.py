"""The balance of a ledger, printed."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from client.protocol.balance import Balance, round_down
from common.privacy.accounting import round_up


def print_balance(account: Balance) -> None:
    """Prints what each run has cost, and what is spent, reserved and left."""
    terms = account.terms
    table = Table(
        title=f"population {account.registry}: epsilon per {terms.unit.value}, {terms.relation}, delta {terms.delta:g}",
        title_justify="left",
        caption="each line is composed by itself; epsilons do not add up",
        caption_justify="left",
    )
    table.add_column("run", overflow="fold")  # In full: `release` asks for it.
    for name in ("epsilon", "rounds", "evaluations", "charges", "without a stored reply"):
        table.add_column(name)
    for run in account.runs:
        counts = (run.rounds, run.evaluations, run.charges, run.open)
        table.add_row(run.run, f"{round_up(run.epsilon):g}", *map(str, counts))
    Console().print(table)
    typer.echo(f"spent     {round_up(account.spent_epsilon):g}")
    typer.echo(f"reserved  {round_up(account.reserved_epsilon):g}   (spent, and charges whose reply may have left)")
    typer.echo(f"left      {round_down(account.left_epsilon, 2):g} of {terms.epsilon_cap:g}")
    if account.filter is not None:
        used = round_up(100.0 * account.used_share, 1)
        typer.echo(f"filter    {account.filter} counts {used:g} % of the budget as used; it decides what still fits")
    if account.earmarks:
        part = round_up(100.0 * account.held_share, 1)
        typer.echo(f"earmarked {part:g} % for {', '.join(account.earmarks)}; `headwater site release` gives it back")
    if account.evaluation is not None:
        held = account.evaluation
        typer.echo(
            f"held      share {held.share:g} for evaluations: {held.left} of {held.evaluations} left at noise "
            f"{held.noise_multiplier:.4g}; those charged cost {round_up(held.spent_epsilon):g} by themselves"
        )
    if account.affordable is not None:
        rest = account.affordable
        noise, rate, steps = rest.plan.noise_multiplier, rest.plan.sampling_rate, rest.plan.steps
        typer.echo(
            f"affords   {rest.rounds} more round(s) at noise {noise:.4g}, rate {rate:g}, {steps} step(s) ({rest.run})"
        )
    if account.amendment_due:
        typer.echo("note: the site file says other terms; `headwater site amend` makes them the ledger's", err=True)
