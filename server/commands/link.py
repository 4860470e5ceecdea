"""`link`: serves in the foreground."""

from __future__ import annotations

from common.process.console import reported_errors
from common.process.lines import LogFormat, LogFormatOption, use_log_format
from server.commands.parts.options import Folder
from server.deployment.federation import open_federation
from server.monitoring.monitor import Monitor
from server.superlink.daemon import run_daemon


def link(folder: Folder, log_format: LogFormatOption = LogFormat.TEXT) -> None:
    """Serves in the foreground until stopped, for systemd and containers; `start` runs the same in the background.

    Example: headwater coordinator link fed
    """
    use_log_format(log_format)
    with reported_errors():
        federation = open_federation(folder)
        run_daemon(federation, Monitor(federation).list_pages())
