"""`approve`: records that a site takes part in a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from client.commands.parts.options import Coordinator, Json, SiteFile, locate_offers
from client.config import SiteConfig
from client.protocol.approvals import Approvals, check_offer, read_offer
from common.bundle import compute_code_digest
from common.offers import Offer
from common.privacy.accounting import round_up
from common.privacy.filters import TOLERANCE
from common.process.console import reported_errors
from common.run import RunConfig
from common.types import BadInput, BudgetExhausted, RecordsUnusable
from common.yaml import load


def approve(
    site: SiteFile,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A kit's offer, a run file, or a waiting offer's name or digest"),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the offers that wait and what was approved")] = False,
    coordinator: Coordinator = None,
    json_: Json = False,
) -> None:
    """Records that you approve a run; with --list, lists the offers that wait and what was approved.

    Without RUN it lists too.

    A run that the site's budget does not cover is not approved: exit code 1. Where a trial says that too few records
    can be used, no run is joined under the approval until the same command finds enough of them.

    Example: headwater site approve site.yaml offers/brain-mri.json
    """
    with reported_errors():
        config = load(SiteConfig, site).select(coordinator)
        approvals = Approvals(config.coordinator_dir)
        if list_ and run is not None:
            raise BadInput(f"--list: expected no run beside it, got {run!r}; leave one of the two out")
        if run is None:
            _print_offers(approvals, site, locate_offers(site, config), json_)
            return
        from client.connection.checks import freeze_records  # Here, as below: `--list` needs no torch.

        offer = _find_offer(approvals, run)
        about = _describe_offer(config, offer)
        hindrance = None
        try:
            about |= {item.name: item.detail for item in freeze_records(config, [offer])}
        except RecordsUnusable as error:
            hindrance = str(error)
        approval = approvals.approve(offer, hindrance=hindrance)
        if json_:
            given = {"approved_by": approval.by, "time": approval.time, "in_force": hindrance is None}
            typer.echo(json.dumps({**about, **given, "hindrance": hindrance}, indent=2))
            return
        width = max(map(len, about))
        for key, value in about.items():
            typer.echo(f"{key:<{width}}  {value}")
        typer.echo(f"approved by {approval.by}, for one run; recorded in {config.coordinator_dir / 'approvals.jsonl'}")
        if hindrance is not None:
            typer.echo(
                f"NOT IN FORCE: {hindrance}; this site joins no run under it: mend that and approve again", err=True
            )


def _find_offer(approvals: Approvals, wanted: str) -> Offer:
    path = Path(wanted)
    if path.suffix == ".json":
        return read_offer(path)
    if path.suffix in (".yaml", ".yml"):
        from common.model.backbones import open_backbones  # Here: it needs torch, and `--list` does not.
        from common.offers import list_digests, make_offer

        run = load(RunConfig, path)
        backbones = open_backbones(run)
        return Offer(make_offer(run, backbones), list_digests(backbones))
    return approvals.find(wanted)


def _describe_offer(config: SiteConfig, offer: Offer) -> dict[str, str]:
    """Returns what an approval covers, as lines for a person. Raises where the run would be declined here."""
    from client.protocol.plan import plan_run  # Here: they need torch, and `--list` does not.
    from client.protocol.site import Joined, SiteDeclined, find_sum_rules

    run = check_offer(offer)
    about = {
        "run": run.name,
        "digest": offer.digest,
        "code_digest": compute_code_digest(),
        "backbones": "; ".join(
            f"{name} ({spec.kind}) {offer.backbones[name]}" for name, spec in run.backbone_specs.items()
        ),
    }
    if run.choice is not None:
        return about | _describe_vote(config, offer, run, run.choice.scorer.kind)
    about |= {
        "tasks": ", ".join(f"{name} ({spec.kind}, on {run.backbone_of(name)})" for name, spec in run.tasks.items()),
        "training": f"{run.rounds} round(s), solver {run.solver.kind}{_describe_trainable(run)}",
    }
    if run.trust is not None:
        about["trust"] = (
            f"secure sum: the coordinator sees only the sum of at least {run.cohort.min_sites} sites, of which "
            f"{run.colluding} may collude with it"
        )
    if run.requested_privacy is None:
        return {**about, "price": "not private: epsilon is infinite"}
    try:
        find_sum_rules(config, Joined("approve", run, offer.backbones, Path()))
        outlook = plan_run(config, run, run.cohort.min_sites)
    except SiteDeclined as declined:
        raise BadInput(f"this run would be declined here: {declined.detail}") from declined
    price = (
        f"epsilon {round_up(outlook.run_epsilon):g} per {outlook.unit} ({outlook.relation}) at delta "
        f"{outlook.delta:g}; {round_up(outlook.final_epsilon):g} of {outlook.budget_epsilon:g} then spent"
    )
    if outlook.final_share > TOLERANCE:
        raise BudgetExhausted(
            f"{run.name}: the budget does not cover this run, so this site would decline it: {price}; nothing was "
            "approved"
        )
    return {**about, "price": price}


def _describe_vote(config: SiteConfig, offer: Offer, run: RunConfig, scorer: str) -> dict[str, str]:
    """Returns what a choice asks of this site. Raises where it would be declined here."""
    from client.protocol.balance import explain_largest_epsilon, find_largest_epsilon, history_of
    from client.protocol.site import Joined, SiteDeclined, check_allowed, plan_vote

    joined = Joined("approve", run, offer.backbones, Path())
    if not joined.tasks(config):
        raise BadInput(f"this run would be declined here: this site has no task {', '.join(run.tasks)}")
    try:
        check_allowed(config, joined)
        vote = plan_vote(config, joined)
    except SiteDeclined as declined:
        raise BadInput(f"this run would be declined here: {declined.detail}") from declined
    about = {
        "task": f"{vote.name} ({run.tasks[vote.name].kind})",
        "vote": f"on {len(run.backbone_specs)} backbones, by scorer {scorer}: only the number of one of them leaves",
    }
    if vote.public_size < vote.min_size:
        why = f"{vote.min_size} declared units are needed, this site declares {vote.public_size}"
        return {**about, "price": f"none: this site will not be asked; {why}"}
    history = history_of(config)
    price = (
        f"pure epsilon {vote.epsilon:g} per {config.unit} ({history.terms.relation}), whatever the number of "
        f"candidates; {round_up(history.compute_epsilon([vote.mechanism])):g} of {history.terms.epsilon_cap:g} then "
        "spent"
    )
    largest = find_largest_epsilon(config, vote.make_mechanism, vote.epsilon)
    if largest < vote.epsilon:
        raise BudgetExhausted(
            f"{run.name}: the budget does not cover this vote, so this site would decline it: {price}; "
            f"{explain_largest_epsilon(largest)}; nothing was approved"
        )
    return {**about, "price": price}


def _describe_trainable(run: RunConfig) -> str:
    """Returns the parts of the backbones that train beside the heads; empty where all are frozen."""
    return "".join(
        f"; {'adapters in ' if trainable.lora else ''}{name} from {trainable.from_} on trains too"
        for name, trainable in run.trainable.items()
    )


def _print_offers(approvals: Approvals, site: Path, kit: Path, json_: bool) -> None:
    """Prints the offers that wait, those that came with the kit, and what was approved."""
    waiting, approved, unreadable = approvals.waiting(), approvals.all(), approvals.unreadable()
    known = {offer.digest for offer in waiting} | {item.digest for item in approved}
    in_kit = {path: offer for path in sorted(kit.glob("*.json")) if (offer := read_offer(path)).digest not in known}
    if json_:
        listed = {
            "waiting": [{"run": check_offer(offer).name, "digest": offer.digest} for offer in waiting],
            "unreadable": unreadable,
            "approved": [
                {
                    "run": item.run,
                    "digest": item.digest,
                    "by": item.by,
                    "time": item.time,
                    "in_force": approvals.find_suspension(item.digest) is None,
                    "used_by": item.used_by,
                }
                for item in approved
            ],
        }
        typer.echo(json.dumps(listed, indent=2))
        return
    for offer in waiting:
        typer.echo(f"waiting   {check_offer(offer).name}  {offer.digest}")
    for digest, reason in unreadable.items():
        typer.echo(f"unreadable  {digest}  {reason}")
    for path, offer in in_kit.items():
        typer.echo(f"in kit    {check_offer(offer).name}  {offer.digest}  {path}")
    for item in approved:
        hindered = approvals.find_suspension(item.digest) is not None
        used = f"; used by {item.used_by}" if item.used_by else ""
        typer.echo(f"approved  {item.run}  {item.digest}  by {item.by}{used or ('; NOT IN FORCE' if hindered else '')}")
    if not waiting and not approved and not in_kit and not unreadable:
        typer.echo("no offer waits and none was approved")
    if waiting:
        typer.echo(f"next: headwater site approve {site} DIGEST, of a run that waits")
