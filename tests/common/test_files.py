"""Files are whole or absent, and their owner's alone; without flushing a small one is written over where it lies."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import lock_file, without_flushing, write_atomic
from common.types import BadInput


@pytest.mark.parametrize("size", [10, 4096, 4097])
def test_a_file_is_replaced_by_a_whole_new_one(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"before")
    with path.open("rb") as reader:
        write_atomic(path, b"x" * size)
        assert reader.read() == b"before"  # Who has it open keeps what was there.
    assert path.read_bytes() == b"x" * size
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("before", "after"), [(b"", b"new"), (b"old", b"new"), (b"old", b"longer"), (b"older", b"new")]
)
def test_without_flushing_a_file_holds_the_last_content_too(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "file"
    with without_flushing():
        write_atomic(path, before)
        write_atomic(path, after)
    assert path.read_bytes() == after
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (4096, 4097)])
def test_what_a_kill_could_tear_is_not_written_over(tmp_path: Path, before: int, after: int) -> None:
    """Shorter content would need a second call; more than one page is not copied at once."""
    path = tmp_path / "file"
    with without_flushing():
        write_atomic(path, b"x" * before)
        number = path.stat().st_ino
        with path.open("rb"):  # Else the new file could get the freed number.
            write_atomic(path, b"x" * after)
        assert path.stat().st_ino != number


def test_a_lock_is_held_by_one_and_released_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = (
        "import pathlib, sys, time\n"
        "from common.files import lock_file\n"
        "with lock_file(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(TimeoutError), lock_file(path, timeout_s=0.1):
            pass
        with pytest.raises(BadInput, match="busy"), lock_file(path, timeout_s=0.0, held=BadInput("busy")):
            pass
        process.kill()
        process.wait()
    with lock_file(path, timeout_s=0.0) as descriptor:
        os.write(descriptor, b"kept")
    assert path.read_bytes() == b"kept"
