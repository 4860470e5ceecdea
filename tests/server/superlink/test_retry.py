"""A reply whose parts are still on their way is waited for where waiting is cheap."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from typing import Any

import pytest

from common.flower import message_pb2
from server.superlink.request_filter import Uploads
from server.superlink.retry import RetryingApp

PATH = "/v1/runtime/pull-object"


class FakeSuperLink:
    """Answers what it is told to, one answer a request; remembers the bodies."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.bodies.append((await receive())["body"])
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(
    superlink: FakeSuperLink, path: str = PATH, uploads: Uploads | None = None, max_quiet_s: float = 20.0
) -> tuple[int, bytes]:
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": request, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    request = message_pb2.PullObjectRequest(object_id="a").SerializeToString()
    asyncio.run(
        RetryingApp(superlink, uploads or Uploads(), max_quiet_s)(
            {"type": "http", "path": path, "method": "POST"}, receive, send
        )
    )
    return sent[0]["status"], sent[1]["body"]


ON_ITS_WAY = message_pb2.PullObjectResponse(object_found=True, object_available=False).SerializeToString()
THERE = message_pb2.PullObjectResponse(
    object_found=True, object_available=True, object_content=b"x"
).SerializeToString()
UNKNOWN = message_pb2.PullObjectResponse(object_found=False).SerializeToString()


def test_a_part_that_arrives_a_moment_later_is_answered_at_once_then() -> None:
    superlink = FakeSuperLink((200, ON_ITS_WAY), (200, ON_ITS_WAY), (200, THERE))
    started = time.monotonic()
    assert ask(superlink) == (200, THERE)
    assert time.monotonic() - started < 1.0
    assert len(set(superlink.bodies)) == 1 and len(superlink.bodies) == 3


def test_a_part_that_never_comes_is_not_waited_for_for_ever() -> None:
    started = time.monotonic()
    assert ask(FakeSuperLink((200, ON_ITS_WAY))) == (200, ON_ITS_WAY)
    assert 1.0 < time.monotonic() - started < 10.0


def test_a_part_that_nobody_uploads_any_more_is_missing_and_one_under_way_is_not() -> None:
    """Else the whole run would wait three minutes for the parts of a site that was cut off."""
    uploads = Uploads()
    with uploads.count():
        assert ask(FakeSuperLink((200, ON_ITS_WAY)), uploads=uploads, max_quiet_s=0.3) == (200, ON_ITS_WAY)
    assert ask(FakeSuperLink((200, ON_ITS_WAY)), uploads=uploads, max_quiet_s=0.3) == (200, UNKNOWN)


@pytest.mark.parametrize("answer", [(200, UNKNOWN), (200, THERE), (403, b"{}"), (200, b"\xff\xff\xff")])
def test_every_other_answer_is_given_as_it_is(answer: tuple[int, bytes]) -> None:
    superlink = FakeSuperLink(answer)
    assert ask(superlink) == answer
    assert len(superlink.bodies) == 1


def test_the_process_that_starts_runs_waits_where_the_database_fails() -> None:
    """At 500 it ends, and the daemon with it; at 503 it asks again."""
    path = "/v1/runtime/acquire-task"
    assert ask(FakeSuperLink((500, b"{}")), path) == (503, b"{}")
    assert [ask(FakeSuperLink((status, b"a")), path) for status in (200, 401, 403)] == [
        (200, b"a"),
        (401, b"a"),
        (403, b"a"),
    ]
    assert ask(FakeSuperLink((500, b"{}")), "/v1/runtime/get-nodes") == (500, b"{}")


def test_other_requests_pass_untouched() -> None:
    superlink = FakeSuperLink((200, ON_ITS_WAY))
    assert ask(superlink, "/v1/runtime/get-nodes") == (200, ON_ITS_WAY)
    assert len(superlink.bodies) == 1
