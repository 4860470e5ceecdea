"""The number of threads that torch uses."""

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
