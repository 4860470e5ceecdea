"""The verbs of a site's staff about runs: `python -m client approve | evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from client.config import SiteConfig
from client.personal.evaluate import FEDERATED, Comparison, compare
from client.protocol.approvals import Approvals, Offer, read_offer
from client.protocol.plan import forecast
from client.protocol.site import Site, SiteDeclined
from common.bundle import compute_code_digest
from common.model.backbones import digests_of, open_backbones
from common.offers import make_offer
from common.privacy.accounting import rounded_up
from common.privacy.noise import os_entropy
from common.process.console import reported_errors
from common.run import RunConfig
from common.types import BadInput, BudgetExhausted
from common.yaml import load

SiteFile = Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site's file")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(approve)
    app.command()(evaluate)


def approve(
    site: SiteFile,
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A kit's offer, a run file, or a waiting offer's name or digest"),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the offers that wait and what was approved")] = False,
    json_: Json = False,
) -> None:
    """Record that you approve a run; with --list or without RUN, list the offers that wait and what was approved.

    A run that the site's budget does not cover is refused with exit code 1.

    Example: python -m client approve site.yaml offers/brain-mri.json
    """
    with reported_errors():
        config = load(SiteConfig, site)
        approvals = Approvals(config.state_dir)
        if list_ and run is not None:
            raise BadInput(f"--list: expected no run beside it, got {run!r}; leave one of the two out")
        if run is None:
            _list(approvals, site.parent / "offers", json_)
            return
        offer = _offer(approvals, run)
        about = _about(config, offer)
        approval = approvals.approve(offer)
        if json_:
            typer.echo(json.dumps({**about, "approved_by": approval.by, "time": approval.time}, indent=2))
            return
        for key, value in about.items():
            typer.echo(f"{key:<13}{value}")
        typer.echo(f"approved by {approval.by}, for one run; recorded in {config.state_dir / 'approvals.jsonl'}")


def evaluate(
    site: SiteFile,
    run: Annotated[
        str | None, typer.Option(help="Id of the run; by default the run whose final heads arrived last")
    ] = None,
    json_: Json = False,
) -> None:
    """Compare a run's final heads with heads trained here alone, on held-out units. Nothing is sent or spent.

    Example: python -m client evaluate site.yaml
    """
    with reported_errors():
        try:
            result = compare(Site(load(SiteConfig, site), os_entropy), run)
        except SiteDeclined as declined:
            raise BadInput(f"--run {run}: {declined.detail}") from declined
        if json_:
            typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False))
        else:
            Console().print(_comparison(result))


def _offer(approvals: Approvals, wanted: str) -> Offer:
    path = Path(wanted)
    if path.suffix == ".json":
        return read_offer(path)
    if path.suffix in (".yaml", ".yml"):
        run = load(RunConfig, path)
        backbones = open_backbones(run)
        return Offer(make_offer(run, backbones), digests_of(backbones))
    return approvals.find(wanted)


def _about(config: SiteConfig, offer: Offer) -> dict[str, str]:
    """What an approval is about, in a person's words."""
    run = offer.config()
    about = {
        "run": run.name,
        "digest": offer.digest,
        "code_digest": compute_code_digest(),
        "backbones": "; ".join(
            f"{name} ({spec.kind}) {offer.backbones[name]}" for name, spec in run.backbone_specs.items()
        ),
        "tasks": ", ".join(f"{name} ({spec.kind}, on {run.backbone_of(name)})" for name, spec in run.tasks.items()),
        "training": f"{run.rounds} round(s), solver {run.solver.kind}{_trained(run)}",
    }
    if run.requested_privacy is None:
        return {**about, "price": "not private: epsilon is infinite"}
    try:
        outlook = forecast(config, run, run.cohort.min_sites)
    except SiteDeclined as declined:
        raise BadInput(f"this run would be declined here: {declined.detail}") from declined
    price = (
        f"epsilon {rounded_up(outlook.run_epsilon):g} per {outlook.unit} ({outlook.relation}) at delta "
        f"{outlook.delta:g}; {rounded_up(outlook.final_epsilon):g} of {outlook.budget_epsilon:g} then spent"
    )
    if outlook.final_epsilon > outlook.budget_epsilon:
        raise BudgetExhausted(
            f"{run.name}: the budget does not cover this run, so this site would decline it: {price}; nothing was "
            "approved"
        )
    return {**about, "price": price}


def _trained(run: RunConfig) -> str:
    """How much of the backbones trains beside the heads; nothing where they are frozen."""
    return "".join(
        f"; {'adapters in ' if trainable.lora else ''}{name} from {trainable.from_} on trains too"
        for name, trainable in run.trainable.items()
    )


def _list(approvals: Approvals, kit: Path, json_: bool) -> None:
    """What waits, what was approved, and the offers that came with the kit and are neither."""
    waiting, approved = approvals.waiting(), approvals.all()
    known = {offer.digest for offer in waiting} | {item.digest for item in approved}
    came = {path: offer for path in sorted(kit.glob("*.json")) if (offer := read_offer(path)).digest not in known}
    if json_:
        listed = {
            "waiting": [{"run": offer.config().name, "digest": offer.digest} for offer in waiting],
            "approved": [
                {"run": item.run, "digest": item.digest, "by": item.by, "time": item.time} for item in approved
            ],
        }
        typer.echo(json.dumps(listed, indent=2))
        return
    for offer in waiting:
        typer.echo(f"waiting   {offer.config().name}  {offer.digest}")
    for path, offer in came.items():
        typer.echo(f"in kit    {offer.config().name}  {offer.digest}  {path}")
    for item in approved:
        typer.echo(f"approved  {item.run}  {item.digest}  by {item.by}")
    if not waiting and not approved and not came:
        typer.echo("no offer waits and none was approved")


def _comparison(result: Comparison) -> Table:
    table = Table(
        title=f"{result.run_id}: {result.num_held_out} held-out unit(s) of this site; nothing was sent or spent",
        title_justify="left",
    )
    columns = list(next(iter(result.tasks.values())))
    for name in ("task", "metric", *columns):
        table.add_column(name)
    for task, own in result.tasks.items():
        for position, metric in enumerate(own[FEDERATED]):
            values = [own[who].get(metric) for who in columns]
            shown = ["" if value is None else f"{value:.3f}" for value in values]
            table.add_row(task if position == 0 else "", metric, *shown)
    return table
