"""Runs rows one after the other on one federation and prints what happened."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import faults
from benchmarks.faults import ROWS
from benchmarks.faults.parts import find_faults, settle
from tests.deployment import make_deployment
from tests.invariants import (
    Watcher,
    find_leftovers,
    find_temporary_files,
)


def _enter_own_mounts() -> None:
    """Begins again in a mount namespace, so that no disk of a row outlives this process."""
    if (
        "DRILL_MOUNTS" not in os.environ
        and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    ):
        environment = {**os.environ, "DRILL_MOUNTS": "own"}
        os.execvpe("unshare", ["unshare", "-m", sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]], environment)


def main() -> None:
    """Runs the rows that are named, or all."""
    arguments = argparse.ArgumentParser(description=faults.__doc__)
    arguments.add_argument("--keep", type=Path, help="folder for the federation, which stays")
    arguments.add_argument("rows", nargs="*", help=", ".join(ROWS))
    chosen = arguments.parse_args()
    _enter_own_mounts()
    unknown = set(chosen.rows) - set(ROWS)
    if unknown:
        arguments.error(f"expected rows of {', '.join(ROWS)}; got {', '.join(sorted(unknown))}")
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # So that all processes are ended.
    made = make_deployment(folder)
    watcher, worst = Watcher(made), 0
    try:
        for name in chosen.rows or ROWS:
            before = time.monotonic()
            try:
                settle(made)
                before = time.monotonic()
                said = ROWS[name](made)
            except (AssertionError, OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
                said = f"FAULT: {type(error).__name__}: {str(error)[-600:]}"
            wrong = [f"FAULT: {fault}" for fault in find_faults(made, watcher)]
            verdict = "; ".join([said, *wrong])
            worst |= "FAULT" in verdict
            print(f"{name} ({ROWS[name].__doc__}): {verdict}  [{time.monotonic() - before:.0f} s]", flush=True)
    finally:
        made.end()
        for fault in [*find_leftovers(made), *find_temporary_files(made)]:
            worst = 1
            print(f"afterwards: FAULT: {fault}", flush=True)
        if chosen.keep is None:
            shutil.rmtree(folder)
    sys.exit(worst)


if __name__ == "__main__":
    main()
