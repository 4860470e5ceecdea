"""`status`: shows sites, run and health."""

from __future__ import annotations

import typer

from common.process.console import EXIT_FAILED, make_console, reported_errors
from server.commands.parts.options import Folder, Json
from server.deployment.federation import open_federation
from server.reports.tables import render_status
from server.superlink import operate


def status(folder: Folder, json_: Json = False) -> None:
    """Shows connected sites, the run and the coordinator's health; exit code 1 where it is not healthy.

    Example: headwater coordinator status fed --json
    """
    with reported_errors():
        found = operate.status(open_federation(folder))
        if json_:
            typer.echo(found.to_json())
        else:
            make_console().print(render_status(found))
        if not found.daemon.healthy:
            raise typer.Exit(EXIT_FAILED)
