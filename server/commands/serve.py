"""`serve`: opens the coordinator to its sites."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from common.process.lines import LogFormat, LogFormatOption, use_log_format
from server.commands.parts.daemon import start_daemon
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.monitoring.monitor import Monitor
from server.superlink.daemon import run_daemon


def serve(
    folder: Folder,
    background: Annotated[bool, typer.Option("--background", help="Return once it listens; `stop` ends it")] = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Opens the coordinator to its sites, and works off its queue, until stopped; a run that was under way goes on.

    Example: headwater coordinator serve fed --background
    """
    use_log_format(log_format)
    with reported_errors():
        federation = open_federation(folder)
        if background:
            start_daemon(federation)  # Its own process writes the line into the log.
        else:
            write_command(federation, "serve", f"for {federation.config.address}")
            run_daemon(federation, Monitor(federation).list_pages())
