"""`stop`: ends a run or the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.superlink import operate
from server.superlink.control import Control
from server.superlink.daemon import find_daemon_pid


def stop(
    folder: Folder, run: Annotated[bool, typer.Option("--run", help="End the run only; sites stay connected")] = False
) -> None:
    """Ends the current run and the coordinator; `resume` continues the run later.

    Example: headwater coordinator stop fed
    """
    with reported_errors():
        federation = open_federation(folder)
        if find_daemon_pid(federation) is None:
            typer.echo(f"{folder}: the coordinator is not running")
            return
        with Control(federation) as control:
            busy = control.find_current_run() if control.is_answering() else None
            if busy is not None:
                control.stop_run(busy.run_id)
                write_command(federation, "stop", f"run {Path(busy.folder).name}")
                typer.echo(f"run {Path(busy.folder).name}: ended; `headwater coordinator resume {folder}` continues it")
            elif run:
                typer.echo("no run is under way")
        if not run:
            operate.stop_daemon(federation)
            write_command(federation, "stop", "the coordinator")
            typer.echo(f"{folder}: the coordinator has stopped")
