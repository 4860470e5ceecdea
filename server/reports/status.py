"""The state of a federation, as `headwater coordinator status` reports it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

RunState = Literal["queued", "running", "completed", "partial", "interrupted", "failed", "cancelled"]
"""A run in the queue; `interrupted` goes on when the staff resumes it."""


class StatusFacts(BaseModel):
    """Base of everything in a status: immutable."""

    model_config = ConfigDict(frozen=True, defer_build=True)


class DaemonStatus(StatusFacts):
    """The coordinator's daemon."""

    running: bool = Field(description="Whether its process exists.")
    pid: int | None = Field(description="Id of its process; null where it does not run.")
    healthy: bool | None = Field(None, description="Whether it answers its health check; null where it does not run.")


class CertificateStatus(StatusFacts):
    """The server's certificate."""

    valid_until: str = Field(description="End of its validity, in ISO 8601.")
    days_left: int = Field(description="Number of days until then.")


class ConnectionStatus(StatusFacts):
    """The connection of one admitted site."""

    connected: bool | None = Field(None, description="Whether the site is connected; null where it is not known.")
    since: str | None = Field(None, description="Start of its last connection, in ISO 8601; null where there is none.")


class RunStatus(StatusFacts):
    """The newest run."""

    id: str = Field(description="Id of the run.")
    state: RunState = Field(
        description="Where it stands; partial: sites or tasks missed rounds; interrupted: it can be resumed."
    )
    under_way: bool = Field(False, description="Whether the daemon works on it.")
    round: int = Field(description="Number of completed rounds.")
    rounds: int | None = Field(description="Number of rounds that the run asks for; null before it started.")
    phase: str = Field("", description="The phase that it is in, in words; empty where it is not running.")
    seconds_per_round: float | None = Field(
        None, description="Pace of its last rounds, in seconds a round; null before the first of this attempt."
    )
    seconds_left: float | None = Field(
        None, description="Duration of the rounds that are left, at that pace; null where it is not known."
    )
    replies: Mapping[str, int] = Field(description="Name of each site -> number of rounds that used its update.")
    missed: Mapping[str, int] = Field(
        {}, description="Name of each site that missed rounds for which it was asked -> their number."
    )
    tasks_missed: Mapping[str, int] = Field(
        {}, description="Name of each task that completed rounds did not update -> their number."
    )


class ListedRun(StatusFacts):
    """A run in the list of all."""

    id: str = Field(description="Id of the run.")
    state: RunState = Field(description="Where it stands; the daemon goes on by itself with what is queued or running.")
    round: int = Field(description="Number of completed rounds.")
    rounds: int | None = Field(description="Number of rounds that the run asks for; null before it started.")
    submitted_at: float = Field(description="When it took its place in the queue, in seconds since 1970 (UTC).")
    last_event_at: float | None = Field(description="Time of its last event, in seconds since 1970; null without one.")
    reason: str | None = Field(description="Why it failed or was given up; null where nothing is known.")


class FederationStatus(StatusFacts):
    """The state of a federation."""

    federation: str = Field(description="Name of the federation.")
    address: str = Field(description="Public address, as host:port.")
    page: str = Field("", description="Address of the status page, for this machine only.")
    daemon: DaemonStatus = Field(serialization_alias="link", description="The coordinator's daemon.")
    certificate: CertificateStatus = Field(description="The server's certificate.")
    sites: Mapping[str, ConnectionStatus] = Field(description="Name of each admitted site -> its connection.")
    run: RunStatus | None = Field(description="The newest run; null where there is none.")

    def to_json(self) -> str:
        """Returns the status as indented JSON text."""
        return self.model_dump_json(indent=2, by_alias=True)
