"""A TCP proxy on loopback that does to a connection what networks do to it, for tests of what survives that.

It knows nothing of TLS: it harms the bytes between two real programs. `mode` may be changed while it runs and holds for
connections that are open as well as for new ones, from the next chunk of bytes on.
"""

from __future__ import annotations

import contextlib
import enum
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import final

_CHUNK = 16384
_POLL_S = 0.02
_PLAIN = b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Mode(enum.Enum):
    """What happens to the bytes.

    Attributes:
        PASS: they are forwarded.
        REFUSE: connections are accepted and closed at once, as by a balancer without a server behind it.
        PLAIN: connections are answered with an HTTP status in plain text, as by a proxy without a server behind it.
        FLIP: one bit of a chunk is inverted.
        TRUNCATE: half of a chunk is forwarded, then both ends are closed.
        DELAY: each chunk is forwarded `delay_s` later.
        CUT: nothing arrives and nothing ends, until the mode changes; what was held is forwarded then.
        REORDER: the second half of a chunk is forwarded before the first.
    """

    PASS = "pass"
    REFUSE = "refuse"
    PLAIN = "plain"
    FLIP = "flip"
    TRUNCATE = "truncate"
    DELAY = "delay"
    CUT = "cut"
    REORDER = "reorder"


@final
class BadProxy:
    """A running proxy. Listens on loopback and forwards to one address.

    Attributes:
        address: host and port at which it listens.
        target: host and port to which it forwards; may be changed while it runs.
        mode: what happens to the bytes.
        rate: the share of chunks that is harmed by FLIP, TRUNCATE, DELAY and REORDER.
        clean_bytes: how many bytes of each direction of a connection pass before anything is harmed.
        delay_s: seconds by which DELAY holds a chunk.
        num_connections: connections that were accepted.
        num_harmed: chunks and connections that were harmed.
    """

    def __init__(self, target: str, *, port: int = 0, seed: int = 0) -> None:
        self.target, self.mode = target, Mode.PASS
        self.rate, self.clean_bytes, self.delay_s = 1.0, 0, 0.2
        self.num_connections = self.num_harmed = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._stopping, self._threads = threading.Event(), set[threading.Thread]()
        self._sockets = set[socket.socket]()
        self._cut_until = 0.0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self._listener.settimeout(_POLL_S)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def cut_for(self, seconds: float) -> None:
        """Cuts all connections from now for so many seconds, whatever the mode; returns at once."""
        self.num_harmed += 1
        self._cut_until = time.monotonic() + seconds

    def drop(self) -> None:
        """Closes every open connection."""
        with self._lock:
            for each in self._sockets:
                _shut(each)

    def close(self) -> None:
        """Ends the proxy with all its connections."""
        self._stopping.set()
        self.drop()
        while threads := [each for each in list(self._threads) if each is not threading.current_thread()]:
            threads[0].join(timeout=5)
            self._threads.discard(threads[0])
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.num_connections += 1
            self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with near, self._kept(near):
            if self.mode in (Mode.REFUSE, Mode.PLAIN):
                self.num_harmed += 1
                if self.mode is Mode.PLAIN:
                    with contextlib.suppress(OSError):
                        near.settimeout(5)
                        near.recv(_CHUNK)
                        near.sendall(_PLAIN)
                return
            host, _, port = self.target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), timeout=5)
            except OSError:
                return
            with far, self._kept(far):
                back = threading.Event()

                def answer() -> None:
                    try:
                        self._forward(far, near)
                    finally:
                        back.set()

                self._start(answer)
                self._forward(near, far)
                while not back.wait(_POLL_S):
                    if self._stopping.is_set():
                        return

    @contextlib.contextmanager
    def _kept(self, each: socket.socket) -> Iterator[None]:
        each.settimeout(_POLL_S)
        with self._lock:
            self._sockets.add(each)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(each)

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        passed = 0
        while not self._stopping.is_set():
            try:
                chunk = source.recv(_CHUNK)
            except TimeoutError:
                continue
            except OSError:
                chunk = b""
            while self._is_cut() and not self._stopping.is_set():
                time.sleep(_POLL_S)
            clean = chunk[: max(self.clean_bytes - passed, 0)]
            passed += len(chunk)
            harmed, ends = self._harm(chunk[len(clean) :])
            try:
                _send(sink, clean + harmed)
            except OSError:
                ends = True
            if ends:
                _shut(source)
            if ends or not chunk:
                with contextlib.suppress(OSError):
                    sink.shutdown(socket.SHUT_WR)
                return

    def _is_cut(self) -> bool:
        return self.mode is Mode.CUT or time.monotonic() < self._cut_until

    def _harm(self, chunk: bytes) -> tuple[bytes, bool]:
        """Returns what of a chunk is forwarded, and whether the connection ends after it."""
        mode = self.mode
        if not chunk or mode in (Mode.PASS, Mode.CUT):
            return chunk, False
        with self._lock:
            if self._random.random() >= self.rate:
                return chunk, False
            at, bit = self._random.randrange(len(chunk)), 1 << self._random.randrange(8)
        self.num_harmed += 1
        match mode:
            case Mode.FLIP:
                return chunk[:at] + bytes([chunk[at] ^ bit]) + chunk[at + 1 :], False
            case Mode.TRUNCATE:
                return chunk[: len(chunk) // 2], True
            case Mode.REORDER:
                return chunk[len(chunk) // 2 :] + chunk[: len(chunk) // 2], False
            case Mode.DELAY:
                self._stopping.wait(self.delay_s)
                return chunk, False
            case _:
                return b"", True


def _send(sink: socket.socket, content: bytes) -> None:
    left = memoryview(content)
    while left:
        try:
            left = left[sink.send(left) :]
        except TimeoutError:
            continue


def _shut(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def bad_proxy(target: str, *, port: int = 0, seed: int = 0) -> Iterator[BadProxy]:
    """A proxy before a host:port, closed at the end."""
    proxy = BadProxy(target, port=port, seed=seed)
    try:
        yield proxy
    finally:
        proxy.close()
