"""What becomes of freed memory: kept by the process while it works on a CPU, given back afterwards.

A training step frees and asks for gigabytes in tensors of megabytes. glibc gives such blocks back to the
system at once, which then has to fill every page with zeros again: 3 to 9 % of a step of GPT-2 small.
Off Linux, where the C library has no such setting, and where somebody set glibc up in the environment,
nothing is changed. A thread beside the main one profits fully only in a process with a single arena: the heap
of another one holds blocks of at most 64 MiB.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Settings of mallopt(3): how much may lie free at the top, which size is mapped alone, and how many such."""

_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""What glibc has, thresholds where it moves them by itself once a process has freed large blocks."""

_ASKED = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
"""By these a user sets up glibc."""


def for_workers() -> dict[str, str]:
    """Environment of processes that train in a thread, as a worker of Ray does: one arena."""
    asked = any(name in os.environ for name in (*_ASKED, "MALLOC_ARENA_MAX"))
    return {} if asked else {"MALLOC_ARENA_MAX": "1"}


def give_back() -> None:
    """Return what is free to the system, where the C library can."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def keeping_memory(device: str) -> Iterator[None]:
    """In the body memory once used stays with the process, if `device` is "cpu"; not for nesting."""
    ours = sys.platform == "linux" and device == "cpu" and not any(name in os.environ for name in _ASKED)
    libc = ctypes.CDLL(None) if ours else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        for setting, value in _USUAL.items():
            libc.mallopt(setting, value)
        give_back()
