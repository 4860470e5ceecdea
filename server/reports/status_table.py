"""The state of a federation for a terminal: a view of `server.superlink.operate.status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text


def status_table(found: Mapping[str, Any]) -> Group:
    """What `python -m server status` shows."""
    link, run, certificate = found["link"], found["run"], found["certificate"]
    state = "not running" if not link["running"] else ("healthy" if link["healthy"] else "running, NOT HEALTHY")
    lines = [
        f"{found['federation']} at {found['address']}: {state}",
        f"server certificate: {certificate['days_left']} days left (until {certificate['valid_until'][:10]})",
    ]
    replies: Mapping[str, int] = {}
    if run is not None:
        replies = run["replies"]
        where = f"round {run['round']} of {run['rounds']}" if run["rounds"] else "not begun"
        lines.append(f"run {run['id']}: {where}, {'under way' if run['under_way'] else run['state']}")
    table = Table(box=box.SIMPLE)
    for column in ("site", "connected", "since", "replies in the run"):
        table.add_column(column)
    for name, site in found["sites"].items():
        connected = {None: "unknown", True: "yes", False: "no"}[site["connected"]]
        table.add_row(name, connected, (site["since"] or "never")[:19], str(replies.get(name, "")))
    return Group(Text("\n".join(lines), no_wrap=True, overflow="ignore"), table)
