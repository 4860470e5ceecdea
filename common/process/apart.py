"""Work in a process of its own, which then ends: its memory, and what it imports, do not stay with the caller."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

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
        RunFailed: the process was ended, as where memory runs out.
    """
    if "torch" in sys.modules:
        return function(*args, **kwargs)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_ctrl_c) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise RunFailed(
                "the process that prepares it was ended from outside, perhaps because memory ran out"
            ) from error


def _end_with_ctrl_c() -> None:
    """Lets Ctrl-C, which a terminal sends to this process too, end it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
