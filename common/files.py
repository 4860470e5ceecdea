"""Files: whole after a crash, locked, or read from an archive that is not trusted.

A file is written beside its place, flushed, then renamed; it is readable by its owner only.

Flushing is for power cuts; a killed process loses nothing that it wrote. A simulation, whose ledgers protect nobody,
may do without (`without_flushing`): thousands of simulated sites on one disk would wait for nothing else. It then also
writes over a small file where it lies: a kernel copies one page whole or not at all, whatever happens to the process.
"""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

from common.types import BadInput

_PAGE_BYTES = 4096
_numbers = itertools.count()
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


def flush_surely(path: Path) -> None:
    """Puts what was written to a file on the disk, in `without_flushing` too: the one order that must hold there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> Path:
    """The folder, created with its parents where missing; it, and each created, is readable by its owner only."""
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        private_folder(path.parent)
        path.mkdir(exist_ok=True)
    path.chmod(0o700)
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing; owner-only; on disk when this returns."""
    if not _flushing.get() and _written_over(path, data):
        return
    with opened_atomic(path) as file:
        file.write(data)


@contextmanager
def opened_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that takes its place, whole and on disk, when the block ends; nothing stays where it fails."""
    handle, temporary = _create_beside(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            flush(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _create_beside(path: Path) -> tuple[int, str]:
    """Returns the descriptor and the path of a new file of the owner's beside a place."""
    for number in _numbers:
        beside = f"{path.parent}/.{path.name}.{os.getpid():x}-{number:x}"
        try:
            return os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), beside
        except FileExistsError:
            continue  # What an earlier process of this number left.
    raise AssertionError("there is always a next number")


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


def stamp_file(file: Path | str | int) -> tuple[int, ...]:
    """Returns numbers that change whenever a file is written to or replaced, given by its path or its descriptor."""
    status = os.stat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def allocate(descriptor: int, num_bytes: int) -> None:
    """Gives the first bytes of an open file their place on the disk, so that writing them cannot find it full.

    A file that is memory-mapped needs it: writing to a page for which there is no room kills the process.

    Raises:
        OSError: there is not so much room, or a quota or limit does not allow it.
    """
    # macOS has no such call; there, a full disk is found when it is written to.
    if sys.platform != "darwin" and num_bytes > 0:
        os.posix_fallocate(descriptor, 0, num_bytes)


def check_room(folder: Path, num_bytes: int) -> None:
    """Checks that a new file of this size has room in a folder, by allocating one and removing it.

    The free bytes that the system states know of no quota.

    Raises:
        OSError: there is not so much room; the error names the folder.
    """
    if not _flushing.get():
        return  # A simulation, whose charges protect nobody.
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".room.")
        try:
            allocate(handle, num_bytes)
        finally:
            os.close(handle)
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


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


def read_zip(
    content: bytes, where: str, *, is_allowed: Callable[[str], bool], allowed: str, max_bytes: int, max_files: int
) -> dict[str, bytes]:
    """Returns the files of a zip archive that is not trusted, by name; they are read in memory and never unpacked.

    Guarantees:
    - At most `max_bytes` are inflated, whatever the archive says about itself.
    - Every name is allowed and stands in the archive once, and no other program can read it differently.
    - Every file is plain: no link, no password, stored or deflated.

    Args:
        content: the archive.
        where: what the archive is, for messages.
        is_allowed: returns whether a file may have this name.
        allowed: the names that files may have, in words.
        max_bytes: largest size of the archive, and of all its files together.
        max_files: largest number of files.

    Raises:
        BadInput: the archive breaks one of these rules or cannot be read.
    """
    if len(content) > max_bytes:
        raise BadInput(f"{where}: expected at most {max_bytes} bytes, got {len(content)}")
    files: dict[str, bytes] = {}
    left = max_bytes
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > max_files:
                raise BadInput(f"{where}: expected at most {max_files} files, got {len(members)}")
            for member in members:
                name = member.filename
                # orig_filename: zipfile cuts a name at a null character, another program may not.
                if member.orig_filename != name or not is_allowed(name):
                    raise BadInput(f"{where}: expected {allowed}, got {name[:80]!r}")
                if name in files:
                    raise BadInput(f"{where}: expected each file once, got {name!r} twice")
                if not _is_plain(member):
                    raise BadInput(f"{where}: expected plain files, got something else under {name!r}")
                with archive.open(member) as file:
                    # The stated size is the sender's word; what is read is bounded here.
                    files[name] = file.read(left + 1)
                left -= len(files[name])
                if left < 0:
                    raise BadInput(f"{where}: expected at most {max_bytes} bytes when unpacked, got more")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"{where}: expected a readable zip, got {type(error).__name__}") from error
    return files


def _is_plain(member: zipfile.ZipInfo) -> bool:
    is_regular = (member.external_attr >> 16) & 0o170000 in (0, 0o100000)
    is_encrypted = bool(member.flag_bits & 1)
    return is_regular and not is_encrypted and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
