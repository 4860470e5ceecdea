"""Stored replies: found again to the byte, also after a crash in the middle of storing one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.protocol.replies import Replies, ReplyDamaged

FIRST, SECOND = "1" * 64, "2" * 64


def find(folder: Path, request: str) -> bytes | None:
    with Replies.exclusive(folder) as replies:
        return replies.find(request)


def store(folder: Path, request: str, data: bytes) -> None:
    with Replies.exclusive(folder) as replies:
        replies.store(request, data)


def test_each_request_finds_its_own_reply(tmp_path: Path) -> None:
    store(tmp_path, FIRST, b"one")
    store(tmp_path, SECOND, b"two")
    assert (find(tmp_path, FIRST), find(tmp_path, SECOND), find(tmp_path, "3" * 64)) == (b"one", b"two", None)


@pytest.mark.parametrize("written", range(0, 130, 43))
def test_a_digest_that_a_crash_tore_is_written_anew(tmp_path: Path, written: int) -> None:
    store(tmp_path, FIRST, b"one")
    digests = tmp_path / "reply_digests"
    store(tmp_path, SECOND, b"lost")
    digests.write_bytes(digests.read_bytes()[: 130 + written])
    (tmp_path / "replies" / SECOND).unlink()
    assert find(tmp_path, SECOND) is None
    store(tmp_path, SECOND, b"two")
    assert (find(tmp_path, FIRST), find(tmp_path, SECOND)) == (b"one", b"two")


def test_a_digest_without_its_reply_is_a_request_that_was_not_answered(tmp_path: Path) -> None:
    """Killed between the two, or removed by the site's staff: the answer to come has another digest."""
    store(tmp_path, FIRST, b"one")
    (tmp_path / "replies" / FIRST).unlink()
    assert find(tmp_path, FIRST) is None
    store(tmp_path, FIRST, b"anew")
    assert find(tmp_path, FIRST) == b"anew"


def test_a_reply_whose_digest_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    """The digest comes first: a reply without one would count as damaged, until somebody looked."""
    (tmp_path / "reply_digests").touch()
    read_only = os.open(tmp_path / "reply_digests", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            Replies(tmp_path, read_only).store(FIRST, b"one")
    finally:
        os.close(read_only)
    assert find(tmp_path, FIRST) is None


def test_an_exchanged_reply_is_not_sent(tmp_path: Path) -> None:
    store(tmp_path, FIRST, b"one")
    store(tmp_path, SECOND, b"two")
    (tmp_path / "replies" / FIRST).write_bytes(b"two")
    with pytest.raises(ReplyDamaged, match=FIRST):
        find(tmp_path, FIRST)
