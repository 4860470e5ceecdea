"""A site's connection to its coordinator: Flower's Fleet API over TLS.

Flower's own SuperNode is not run: it unpacks and executes the bundle it is handed, opens an unauthenticated port for
its child processes, waits three seconds between two polls, and answers every failure by ending the process. What it
sends is sent here: the same protobuf messages, signatures and objects of Flower (`common.flower`).

Guarantees:
- Only the coordinator's address is contacted, directly or through the proxy of the environment; redirects are refused.
- No answer larger than its bound is read, and every object is the one its digest names.

Two kinds of failure: `ConnectionLost` may pass; `ConnectionRefused` says in one sentence what a person has to do.
Final are a key that is not admitted and a certificate of another authority or name, both found by a fresh try; and,
until the coordinator has answered once, an address at which something else answers.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import Any, TypeVar, final

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError, Message

from client.config import Coordinator
from client.connection.diagnose import (
    create_trusting_context,
    diagnose_connection,
    explain_clock_skew,
    find_proxy,
    is_tls_error,
)
from common.bundle import MAX_BUNDLE_BYTES
from common.files import stamp_file
from common.flower import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    fab_pb2,
    fleet_pb2,
    heartbeat_pb2,
    make_version_headers,
    message_pb2,
    node_pb2,
    now,
    public_key_to_bytes,
    run_pb2,
    sign_message,
)
from common.messages import MAX_UPLOAD_HEADER
from common.types import HeadwaterError

HEARTBEAT_S = 30.0
"""Flower counts a site as gone after two of these without a word."""
MAX_MESSAGE_BYTES = 8 << 30
"""The bound on all objects of one message; a backbone is the largest thing that is sent."""
_SMALL = 4 << 20
_OBJECT = 1 << 30
_MAX_OBJECTS = 100_000
_RETRY_FOR_S = 600.0
"""Seconds for which the transfer of a message is tried again: once handed out, Flower never hands it out again."""
_CONFIRM_S = 5.0
"""Seconds after which a key that was known is refused for good."""
_PASSING = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_EARLY, httpx.codes.TOO_MANY_REQUESTS)
_OF_NO_RUN = ("activate-node", "deactivate-node", "pull-messages", "send-node-heartbeat")
_AROUND_OBJECT = 1024
"""Bytes of an upload beside its object, at most."""
_MEDIA_TYPE = "application/protobuf"
_T = TypeVar("_T")
_Response = TypeVar("_Response", bound=Message)


class ConnectionLost(Exception):
    """The coordinator cannot be reached now; another try may succeed."""


class ExplainedLoss(ConnectionLost):
    """The same; the message says in one sentence what was seen and what to do."""


class PartPending(ConnectionLost):
    """A part of a message has not reached the coordinator yet; that is no fault."""


class InvalidAnswer(ConnectionLost):
    """The coordinator can be reached and its answer is wrong; the same request again would not help."""


class RunInactive(Exception):
    """The run a message belongs to is not running any more."""


class UploadTooLarge(Exception):
    """A reply is larger than the coordinator takes in; the message says what a person has to do."""


class ConnectionRefused(HeadwaterError):
    """No further try helps; the message says what a person has to do."""


class KeyInUse(ConnectionRefused):
    """The coordinator does not know the key, or counts it as connected: for a minute after a crash, too."""


@dataclass(frozen=True)
class Claim:
    """A message that was handed out to this site, and to nobody again: Flower's envelope and the tree of its objects.

    Its content is still at the coordinator.
    """

    envelope: Any
    tree: Any


@dataclass(frozen=True)
class Delivery:
    """A message as it arrived: Flower's envelope and the digest-named objects it consists of."""

    envelope: Any
    root: str
    objects: Mapping[str, bytes]


@dataclass(frozen=True)
class Outgoing:
    """A reply ready to be pushed: envelope, object tree and objects."""

    envelope: Any
    tree: Any
    objects: Mapping[str, bytes]


