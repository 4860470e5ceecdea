"""One loopback port: the gRPC health service, and read-only pages over HTTP/1.1."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from common.process.health import Health, is_serving
from common.process.metrics import Measure, write_metrics
from common.process.pages import Page
from common.types import BadInput
from tests.federation import free_port

METRICS = [Measure("seconds", "Seconds.", {('a"\n\\',): 1.5}, ("site",), "counter")]


def fail() -> Page:
    raise BadInput("sites.json: expected a list")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    port = free_port()
    health = Health(port, {"/metrics": lambda: write_metrics(METRICS), "/broken": fail})
    health.serving(True)
    yield port
    health.stop()
    assert is_serving(port) is None


def ask(port: int, path: str, method: str = "GET", **headers: str) -> httpx.Response:
    return httpx.request(method, f"http://127.0.0.1:{port}{path}", headers=headers, trust_env=False)


def send(port: int, *parts: bytes) -> bytes:
    """Returns all that is answered to bytes that are sent one part after the other."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.05)
        answer = b""
        while data := connection.recv(65536):
            answer += data
        return answer


def test_grpc_and_http_share_the_port(port: int) -> None:
    assert is_serving(port) is True
    answer = ask(port, "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'headwater_seconds_total{site="a\\"\\n\\\\"} 1.5\n' in answer.text
    assert is_serving(port) is True


def test_a_page_can_run_nothing_and_is_not_kept(port: int) -> None:
    headers = ask(port, "/metrics").headers
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "script" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "set-cookie" not in headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:80"])
def test_a_loopback_name_is_answered(port: int, host: str) -> None:
    assert ask(port, "/metrics", host=host).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "evil.example:80", "127.0.0.1.evil", "", "localhost:x", "::1"]
)
def test_a_name_of_elsewhere_is_not_answered(port: int, host: str) -> None:
    """DNS rebinding: a page of evil.example that now resolves to loopback."""
    assert ask(port, "/metrics", host=host).status_code == 421


def test_two_hosts_or_none_are_not_answered(port: int) -> None:
    assert b" 421 " in send(port, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
    assert b" 421 " in send(port, b"GET /metrics HTTP/1.0\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_get_is_answered(port: int, method: str) -> None:
    answer = ask(port, "/metrics", method)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"


def test_what_is_not_there_or_cannot_be_made_is_one_plain_sentence(port: int) -> None:
    assert ask(port, "/etc/passwd").text == "no such page; there are /metrics, /broken\n"
    broken = ask(port, "/broken")
    assert (broken.status_code, broken.text) == (503, "sites.json: expected a list\n")
    assert broken.headers["content-type"].startswith("text/plain")


def test_a_request_that_comes_byte_by_byte_is_understood(port: int) -> None:
    assert b" 200 " in send(port, b"G", b"E", b"T /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    # Enough of HTTP/2 to be passed on; the service then answers with its own settings frame, type 4.
    answer = send(port, b"P", b"RI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", b"x" * 64)
    assert answer[3] == 4


def test_silent_and_rude_peers_leave_the_service_running(port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for rude in (b"\x16\x03\x01\x00\xa5", b"\0" * 70_000, b"GET " + b"x" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(rude)
    assert is_serving(port) is True
    assert ask(port, "/metrics").status_code == 200
    for connection in silent:
        connection.close()


def test_a_flood_of_connections_is_bounded_and_passes(port: int) -> None:
    flood = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    flood[-1].settimeout(5)
    assert flood[-1].recv(1) == b""  # One too many: closed at once.
    for connection in flood:
        connection.close()
    until = time.monotonic() + 10
    while is_serving(port) is not True and time.monotonic() < until:
        time.sleep(0.05)
    assert is_serving(port) is True


def test_a_port_in_use_is_one_sentence(port: int) -> None:
    with pytest.raises(BadInput, match=f"health_port: expected a free port, got {port}, which is in use"):
        Health(port)
