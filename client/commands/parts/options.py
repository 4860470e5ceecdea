"""Arguments and options that several verbs of a site share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.config import MAIN, SiteConfig
from common.types import BadInput
from common.yaml import load

SiteFile = Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site's file")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run's file")]
Reason = Annotated[str, typer.Option(help="The reason; it is kept in the ledger (required)")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the site file (repeatable)")]
Coordinator = Annotated[
    str | None, typer.Option("--coordinator", help="Name of the coordinator, where the site file has several")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else")]
FinishedModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Folder of a finished model, or of the run that it came from, for a site that took part in no run",
    ),
]


def load_for(site: Path, coordinator: str | None, run: str | None, model: Path | None) -> SiteConfig:
    """Returns a site file's settings for a run of one of its coordinators, or for a model without one.

    Args:
        site: the site file.
        coordinator: name of the coordinator.
        run: id of the run.
        model: folder of the model.

    Raises:
        BadInput: the file is wrong, or both a model and a run are named.
    """
    if model is None:
        return load(SiteConfig, site).select(coordinator)
    for option, given in (("--run", run), ("--coordinator", coordinator)):
        if given is not None:
            raise BadInput(f"{option}: expected none beside --model, which stands for no run of this site")
    return load(SiteConfig, site)


def check_reason(reason: str) -> str:
    """Returns a stated reason without surrounding space. Raises BadInput where it is empty."""
    if not reason.strip():
        raise BadInput('--reason: expected a reason, such as --reason "cap raised by the board", got nothing')
    return reason.strip()


def locate_offers(site: Path, config: SiteConfig) -> Path:
    """Returns the folder of the offers that came with the selected coordinator's kit."""
    name = config.coordinator_name
    return site.parent / "offers" if name == MAIN else site.parent / "offers" / name