@final
class Fleet:
    """One site's connection. Thread-safe: heartbeats may go beside a pull."""

    def __init__(
        self,
        coordinator: Coordinator,
        key: ec.EllipticCurvePrivateKey,
        *,
        stopping: threading.Event,
        report: Callable[[str], None] = lambda line: None,
        timeout_s: float = 30.0,
    ) -> None:
        """Reads the authority's certificate; contacts nothing yet.

        Args:
            coordinator: The coordinator's address and authority.
            key: This site's private key.
            stopping: An event that ends all waiting.
            report: A function that is called with one sentence when a transfer is tried again.
            timeout_s: The longest wait for each step of a request, in seconds.

        Raises:
            BadInput: The authority's certificate cannot be read.
        """
        self._coordinator = coordinator
        self._stopping, self._report = stopping, report
        self._key = key
        self._has_answered = False
        self._refused_since: float | None = None
        self._public = public_key_to_bytes(key.public_key())
        self._versions = make_version_headers()
        self._max_upload: int | None = None
        self._timeout_s = timeout_s
        self._open_client()

    def _open_client(self) -> None:
        """Trusts the authorities that the file names now. An earlier client is left to requests under way."""
        context = create_trusting_context(self._coordinator.ca)
        self._trusted = stamp_file(self._coordinator.ca)
        self._http = httpx.Client(
            base_url=f"https://{self._coordinator.address}",
            verify=context,
            proxy=find_proxy(self._coordinator),
            # The environment decides about the proxy, above, and about nothing else.
            trust_env=False,
            follow_redirects=False,
            timeout=self._timeout_s,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def activate(self) -> int:
        """Goes online and returns this key's node id. Raises ConnectionRefused where the key is not admitted."""
        request = fleet_pb2.ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_S)
        return int(self._call("activate-node", request, fleet_pb2.ActivateNodeResponse()).node_id)

    def deactivate(self, node: int) -> None:
        """Goes offline."""
        request = fleet_pb2.DeactivateNodeRequest(node_id=node)
        self._call("deactivate-node", request, fleet_pb2.DeactivateNodeResponse())

    def send_heartbeat(self, node: int) -> bool:
        """Stays online; returns whether the coordinator knows the node."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(
            node=node_pb2.Node(node_id=node), heartbeat_interval=HEARTBEAT_S
        )
        return bool(
            self._call("send-node-heartbeat", request, heartbeat_pb2.SendNodeHeartbeatResponse(), timeout_s=5.0).success
        )

    def check_admission(self, node: int) -> None:
        """Raises ConnectionRefused unless the key is admitted as this node; changes nothing at the coordinator."""
        with contextlib.suppress(RunInactive):  # No run has the number 0; who is not admitted is not told even that.
            self._fetch_bundle_hash(node, 0)

    def fetch_bundle(self, node: int, run: int) -> bytes:
        """Returns a run's app bundle, unread; tries again while the coordinator cannot be reached."""
        name = self._retry(lambda: self._fetch_bundle_hash(node, run))
        request = fab_pb2.GetFabRequest(node=node_pb2.Node(node_id=node), hash_str=name, run_id=run)
        response, max_bytes = fab_pb2.GetFabResponse(), MAX_BUNDLE_BYTES + _SMALL
        self._retry(lambda: self._call("get-fab", request, response, max_bytes=max_bytes))
        return bytes(response.fab.content)

    def _fetch_bundle_hash(self, node: int, run: int) -> str:
        request = run_pb2.GetRunRequest(node=node_pb2.Node(node_id=node), run_id=run)
        return str(self._call("get-run", request, run_pb2.GetRunResponse()).run.fab_hash)

    def claim_message(self, node: int) -> Claim | None:
        """Returns the next message for this site without its content; None where there is none."""
        request = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=node))
        response = self._call("pull-messages", request, fleet_pb2.PullMessagesResponse())
        if not response.messages_list:
            return None
        return Claim(response.messages_list[0], response.message_object_trees[0])

    def fetch_content(self, node: int, claim: Claim) -> Delivery:
        """Returns a claimed message with all its objects."""
        run = claim.envelope.metadata.run_id
        objects: dict[str, bytes] = {}
        left = MAX_MESSAGE_BYTES
        for name in _list_object_names(claim.tree):
            bound = min(left, _OBJECT)
            objects[name] = self._retry(functools.partial(self._fetch_object, node, run, name, bound))
            left -= len(objects[name])
        self.confirm_receipt(node, claim)
        return Delivery(claim.envelope, claim.tree.object_id, objects)

    def confirm_receipt(self, node: int, claim: Claim) -> None:
        """Tells the coordinator that it need not keep a claimed message's content any longer."""
        confirmed = message_pb2.ConfirmMessageReceivedRequest(
            node=node_pb2.Node(node_id=node),
            run_id=claim.envelope.metadata.run_id,
            message_object_id=claim.tree.object_id,
        )
        response = message_pb2.ConfirmMessageReceivedResponse()
        self._retry(lambda: self._call("confirm-message-received", confirmed, response))

    def push_reply(self, node: int, outgoing: Outgoing) -> None:
        """Sends a reply, again while the coordinator cannot be reached.

        Raises:
            RunInactive: The reply is not wanted any more.
            UploadTooLarge: A part of the reply is larger than the coordinator takes in; nothing was sent of it, where
                the coordinator had stated its bound.
            ConnectionLost: The coordinator could not be reached for too long, or the site stops.
        """
        largest = max(map(len, outgoing.objects.values()), default=0)
        if self._max_upload is not None and largest + _AROUND_OBJECT > self._max_upload:
            raise UploadTooLarge(
                f"the reply has {largest:,} bytes and the coordinator takes {self._max_upload:,}; "
                "its staff raises max_upload_mib in federation.yaml and resumes the run"
            )
        tries = itertools.count()
        self._retry(lambda: self._push(node, outgoing, again=next(tries) > 0))

    def _push(self, node: int, outgoing: Outgoing, *, again: bool) -> None:
        sender = node_pb2.Node(node_id=node)
        # Flower's site would also say here for how long it worked.
        request = fleet_pb2.PushMessagesRequest(
            node=sender, messages_list=[outgoing.envelope], message_object_trees=[outgoing.tree]
        )
        response = self._call("push-messages", request, fleet_pb2.PushMessagesResponse())
        missing, session = list(response.objects_to_push), response.session_id
        if again and not missing:
            # The try before may have ended after the coordinator's run took the envelope: no part is asked for any
            # more, and the run waits for them. Without a session's id Flower finds the one that lacks a part.
            missing, session = list(outgoing.objects), ""
        for name in missing:
            if name not in outgoing.objects:
                raise InvalidAnswer("the coordinator asked for an object that is not part of the reply")
            stored = message_pb2.PushObjectRequest(
                node=sender,
                run_id=outgoing.envelope.metadata.run_id,
                object_id=name,
                object_content=outgoing.objects[name],
                session_id=session,
            )
            # Not stored again is a part that was there already.
            if not self._call("push-object", stored, message_pb2.PushObjectResponse()).stored and not again:
                raise InvalidAnswer("the coordinator did not store a part of the reply")

    def _retry(self, attempt: Callable[[], _T]) -> _T:
        """Returns the attempt's value; tries again while it is only the connection that fails, and says so once."""
        until = time.monotonic() + _RETRY_FOR_S
        wait_s, reported = 0.1, False
        while True:
            try:
                return attempt()
            except InvalidAnswer:
                raise
            except ConnectionLost as error:
                if not reported and not isinstance(error, PartPending):
                    self._report(f"a transfer is tried again for {_RETRY_FOR_S:g} s: {self.explain_loss(error)}")
                    reported = True
                if time.monotonic() > until or self._stopping.wait(wait_s):
                    raise
                wait_s = min(2 * wait_s, 10.0)

    def explain_loss(self, error: ConnectionLost) -> str:
        """Returns in one sentence why the coordinator does not answer, found by a fresh TLS handshake.

        Raises:
            ConnectionRefused: No further try helps.
        """
        if isinstance(error, ExplainedLoss):
            return str(error)
        found = diagnose_connection(self._coordinator)
        if found is None:
            return f"{self._coordinator.address} is there but does not answer properly ({error})"
        if found.is_final:
            raise ConnectionRefused(found.sentence) from error
        return found.sentence

    def _fetch_object(self, node: int, run: int, name: str, max_bytes: int) -> bytes:
        request = message_pb2.PullObjectRequest(node=node_pb2.Node(node_id=node), run_id=run, object_id=name)
        response = self._call("pull-object", request, message_pb2.PullObjectResponse(), max_bytes=max_bytes + _SMALL)
        if response.object_found and not response.object_available:
            raise PartPending("a part of the message is still on its way")
        content = bytes(response.object_content)
        if sha256(content).hexdigest() != name:
            raise InvalidAnswer("a part of the message is not there, or not what its digest says")
        return content

    def _call(
        self,
        path: str,
        request: Message,
        response: _Response,
        *,
        max_bytes: int = _SMALL,
        timeout_s: float | None = None,
    ) -> _Response:
        body = request.SerializeToString(deterministic=True)
        signed = now()
        timeout = self._http.timeout if timeout_s is None else httpx.Timeout(timeout_s)
        try:
            with self._http.stream(
                "POST", f"/v1/fleet/{path}", content=body, headers=self._make_headers(signed), timeout=timeout
            ) as reply:
                content = _read_bounded(reply, max_bytes)
        except httpx.HTTPError as error:
            if is_tls_error(error):
                raise self._explain_tls_failure(error) from error
            raise ConnectionLost(f"{type(error).__name__}") from error
        if reply.status_code != httpx.codes.OK:
            raise self._explain_failure(path, reply, signed)
        stated = reply.headers.get(MAX_UPLOAD_HEADER, "")
        if stated.isascii() and stated.isdigit() and len(stated) < 16:
            self._max_upload = int(stated)
        parsed = _parse(response, content)
        self._has_answered, self._refused_since = True, None
        return parsed

    def _explain_tls_failure(self, error: httpx.HTTPError) -> Exception:
        """Returns the failure to raise: only what a fresh handshake finds is final, whatever the connection met."""
        found = diagnose_connection(self._coordinator)
        if found is None and stamp_file(self._coordinator.ca) != self._trusted:
            self._open_client()
            return ExplainedLoss(f"{self._coordinator.ca} names other authorities than before, which are trusted now")
        if found is None:
            return ExplainedLoss(
                f"the TLS connection to {self._coordinator.address} broke ({error}) and a new handshake succeeds: the "
                "line damages what is sent"
            )
        return ConnectionRefused(found.sentence) if found.is_final else ExplainedLoss(found.sentence)

    def _make_headers(self, signed: datetime.datetime) -> dict[str, str]:
        stamp = signed.isoformat()
        return {
            "content-type": _MEDIA_TYPE,
            "accept": _MEDIA_TYPE,
            "accept-encoding": "identity",
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(self._public).decode(),
            TIMESTAMP_HEADER: stamp,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(self._key, stamp.encode())).decode(),
            **self._versions,
        }

    def _explain_failure(self, path: str, reply: httpx.Response, signed: datetime.datetime) -> Exception:
        status = reply.status_code
        if status == httpx.codes.UNAUTHORIZED:
            # A signature carries the time: a wrong clock looks like a wrong key. So does a process that was stopped
            # between signing and sending, hence the time of signing.
            clock = explain_clock_skew(measure_clock_skew(reply.headers.get("date"), signed))
            if clock:
                return ExplainedLoss(clock)
            # Right after the coordinator's own clock was moved, the time that it states lags behind the one that it
            # checks by: a key that it knew a moment ago is refused for good only when it is refused again later.
            if self._has_answered:
                self._refused_since = self._refused_since or time.monotonic()
                if time.monotonic() - self._refused_since < _CONFIRM_S:
                    return ExplainedLoss("the coordinator refuses this site's signature")
            return ConnectionRefused(
                self._explain_unknown_key("the coordinator does not know this site's key (any more)")
            )
        if status == httpx.codes.PRECONDITION_FAILED and path == "activate-node":
            return KeyInUse(
                self._explain_unknown_key(
                    "the coordinator does not know this site's key, or another process is connected with it"
                )
            )
        if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            return UploadTooLarge(
                "the coordinator, or a proxy before it, takes no upload of this size; its staff raises the bound "
                "(max_upload_mib in federation.yaml, or the proxy's) and resumes the run"
            )
        if status == httpx.codes.FORBIDDEN and path not in _OF_NO_RUN:
            return RunInactive("the run is not running any more")
        if status in (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND) or 300 <= status < 400:
            sentence = (
                f"{self._coordinator.address} answers, but is no coordinator of this version (status {status}); "
                "check coordinator.address"
            )
            # What was a coordinator a minute ago may be one again, as when a proxy before it is being changed.
            return ExplainedLoss(sentence) if self._has_answered else ConnectionRefused(sentence)
        if status in _PASSING or status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return ConnectionLost(f"status {status}")
        return InvalidAnswer(f"status {status}")

    def _explain_unknown_key(self, what: str) -> str:
        return (
            f"{what}: send {self._coordinator.key}.pub to the coordinator's staff, who admit it with "
            "`headwater coordinator admit`; a key that was removed stays revoked: `headwater site init DIR --new-key` "
            "makes another"
        )


