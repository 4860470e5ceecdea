"""Memory of large tensors, which stays with the process while it encodes."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from common.process.threads import kept_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library of C than glibc")


def count_new_pages() -> int:
    """Returns the pages that are handed out while a tensor of 48 MiB, which glibc never keeps, is made four times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(12 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def read_resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def test_a_large_tensors_memory_is_used_again_and_goes_back_at_the_end() -> None:
    with kept_memory():
        # At first small pieces come to lie in the way.
        meanwhile, held = min(count_new_pages() for _ in range(6)), read_resident_mib()
    assert read_resident_mib() < held - 40
    assert 2 * meanwhile < count_new_pages()
