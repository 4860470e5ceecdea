"""The two listeners over real sockets, before an app of a few lines: TLS, silent peers, floods, renewals."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cryptography import x509

from common.types import BadInput
from server.deployment import certificates
from server.deployment.federation import Federation
from server.superlink.listeners import (
    Listener,
    bind_socket,
    create_loopback_listener,
    create_public_listener,
    start_listener,
)
from tests.server.deployment.federations import free_ports, new_federation

IDLE_S = 0.6


async def app(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def listening(listener: Listener, bound: socket.socket) -> Iterator[None]:
    ready = threading.Event()

    async def main() -> None:
        task = await start_listener(listener, bound)
        ready.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        listener.should_exit = True
        thread.join(20)
        bound.close()


@contextmanager
def public(federation: Federation, max_connections: int = 20) -> Iterator[Listener]:
    host, port = federation.config.bind.host, federation.config.bind.port
    listener = create_public_listener(app, tls=federation.tls, max_connections=max_connections, idle_s=IDLE_S)
    with listening(listener, bind_socket(host, port, "bind")):
        yield listener


def connect_plain(federation: Federation) -> socket.socket:
    address = federation.config.bind
    return socket.create_connection((address.host, address.port), timeout=10)


def connect(federation: Federation, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(federation.tls / "ca.crt"))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context.wrap_socket(connect_plain(federation), server_hostname="localhost")


def status(connection: socket.socket) -> int:
    """The status of one whole answer."""
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"ok"):
        answer += connection.recv(4096)
    return int(answer.split()[1])


def seconds_until_closed(connection: socket.socket) -> float:
    started = time.monotonic()
    with suppress(ConnectionError, ssl.SSLError):
        while connection.recv(1024):
            pass
    return time.monotonic() - started


def test_a_request_is_answered_over_tls_and_the_connection_serves_the_next(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation), connect(federation) as connection:
        for _ in range(2):
            assert status(connection) == 200


def test_plain_http_gets_no_answer_on_the_network(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation), connect_plain(federation) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        with suppress(ConnectionError):  # Cut off: no answer either.
            assert b"HTTP/1.1" not in plain.recv(4096)


def test_old_tls_is_refused(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation) as listener:
        assert listener.config.ssl is not None
        assert listener.config.ssl.minimum_version == ssl.TLSVersion.TLSv1_2
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            connect(federation, version).close()


def test_a_peer_that_says_nothing_is_cut_off(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation), connect(federation) as connection:
        assert IDLE_S / 2 < seconds_until_closed(connection) < 5


def test_a_head_that_comes_byte_by_byte_is_cut_off_in_the_same_time(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation), connect(federation) as connection:
        started = time.monotonic()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            for byte in b"GET /health HTTP/1.1\r\n" + b"x" * 400:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - started < 5


def test_the_second_head_on_a_connection_has_no_more_time_than_the_first(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation), connect(federation) as connection:
        assert status(connection) == 200
        connection.sendall(b"GET /hea")
        assert seconds_until_closed(connection) < 5


def test_more_connections_than_the_bound_are_cut_off_and_the_others_stay(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation, max_connections=2):
        first, second = connect(federation), connect(federation)
        third = connect(federation)
        assert seconds_until_closed(third) < IDLE_S
        assert status(first) == 200
        for each in (first, second, third):
            each.close()


def test_a_renewed_certificate_is_used_for_new_connections_without_a_restart(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    with public(federation) as listener:
        with connect(federation) as connection:
            old = connection.getpeercert(binary_form=True)
        certificates.write_server(federation.tls, federation.config.hosts())
        listener.reload_certificate(federation.tls)
        with connect(federation) as connection:
            new = connection.getpeercert(binary_form=True)
    assert old is not None and new is not None and new != old
    on_disk = x509.load_pem_x509_certificate((federation.tls / "server.crt").read_bytes())
    assert x509.load_der_x509_certificate(new) == on_disk


def test_a_port_in_use_is_one_sentence_that_names_the_setting() -> None:
    (port,) = free_ports(1)
    with bind_socket("127.0.0.1", port, "bind"), pytest.raises(BadInput, match=rf"^bind: .*{port}.* in use"):
        bind_socket("127.0.0.1", port, "bind")


def test_an_address_of_another_machine_is_said() -> None:
    with pytest.raises(BadInput, match="no address of this machine"):
        bind_socket("203.0.113.7", 9092, "bind")


def test_the_loopback_listener_speaks_plain_http_to_this_machine() -> None:
    (port,) = free_ports(1)
    with (
        listening(create_loopback_listener(app), bind_socket("127.0.0.1", port, "control_port")),
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        assert status(connection) == 200
