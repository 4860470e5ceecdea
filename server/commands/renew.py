"""`renew`: makes a new server certificate, or exchanges the authority that signs it."""

from __future__ import annotations

from typing import Annotated

import typer

from common.events import CommandRun
from common.process.console import reported_errors
from common.types import BadInput
from server.commands.parts.options import Folder
from server.deployment import certificates
from server.deployment.admitted_sites import load_admitted_sites
from server.deployment.federation import Federation, open_federation
from server.deployment.log import read_log, write_command


def renew(
    folder: Folder,
    ca: Annotated[bool, typer.Option("--ca", help="Begin the exchange of the authority: kits then name two")] = False,
    switch: Annotated[
        bool, typer.Option("--switch", help="With --ca: let the other authority sign; again to take it back")
    ] = False,
    retire: Annotated[
        bool, typer.Option("--retire", help="With --ca: leave the authority that does not sign out of the kits")
    ] = False,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="With --ca: a new authority now; each site is locked out until its kit")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --switch: although a site has no new kit yet")] = False,
) -> None:
    """Makes a new server certificate; a running coordinator uses it for new connections within seconds.

    An authority is exchanged without locking a site out: `--ca`, a new kit for each site, `--ca --switch`, and once all
    have joined again `--ca --retire`.

    Example: headwater coordinator renew fed
    """
    with reported_errors():
        if switch + retire + at_once > 1 or ((switch or retire or at_once) and not ca) or (force and not switch):
            raise BadInput("expected --ca alone or with one of --switch, --retire, --at-once; --force beside --switch")
        federation = open_federation(folder)
        tls, config = federation.tls, federation.config
        what, then = "server certificate", "sites need nothing: the authority they trust is the same"
        if at_once:
            certificates.replace_authority(tls, config.name)
            what = "authority and server certificate"
            then = (
                "every site needs the new authority: send each a new kit (`headwater coordinator kit`) now; until a "
                "site has put its ca.crt in place, it refuses this coordinator"
            )
        elif switch:
            _check_kits(federation, force=force)
            certificates.switch_authority(tls, config.hosts())
            what = "switched to the other authority"
            then = (
                "sites that took a kit made since `renew --ca` join as before; to take this back, run the same command "
                "again. Once each site has joined: `headwater coordinator renew --ca --retire`"
            )
        elif retire:
            certificates.retire_authority(tls)
            what, then = "retired the authority that does not sign", "kits made from now on name one authority again"
        elif ca:
            certificates.add_authority(tls, config.name)
            what = "second authority"
            then = (
                "nothing changes for sites yet: send each a new kit (`headwater coordinator kit`), which names both "
                "authorities; when all have it: `headwater coordinator renew --ca --switch`"
            )
        if not (retire or switch or (ca and not at_once)):
            certificates.write_server(tls, config.hosts())
        write_command(federation, "renew", what)
        until = certificates.read_validity(tls / "server.crt").until
        typer.echo(f"server certificate for {', '.join(config.hosts())}, valid until {until:%Y-%m-%d}")
        typer.echo(then)


def _check_kits(federation: Federation, *, force: bool) -> None:
    """Checks that a kit was made for each admitted site since there are two authorities.

    Raises:
        BadInput: there is none for a site, and `force` is false.
    """
    second = federation.tls / f"{certificates.SECOND}.crt"
    if force or not second.exists():
        return
    since = second.stat().st_mtime
    done = {
        site
        for event in read_log(federation)
        if isinstance(event, CommandRun) and event.command == "kit" and event.time >= since
        for site in event.what.partition(":")[0].split(", ")
    }
    missing = sorted(set(load_admitted_sites(federation)) - done)
    if missing:
        raise BadInput(
            f"expected a new kit for each site first, there is none for {', '.join(missing)}: `headwater coordinator "
            "kit` makes one; --force switches all the same, and those sites are turned away until they have one"
        )
