"""`purge`: removes old runs."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.superlink.queue import remove_old_runs


def purge(
    folder: Folder, older_than: Annotated[float, typer.Option(min=0.0, help="Age in days of the runs to remove")]
) -> None:
    """Removes the folders, with journals and heads, of runs that ended so many days ago.

    A run that waits, is under way or can be resumed stays.

    Example: headwater coordinator purge fed --older-than 365
    """
    with reported_errors():
        federation = open_federation(folder)
        removed = remove_old_runs(federation, older_than)
        for run_id in removed:
            write_command(federation, "purge", f"run {run_id}")
            typer.echo(f"{run_id}: removed")
        typer.echo(f"{len(removed)} run(s) removed")
