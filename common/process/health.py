"""The standard gRPC health service (grpc.health.v1) on a loopback port: for Kubernetes, systemd and `status`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.types import BadInput

_Status = health_pb2.HealthCheckResponse.ServingStatus


class Health:
    """A running health service; it answers for the whole process, as the service named ""."""

    def __init__(self, port: int) -> None:
        """Starts the service on 127.0.0.1, as NOT_SERVING.

        Raises:
            BadInput: the port is in use.
        """
        self._servicer = health.HealthServicer()
        # so_reuseport would let a second process share the port silently.
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4), options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self._server.add_insecure_port(f"127.0.0.1:{port}")
        except RuntimeError as error:
            raise BadInput(f"health_port: expected a free port, got {port}, which is in use") from error
        self.serving(False)
        self._server.start()

    def serving(self, yes: bool) -> None:
        """Sets whether the process can work now."""
        self._servicer.set("", _Status.SERVING if yes else _Status.NOT_SERVING)

    def stop(self) -> None:
        """Stops the service."""
        self._server.stop(grace=1).wait()


def is_serving(port: int, timeout_s: float = 2.0) -> bool | None:
    """Returns what the service on a loopback port says; None where none answers."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=timeout_s)
        except grpc.RpcError:
            return None
    return bool(reply.status == _Status.SERVING)
