"""Files that survive a crash: written beside their place, flushed, then renamed. Readable by their owner only.

Flushing is for power cuts; a killed process loses nothing that it wrote. A simulation, whose ledgers protect nobody,
may do without (`without_flushing`): thousands of simulated sites on one disk would wait for nothing else.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

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


def flush_folder(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
