"""Has Flower's processes at the coordinator wait for what passes: a reply's part under way, a full disk.

A site pushes a reply's envelope first and its parts after it; a request in between finds a part that is known and not
available yet. Flower's client then waits 1 s, 2 s, ... before it asks again: a third of a small head's round.

A site that is cut off in the middle uploads nothing more, and Flower would have the whole run wait three minutes for
its parts. Where nobody uploads any more, the part is answered as missing, and the site is asked again.

The process that starts runs ends at an error of the SuperLink, and the daemon with it. Its database fails where the
disk is full; "not available now" is answered instead, after which that process asks again, 20 s later at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, final

from google.protobuf.message import DecodeError

from common.flower import message_pb2
from server.superlink.request_filter import App, Receive, Scope, Send, Uploads

_PATH = "/v1/runtime/pull-object"
_ACQUIRE = "/v1/runtime/acquire-task"
_STEP_S = 0.03
_LONGEST_S = 2.0
_MAX_QUIET_S = 20.0
"""Longer than the pauses between a site's tries of one upload."""


@final
class RetryingApp:
    """An app that answers what its callers wait for, where the SuperLink's answer would end them or hold them up.

    It repeats a request answered by "known, not available yet" for a while before it gives that answer.
    """

    def __init__(self, app: App, uploads: Uploads, max_quiet_s: float = _MAX_QUIET_S) -> None:
        """Wraps an app.

        Args:
            app: the SuperLink.
            uploads: the uploads of sites that are under way.
            max_quiet_s: seconds without any upload after which a part is not waited for.
        """
        self._app, self._uploads, self._max_quiet_s = app, uploads, max_quiet_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http" and scope["path"] == _ACQUIRE:
            return await self._app(scope, receive, _answer_errors_as_unavailable(send))
        if scope["type"] != "http" or scope["path"] != _PATH:
            return await self._app(scope, receive, send)
        body = await _read_body(receive)
        loop = asyncio.get_running_loop()
        until = loop.time() + _LONGEST_S
        while True:
            answer = await self._forward({**scope, "state": dict(scope.get("state", {}))}, body)
            if not _is_pending(answer):
                break
            if self._uploads.measure_quiet() > self._max_quiet_s:
                answer = _make_missing()
                break
            if loop.time() > until:
                break
            await asyncio.sleep(_STEP_S)
        for message in answer:
            await send(message)

    async def _forward(self, scope: Scope, body: bytes) -> list[MutableMapping[str, Any]]:
        answer: list[MutableMapping[str, Any]] = []
        ended = asyncio.Event()
        waiting = [body]

        async def receive() -> MutableMapping[str, Any]:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            answer.append(message)

        try:
            await self._app(scope, receive, send)
        finally:
            ended.set()
        return answer


def _answer_errors_as_unavailable(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        await send({**message, "status": 503} if message.get("status") == 500 else message)

    return sent


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    more = True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event["type"] == "http.request" and event.get("more_body", False)
    return bytes(body)


def _make_missing() -> list[MutableMapping[str, Any]]:
    body = message_pb2.PullObjectResponse(object_found=False).SerializeToString()
    headers = [(b"content-type", b"application/protobuf"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": 200, "headers": headers}
    return [start, {"type": "http.response.body", "body": body}]


def _is_pending(answer: list[MutableMapping[str, Any]]) -> bool:
    if answer[0].get("status") != 200:
        return False
    response = message_pb2.PullObjectResponse()
    try:
        response.ParseFromString(b"".join(message.get("body", b"") for message in answer[1:]))
    except DecodeError:
        return False
    return bool(response.object_found and not response.object_available)
