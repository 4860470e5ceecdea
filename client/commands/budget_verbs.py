"""The verbs about a site's budget: `python -m client budget | plan | audit | log | amend | recover | purge`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.config import SiteConfig
from client.ledger import log as statements
from client.ledger.ledger import amend as amend_ledger
from client.ledger.log import Statement, in_words
from client.ledger.recovery import recover as recover_ledger
from client.protocol import balance as budgets
from client.protocol import plan as forecasts
from client.protocol.balance import Balance, rounded_down
from client.protocol.purge import Purged
from client.protocol.purge import purge as purge_site
from client.protocol.site import Joined, Site, SiteDeclined, plan_of
from common.errors import instead
from common.privacy.accounting import Mechanism, rounded_up
from common.privacy.noise import os_entropy
from common.process.console import EXIT_FAILED, reported_errors
from common.run import RunConfig
from common.types import BadInput, Plan
from common.yaml import load

SiteFile = Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site's file")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's file")]
Reason = Annotated[str, typer.Option(help="Why; kept in the ledger (required)")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the site file (repeatable)")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (budget, plan, audit, log, amend, recover, purge):
        app.command()(verb)


def budget(
    site: SiteFile,
    run: Annotated[Path | None, typer.Option(help="Count affordable rounds of this run's plan")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Show what the site's registry has spent, reserved and left, and what the rest affords.

    Example: python -m client budget site.yaml --run run.yaml
    """
    with reported_errors():
        config = load(SiteConfig, site, set_ or [])
        wanted = None if run is None else load(RunConfig, run)
        try:
            account = budgets.balance(config, wanted)
        except SiteDeclined as declined:
            raise BadInput(f"{run or 'the last run'}: {declined.detail}") from declined
        if json_:
            _print_json(budgets.as_json(account))
        else:
            _print_balance(account)


def plan(site: SiteFile, run: RunFile, set_: Set = None, json_: Json = False) -> None:
    """Say what a run would cost here and whether it can be useful; exit code 1 when it would be declined.

    Nothing is opened or spent.

    Example: python -m client plan site.yaml run.yaml
    """
    with reported_errors():
        config, wanted = load(SiteConfig, site, set_ or []), load(RunConfig, run)
        try:
            outlook = forecasts.forecast(config, wanted, wanted.cohort.min_sites)
        except SiteDeclined as declined:
            raise BadInput(f"{run}: {declined.detail}") from declined
        if json_:
            _print_json(forecasts.as_json(outlook))
        else:
            Console().print(forecasts.table([outlook]))
            typer.echo(forecasts.LEGEND)
            for warning in outlook.warnings:
                typer.echo(f"warning: {outlook.site}: {warning}")
        if outlook.declines:
            raise typer.Exit(EXIT_FAILED)


def audit(site: SiteFile, run: RunFile, set_: Set = None, json_: Json = False) -> None:
    """Attack a run's solver on synthetic records, as it would run here; exit code 1 when a claim is refuted.

    Example: python -m client audit site.yaml run.yaml --json
    """
    from client.audit.audit import audit_run, make_audit_table  # Here: it loads a third of a second of statistics.

    with reported_errors():
        config, wanted = load(SiteConfig, site, set_ or []), load(RunConfig, run)
        sizes = {name: task.public_size for name, task in config.tasks.items() if name in wanted.tasks}
        result = audit_run(wanted, config.unit, sizes, delta=config.budget.delta)
        if json_:
            _print_json(result.model_dump(mode="json"))
        else:
            Console().print(make_audit_table(result))
        for reason in result.reasons:
            typer.echo(f"error: {reason}", err=True)
        if not result.passed:
            raise typer.Exit(EXIT_FAILED)


def log(site: SiteFile, set_: Set = None, json_: Json = False) -> None:
    """List every release, every refusal with its reason, and every change of the ledger.

    Example: python -m client log site.yaml --json > log.json
    """
    with reported_errors():
        page = statements.statement(load(SiteConfig, site, set_ or []))
        if json_:
            _print_json(statements.as_json(page))
        else:
            _print_statement(page)


def amend(site: SiteFile, reason: Reason = "") -> None:
    """Change the ledger's cap, delta or unit to what the site file says now: logged, and nothing is reset.

    Example: python -m client amend site.yaml --reason "cap raised to 12 by the data protection board"
    """
    with reported_errors():
        config = load(SiteConfig, site)
        amend_ledger(
            config.state_dir / "ledgers",
            registry=config.registry,
            unit=config.unit,
            epsilon_cap=config.budget.epsilon,
            delta=config.budget.delta,
            reason=_stated(reason),
        )
        _print_balance(budgets.balance(config))


def recover(
    site: SiteFile,
    reason: Reason = "",
    assume_epsilon: Annotated[
        float | None, typer.Option(help="Count this as spent, at least the whole cap; by default the cap")
    ] = None,
    assume_run: Annotated[
        Path | None, typer.Option(help="Count this run file's whole run as released beside what still verifies")
    ] = None,
) -> None:
    """Replace a damaged ledger: what verifies is kept, the worst case counts as spent, the damaged files stay aside.

    Example: python -m client recover site.yaml --reason "disk failure on 3 May, ticket 812"
    """
    with reported_errors():
        config = load(SiteConfig, site)
        done = recover_ledger(
            config.state_dir / "ledgers",
            config.registry,
            budgets.terms_of(config),
            reason=_stated(reason),
            noiseless_possible=config.allow.non_private,
            was_used=Site(config, os_entropy).has_replies(),
            assume_epsilon=assume_epsilon,
            assume_mechanism=None if assume_run is None else _whole_run(config, assume_run),
        )
        typer.echo(f"damage: {done.seen}")
        typer.echo(f"kept: {done.num_kept} charge(s) that verify; {done.num_damaged} line(s) do not")
        typer.echo(f"damaged files: {done.aside or 'none were left'}")
        typer.echo(f"the registry counts as having spent epsilon {rounded_up(done.epsilon):g}")
        more = "the cap alone" if assume_run else "the cap and delta, because a bare epsilon adds up in both"
        typer.echo(f"more can be released only after `python -m client amend` has raised {more}")


