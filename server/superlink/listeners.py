"""Two listeners for one app in one process: TLS for the network, plain HTTP for loopback alone.

Sockets are bound before anything else starts, so that a port in use is one sentence and not half a coordinator.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import instead
from common.types import BadInput
from server.superlink.request_filter import App

_BACKLOG = 128
_MAX_HEAD_BYTES = 32 << 10


def bind_socket(host: str, port: int, key: str) -> socket.socket:
    """Returns a listening socket that is bound to an address of this machine.

    Args:
        host: IP address.
        port: TCP port.
        key: setting that names the port, for the message.

    Raises:
        BadInput: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A port that a stopped coordinator left in TIME_WAIT is free; one that another listens on stays taken.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        why = {
            errno.EADDRINUSE: "which is in use by another program",
            errno.EADDRNOTAVAIL: "which is no address of this machine",
            errno.EACCES: "which this user may not listen on",
        }.get(error.errno or 0, f"which cannot be used ({type(error).__name__})")
        raise BadInput(f"{key}: expected a free address, got {host} port {port}, {why}") from error
    return listener


@final
class Listener(uvicorn.Server):
    """One listener. The daemon handles signals: uvicorn's own handlers would stop only one of two listeners."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signal handlers as they are."""
        yield

    def reload_certificate(self, tls: Path) -> None:
        """Loads the folder's present certificate for new connections."""
        assert self.config.ssl is not None
        self.config.ssl.load_cert_chain(tls / "server.crt", tls / "server.key")


def create_public_listener(app: App, *, tls: Path, max_connections: int, idle_s: float) -> Listener:
    """Returns the listener on the network: TLS 1.2 or newer, bounded connections, silent ones are closed.

    Args:
        app: what answers requests.
        tls: folder with server.crt and server.key.
        max_connections: largest number of open connections.
        idle_s: longest time a connection may take for a request's head, in seconds.

    Raises:
        BadInput: certificate and key cannot be used.
    """
    config = uvicorn.Config(
        app,
        **_common_settings(),
        http=_create_limited_protocol(max_connections, idle_s),
        timeout_keep_alive=int(max(idle_s, 5)),
        ssl_certfile=tls / "server.crt",
        ssl_keyfile=tls / "server.key",
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise BadInput(
            f"{tls}: expected server.crt and the server.key that belongs to it{instead(error)}; "
            "`headwater coordinator renew`"
        ) from error
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return Listener(config)


def create_loopback_listener(app: App) -> Listener:
    """Returns the listener for this machine, without TLS; its socket must be bound to loopback."""
    return Listener(uvicorn.Config(app, **_common_settings(), http=H11Protocol))


async def start_listener(listener: Listener, bound: socket.socket) -> asyncio.Task[None]:
    """Starts a listener on its socket and returns its task, which ends when the listener stops."""
    task = asyncio.create_task(listener.serve(sockets=[bound]))
    while not listener.started and not task.done():
        await asyncio.sleep(0.01)
    return task


def _common_settings() -> dict[str, Any]:
    return {
        "lifespan": "off",  # The app's lifespan is entered once, not once a listener.
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "proxy_headers": False,  # A peer does not say who it is.
        "h11_max_incomplete_event_size": _MAX_HEAD_BYTES,
        "timeout_graceful_shutdown": 5,
    }


def _create_limited_protocol(max_connections: int, idle_s: float) -> type[H11Protocol]:
    """Returns a protocol with bounds that uvicorn lacks: of open connections, and of the time for a request's head."""

    class Limited(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._unwatch()  # A whole head came; the filter bounds its body.
            elif before is None or before.response_complete:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            # Once armed it is not postponed: a head that comes byte by byte has the same time.
            if self._timer is None:
                self._timer = self.loop.call_later(idle_s, self._too_slow)

        def _too_slow(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self.transport.abort()

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Limited
