"""`init`: makes a federation's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.address import Address
from common.process.console import reported_errors
from common.types import BadInput
from common.yaml import parse
from server.commands.parts.options import Folder
from server.deployment import admitted_sites, certificates
from server.deployment.federation import Federation, FederationConfig, create_federation
from server.deployment.log import write_command


def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="Name of the federation")],
    address: Annotated[str, typer.Option(help="HOST:PORT under which sites reach the coordinator")],
    also: Annotated[list[str] | None, typer.Option(help="A further public name or address (repeatable)")] = None,
    bind: Annotated[str | None, typer.Option(help="IP:PORT to listen on; by default every address, same port")] = None,
) -> None:
    """Makes a federation's folder: authority, server certificate, settings, an empty list of admitted sites.

    Example: headwater coordinator init fed --name hearts --address fed.example.org:9092 --also 203.0.113.7
    """
    with reported_errors():
        federation = _create(folder, name, address, also or [], bind)
        config = federation.config
        write_command(federation, "init", f"{config.name} at {config.address}")
        typer.echo(f"{folder}: federation {config.name} at {config.address}, listening on {config.bind}")
        typer.echo(
            f"its certificate names {', '.join(config.hosts())}; keep {folder}/tls/ca.key secret, and a copy of it"
        )
        typer.echo(f"next: headwater coordinator admit {folder} SITE --key SITE.pub")


def _create(folder: Path, name: str, address: str, also: list[str], bind: str | None) -> Federation:
    """Makes the folder; the ports of control and health follow the public one."""
    try:
        parsed = Address.parse(address)
    except ValueError as error:
        raise BadInput(f"--address: {error}") from error
    step = 1 if parsed.port <= 65533 else -1
    values = {
        "name": name,
        "address": address,
        "also": also,
        "bind": bind or f"{'127.0.0.1' if parsed.host in ('127.0.0.1', 'localhost') else '0.0.0.0'}:{parsed.port}",
        "control_port": parsed.port + step,
        "health_port": parsed.port + 2 * step,
    }
    federation = create_federation(folder, parse(FederationConfig, values, base=Path.cwd()))
    admitted_sites.write_no_sites(federation)
    certificates.write_authority(federation.tls, name)
    certificates.write_server(federation.tls, federation.config.hosts())
    return federation
