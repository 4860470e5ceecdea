"""The state of a coordinator at one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.events import DaemonEvent, RequestRejected
from server.deployment.certificates import Validity
from server.deployment.federation import Federation
from server.monitoring.counts import RunCounts
from server.superlink.control import NodeState


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
        runs: run id -> its numbers, oldest first.
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
    ever: Sequence[RunCounts]
    rejections: Rejections

    def get_newest_run(self) -> tuple[str, RunCounts] | None:
        """Returns the run that is under way, else the newest one; None where there is none."""
        if not self.runs:
            return None
        name = list(self.runs)[-1]
        if self.current is not None and self.current in self.runs:
            name = self.current
        return name, self.runs[name]

    def name_node(self, node_id: int) -> str:
        """Returns the site of a node, as far as it is known."""
        named = [site for site, node in self.nodes.items() if node is not None and node.node_id == node_id]
        return named[0] if named else f"node {node_id}"
