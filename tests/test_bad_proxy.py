"""The proxy of the other tests: each mode harms what it says, and nothing stays when it is closed."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.bad_proxy import BadProxy, Mode, bad_proxy

SENT = bytes(range(256)) * 4


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(each: socket.socket) -> None:
        with each:
            try:
                while chunk := each.recv(65536):
                    each.sendall(chunk)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                each, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(each,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(timeout=5)


def connect(proxy: BadProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def ask(proxy: BadProxy, sent: bytes = SENT) -> bytes:
    """What comes back for some bytes, until the other end closes or nothing is left to come."""
    with connect(proxy) as near:
        back = b""
        with contextlib.suppress(OSError):  # A reset, at whichever of these calls it is noticed.
            near.sendall(sent)
            near.shutdown(socket.SHUT_WR)
            while chunk := near.recv(65536):
                back += chunk
        return back


def test_each_mode_harms_what_it_says_and_changes_while_the_proxy_runs(echo: str) -> None:
    with bad_proxy(echo) as proxy:
        assert ask(proxy) == SENT
        proxy.mode = Mode.REFUSE
        assert ask(proxy) == b""
        proxy.mode = Mode.PLAIN
        assert ask(proxy).startswith(b"HTTP/1.1 502 ")
        proxy.mode = Mode.TRUNCATE
        assert SENT.startswith(ask(proxy)) and len(ask(proxy)) < len(SENT)
        proxy.mode = Mode.REORDER
        assert ask(proxy, b"abcd") == b"abcd" and proxy.num_harmed >= 4  # Swapped there and back.
        proxy.mode = Mode.PASS
        assert ask(proxy) == SENT
        assert proxy.num_connections == 7


def test_a_flip_inverts_one_bit_of_a_chunk_after_the_clean_bytes(echo: str) -> None:
    with bad_proxy(echo) as proxy:
        proxy.mode, proxy.clean_bytes = Mode.FLIP, 1000
        back = ask(proxy)
        assert back[:1000] == SENT[:1000]
        flipped = sum((a ^ b).bit_count() for a, b in zip(back, SENT, strict=True))
        assert 1 <= flipped <= proxy.num_harmed
        proxy.rate = 0.0
        assert ask(proxy) == SENT


def test_a_cut_holds_what_is_sent_and_lets_it_through_afterwards(echo: str) -> None:
    with bad_proxy(echo) as proxy, connect(proxy) as near:
        proxy.mode = Mode.CUT
        near.sendall(b"held")
        near.settimeout(0.3)
        with pytest.raises(TimeoutError):
            near.recv(4)
        proxy.mode = Mode.PASS
        near.settimeout(5)
        assert near.recv(4) == b"held"
        before = time.monotonic()
        proxy.cut_for(0.4)
        near.sendall(b"late")
        assert near.recv(4) == b"late"
        assert time.monotonic() - before >= 0.4


def test_a_closed_proxy_leaves_no_thread_and_no_connection(echo: str) -> None:
    before = threading.active_count()
    with bad_proxy(echo) as proxy:
        open_one = connect(proxy)
        open_one.sendall(b"x")
        assert open_one.recv(1) == b"x"
        proxy.mode = Mode.CUT
        open_one.sendall(b"y")
    assert open_one.recv(1) == b""
    open_one.close()
    until = time.monotonic() + 5
    while threading.active_count() > before + 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() <= before + 1  # The echo server's own may still be ending.
