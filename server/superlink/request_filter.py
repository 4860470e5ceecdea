"""Two ASGI filters before the SuperLink's one app: what may pass from the network, and what from this machine.

The SuperLink answers fleet, control and runtime requests at one address and asks for no credential on the control
side: whoever reaches it can register sites and run code on them. So it is never reachable without a filter:

- `PublicFilter`, on the network: nothing but the fleet's requests, each signed by an admitted site's key, and health.
  An unknown peer costs a signature check; its request's body is not read.
- `LoopbackFilter`, on this machine: control requests with the federation's secret, runtime requests (which have
  tokens and a secret of their own), and health.

Guarantees of the public filter:
- A path that is not on the list answers 404 and the SuperLink never sees it.
- A body is rejected by its declared size before it is read, and by its true size before more than the bound is kept.
- Every answer to an admitted site says how large an upload may be, so that it sends none that is larger.
- All bodies being read hold at most `max_in_flight` bytes.
- A sender that stalls is cut off.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import datetime
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.message import DecodeError

from common.flower import fleet_pb2
from common.messages import MAX_UPLOAD_HEADER

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CONTROL_HEADER = "x-headwater-control"
HEALTH = ("GET", "/health")
# Not register-node and unregister-node: sites are admitted by the coordinator, never by themselves.
FLEET = frozenset(
    ("POST", f"/v1/fleet/{name}")
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)
_PUSH_MESSAGES = "/v1/fleet/push-messages"
_UPLOADS = ("/v1/fleet/push-object", "/v1/fleet/push-messages")
_SMALL = 256 << 10
# The SuperLink's own window for a signed time; it checks again.
_OLDEST_S, _NEWEST_S = 300.0 + 60.0, 60.0
_KEY, _SIGNATURE, _TIME = b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"


@dataclass(frozen=True)
class RequestLimits:
    """Bounds of the public filter.

    Attributes:
        max_upload: size of one upload, in bytes.
        max_in_flight: size of all bodies being read or answered, in bytes.
        idle_s: longest silence within a body, in seconds.
        body_s: longest time for a whole body, in seconds.
    """

    max_upload: int
    max_in_flight: int
    idle_s: float
    body_s: float


@dataclass(frozen=True)
class RejectedRequest:
    """A rejected request, for the journal.

    Attributes:
        peer: network address of the sender.
        site: name of the site that signed, where one did.
        path: path that was asked for.
        reason: why the request was rejected.
    """

    peer: str
    site: str | None
    path: str
    reason: str


class _RequestRejected(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@final
class Uploads:
    """The uploads of parts that are under way, of all sites together."""

    def __init__(self) -> None:
        self._num_open = 0
        self._last = time.monotonic()

    @contextmanager
    def count(self) -> Iterator[None]:
        """Counts an upload while it lasts."""
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1
            self._last = time.monotonic()

    def measure_quiet(self) -> float:
        """Returns the seconds since the last upload; 0 while there is one."""
        return 0.0 if self._num_open else time.monotonic() - self._last


@final
class PublicFilter:
    """The fleet's requests of admitted sites, and health; nothing else."""

    def __init__(
        self,
        app: App,
        *,
        find_site: Callable[[bytes], str | None],
        limits: RequestLimits,
        on_rejection: Callable[[RejectedRequest], None],
    ) -> None:
        """Stands before an app.

        Args:
            app: the SuperLink's app.
            find_site: returns the name of the admitted site with a public key (PEM), None for an unknown key.
            limits: bounds of sizes and times.
            on_rejection: called with each rejected request.
        """
        self._app, self._find_site, self._limits, self._on_rejection = app, find_site, limits, on_rejection
        self._in_flight = 0
        self.uploads = Uploads()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or passes it on with its whole body."""
        if scope["type"] != "http":
            return await _close_websocket(scope, send)
        if (scope["method"], scope["path"]) == HEALTH:
            return await self._app(scope, _receive_no_body, send)
        site: str | None = None
        kept = 0
        try:
            if (scope["method"], scope["path"]) not in FLEET:
                raise _RequestRejected(404, "no such path")
            headers = _read_headers(scope)
            site = self._verify_signature(headers)
            kept = self._reserve_bytes(headers, self._max_bytes(scope["path"]))
            with self.uploads.count() if scope["path"] in _UPLOADS else nullcontext():
                body = await self._read_body(receive, kept)
                if scope["path"] == _PUSH_MESSAGES:
                    _check_senders(body)
                await self._app(scope, _replay(body, receive), self._state_bound(send))
        except _RequestRejected as rejected:
            peer = (scope.get("client") or ("unknown",))[0]
            self._on_rejection(RejectedRequest(peer, site, str(scope["path"])[:100], rejected.reason))
            await _send_error(send, rejected.status, rejected.reason)
        finally:
            self._in_flight -= kept

    def _state_bound(self, send: Send) -> Send:
        """Returns a sender that adds the bound of an upload to an answer's headers."""
        bound = (MAX_UPLOAD_HEADER.encode(), str(self._limits.max_upload).encode())

        async def stated(event: MutableMapping[str, Any]) -> None:
            if event["type"] == "http.response.start":
                event = {**event, "headers": [*event.get("headers", []), bound]}
            await send(event)

        return stated

    def _max_bytes(self, path: str) -> int:
        return self._limits.max_upload if path in _UPLOADS else _SMALL

    def _verify_signature(self, headers: dict[bytes, bytes]) -> str:
        try:
            pem = base64.b64decode(headers[_KEY], validate=True)
            signature = base64.b64decode(headers[_SIGNATURE], validate=True)
            stamp = headers[_TIME]
            signed = datetime.datetime.fromisoformat(stamp.decode("ascii"))
        except (KeyError, ValueError, binascii.Error) as error:
            raise _RequestRejected(401, "no site's signature") from error
        site = self._find_site(pem)
        if site is None:
            raise _RequestRejected(401, "a key that is not admitted")
        key = load_pem_public_key(pem)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        try:
            key.verify(signature, stamp, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise _RequestRejected(401, "a wrong signature") from error
        if signed.tzinfo is None:
            raise _RequestRejected(401, "a signed time without a zone")
        age_s = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
        if not -_NEWEST_S < age_s < _OLDEST_S:
            raise _RequestRejected(401, "a signed time that is not now: check the site's clock")
        return site

    def _reserve_bytes(self, headers: dict[bytes, bytes], bound: int) -> int:
        """Returns the number of bytes reserved for a body, before any of it is read."""
        declared = headers.get(b"content-length")
        if declared is not None and not declared.isdigit():
            raise _RequestRejected(400, "a content length that is no number")
        # Without a declared length the sender may use the whole bound.
        size = bound if declared is None else int(declared)
        if size > bound:
            raise _RequestRejected(413, f"a body of more than {bound} bytes")
        if self._in_flight + size > self._limits.max_in_flight:
            raise _RequestRejected(503, "too much is being uploaded at once")
        self._in_flight += size
        return size

    async def _read_body(self, receive: Receive, bound: int) -> bytes:
        body = bytearray()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.body_s
        more = True
        while more:
            left_s = min(self._limits.idle_s, deadline - loop.time())
            try:
                event = await asyncio.wait_for(receive(), max(left_s, 0.0))
            except TimeoutError as error:
                raise _RequestRejected(408, "a body that did not arrive in time") from error
            if event["type"] == "http.disconnect":
                raise _RequestRejected(400, "a sender that went away")
            body += event.get("body", b"")
            if len(body) > bound:
                raise _RequestRejected(413, f"a body of more than {bound} bytes")
            more = event.get("more_body", False)
        return bytes(body)


@final
class LoopbackFilter:
    """Control requests with the secret, runtime requests, health: for this machine only."""

    def __init__(self, app: App, *, secret: str, port: int) -> None:
        """Stands before an app.

        Args:
            app: the SuperLink's app.
            secret: secret that a control request must carry in its header.
            port: TCP port of the listener.
        """
        self._app, self._secret = app, secret.encode()
        # A page in a browser on this machine cannot name this host (DNS rebinding).
        self._host = f"127.0.0.1:{port}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or passes it on."""
        if scope["type"] != "http":
            return await _close_websocket(scope, send)
        headers, path = _read_headers(scope), scope["path"]
        if headers.get(b"host") != self._host:
            return await _send_error(send, 421, "another host is asked")
        if (scope["method"], path) == HEALTH:
            return await self._app(scope, _receive_no_body, send)
        if scope["method"] != "POST" or not path.startswith(("/v1/control/", "/v1/runtime/")):
            return await _send_error(send, 404, "no such path")
        given = headers.get(CONTROL_HEADER.encode(), b"")
        if path.startswith("/v1/control/") and not hmac.compare_digest(given, self._secret):
            return await _send_error(send, 403, "control requests need the federation's secret")
        await self._app(scope, receive, send)


def _check_senders(body: bytes) -> None:
    """Checks that every pushed message is from the node that pushes it.

    The SuperLink compares a key with the request's node, and the request's node with no message of it.

    Raises:
        _RequestRejected: a message is from another node, or cannot be read.
    """
    try:
        request = fleet_pb2.PushMessagesRequest.FromString(body)
    except DecodeError as error:
        raise _RequestRejected(400, "messages that cannot be read") from error
    if any(message.metadata.src_node_id != request.node.node_id for message in request.messages_list):
        raise _RequestRejected(403, "a message in another site's name")


def _read_headers(scope: Scope) -> dict[bytes, bytes]:
    # A repeated header would let filter and SuperLink read different values.
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found[name] = b"" if name in found else value
    return found


def _replay(body: bytes, receive: Receive) -> Receive:
    """Returns a receiver that gives the body once, then whatever the connection says."""
    waiting = [body]

    async def replayed() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


async def _receive_no_body() -> MutableMapping[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _close_websocket(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})


async def _send_error(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # A body that was not read must not be taken for the next request.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
