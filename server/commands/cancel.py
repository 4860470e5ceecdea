"""`cancel`: takes a run out of the queue, or ends it."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from common.types import BadInput
from server.commands.parts.daemon import stop_run
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.superlink.queue import describe_run, find_run, withdraw_run


def cancel(folder: Folder, run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="The run's id")]) -> None:
    """Takes a run out of the queue; ends it where it is under way. What sites spent stays spent.

    Example: headwater coordinator cancel fed chest-20261128-090000-1a2b
    """
    with reported_errors():
        federation = open_federation(folder)
        path = find_run(federation, run_id)
        found = describe_run(path)
        if found.state in ("completed", "partial", "failed"):
            raise BadInput(f"expected a run that has not ended, got {run_id}, which is {found.state}")
        withdraw_run(path, "cancel")
        write_command(federation, "cancel", f"run {run_id}")
        stop_run(federation, path)
        begun = found.order.attempts or found.round
        typer.echo(f"{run_id}: cancelled")
        if begun:
            typer.echo("sites that joined hold what they set aside for it until `headwater site release`")
