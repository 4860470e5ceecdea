"""A small real HTTPS server that answers as a test wants, for what a well-behaved coordinator never does."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Answer:
    """One answer: status, body, headers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    date: str | None = None


@dataclass
class Answering:
    """A running server.

    Attributes:
        address: host and port.
        asked: paths in the order in which they were asked for.
        bodies: what came with each of them.
    """

    address: str
    asked: list[str]
    bodies: list[bytes]


@contextlib.contextmanager
def answering(certificate: tuple[Path, Path] | None, answer: Callable[[str], Answer]) -> Iterator[Answering]:
    """Serve on loopback, over TLS where a certificate and key are given, else in plain HTTP."""
    asked: list[str] = []
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        date: str | None = None

        def reply(self) -> None:
            bodies.append(self.rfile.read(int(self.headers.get("content-length") or 0)))
            asked.append(self.path)
            chosen = answer(self.path)
            self.date = chosen.date
            self.send_response(chosen.status)
            for name, value in {"content-length": str(len(chosen.body)), **chosen.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(chosen.body)

        do_GET = do_POST = reply

        def do_CONNECT(self) -> None:
            self.path = f"CONNECT {self.path}"
            self.close_connection = True
            self.reply()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return self.date or super().date_time_string(timestamp)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            pass  # A handshake that fails is what some tests are about.

    server = Server(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield Answering(f"127.0.0.1:{server.server_address[1]}", asked, bodies)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
