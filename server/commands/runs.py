"""`runs`: lists the runs."""

from __future__ import annotations

import json

import typer

from common.process.console import make_console, reported_errors
from server.commands.parts.options import Folder, Json
from server.deployment.federation import open_federation
from server.reports.tables import render_runs
from server.superlink.daemon import find_daemon_pid
from server.superlink.queue import PENDING, list_runs


def runs(folder: Folder, json_: Json = False) -> None:
    """Lists the runs in the order in which they were submitted: queued, running, and ended.

    Example: headwater coordinator runs fed --json
    """
    with reported_errors():
        federation = open_federation(folder)
        found = [run.to_status() for run in list_runs(federation)]
        if json_:
            typer.echo(json.dumps([run.model_dump() for run in found], indent=2))
            return
        make_console().print(render_runs(found))
        if any(run.state in PENDING for run in found) and find_daemon_pid(federation) is None:
            typer.echo(f"the coordinator does not run: headwater coordinator serve {folder}", err=True)
