"""`check`: tries everything that a site needs before it joins."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.parts.options import Json, SiteFile, locate_offers
from client.config import SiteConfig
from common.errors import plain
from common.process.console import EXIT_FAILED, print_json, reported_errors
from common.types import BadInput
from common.yaml import load

if TYPE_CHECKING:
    from client.connection.checks import Check

_MOST_SHOWN = 4000
"""Characters of a sentence that are shown."""

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def check(
    site: SiteFile,
    offline: Annotated[bool, typer.Option("--offline", help="Leave out what needs the network")] = False,
    json_: Json = False,
) -> None:
    """Checks everything that joining needs; exit code 1 when something fails. Nothing is sent or spent.

    With kept offers it tries a sample of the records with the offered backbones, and writes previews of them as the
    backbones receive them.

    Example: headwater site check hospital-a/site.yaml --offline
    """
    with reported_errors():
        config = load(SiteConfig, site)
        from client.connection.checks import (  # Here: it needs torch, and `init` does not.
            check_approvals,
            check_records,
            check_site,
        )
        from client.data.preview import Preview, write_previews
        from client.data.snapshot import freeze_snapshot, survey_sources
        from client.protocol.approvals import check_offer, read_offer

        names: list[str | None] = [*config.list_coordinators()]
        kept = {}
        for name in names if len(names) > 1 else [None]:
            folder = locate_offers(site, config.select(name))
            kept[name] = {path: read_offer(path) for path in sorted(folder.glob("*.json"))}
        offers = {str(path): check_offer(offer) for own in kept.values() for path, offer in own.items()}
        found = [*check_site(config, offers, offline=offline)]
        found += [each for name, own in kept.items() for each in check_approvals(site, config, own, name)]
        previews: list[Preview] = []
        with contextlib.suppress(BadInput):  # A source that does not open was reported above.
            previews = write_previews(config, offers)
            survey = survey_sources(config)
            tried = [
                each
                for name, own in kept.items()
                for offer in own.values()
                for each in check_records(config.select(name), offer, survey)
            ]
            found += tried
            if all(each.outcome != "fail" for each in tried):
                freeze_snapshot(config, survey)
        sheets = [preview.sheet for preview in previews if preview.sheet]
        failed = sum(item.outcome == "fail" for item in found)
        if json_:
            checks = [asdict(item) for item in found]
            print_json({"passed": not failed, "checks": checks, "previews": [str(path) for path in sheets]})
        else:
            _print_checks(found)
            for path in sheets:
                typer.echo(f"preview: {path} (it shows records: delete it after you have looked at it)")
            typer.echo(_describe_next_step(site, failed, offline=offline))
        if failed:
            raise typer.Exit(EXIT_FAILED)


def _describe_next_step(site: Path, failed: int, *, offline: bool) -> str:
    if failed:
        return f"{failed} failure(s)"
    if offline:
        return f"no failure; the network was left out; check it too with: headwater site check {site}"
    return f"ready to join: headwater site start {site}"


def _print_checks(found: Sequence[Check]) -> None:
    width = max(len(item.name) for item in found)
    for item in found:
        outcome = typer.style(item.outcome, fg=_COLOURS[item.outcome])
        # The names of labels may come from a stranger's file.
        typer.echo(f"{outcome}  {item.name:<{width}}  {plain(item.detail, _MOST_SHOWN)}")
        if item.remedy:
            typer.echo(f"      {'':<{width}}  -> {plain(item.remedy, _MOST_SHOWN)}")