def purge(
    site: SiteFile,
    patient: Annotated[
        list[str] | None, typer.Option(help="A patient id or record key (repeatable; stays in the shell's history)")
    ] = None,
    list_: Annotated[Path | None, typer.Option("--list", help="A file with one id or key a line")] = None,
) -> None:
    """Leave patients or records out for ever and remove everything computed from records. No id is printed.

    Example: python -m client purge site.yaml --list withdrawn.txt
    """
    with reported_errors():
        config = load(SiteConfig, site)
        ids = [*(patient or []), *(_lines(list_) if list_ else [])]
        if not ids:
            raise BadInput("purge: expected at least one id in --patient or --list, got none")
        done = purge_site(Site(config, os_entropy), ids)
        _print_purged(done)


# --- input -----------------------------------------------------------------------------------------------------------


def _stated(reason: str) -> str:
    if not reason.strip():
        raise BadInput('--reason: expected why, such as --reason "cap raised by the board", got nothing')
    return reason.strip()


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--list {path}: expected a text file{instead(error)}") from error
    return [line for line in text.splitlines() if line.strip()]


def _whole_run(config: SiteConfig, path: Path) -> Mechanism:
    run = load(RunConfig, path)
    try:
        once = plan_of(config, Joined("stated", run, {}, config.state_dir))
    except SiteDeclined as declined:
        raise BadInput(f"--assume-run {path}: {declined.detail}") from declined
    steps = once.steps * run.rounds
    return Mechanism.of(Plan(once.sampling_rate, steps, once.clip_norm, once.noise_multiplier, once.unit))


# --- output ----------------------------------------------------------------------------------------------------------


def _print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def _print_balance(account: Balance) -> None:
    terms = account.terms
    table = Table(
        title=f"registry {account.registry}: epsilon per {terms.unit.value}, {terms.relation}, delta {terms.delta:g}",
        title_justify="left",
        caption="each line is composed by itself; epsilons do not add up",
        caption_justify="left",
    )
    for name in ("run", "epsilon", "rounds", "evaluations", "charges", "without a stored reply"):
        table.add_column(name)
    for run in account.runs:
        counts = (run.rounds, run.evaluations, run.charges, run.open)
        table.add_row(run.run, f"{rounded_up(run.epsilon):g}", *map(str, counts))
    Console().print(table)
    typer.echo(f"spent     {rounded_up(account.spent_epsilon):g}")
    typer.echo(f"reserved  {rounded_up(account.reserved_epsilon):g}   (spent, and charges whose reply may have left)")
    typer.echo(f"left      {rounded_down(account.left_epsilon, 2):g} of {terms.epsilon_cap:g}")
    if account.evaluation is not None:
        held = account.evaluation
        typer.echo(
            f"held      share {held.share:g} for evaluations: {held.left} of {held.evaluations} left at noise "
            f"{held.noise_multiplier:.4g}; those charged cost {rounded_up(held.spent_epsilon):g} by themselves"
        )
    if account.affordable is not None:
        rest = account.affordable
        noise, rate, steps = rest.plan.noise_multiplier, rest.plan.sampling_rate, rest.plan.steps
        typer.echo(
            f"affords   {rest.rounds} more round(s) at noise {noise:.4g}, rate {rate:g}, {steps} step(s) ({rest.run})"
        )
    if account.amendment_due:
        typer.echo("note: the site file says other terms; `python -m client amend` makes them the ledger's", err=True)


def _print_statement(page: Statement) -> None:
    console = Console()
    console.print(
        _table(
            "releases",
            ("time (UTC)", "run", "round", "for", "mechanism", "bytes", "resent"),
            [
                (
                    _utc(each.time),
                    each.run,
                    str(each.round),
                    each.purpose,
                    in_words(each.mechanism),
                    "no stored reply" if each.bytes is None else str(each.bytes),
                    str(each.resent),
                )
                for each in page.releases
            ],
        )
    )
    refusals = [(_utc(each.time), each.source, each.reason, each.detail) for each in page.refusals]
    console.print(_table("refusals", ("time (UTC)", "by", "reason sent", "detail, kept here"), refusals))
    changes = [(_utc(each.time), each.event, each.detail) for each in page.changes]
    console.print(_table("changes", ("time (UTC)", "what", "detail"), changes))


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=f"{title}: {len(rows)}", title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(moment))


def _print_purged(done: Purged) -> None:
    typer.echo(f"excluded: {done.num_excluded} id(s), {done.num_new} of them new")
    typer.echo(f"left out: {done.num_records} record(s) of the site's present sources")
    typer.echo(f"removed: {done.num_features} cached source(s), the prepared arrays of {done.num_runs} run(s)")
    typer.echo("what was spent stays spent; a run under way has to be prepared again")
    if done.num_records == 0:
        typer.echo("warning: no record of the present sources has such an id or key", err=True)
