"""`kit`: packs what a site needs to join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.options import Folder, SiteName
from server.deployment.federation import open_federation
from server.deployment.kit import write_kit
from server.deployment.log import write_command


def kit(
    folder: Folder,
    name: SiteName,
    run: Annotated[list[Path] | None, typer.Option(help="A run file to offer (repeatable)")] = None,
    out: Annotated[Path | None, typer.Option(help="The archive; by default NAME-kit.zip here")] = None,
) -> None:
    """Packs what a site needs to join: authority, address, offered runs. Nothing in it is secret.

    Example: headwater coordinator kit fed north --run fed/run.yaml
    """
    with reported_errors():
        path = out or Path(f"{name}-kit.zip")
        federation = open_federation(folder)
        files = write_kit(federation, name, run or [], path)
        write_command(federation, "kit", f"{name}: {', '.join(files)}")
        typer.echo(f"{path}: {path.stat().st_size} bytes: {', '.join(files)}")
