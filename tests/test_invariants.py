"""What looks at deployments: it bears what it finds there."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.invariants import read_use


def test_the_use_of_a_process_that_has_ended_is_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert read_use(child.pid) is None  # Nobody has waited for it: its folder in /proc is there, without memory.
    assert read_use(child.pid) is None
    memory, files = read_use(os.getpid()) or (0.0, 0)
    assert memory > 1.0 and files >= 3
