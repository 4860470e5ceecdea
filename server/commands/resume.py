"""`resume`: continues an interrupted run."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.daemon import follow_run, start_daemon
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.superlink.queue import find_interrupted_run, prepare_interrupted_run, resume_run


def resume(
    folder: Folder,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN_ID]", help="By default the newest interrupted run")
    ] = None,
) -> None:
    """Continues an interrupted run after its last complete round; what sites spent stays spent.

    Example: headwater coordinator resume fed
    """
    with reported_errors():
        federation = open_federation(folder)
        path = find_interrupted_run(federation, run_id)
        prepare_interrupted_run(federation, path)
        start_daemon(federation)
        resume_run(path)
        write_command(federation, "resume", f"run {path.name}")
        follow_run(federation, path)
