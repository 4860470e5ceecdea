"""The standard gRPC health service (grpc.health.v1) on a loopback port: for Kubernetes, systemd and `status`.

The same port serves read-only pages over HTTP/1.1 (`common.process.pages`).
"""

from __future__ import annotations

import secrets
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.process.pages import Pages, PageServer
from common.types import BadInput

_Status = health_pb2.HealthCheckResponse.ServingStatus


class Health:
    """A running health service; it answers for the whole process, as the service named ""."""

    def __init__(self, port: int, pages: Pages | None = None) -> None:
        """Starts the service on 127.0.0.1, as NOT_SERVING.

        Args:
            port: TCP port.
            pages: pages that the same port serves, by path.

        Raises:
            BadInput: the port is in use.
        """
        try:
            self._pages = PageServer(port, pages or {}, self._connect)
        except OSError as error:
            raise BadInput(f"health_port: expected a free port, got {port}, which is in use") from error
        self._servicer = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        # A name in memory leaves no file behind and takes no port; only Linux has such names.
        self._name = f"headwater-{secrets.token_hex(16)}" if sys.platform == "linux" else ""
        self._port = self._server.add_insecure_port(f"unix-abstract:{self._name}" if self._name else "127.0.0.1:0")
        self._serves: bool | None = None
        self.serving(False)
        self._server.start()
        self._pages.start()

    def serving(self, yes: bool) -> None:
        """Sets whether the process can work now; who watches is told where that changes."""
        if yes == self._serves:
            return
        self._serves = yes
        self._servicer.set("", _Status.SERVING if yes else _Status.NOT_SERVING)

    def stop(self) -> None:
        """Stops the service."""
        self._pages.stop()
        self._server.stop(grace=1).wait()

    def _connect(self) -> socket.socket:
        if not self._name:
            return socket.create_connection(("127.0.0.1", self._port))
        service = socket.socket(socket.AF_UNIX)
        service.connect(f"\0{self._name}")
        return service


def is_serving(port: int, timeout_s: float = 2.0) -> bool | None:
    """Returns what the service on a loopback port says; None where none answers."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=timeout_s)
        except grpc.RpcError:
            return None
    return bool(reply.status == _Status.SERVING)
