"""`admit`: lets a site join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.daemon import update_daemon
from server.commands.parts.options import Folder, SiteName
from server.deployment import admitted_sites
from server.deployment.federation import open_federation
from server.deployment.log import write_command


def admit(
    folder: Folder, name: SiteName, key: Annotated[Path, typer.Option(help="The site's public key, a .pub file")]
) -> None:
    """Admits a site by its public key; a running coordinator accepts it at once.

    Example: headwater coordinator admit fed north --key north.pub
    """
    with reported_errors():
        federation = open_federation(folder)
        entry = admitted_sites.admit_site(federation, name, key)
        write_command(federation, "admit", f"{name}, key {entry.fingerprint()}")
        update_daemon(federation)
        typer.echo(f"{name}: admitted; key {entry.fingerprint()} (compare it with the site's by telephone)")
