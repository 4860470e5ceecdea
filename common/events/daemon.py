"""The events of a coordinator's daemon: the lines of a federation's `link.jsonl` and `commands.jsonl`."""

from __future__ import annotations

from pydantic import Field

from common.events.facts import Event


class DaemonStarted(Event):
    """The daemon listens."""

    event_name = "daemon_started"
    former_event_names = ("link_started",)

    pid: int = Field(description="Id of the daemon's process.")
    bind: str = Field(description="Address that it listens on, as host:port.")


class DaemonStopped(Event):
    """The daemon ended on request."""

    event_name = "daemon_stopped"
    former_event_names = ("link_stopped",)


class RunsRemoved(Event):
    """Folders of runs that had ended were removed, because they were older than the federation keeps them."""

    event_name = "runs_removed"

    runs: tuple[str, ...] = Field(description="Ids of the runs.")
    days: float = Field(description="Age at which a run is removed, in days.")


class RequestRejected(Event):
    """A request from the network was rejected before Flower saw it."""

    event_name = "rejected"
    former_event_names = ("refused",)

    peer: str = Field(description="Network address of the sender.")
    site: str | None = Field(description="Name of the site that signed the request; null where none did.")
    path: str = Field(description="Path of the request.")
    reason: str = Field(description="Why it was rejected.")


class CommandRun(Event):
    """A command changed something at the coordinator, or gave something away."""

    event_name = "command"

    command: str = Field(description="Name of the command, such as `admit`.")
    what: str = Field(description="The site, run or file that it was for, in words.")
    user: str = Field(description="Name of the system's user whose process it was, or the user's number.")
    login: str | None = Field(description="User who had logged in, as Linux or else sudo says; null where unknown.")
    host: str = Field(description="Name of the machine.")


DaemonEvent = DaemonStarted | DaemonStopped | RunsRemoved | RequestRejected | CommandRun
"""An event of a federation's `link.jsonl` or `commands.jsonl`."""
