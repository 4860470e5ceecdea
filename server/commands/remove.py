"""`remove`: revokes a site's key."""

from __future__ import annotations

import typer

from common.process.console import reported_errors
from server.commands.parts.daemon import update_daemon
from server.commands.parts.options import Folder, SiteName
from server.deployment import admitted_sites
from server.deployment.federation import open_federation
from server.deployment.log import write_command


def remove(folder: Folder, name: SiteName) -> None:
    """Revokes a site's key for ever; a running coordinator disconnects it at once.

    Example: headwater coordinator remove fed north
    """
    with reported_errors():
        federation = open_federation(folder)
        entry = admitted_sites.remove_site(federation, name)
        write_command(federation, "remove", f"{name}, key {entry.fingerprint()}")
        update_daemon(federation)
        typer.echo(f"{name}: removed; key {entry.fingerprint()} is revoked")
