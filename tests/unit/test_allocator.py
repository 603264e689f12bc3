"""While a process keeps its memory, a large block that is freed stays with it; afterwards it leaves."""

import os
import subprocess
import sys

import pytest

from pipeline.allocator import for_workers
from pipeline.cluster import runtime_env

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")

BLOCK = 96 << 20
"""Bytes: more than glibc keeps by itself, and than fit into the heap of a thread."""

SCRIPT = """
import ctypes, pathlib, sys, threading
from pipeline.allocator import keeping_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[1])

def use():
    for _ in range(3):
        block = libc.malloc({block})
        ctypes.memset(block, 1, {block})
        libc.free(block)

def work():
    before = resident()
    use()
    usual = resident() - before
    with keeping_memory({device!r}):
        use()
        print(usual, resident() - before, end=" ")
    print(resident() - before)

if {threaded}:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def grown(*, device: str = "cpu", threaded: bool = False, **environment: str) -> list[int]:
    """Bytes that a fresh process still holds of freed blocks: before, while it keeps memory, afterwards."""
    script = SCRIPT.format(block=BLOCK, device=device, threaded=threaded)
    rest = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=rest | environment, capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_stays_and_leaves_at_the_end():
    before, within, after = grown()
    assert before < BLOCK / 4 < 0.9 * BLOCK < within < 2 * BLOCK
    assert after < BLOCK / 4


def test_a_thread_keeps_as_much_in_a_worker_of_ours(monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    environment = for_workers()
    assert environment.items() <= runtime_env()["env_vars"].items()
    before, within, after = grown(threaded=True, **environment)
    assert before < BLOCK / 4 < 0.9 * BLOCK < within < 2 * BLOCK
    assert after < BLOCK / 4


def test_a_user_who_set_up_arenas_keeps_them(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert "MALLOC_ARENA_MAX" not in runtime_env()["env_vars"]


@pytest.mark.parametrize("where", [{"device": "cuda"}, {"MALLOC_TRIM_THRESHOLD_": "65536"}])
def test_another_device_or_a_choice_of_the_user_is_left_alone(where):
    assert all(held < BLOCK / 4 for held in grown(**where))
