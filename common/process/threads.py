"""Settings of torch on a CPU: the number of its threads, and the arithmetic of very small numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, in this thread and in those that are started meanwhile.

    Heads are small: on two busy cores, threads made a step 80 times slower (measured). And a sum must not depend on
    how many threads a machine has: executors are compared to the bit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def steady_time() -> Iterator[None]:
    """Torch on one thread, with denormal numbers as zeros, in this thread and in those that are started meanwhile.

    A processor takes up to a hundred times as long for a denormal number: one record of such could show in the time.
    """
    with one_thread():
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
