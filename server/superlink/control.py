"""A client of the SuperLink's control requests, over loopback and with the federation's secret.

Flower's own command line and its configuration files are not used: single requests are all that is needed.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar, final

import httpx
from google.protobuf.message import DecodeError, Message

from common.flower import HEARTBEAT_PATIENCE, Fab, control_pb2, fab_to_proto, user_config_to_proto
from common.types import RunFailed
from server.deployment.federation import Federation
from server.superlink.request_filter import CONTROL_HEADER

_Response = TypeVar("_Response", bound=Message)
_MEDIA_TYPE = "application/protobuf"


@dataclass(frozen=True)
class NodeState:
    """The SuperLink's record of a site.

    Attributes:
        node_id: Flower's number of the site's node.
        key: the site's public key, PEM.
        status: `registered` (never connected), `online`, `offline` or `unregistered`.
        since: time of the last change, ISO 8601; empty where it never connected.
        last_contact: time of the last heartbeat, or of the end of the connection, in seconds since 1970; a site that
            vanished counts as connected for a minute. None where it never connected.
    """

    node_id: int
    key: bytes
    status: str
    since: str
    last_contact: float | None = None


@dataclass(frozen=True)
class RunState:
    """The SuperLink's record of a submitted run.

    Attributes:
        run_id: Flower's number of the run.
        folder: path of the run's folder.
        finished: true once its process has ended.
        outcome: `completed`, `failed`, `stopped`, or empty while it is not finished.
        details: Flower's description of a failure.
    """

    run_id: int
    folder: str
    finished: bool
    outcome: str
    details: str


class DaemonUnreachable(RunFailed):
    """The coordinator's daemon does not answer."""


@final
class Control:
    """A connection to the running daemon of a federation."""

    def __init__(self, federation: Federation, *, timeout_s: float = 30.0) -> None:
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{federation.config.control_port}",
            headers={
                CONTROL_HEADER: federation.read_control_secret(),
                "content-type": _MEDIA_TYPE,
                "accept": _MEDIA_TYPE,
            },
            timeout=timeout_s,
            trust_env=False,  # No proxy between this machine and itself.
            follow_redirects=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def is_answering(self) -> bool:
        """Returns whether the daemon answers."""
        try:
            return self._http.get("/health", timeout=5.0).is_success
        except httpx.HTTPError:
            return False

    def list_nodes(self) -> list[NodeState]:
        """Returns every registered site."""
        reply = self._call("list-nodes", control_pb2.ListNodesRequest(), control_pb2.ListNodesResponse())
        return [
            NodeState(
                int(node.node_id),
                bytes(node.public_key),
                str(node.status),
                str(max(node.last_activated_at, node.last_deactivated_at)),
                _find_last_contact(node),
            )
            for node in reply.nodes_info
            if node.status != "unregistered"
        ]

    def register(self, key: bytes, site: str) -> int:
        """Registers a site's key and returns its node id."""
        request = control_pb2.RegisterNodeRequest(public_key=key, name=site)
        return int(self._call("register-node", request, control_pb2.RegisterNodeResponse()).node_id)

    def unregister(self, node_id: int) -> None:
        """Removes a node: its requests are rejected from now on."""
        request = control_pb2.UnregisterNodeRequest(node_id=node_id)
        self._call("unregister-node", request, control_pb2.UnregisterNodeResponse())

    def submit(self, bundle: Fab, settings: Mapping[str, str]) -> int:
        """Starts a run of an app bundle and returns Flower's number of the run."""
        request = control_pb2.StartRunRequest(
            fab=fab_to_proto(bundle), override_config=user_config_to_proto(dict(settings))
        )
        reply = self._call("start-run", request, control_pb2.StartRunResponse())
        if not reply.HasField("run_id"):
            raise RunFailed("the SuperLink did not take the run; see state/link.log")
        return int(reply.run_id)

    def list_runs(self) -> list[RunState]:
        """Returns the submitted runs, newest first."""
        reply = self._call("list-runs", control_pb2.ListRunsRequest(), control_pb2.ListRunsResponse())
        return [
            RunState(
                int(run.run_id),
                str(run.override_config["run-folder"].string),
                run.status.status == "finished",
                str(run.status.sub_status),
                str(run.status.details),
            )
            for run in sorted(reply.run_dict.values(), key=lambda run: run.pending_at, reverse=True)
            if "run-folder" in run.override_config
        ]

    def find_current_run(self) -> RunState | None:
        """Returns the run that is under way; None where there is none."""
        return next((run for run in self.list_runs() if not run.finished), None)

    def stop_run(self, run_id: int) -> None:
        """Ends a run; one that has ended by itself meanwhile stays as it is."""
        try:
            self._call("stop-run", control_pb2.StopRunRequest(run_id=run_id), control_pb2.StopRunResponse())
        except RunFailed:
            if any(run.run_id == run_id and not run.finished for run in self.list_runs()):
                raise

    def _call(self, path: str, request: Message, response: _Response) -> _Response:
        try:
            reply = self._http.post(f"/v1/control/{path}", content=request.SerializeToString())
        except httpx.HTTPError as error:
            raise DaemonUnreachable(f"the coordinator's daemon does not answer ({type(error).__name__})") from error
        if not reply.is_success:
            raise RunFailed(f"the SuperLink refused {path}: status {reply.status_code}, {reply.text[:200]}")
        try:
            response.ParseFromString(reply.content)
        except DecodeError as error:
            raise RunFailed(f"the SuperLink's answer to {path} cannot be read") from error
        return response


def _find_last_contact(node: Any) -> float | None:
    if node.status == "online":
        # Each heartbeat lets a node count as online for two intervals from then on.
        return float(node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval)
    left = str(node.last_deactivated_at)
    return datetime.datetime.fromisoformat(left).timestamp() if left else None


def is_listening(port: int) -> bool:
    """Returns whether anything listens on a loopback port."""
    with socket.socket() as client:
        client.settimeout(1.0)
        return client.connect_ex(("127.0.0.1", port)) == 0
