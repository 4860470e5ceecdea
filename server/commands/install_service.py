"""`install-service`: writes the coordinator's systemd unit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from common.process.service import Service
from common.process.service import install_service as write_service
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation


def install_service(
    folder: Folder,
    user: Annotated[bool, typer.Option("--user", help="For this user's own systemd instead of the system's")] = False,
    out: Annotated[Path | None, typer.Option(help="File to write; by default where systemd looks for it")] = None,
) -> None:
    """Writes a systemd unit that serves the federation from each start of the machine; enables and starts nothing.

    A unit of the system runs as the owner of the folder and can write to nothing else. Run this as root, or with
    `--user` for a unit of your own.

    Example: headwater coordinator install-service /srv/headwater/fed
    """
    with reported_errors():
        federation = open_federation(folder)
        service = Service(
            side="coordinator",
            name=federation.config.name,
            command=(sys.executable, "-m", "server", "serve", str(federation.folder)),
            owner=federation.folder.stat().st_uid,
            writable=(federation.folder,),
            restart_s=10,
            stop_s=30,
            port=federation.config.bind.port,
        )
        for line in write_service(service, user=user, out=out):
            typer.echo(line)
