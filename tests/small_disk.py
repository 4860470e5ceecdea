"""A small disk of its own for a test: a tmpfs that only one child process sees, and that goes with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.federation import ROOT, environment

_MOUNT = 'mount -t tmpfs -o "size=$1,mode=700" tmpfs "$2" && exec "$3" -c "$4"'


def run_on_small_disk(check: Callable[[Path], None], folder: Path, *, size: str = "2m", timeout_s: float = 240) -> str:
    """Runs a function of a test module with an empty folder on a disk of that size; returns what it printed.

    Args:
        check: the function; it is imported by its name in a process of its own.
        folder: the folder to mount the disk at.
        size: the disk's size, as tmpfs takes it.
        timeout_s: seconds after which it is ended.
    """
    folder.mkdir(parents=True)
    code = f"from pathlib import Path; from {check.__module__} import {check.__name__} as f; f(Path({str(folder)!r}))"
    command = ["unshare", "-m", "sh", "-c", _MOUNT, "sh", size, str(folder), sys.executable, code]
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if "mount:" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """A folder whose disk is full until the context ends."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        filler.unlink()
