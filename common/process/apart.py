"""Work in a process of its own, which then ends: its memory, and what it imports, do not stay with the caller.

The standard library's process pools leave a process behind that tracks their semaphores, for as long as the caller
lives; this is one process, and two pipes.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from common.bundle import find_installation
from common.process.parent import end_with_parent
from common.types import RunFailed

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def run_apart(function: Callable[_Given, _Result], *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
    """Returns the result of a function that needs torch, from a process that ends with it.

    Where torch is loaded already there is nothing to keep out: the function then runs here.

    Args:
        function: a function of a module.
        args: its arguments.
        kwargs: its named arguments.

    Raises:
        Exception: what the function raises.
        RunFailed: the process was ended, as where memory runs out.
    """
    if "torch" in sys.modules:
        return function(*args, **kwargs)
    # The function's own module is found as it is here, whatever the working directory.
    done = subprocess.run(
        [sys.executable, "-m", "common.process.apart"],
        input=pickle.dumps((os.getcwd(), sys.path, pickle.dumps((function, args, kwargs)))),
        stdout=subprocess.PIPE,
        cwd=find_installation(),
        check=False,
    )
    if done.returncode:
        raise RunFailed("the process that prepares it was ended from outside, perhaps because memory ran out")
    result, error = pickle.loads(done.stdout)
    if error is not None:
        raise error
    returned: _Result = result
    return returned


def _answer() -> None:
    """Runs what comes in by the standard input; what its function prints goes to the standard error output."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, which a terminal sends to this process too.
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    folder, path, asked = pickle.load(sys.stdin.buffer)
    os.chdir(folder)
    sys.path[:] = path
    function, args, kwargs = pickle.loads(asked)
    answer: tuple[object, Exception | None]
    try:
        answer = function(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - the caller's to handle, as if the function had run there
        answer = None, error
    with private:
        pickle.dump(answer, private)


if __name__ == "__main__":
    _answer()
