"""`submit`: queues a run."""

from __future__ import annotations

import typer

from common.process.console import reported_errors
from server.commands.parts.options import Anyway, Folder, RunFile, Set
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.deployment.run_checks import check_run
from server.superlink.daemon import find_daemon_pid
from server.superlink.queue import submit_run


def submit(folder: Folder, run: RunFile, set_: Set = None, anyway: Anyway = False) -> None:
    """Queues a run and returns: it starts when those before it have ended. Prints the run's id.

    A run that cannot be better than guessing with the sites that joined ends before anything is charged.

    Example: headwater coordinator submit fed fed/run.yaml --set rounds=3
    """
    with reported_errors():
        federation = open_federation(folder)
        path = submit_run(federation, *check_run(federation, run, set_ or []), anyway=anyway)
        write_command(federation, "submit", f"run {path.name}")
        typer.echo(path.name)
        if find_daemon_pid(federation) is None:
            typer.echo(f"it waits for the coordinator: headwater coordinator serve {folder}", err=True)
