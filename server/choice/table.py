"""The table of a choice and the lines below it, as a person reads them in a terminal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer
from rich.table import Table

from common.privacy.accounting import round_up
from common.process.console import make_console, print_json
from server.choice.outcome import BackboneChoice, CandidateRow


def show_choice(choice: BackboneChoice, path: Path, *, as_json: bool) -> None:
    """Prints the outcome of a choice on stdout: its table and where it is kept, or JSON and nothing else.

    Args:
        choice: the outcome.
        path: the file that holds it.
        as_json: whether JSON is printed.
    """
    if as_json:
        print_json(asdict(choice))
        return
    make_console().print(_make_table(choice))
    for line in [*_describe(choice), f"results: {path}"]:
        typer.echo(line)


def _make_table(choice: BackboneChoice) -> Table:
    table = Table(title=f"candidates for task {choice.task}", title_justify="left")
    has_proxy = any(row.proxy is not None for row in choice.rows)
    columns = ["candidate"]
    if choice.site_votes:
        columns.append(f"votes of {len(choice.site_votes)} sites, noised")
    if choice.by == "moments":
        columns.append("class means: accuracy, noised")
    if has_proxy:
        columns.append("public proxy: accuracy")
    for name in (*columns, "features", "s/record", "MB", "licence", "price in each ledger"):
        table.add_column(name, overflow="fold", no_wrap=name == "candidate")
    for row in choice.rows:
        table.add_row(*_format_row(row, choice, has_proxy))
    return table


def _format_row(row: CandidateRow, choice: BackboneChoice, has_proxy: bool) -> list[str]:
    cells = [f"{row.name} (chosen)" if row.name == choice.chosen else row.name]
    if row.votes is not None:
        cells.append(str(row.votes))
    if row.moments is not None:
        cells.append(f"{row.moments.accuracy:.3f} ± {row.moments.error:.3f}")
    if has_proxy:
        cells.append("-" if row.proxy is None else f"{row.proxy.accuracy:.3f} ± {row.proxy.error:.3f}")
    seconds = "-" if row.seconds is None else f"{row.seconds:.2g}"
    price = "none" if choice.price is None else f"epsilon {choice.price.epsilon:g} for all"
    return [*cells, str(row.dimension), seconds, f"{row.megabytes:.1f}", row.licence or "not declared", price]


def _describe(choice: BackboneChoice) -> list[str]:
    lines = []
    if choice.by == "moments" and choice.price is not None:
        used = [round_up(100.0 * each, 1) for each in choice.price.budget_used.values()]
        lines.append(
            f"price at each site: one Gaussian release of mu {round_up(choice.price.mu, 3):g} in the total over "
            f"{len(used)} sites, {max(used):g} % of a site's budget; no site's own sum is seen"
        )
    elif choice.price is not None:
        used = [round_up(100.0 * each, 1) for each in choice.price.budget_used.values()]
        lines.append(
            f"each vote: exponential mechanism, pure epsilon {choice.price.epsilon:g} (Gumbel noise of scale "
            f"{choice.price.sensitivity:g} / {choice.price.epsilon:g} on each cost); its ledger counts mu "
            f"{round_up(choice.price.mu, 3):g}, {max(used):g} % of a site's budget"
        )
    if choice.abstained:
        lines.append(
            f"not asked, because fewer than {choice.min_size} units are declared: {', '.join(choice.abstained)}"
        )
    if choice.by == "moments":
        lines.append(
            f"chosen: {choice.chosen}, by the class means of half of the units, counted on the other half; a head that "
            "is trained is better than class means, above all where classes overlap"
        )
    elif choice.by == "vote":
        count = sum(vote == choice.chosen for vote in choice.site_votes.values())
        lines.append(f"chosen: {choice.chosen}, by {count} of {len(choice.site_votes)} votes")
    else:
        lines.append(
            f"chosen: {choice.chosen}, by the public proxy; it has seen no record of the sites, and misses a backbone "
            "that is special to them"
        )
    return lines
