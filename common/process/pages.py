"""Read-only pages on a loopback port: an HTTP server that shares its port with the gRPC health service.

A gRPC client begins with `PRI * HTTP/2.0`, an HTTP/1.1 client with its method: the first bytes of a connection decide,
and a gRPC connection is passed on unread to the health service's own local socket.

Guarantees:
- Only GET is answered, and only for a loopback name in the header Host: a page of another origin in a browser on this
  machine cannot name this server (DNS rebinding).
- Every answer forbids scripts, frames, forms and anything from elsewhere (Content-Security-Policy), and is not kept.
- The number of open connections and the time of each request are bounded. Nothing that a peer sends is logged.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from common.process.html import STYLE
from common.types import HeadwaterError

_LOGGER = logging.getLogger(__name__)
_HTTP2 = b"PRI "
_MAX_CONNECTIONS = 64
_REQUEST_S = 10.0
_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Page:
    """An answer.

    Attributes:
        media_type: its media type, with the character set.
        body: its content.
    """

    media_type: str
    body: bytes


Pages = Mapping[str, Callable[[], Page]]
"""Path -> function that makes the page of this moment."""


class PageServer(ThreadingHTTPServer):
    """A server of pages on 127.0.0.1 that passes gRPC connections on."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, pages: Pages, connect_grpc: Callable[[], socket.socket]) -> None:
        """Binds the port; nothing is answered before `start`.

        Args:
            port: TCP port.
            pages: what is served, by path.
            connect_grpc: opens a connection to the health service.

        Raises:
            OSError: the port is in use.
        """
        self.pages, self._connect_grpc = pages, connect_grpc
        self._free = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        """Binds without asking a name server for this machine's name, as the class above would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def start(self) -> None:
        """Answers from now on, in threads."""
        threading.Thread(target=self.serve_forever, name="pages", daemon=True).start()

    def stop(self) -> None:
        """Ends the server."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers one connection in a thread of its own; closes it where too many are open."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Passes a gRPC connection on; answers any other as HTTP/1."""
        if _begins_http2(request):
            request.settimeout(None)
            with self._connect_grpc() as service:
                _pass_on(request, service)
        else:
            super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leaves one line in the log, at most: a peer that went away is no fault."""
        _LOGGER.debug("a connection to the health port ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_S
    server: PageServer

    def do_GET(self) -> None:
        if not _is_loopback_name(self.headers.get_all("Host", [])):
            self.send_error(421, "this server answers for localhost only")
            return
        make = self.server.pages.get(self.path.partition("?")[0])
        if make is None:
            self.send_error(404, f"no such page; there are {', '.join(self.server.pages)}")
            return
        try:
            page = make()
        except (HeadwaterError, OSError) as error:
            self.send_error(503, str(error) if isinstance(error, HeadwaterError) else type(error).__name__)
            return
        self._send(200, page)

    def do_POST(self) -> None:
        self.send_error(405, "only GET is answered")

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = do_POST

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers with one line of plain text, where the class above makes a page of its own.

        Args:
            code: status of the answer.
            message: the line.
            explain: not used.
        """
        self._send(code, Page("text/plain; charset=utf-8", f"{message or 'not answered'}\n".encode()))

    def _send(self, code: int, page: Page) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": page.media_type, "Content-Length": str(len(page.body)), **_HEADERS}.items():
            self.send_header(name, value)
        if code == 405:
            self.send_header("Allow", "GET")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(page.body)

    def version_string(self) -> str:
        return "headwater"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _is_loopback_name(hosts: list[str]) -> bool:
    """Returns whether the one header Host names this machine to itself; any port, because tunnels change it."""
    if len(hosts) != 1:
        return False
    host, colon, port = hosts[0].strip().lower().rpartition(":")
    if not colon or port.endswith("]"):  # No port; the last colon is one of an IPv6 address.
        host, port = hosts[0].strip().lower(), "0"
    return host in _HOSTS and port.isascii() and port.isdigit()


def _begins_http2(connection: socket.socket) -> bool:
    """Returns whether a connection's first bytes are those of HTTP/2; none of them is taken away."""
    until = time.monotonic() + _REQUEST_S
    connection.settimeout(_REQUEST_S)
    while time.monotonic() < until:
        first = connection.recv(len(_HTTP2), socket.MSG_PEEK)
        if len(first) == len(_HTTP2) or not first or not _HTTP2.startswith(first):
            return first == _HTTP2
        time.sleep(0.01)
    return False


def _pass_on(client: socket.socket, service: socket.socket) -> None:
    """Copies bytes both ways until either side has ended."""
    other = {client: service, service: client}
    with contextlib.suppress(OSError):
        while True:
            for ready in select.select([client, service], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                other[ready].sendall(data)
