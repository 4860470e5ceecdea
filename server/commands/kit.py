"""`kit`: packs what a site needs to join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.types import BadInput
from server.commands.parts.options import Folder
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.federation import Federation, open_federation
from server.deployment.kit import write_kits
from server.deployment.log import write_command


def kit(
    folder: Folder,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The site's name")] = None,
    all_: Annotated[bool, typer.Option("--all", help="One kit for each admitted site, in place of NAME")] = False,
    run: Annotated[list[Path] | None, typer.Option(help="A run file to offer (repeatable)")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The archive, by default NAME-kit.zip here; with --all the folder of all")
    ] = None,
) -> None:
    """Packs what a site needs to join: authority, address, offered runs. Nothing in it is secret.

    Example: headwater coordinator kit fed north --run fed/run.yaml
    """
    with reported_errors():
        federation = open_federation(folder)
        paths = _choose_paths(federation, name, all_, out)
        if all_ and out is not None:
            out.mkdir(parents=True, exist_ok=True)
        files = write_kits(federation, paths, run or [])
        write_command(federation, "kit", f"{', '.join(paths)}: {', '.join(files)}")
        for path in paths.values():
            typer.echo(f"{path}: {path.stat().st_size} bytes: {', '.join(files)}")


def _choose_paths(federation: Federation, name: str | None, all_: bool, out: Path | None) -> dict[str, Path]:
    """Returns the archive of each site."""
    if (name is None) != all_:
        raise BadInput("expected either a site's name or --all")
    if name is not None:
        return {name: out or Path(f"{name}-kit.zip")}
    sites = load_admitted_sites(federation)
    if not sites:
        raise BadInput(
            f"{federation.folder}: no site is admitted; give a name, or `headwater coordinator admit` sites first"
        )
    return {site: (out or Path()) / f"{site}-kit.zip" for site in sorted(sites)}
