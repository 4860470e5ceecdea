"""The state of a coordinator at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.events import DaemonEvent, RequestRejected
from server.deployment.certificates import Validity
from server.deployment.federation import Federation
from server.monitoring.counts import RunCounts
from server.superlink.control import NodeState
from server.superlink.queue import FederationRun


@dataclass
class Rejections:
    """Requests from the network that were rejected, as far as the daemon's journal lists them.

    Attributes:
        count: their number.
        last: the last one.
    """

    count: int = 0
    last: RequestRejected | None = None

    def add(self, event: DaemonEvent) -> None:
        """Adds the next event of the daemon's journal."""
        if isinstance(event, RequestRejected):
            self.count += 1
            self.last = event


@dataclass(frozen=True)
class CoordinatorState:
    """The state of a coordinator.

    Attributes:
        time: when this was true, in seconds since 1970.
        federation: its folder and settings.
        version: version of this installation.
        code_digest: digest of the code that sites review.
        certificate: validity of the server's certificate.
        free_bytes: free space where the folder lies.
        nodes: admitted site -> its connection; None where the SuperLink knows none, or did not answer.
        answering: whether the SuperLink answered.
        current: id of the run that is under way; None where there is none.
        runs: run id -> its numbers, in the order of the queue.
        listed: run id -> what is wanted of it and where it stands; of the run under way, when it was last asked for.
        ever: numbers of all runs that this process has seen, those included whose folders are gone.
        rejections: rejected requests.
    """

    time: float
    federation: Federation
    version: str
    code_digest: str
    certificate: Validity
    free_bytes: int
    nodes: Mapping[str, NodeState | None]
    answering: bool
    current: str | None
    runs: Mapping[str, RunCounts]
    listed: Mapping[str, FederationRun]
    ever: Sequence[RunCounts]
    rejections: Rejections

    def get_newest_run(self) -> tuple[str, RunCounts] | None:
        """Returns the run that is under way, else the last that was begun; None where there is none."""
        name = self.current if self.current in self.runs else None
        name = name or next((each for each in reversed(list(self.runs)) if self.runs[each].started), None)
        return None if name is None else (name, self.runs[name])

    def count_queued(self) -> int:
        """Returns the number of runs that wait for their turn."""
        return sum(run.state == "queued" and name != self.current for name, run in self.listed.items())

    def name_node(self, node_id: int) -> str:
        """Returns the site of a node, as far as it is known."""
        named = [site for site, node in self.nodes.items() if node is not None and node.node_id == node_id]
        return named[0] if named else f"node {node_id}"
