"""What passes to the SuperLink from the network and from this machine, request by request."""

from __future__ import annotations

import asyncio
import base64
import datetime
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from common.events import FileJournal, read_daemon_journal
from common.flower import fleet_pb2, message_pb2, node_pb2
from common.messages import MAX_UPLOAD_HEADER
from server.deployment import admitted_sites
from server.superlink.admission import AdmittedKeys, RejectionLog
from server.superlink.request_filter import (
    CONTROL_HEADER,
    FLEET,
    LoopbackFilter,
    PublicFilter,
    RejectedRequest,
    RequestLimits,
)
from tests.server.deployment.federations import new_federation, write_key_pair

KEY = ec.generate_private_key(ec.SECP384R1())
STRANGER = ec.generate_private_key(ec.SECP384R1())
LIMITS = RequestLimits(max_upload=1000, max_in_flight=1 << 20, idle_s=0.2, body_s=0.5)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed(key: ec.EllipticCurvePrivateKey = KEY, *, age_s: float = 0.0, stamp: str | None = None) -> dict[str, str]:
    text = stamp or (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)).isoformat()
    return {
        "flwr-public-key": base64.b64encode(pem(key)).decode(),
        "flwr-signature": base64.b64encode(key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
        "flwr-timestamp": text,
    }


class FakeSuperLink:
    """An app that remembers what reached it and answers 200."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            event = await receive()
            body += event["body"]
            more = event["more_body"]
        self.seen.append((scope["path"], body))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


class Sender:
    """A peer that sends a body in pieces; a number among them is a pause in seconds."""

    def __init__(self, *pieces: bytes | float) -> None:
        self.pieces = list(pieces)
        self.taken = 0

    async def __call__(self) -> MutableMapping[str, Any]:
        while self.pieces:
            piece = self.pieces.pop(0)
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            self.taken += len(piece)
            return {"type": "http.request", "body": piece, "more_body": bool(self.pieces)}
        await asyncio.sleep(3600)
        raise AssertionError


def ask(
    app: Any,
    path: str,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    sender: Sender | None = None,
    kind: str = "http",
) -> int:
    """The status of one request."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "client": ("203.0.113.9", 5000),
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    asyncio.run(app(scope, sender or Sender(b""), send))
    return int(sent[0].get("status", 0)) if sent else 0


def public(
    superlink: FakeSuperLink, rejections: list[RejectedRequest] | None = None, limits: RequestLimits = LIMITS
) -> PublicFilter:
    names = {pem(KEY): "north"}
    return PublicFilter(
        superlink,
        find_site=names.get,
        limits=limits,
        on_rejection=(rejections if rejections is not None else []).append,
    )


# --- from the network ------------------------------------------------------------------------------------------------


def reply_of(node: int, source: int) -> bytes:
    """A reply pushed by one node that says it comes from another, or from itself."""
    envelope = message_pb2.Message(metadata=message_pb2.Metadata(src_node_id=source, message_id="m"))
    return fleet_pb2.PushMessagesRequest(node=node_pb2.Node(node_id=node), messages_list=[envelope]).SerializeToString()


REPLY = reply_of(7, 7)


@pytest.mark.parametrize("path", sorted(path for _, path in FLEET))
def test_an_admitted_sites_request_arrives_with_its_body(path: str) -> None:
    superlink = FakeSuperLink()
    assert ask(public(superlink), path, headers=signed(), sender=Sender(REPLY[:7], REPLY[7:])) == 200
    assert superlink.seen == [(path, REPLY)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/fleet/register-node"),
        ("POST", "/v1/fleet/unregister-node"),
        ("POST", "/v1/fleet/pull-messages/"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "//v1/fleet/pull-messages"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/health"),
    ],
)
def test_no_other_path_reaches_the_engine_from_the_network(method: str, path: str) -> None:
    superlink, rejections = FakeSuperLink(), list[RejectedRequest]()
    assert ask(public(superlink, rejections), path, method=method, headers=signed()) == 404
    assert superlink.seen == []
    assert rejections == [RejectedRequest("203.0.113.9", None, path, "no such path")]


def test_the_federations_secret_opens_nothing_from_the_network() -> None:
    superlink = FakeSuperLink()
    assert ask(public(superlink), "/v1/control/start-run", headers={CONTROL_HEADER: "secret", **signed()}) == 404
    assert superlink.seen == []


def test_health_answers_anyone() -> None:
    assert ask(public(FakeSuperLink()), "/health", method="GET") == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "no site's signature"),
        (signed(STRANGER), "a key that is not admitted"),
        ({**signed(STRANGER), "flwr-public-key": signed()["flwr-public-key"]}, "a wrong signature"),
        ({**signed(), "flwr-timestamp": signed(age_s=1)["flwr-timestamp"]}, "a wrong signature"),
        (signed(age_s=100_000), "a signed time that is not now: check the site's clock"),
        (signed(age_s=-100_000), "a signed time that is not now: check the site's clock"),
        (signed(stamp="2026-01-01T00:00:00"), "a signed time without a zone"),
        ({**signed(), "flwr-signature": "!"}, "no site's signature"),
    ],
)
def test_whoever_is_not_an_admitted_site_is_refused_before_a_byte_is_read(headers: dict[str, str], reason: str) -> None:
    superlink, rejections, sender = FakeSuperLink(), list[RejectedRequest](), Sender(b"x" * 100)
    assert ask(public(superlink, rejections), "/v1/fleet/push-object", headers=headers, sender=sender) == 401
    assert (superlink.seen, sender.taken) == ([], 0)
    assert [refused.reason for refused in rejections] == [reason]


