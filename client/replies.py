"""Replies kept for being sent again: the identical request gets the identical bytes, and noise is drawn once for it.

One lock for each run is held from looking for a reply to storing it: of two identical requests at the same moment the
second waits and gets the first one's bytes.

A reply's digest is kept beside it. A reply that differs from it is not sent, and the request is declined until the
site's staff has looked: to answer anew would draw noise a second time for one request, which costs a second charge, and
whoever damages a file would decide that it is spent. When the staff has removed the file, the request is a new charge.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.files import private_folder, write_atomic


class ReplyDamaged(Exception):
    """A stored reply is not the one that was stored. The message names its file."""


@dataclass(frozen=True)
class Replies:
    """What one run was answered; a folder of the run's."""

    run_folder: Path

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While no other process or thread looks for or stores a reply of this run."""
        descriptor = os.open(self.run_folder / "replies.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # Released by the operating system if the process dies.
            yield
        finally:
            os.close(descriptor)

    def find(self, request: str) -> bytes | None:
        """The stored reply to a request's digest; None where there is none.

        Raises:
            ReplyDamaged: it was changed since, or its digest is gone.
        """
        stored, kept = self._reply(request), self._digest(request)
        if not stored.exists():
            return None
        data = stored.read_bytes()
        if not kept.exists() or kept.read_text(encoding="ascii", errors="replace") != _digest_of(data):
            raise ReplyDamaged(
                f"{stored}: the stored reply was damaged; remove it, and the same request is charged and answered anew"
            )
        return data

    def store(self, request: str, data: bytes) -> None:
        """Keep a reply; durable when this returns. The digest first: a reply without one counts as damaged."""
        for path, content in ((self._digest(request), _digest_of(data).encode()), (self._reply(request), data)):
            private_folder(path.parent)
            write_atomic(path, content)

    def _reply(self, request: str) -> Path:
        return self.run_folder / "replies" / request

    def _digest(self, request: str) -> Path:
        return self.run_folder / "reply_digests" / request


def _digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