def measure_clock_skew(date: str | None, at: datetime.datetime | None = None) -> float | None:
    """Returns the seconds by which a time is ahead of an HTTP Date header's; None without a readable header.

    Args:
        date: The header's text.
        at: A time of this machine's clock, UTC; by default now.
    """
    try:
        sent = parsedate_to_datetime(date or "")
    except (TypeError, ValueError):
        return None
    if sent.tzinfo is None:  # A header without a zone, which HTTP does not allow, is meant in UTC.
        sent = sent.replace(tzinfo=datetime.UTC)
    return ((at or datetime.datetime.now(datetime.UTC)) - sent).total_seconds()


def _read_bounded(reply: httpx.Response, max_bytes: int) -> bytes:
    content = bytearray()
    for chunk in reply.iter_raw():
        content += chunk
        if len(content) > max_bytes:
            raise InvalidAnswer(f"the coordinator's answer is larger than {max_bytes} bytes")
    return bytes(content)


def _parse(response: _Response, content: bytes) -> _Response:
    try:
        response.ParseFromString(content)
    except DecodeError as error:
        raise InvalidAnswer("the coordinator's answer cannot be read") from error
    return response


def _list_object_names(tree: Any) -> list[str]:
    """Returns the names of all objects of a tree, each once; without recursion, because its depth is the sender's."""
    found: dict[str, None] = {}
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        found.setdefault(node.object_id)
        waiting.extend(node.children)
        if len(found) + len(waiting) > _MAX_OBJECTS:
            raise InvalidAnswer(f"a message of more than {_MAX_OBJECTS} parts was sent")
    return list(found)
