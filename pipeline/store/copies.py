"""Files on this node: their digests, and copies of remote ones that one process fetches for all of them.

Whoever needs a copy takes the kernel's lock on its folder first, so the ranks of a node wait for the one that
was first, hold what it fetched against the digest, and fetch nothing. The lock ends with its process, however
that dies. It saves work and is needed by nobody: copies arrive whole, whoever else fetches them.
"""

import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StoreError

HANDS = 8
"""Files that are hashed or fetched at once."""

POLL_S = 0.05
PATIENCE_S = 600.0
"""Seconds for which a process that fetches is waited for, in case it hangs."""

T = TypeVar("T")
U = TypeVar("U")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """As `sha256_file`, once per process for each state of the file: its size, times and inode."""
    status = path.stat()
    return _digest(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache(maxsize=1 << 16)
def _digest(path: str, *_state: int) -> str:
    return sha256_file(Path(path))


def is_here(path: Path, expected: str) -> bool:
    """Whether a copy lies at `path`, and is as expected if anything is."""
    return path.exists() and (not expected or known_digest(path) == expected)


def side_by_side(work: Callable[[T], U], things: Iterable[T]) -> list[U]:
    """`work` on each of some files, in threads: hashing and waiting leave Python to others. In their order.

    Raises what the first of them that fails raises; those that are not begun by then are left alone.
    """
    given = list(things)
    if len(given) < 2:
        return [work(each) for each in given]
    with ThreadPoolExecutor(min(HANDS, len(given))) as pool:
        return list(pool.map(work, given))


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a folder of this node's cache, which is made, among all its processes and threads.

    Goes on without the lock where the file system has none, and after `PATIENCE_S` of waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _is_taken(handle) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        yield
    finally:
        os.close(handle)


def _is_taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks here
    return True


def node_cache() -> Path:
    """Where this node keeps copies of remote files, by digest: KRONY_CACHE, or a folder for this user alone.

    Raises StoreError where somebody else was faster and made that folder, or may write to it.
    """
    if chosen := os.environ.get("KRONY_CACHE"):
        return Path(chosen)
    folder = Path(tempfile.gettempdir()) / f"krony-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StoreError(
            f"{folder}: is another user's, or others may write to it, so its copies cannot be trusted; "
            "remove it, or set KRONY_CACHE to a folder of your own"
        )
    return folder