@pytest.mark.parametrize(
    ("body", "status"),
    [(reply_of(7, 7), 200), (reply_of(7, 8), 403), (b"no message", 400)],
    ids=["own", "other", "junk"],
)
def test_a_site_answers_in_its_own_name_only(body: bytes, status: int) -> None:
    """The superlink itself accepts a reply in another's name from whoever knows the other's node id."""
    superlink = FakeSuperLink()
    assert ask(public(superlink), "/v1/fleet/push-messages", headers=signed(), sender=Sender(body)) == status
    assert bool(superlink.seen) == (status == 200)


def test_a_declared_size_above_the_bound_is_refused_before_a_byte_is_read() -> None:
    superlink, sender = FakeSuperLink(), Sender(b"x")
    headers = {**signed(), "content-length": "1001"}
    assert ask(public(superlink), "/v1/fleet/push-object", headers=headers, sender=sender) == 413
    assert (superlink.seen, sender.taken) == ([], 0)


def test_every_answer_to_an_admitted_site_states_the_bound_and_none_to_a_stranger() -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    for headers in (signed(), {}):
        scope = {"type": "http", "method": "POST", "path": "/v1/fleet/pull-messages", "client": None}
        scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
        asyncio.run(public(FakeSuperLink())(scope, Sender(b""), send))
    answered, rejected = (dict(message["headers"]) for message in sent if message["type"] == "http.response.start")
    assert answered[MAX_UPLOAD_HEADER.encode()] == str(LIMITS.max_upload).encode()
    assert MAX_UPLOAD_HEADER.encode() not in rejected


def test_a_body_that_is_longer_than_it_says_is_cut_off() -> None:
    superlink, sender = FakeSuperLink(), Sender(*[b"x" * 100] * 50)
    headers = {**signed(), "content-length": "100"}
    assert ask(public(superlink), "/v1/fleet/push-object", headers=headers, sender=sender) == 413
    assert (superlink.seen, sender.taken) == ([], 200)


def test_a_body_without_a_declared_size_has_the_same_bound() -> None:
    sender = Sender(*[b"x" * 100] * 50)
    assert ask(public(FakeSuperLink()), "/v1/fleet/push-object", headers=signed(), sender=sender) == 413
    assert sender.taken == 1100


@pytest.mark.parametrize("length", ["-1", "1e3", "", "9" * 400])
def test_a_size_that_is_no_size_is_refused(length: str) -> None:
    headers = {**signed(), "content-length": length}
    assert ask(public(FakeSuperLink()), "/v1/fleet/push-object", headers=headers) in (400, 413)


