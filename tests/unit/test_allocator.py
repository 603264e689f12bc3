"""While a process keeps its memory, large tensors are made without asking the system for pages again."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from pipeline.allocator import keeping_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")

NUMBERS = 24 << 20
"""96 MiB in fp32: beyond what glibc keeps by itself."""


def faults(times: int) -> int:
    """Pages that the system had to bring while a large tensor was made and dropped `times` times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(NUMBERS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


PAGES = 4 * NUMBERS // resource.getpagesize()
"""Of one such tensor."""


def test_pages_are_asked_for_once_and_given_back_at_the_end() -> None:
    with keeping_memory("cpu"):
        faults(16)  # glibc needs a few blocks before it finds one of its own again
        held = resident()
        assert faults(16) < 6 * PAGES
    assert held - resident() > 3 * NUMBERS
    assert faults(8) > 7 * PAGES


def test_another_device_is_left_alone() -> None:
    with keeping_memory("cuda"):
        assert faults(8) > 7 * PAGES
