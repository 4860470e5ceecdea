"""Settings of a process on a CPU: torch's threads, the arithmetic of very small numbers, and memory that is kept."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Made = TypeVar("_Made")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of `mallopt`, as glibc's malloc.h has them."""


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


@contextmanager
def kept_memory() -> Iterator[None]:
    """Memory of large tensors stays with the process meanwhile, and goes back to the system at the end.

    Left to itself, glibc gives it back when a layer's output is freed, and the next batch waits for new pages: a sixth
    to a half of the time of encoding (docs/benchmarks.md, Encoding). Elsewhere nothing is changed.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    try:
        set_option, trim = (None, None) if libc is None else (libc.mallopt, libc.malloc_trim)
    except AttributeError:  # Another library of C.
        set_option = trim = None
    if set_option is None or trim is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, 1 << 30)
    set_option(_TRIM_THRESHOLD, 1 << 30)
    try:
        yield
    finally:
        # Where glibc's own thresholds end up in a process that frees large tensors.
        set_option(_MMAP_THRESHOLD, 32 << 20)
        set_option(_TRIM_THRESHOLD, 64 << 20)
        trim(0)


def make_ahead(make: Callable[[range], _Made], ranges: list[range], workers: int) -> Iterator[_Made]:
    """Yields the result for each range, in order, made by some threads; only a few are held at once.

    Args:
        make: makes it.
        ranges: the ranges.
        workers: number of threads.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Made]] = deque()
        for some in ranges:
            waiting.append(pool.submit(make, some))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
