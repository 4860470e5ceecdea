"""`serve`: opens the coordinator to its sites."""

from __future__ import annotations

from typing import Annotated

import typer

from common.process.console import reported_errors
from common.process.lines import LogFormat, LogFormatOption, use_log_format
from common.types import BadInput
from server.commands.parts.daemon import start_daemon
from server.commands.parts.options import Folder, TrackerDir, TrackerKind
from server.deployment.federation import open_federation
from server.deployment.log import write_command
from server.monitoring.monitor import Monitor
from server.monitoring.tracking import tracked_runs
from server.reports.trackers import open_trackers
from server.superlink.daemon import run_daemon


def serve(
    folder: Folder,
    background: Annotated[bool, typer.Option("--background", help="Return once it listens; `stop` ends it")] = False,
    tracker: TrackerKind = None,
    tracker_dir: TrackerDir = None,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Opens the coordinator to its sites, and works off its queue, until stopped; a run that was under way goes on.

    Example: headwater coordinator serve fed --background
    """
    use_log_format(log_format)
    with reported_errors():
        trackers = open_trackers(tracker or [])
        if trackers and background:
            raise BadInput("--tracker: expected it without --background; use it with `serve` in a service, or `start`")
        federation = open_federation(folder)
        if background:
            start_daemon(federation)  # Its own process writes the line into the log.
        else:
            write_command(federation, "serve", f"for {federation.config.address}")
            with tracked_runs(federation, trackers, tracker_dir):
                run_daemon(federation, Monitor(federation).list_pages())
