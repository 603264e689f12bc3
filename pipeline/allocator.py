"""What becomes of freed memory: kept by the process while it works on a CPU, given back afterwards.

A training step frees and asks for gigabytes in tensors of megabytes. glibc gives such blocks back to the
system at once, which then has to fill every page with zeros again: about a tenth of a step of GPT-2 small.
Off Linux, and where the C library has no such setting, nothing is changed.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Settings of mallopt(3): how much may lie free at the top, which size is mapped alone, and how many such."""

_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""What glibc has, thresholds where it moves them by itself once a process has freed large blocks."""


@contextmanager
def keeping_memory(device: str) -> Iterator[None]:
    """In the body memory once used stays with the process, if `device` is "cpu"; not for nesting."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device == "cpu" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        for setting, value in _USUAL.items():
            libc.mallopt(setting, value)
        libc.malloc_trim(0)
