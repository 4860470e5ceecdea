"""`stop`: ends a run or the coordinator."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from server.commands.parts.daemon import stop_run
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.superlink import operate
from server.superlink.queue import list_runs, withdraw_run


def stop(
    folder: Folder, run: Annotated[bool, typer.Option("--run", help="End the run only; sites stay connected")] = False
) -> None:
    """Ends the current run and the coordinator; `resume` continues the run later. Queued runs stay queued.

    Example: headwater coordinator stop fed
    """
    with reported_errors():
        federation = open_federation(folder)
        running = [found.folder for found in list_runs(federation) if found.state == "running"]
        for path in running:
            withdraw_run(path, "pause")
            write_command(federation, "stop", f"run {path.name}")
            stop_run(federation, path)
            typer.echo(f"run {path.name}: ended; `headwater coordinator resume {folder}` continues it")
        if run and not running:
            typer.echo("no run is under way")
        if not run:
            stopped = operate.stop_daemon(federation)
            if stopped:
                write_command(federation, "stop", "the coordinator")
            typer.echo(f"{folder}: the coordinator {'has stopped' if stopped else 'is not running'}")
