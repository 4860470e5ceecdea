"""`recover`: replaces a damaged ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.parts.options import Reason, SiteFile, check_reason
from client.config import SiteConfig
from client.ledger.older_copy import describe_unknown_claims
from client.ledger.place import locate_ledgers
from client.ledger.recovery import recover as recover_ledger
from client.protocol import balance as budgets
from client.protocol.site import Joined, SiteDeclined, find_ledger, has_replies, make_plan
from common.privacy.accounting import Mechanism, round_up
from common.process.console import reported_errors
from common.run import RunConfig
from common.types import BadInput, LedgerDamaged, Plan
from common.yaml import load


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
    """Replaces a ledger that is damaged or an older copy by what still verifies and counts the worst case as spent.

    The damaged files are kept under another name.

    Example: headwater site recover site.yaml --reason "disk failure on 3 May, ticket 812"
    """
    with reported_errors():
        config = load(SiteConfig, site)
        done = recover_ledger(
            locate_ledgers(config),
            config.registry,
            budgets.read_terms(config),
            reason=check_reason(reason),
            noiseless_possible=config.allow.non_private,
            was_used=has_replies(config),
            behind=_describe_older_copy(config),
            assume_epsilon=assume_epsilon,
            assume_mechanism=None if assume_run is None else _charge_whole_run(config, assume_run),
        )
        typer.echo(f"damage: {done.seen}")
        typer.echo(f"kept: {done.num_kept} charge(s) that verify; {done.num_damaged} line(s) do not")
        typer.echo(f"damaged files: {done.aside or 'none were left'}")
        typer.echo(f"the population counts as having spent epsilon {round_up(done.epsilon):g}")
        more = "the cap alone" if assume_run else "the cap and delta, because a bare epsilon adds up in both"
        typer.echo(f"more can be released only after `headwater site amend` has raised {more}")


def _describe_older_copy(config: SiteConfig) -> str | None:
    try:
        ledger = find_ledger(config)
    except LedgerDamaged as damage:
        return str(damage)
    return None if ledger is None else describe_unknown_claims(ledger)


def _charge_whole_run(config: SiteConfig, path: Path) -> Mechanism:
    run = load(RunConfig, path)
    try:
        once = make_plan(config, Joined("stated", run, {}, config.state_dir))
    except SiteDeclined as declined:
        raise BadInput(f"--assume-run {path}: {declined.detail}") from declined
    steps = once.steps * run.rounds
    return Mechanism.of(Plan(once.sampling_rate, steps, once.clip_norm, once.noise_multiplier, once.unit))
