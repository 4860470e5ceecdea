"""Replies kept for being sent again: the identical request gets the identical bytes, and noise is drawn once for it.

One lock for each run is held from looking for a reply to storing it: of two identical requests at the same moment the
second waits and gets the first one's bytes.

Each reply is a file; their digests are lines of one file, `reply_digests`, a line appended before its reply is stored
(the last line of a request counts). A reply that differs from its digest is not sent, and the request is declined until
the site's staff has looked: to answer anew would draw noise a second time for one request, which costs a second charge,
and whoever damages a file would decide that it is spent. When the staff has removed the reply, the request is a new
charge.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.files import flush, flush_folder, private_folder, write_atomic

_LINE_BYTES = 130
"""Two digests of 64 hex digits, a space between them and a newline."""


class ReplyDamaged(Exception):
    """A stored reply is not the one that was stored. The message names its file."""


@dataclass(frozen=True)
class Replies:
    """The stored replies of one run, while nobody else looks for or stores a reply of it."""

    _run_folder: Path
    _digests: int

    @classmethod
    @contextmanager
    def exclusive(cls, run_folder: Path) -> Iterator[Replies]:
        """The replies of a run, while no other process or thread has them."""
        descriptor = os.open(run_folder / "reply_digests", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # Released by the operating system if the process dies.
            yield cls(run_folder, descriptor)
        finally:
            os.close(descriptor)

    def find(self, request: str) -> bytes | None:
        """The stored reply to a request's digest; None where there is none.

        Raises:
            ReplyDamaged: it was changed since, or its digest is gone.
        """
        stored = self._reply(request)
        try:
            data = stored.read_bytes()
        except FileNotFoundError:
            return None
        kept = [line[65:129] for line in self._lines() if line[:64] == request.encode()]
        if not kept or kept[-1] != _digest_of(data):
            raise ReplyDamaged(
                f"{stored}: the stored reply was damaged; remove it, and the same request is charged and answered anew"
            )
        return data

    @staticmethod
    def was_stored(run_folder: Path, request: str) -> bool:
        """Returns whether a reply to a request was ever stored, or begun to be: before, none was sent."""
        return request.encode() in (run_folder / "reply_digests").read_bytes()

    def find_newest(self) -> Path | None:
        """Returns the file of the reply that was stored last; None where there is none, or it was removed."""
        size = os.fstat(self._digests).st_size // _LINE_BYTES * _LINE_BYTES
        reply = self._reply(os.pread(self._digests, 64, max(0, size - _LINE_BYTES)).decode())
        return reply if size and reply.exists() else None

    def store(self, request: str, data: bytes) -> None:
        """Keep a reply; durable when this returns. The digest first: a reply without one counts as damaged."""
        line = b"%s %s\n" % (request.encode(), _digest_of(data))
        # Over what a crash left of a line.
        end = os.fstat(self._digests).st_size // _LINE_BYTES * _LINE_BYTES
        if os.pwrite(self._digests, line, end) != _LINE_BYTES:
            raise OSError(f"{self._run_folder}: expected room for a reply's digest, got a full disk")
        flush(self._digests)
        if end == 0:
            flush_folder(self._run_folder)  # Where the file of digests is new.
        stored = self._reply(request)
        write_atomic(private_folder(stored.parent) / request, data)

    def _lines(self) -> list[bytes]:
        """The whole lines of the file of digests."""
        data = os.pread(self._digests, os.fstat(self._digests).st_size, 0)
        return [data[start : start + _LINE_BYTES] for start in range(0, len(data) - _LINE_BYTES + 1, _LINE_BYTES)]

    def _reply(self, request: str) -> Path:
        return self._run_folder / "replies" / request


def _digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
