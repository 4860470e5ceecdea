"""`log`: lists who ran which command."""

from __future__ import annotations

import time

from rich.table import Table

from common.errors import plain
from common.events import CommandRun, DaemonEvent, DaemonStarted, RequestRejected, RunsRemoved
from common.process.console import make_console, print_json, reported_errors
from server.commands.parts.options import Folder, Json
from server.deployment.federation import open_federation
from server.deployment.log import read_log


def log(folder: Folder, json_: Json = False) -> None:
    """Lists who ran which command, when the coordinator started and ended, which requests it rejected, and
    which old runs it removed.

    Example: headwater coordinator log fed --json
    """
    with reported_errors():
        events = read_log(open_federation(folder))
        if json_:
            print_json([{"event": event.event_name, **event.model_dump(mode="json")} for event in events])
            return
        table = Table(title=f"{len(events)} event(s)", title_justify="left")
        for column in ("time (UTC)", "by", "what", "detail"):
            table.add_column(column, overflow="fold")
        for event in events:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
            table.add_row(when, *_describe_event(event))
        make_console().print(table)


def _describe_event(event: DaemonEvent) -> tuple[str, str, str]:
    """Returns who did something, what, and for whom or why."""
    match event:
        case CommandRun():
            by = event.user if event.login in (None, event.user) else f"{event.user} ({event.login})"
            return f"{by} at {event.host}", event.command, event.what
        case RequestRejected():
            return event.site or plain(event.peer), event.event_name, f"{plain(event.path)}: {event.reason}"
        case DaemonStarted():
            return "", event.event_name, f"listening on {event.bind}"
        case RunsRemoved():
            return "", event.event_name, f"{', '.join(event.runs)}: older than {event.days:g} day(s)"
        case _:
            return "", event.event_name, ""
