"""Work in a process of its own: its result, its errors and its end reach the caller; nothing else stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.federation import ROOT, environment

FUNCTIONS = """
import os
from common.types import BadInput

def add(first, second):
    print("nothing of this may reach the result")
    return first + second

def refuse():
    raise BadInput("a sentence")

def end():
    os.kill(os.getpid(), 9)
"""

SCRIPT = """
import functions, os, pathlib, sys
from common.process.apart import run_apart

assert "torch" not in sys.modules
try:
    print(run_apart({call}))
except Exception as error:
    print(repr(error))
print(pathlib.Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read_text())
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("functions.add, [1], second=[2]", "[1, 2]"),
        ("functions.refuse", "BadInput('a sentence')"),
        ("functions.end", "RunFailed('the process that prepares it was ended from outside"),
    ],
)
def test_a_result_an_error_and_an_end_reach_the_caller_and_no_process_stays(
    tmp_path: Path, call: str, said: str
) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "script.py").write_text(SCRIPT.format(call=call))
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-m", "script"],
        env={**environment(), "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, children, *rest = done.stdout.split("\n")
    assert first.startswith(said)
    assert not children and not any(rest)
