"""`renew`: makes a new server certificate."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.options import Folder
from server.deployment import certificates
from server.deployment.federation import open_federation
from server.deployment.log import write_command


def renew(
    folder: Folder,
    ca: Annotated[bool, typer.Option("--ca", help="A new authority too: every site then needs a new kit")] = False,
) -> None:
    """Makes a new server certificate; a running coordinator uses it for new connections within seconds.

    Example: headwater coordinator renew fed
    """
    with reported_errors():
        federation = open_federation(folder)
        if ca:
            certificates.write_authority(federation.tls, federation.config.name)
        certificates.write_server(federation.tls, federation.config.hosts())
        write_command(federation, "renew", "authority and server certificate" if ca else "server certificate")
        until = certificates.read_validity(federation.tls / "server.crt").until
        typer.echo(f"server certificate for {', '.join(federation.config.hosts())}, valid until {until:%Y-%m-%d}")
        if ca:
            typer.echo(
                "every site needs the new authority: send each a new kit (`headwater coordinator kit`) now; until a "
                "site has put its ca.crt in place, it refuses this coordinator"
            )
        else:
            typer.echo("sites need nothing: the authority they trust is the same")
