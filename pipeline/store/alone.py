"""One driver at a time on an attempt that goes on over restarts; the next waits, then finds the work done.

On a file system, NFS included, this is the kernel's lock on a small file beside the attempt: it ends with its
process, however that dies, so nothing is ever left to clean up. An object store knows no locks: two drivers
of one run do the same work twice there, and each object is one whole put of equal content.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pipeline.errors import Interrupted, StoreError
from pipeline.progress import say
from pipeline.store.artifacts import Artifact, Attempt

POLL_S = 0.5
"""Seconds between two tries."""


@contextmanager
def alone(
    attempt: Attempt,
    *,
    label: str,
    should_stop: Callable[[], bool],
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[Artifact | None]:
    """Hold the attempt, and yield what another process made of it before this one's turn came, if it did.

    Says once, in a line, whom it waits for, and calls `on_wait` again and again meanwhile; raises Interrupted
    if `should_stop` before its turn comes, and StoreError where no lock file can be made.
    """
    place = attempt.store.root.child(attempt.identity.address)
    if not place.is_local:
        yield None
        return
    path = Path(place.uri) / f"{attempt.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as err:
        raise StoreError(
            f"{path}: cannot be written ({err.strerror or err}); free or unlock the place, or choose another "
            "--store"
        ) from err
    with file:
        has_told = False
        while not _is_taken(file, path):
            on_wait()
            if should_stop():
                raise Interrupted(
                    f"{attempt.identity.address}: {_holder(file)} is at work on it, not this one"
                )
            if not has_told:
                say(label, f"{attempt.identity.address}: {_holder(file)} is at work on it; waits for its end")
            has_told = True
            time.sleep(POLL_S)
        with suppress(OSError):  # for people; on a full disk the lock holds without it
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
        made = attempt.store.find(attempt.identity)
        yield made if made and made.record.attempt == attempt.name else None


def _is_taken(file: TextIO, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        raise StoreError(
            f"{path}: this file system has no locks ({err.strerror or err}); mount it with locks, or choose "
            "another --store"
        ) from err
    return True


def _holder(file: TextIO) -> str:
    """Who holds it, as its holder wrote it down; the file may be just being written."""
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