def test_only_uploads_may_be_large() -> None:
    public_filter = PublicFilter(
        FakeSuperLink(),
        find_site={pem(KEY): "north"}.get,
        limits=RequestLimits(1 << 30, 1 << 31, 1.0, 1.0),
        on_rejection=[].append,
    )
    headers = {**signed(), "content-length": str(1 << 20)}
    assert ask(public_filter, "/v1/fleet/pull-messages", headers=headers) == 413


def test_a_sender_that_stalls_or_drips_is_cut_off() -> None:
    rejections: list[RejectedRequest] = []
    for sender in (Sender(b"x", 1.0, b"y"), Sender(*[b"x", 0.1] * 20)):
        assert ask(public(FakeSuperLink(), rejections), "/v1/fleet/push-object", headers=signed(), sender=sender) == 408
    assert [(refused.site, refused.reason) for refused in rejections] == [
        ("north", "a body that did not arrive in time")
    ] * 2


def test_bodies_that_are_read_at_once_are_bounded_together_and_given_back() -> None:
    superlink = FakeSuperLink()
    public_filter = public(superlink, limits=replace(LIMITS, max_in_flight=1500))
    headers = {**signed(), "content-length": "1000"}
    sent: list[int] = []

    async def one(sender: Sender) -> None:
        async def send(message: MutableMapping[str, Any]) -> None:
            if "status" in message:
                sent.append(message["status"])

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/fleet/push-object",
            "client": None,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        await public_filter(scope, sender, send)

    async def both() -> None:
        await asyncio.gather(one(Sender(b"x" * 500, 0.1, b"x" * 500)), one(Sender(b"x" * 1000)))
        await one(Sender(b"x" * 1000))

    asyncio.run(both())
    assert sorted(sent) == [200, 200, 503]


def test_a_websocket_is_closed() -> None:
    superlink = FakeSuperLink()
    assert ask(public(superlink), "/v1/fleet/pull-messages", kind="websocket") == 0
    assert superlink.seen == []


# --- from this machine -----------------------------------------------------------------------------------------------


def loopback(path: str, *, secret: str | None = None, host: str = "127.0.0.1:9193", method: str = "POST") -> int:
    headers = {"host": host} | ({} if secret is None else {CONTROL_HEADER: secret})
    return ask(LoopbackFilter(FakeSuperLink(), secret="right", port=9193), path, headers=headers, method=method)


def test_control_requests_need_the_federations_secret() -> None:
    assert loopback("/v1/control/start-run") == 403
    assert loopback("/v1/control/start-run", secret="wrong") == 403
    assert loopback("/v1/control/start-run", secret="right") == 200


def test_a_web_page_cannot_ask_under_another_host() -> None:
    assert loopback("/v1/control/start-run", secret="right", host="rebound.example.org:9193") == 421


def test_fleet_requests_have_no_way_around_the_public_gate() -> None:
    assert loopback("/v1/fleet/pull-messages", secret="right") == 404
    assert loopback("/docs", method="GET") == 404
    assert loopback("/v1/runtime/acquire-task") == 200  # The superlink asks for its own token.


# --- admitted keys and the journal -----------------------------------------------------------------------------------


def test_a_removed_key_is_unknown_from_the_next_request_on(tmp_path: Path) -> None:
    federation = new_federation(tmp_path / "fed")
    admitted_sites.admit_site(federation, "north", write_key_pair(tmp_path, "north"))
    keys = AdmittedKeys(federation)
    key = admitted_sites.load_admitted_sites(federation)["north"].pem()
    assert keys.find_site(key) == "north"
    admitted_sites.remove_site(federation, "north")
    assert keys.find_site(key) is None


def test_a_flood_of_rejections_is_one_line_in_the_journal(tmp_path: Path) -> None:
    rejections = RejectionLog(FileJournal(tmp_path / "link.jsonl"))
    for number in range(500):
        rejections(RejectedRequest("203.0.113.9", None, f"/guess/{number}", "no such path"))
    rejections(RejectedRequest("203.0.113.10", None, "/guess", "no such path"))
    events = read_daemon_journal(tmp_path / "link.jsonl")
    assert [event.peer for event in events] == ["203.0.113.9", "203.0.113.10"]
    assert events[0].model_dump_json().count("guess") == 1
