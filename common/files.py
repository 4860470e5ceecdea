"""Files that survive a crash: written beside their place, flushed, then renamed. Readable by their owner only.

Flushing is for power cuts; a killed process loses nothing that it wrote. A simulation, whose ledgers protect nobody,
may do without (`without_flushing`): thousands of simulated sites on one disk would wait for nothing else. It then also
writes over a small file where it lies: a kernel copies one page whole or not at all, whatever happens to the process.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_PAGE_BYTES = 4096
_flushing: ContextVar[bool] = ContextVar("flushing", default=True)


@contextmanager
def without_flushing() -> Iterator[None]:
    """Leave it to the operating system when files reach the disk. For simulations only (tests/test_rooms.py)."""
    token = _flushing.set(False)
    try:
        yield
    finally:
        _flushing.reset(token)


def flush(descriptor: int) -> None:
    """Put what was written to an open file on the disk."""
    if _flushing.get():
        os.fsync(descriptor)


def private_folder(path: Path) -> Path:
    """The folder, created with its parents where missing; it is readable by its owner only."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing; owner-only; on disk when this returns."""
    if not _flushing.get() and _written_over(path, data):
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            flush(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _written_over(path: Path, data: bytes) -> bool:
    """Write over a file of one page at most; false, and nothing done, where there is none or it would shrink.

    A replaced file is a deleted one, and ext4 takes up to 0.4 ms to make a new file while others were just deleted
    (measured; it steps over each of them): most of a round of thousands of ledgers.
    """
    if len(data) > _PAGE_BYTES:
        return False
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return False
    try:
        return os.fstat(descriptor).st_size <= len(data) == os.pwrite(descriptor, data, 0)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(path: Path, *, timeout_s: float | None = None, held: Exception | None = None) -> Iterator[int]:
    """Holds an exclusive lock on a file, which is created where it is missing; yields its descriptor.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        path: the lock's file; it may hold content.
        timeout_s: longest wait for another process or thread to release it, in seconds; None waits for ever.
        held: error to raise where it was held for the whole wait; by default a TimeoutError.

    Raises:
        TimeoutError: the lock was held for the whole wait, and `held` is None.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if timeout_s is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        elif not _lock_within(descriptor, time.monotonic() + timeout_s):
            raise held or TimeoutError(f"{path} is locked")
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_within(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)
        else:
            return True
