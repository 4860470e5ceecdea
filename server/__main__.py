"""Command line of the coordinator: `python -m server init | admit | remove | renew | kit`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from common.config import parse
from common.console import reported_errors
from common.types import BadInput
from server import certificates, registry
from server.federation import Federation, FederationConfig, create_folder, open_federation, split_address
from server.kit import write_kit
from server.link import run_link

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder")]
Site = Annotated[str, typer.Argument(metavar="NAME", help="The site's name")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the run file: --set rounds=5")]


@app.command()
def init(
    folder: Dir,
    name: Annotated[str, typer.Option(help="Name of the federation")],
    address: Annotated[str, typer.Option(help="HOST:PORT under which sites reach the coordinator")],
    also: Annotated[list[str] | None, typer.Option(help="A further public name or address (repeatable)")] = None,
    bind: Annotated[str | None, typer.Option(help="IP:PORT to listen on; by default every address, same port")] = None,
) -> None:
    """Make a federation folder: authority, server certificate, settings, an empty registry of sites.

    Example: python -m server init fed --name hearts --address fed.example.org:9092 --also 203.0.113.7
    """
    with reported_errors():
        federation = _init(folder, name, address, also or [], bind)
        config = federation.config
        typer.echo(f"{folder}: federation {config.name} at {config.address}, listening on {config.bind}")
        typer.echo(
            f"its certificate names {', '.join(config.hosts())}; keep {folder}/tls/ca.key secret, and a copy of it"
        )
        typer.echo(f"next: python -m server admit {folder} SITE --key SITE.pub")


def _init(folder: Path, name: str, address: str, also: list[str], bind: str | None) -> Federation:
    try:
        _, port = split_address(address)
    except ValueError as error:
        raise BadInput(f"--address: {error}") from error
    step = 1 if port <= 65533 else -1
    values = {
        "name": name,
        "address": address,
        "also": also,
        "bind": bind or f"0.0.0.0:{port}",
        "control_port": port + step,
        "health_port": port + 2 * step,
    }
    federation = create_folder(folder, parse(FederationConfig, values, base=Path.cwd()))
    registry.write_empty(federation)
    certificates.write_authority(federation.tls, name)
    certificates.write_server(federation.tls, federation.config.hosts())
    return federation


@app.command()
def admit(
    folder: Dir, name: Site, key: Annotated[Path, typer.Option(help="The site's public key, a .pub file")]
) -> None:
    """Let a site join, by its public key; a running federation takes it at once.

    Example: python -m server admit fed north --key north.pub
    """
    with reported_errors():
        entry = registry.admit(open_federation(folder), name, key)
        typer.echo(f"{name}: admitted; key {entry.fingerprint()} (compare it with the site's by telephone)")


@app.command()
def remove(folder: Dir, name: Site) -> None:
    """Revoke a site's key, for ever and at once, also in a running federation.

    Example: python -m server remove fed north
    """
    with reported_errors():
        entry = registry.remove(open_federation(folder), name)
        typer.echo(f"{name}: removed; key {entry.fingerprint()} is revoked")


@app.command()
def renew(
    folder: Dir,
    ca: Annotated[bool, typer.Option("--ca", help="A new authority too: every site then needs a new kit")] = False,
) -> None:
    """Make a new server certificate; a running federation uses it for new connections within seconds.

    Example: python -m server renew fed
    """
    with reported_errors():
        federation = open_federation(folder)
        if ca:
            certificates.write_authority(federation.tls, federation.config.name)
        certificates.write_server(federation.tls, federation.config.hosts())
        until = certificates.validity(federation.tls / "server.crt").until
        typer.echo(f"server certificate for {', '.join(federation.config.hosts())}, valid until {until:%Y-%m-%d}")
        if ca:
            typer.echo("every site needs the new authority: send each a new kit (`python -m server kit`) now; until "
                       "a site has put its ca.crt in place, it refuses this coordinator")  # fmt: skip
        else:
            typer.echo("sites need nothing: the authority they trust is the same")


@app.command()
def kit(
    folder: Dir,
    name: Site,
    run: Annotated[list[Path] | None, typer.Option(help="A run file to offer (repeatable)")] = None,
    out: Annotated[Path | None, typer.Option(help="The archive; by default NAME-kit.zip here")] = None,
) -> None:
    """Pack what a site needs to join: authority, address, offered runs. Nothing secret.

    Example: python -m server kit fed north --run fed/run.yaml
    """
    with reported_errors():
        path = out or Path(f"{name}-kit.zip")
        files = write_kit(open_federation(folder), name, run or [], path)
        typer.echo(f"{path}: {path.stat().st_size} bytes: {', '.join(files)}")


@app.command()
def link(folder: Dir) -> None:
    """Serve in the foreground until stopped; `start` launches the same in the background. For systemd and containers.

    Example: python -m server link fed
    """
    with reported_errors():
        run_link(open_federation(folder))


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
