"""Asking a long job to stop: the first signal raises a flag, the second one ends the process.

Inside `stop_on_signal` SIGINT and SIGTERM only set the flag, and the job leaves at its next safe point with
its state saved. Outside of it a signal interrupts at once, which is safe there because artifacts are
published last.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.progress import say

_abandoned = threading.Event()


def abandon() -> None:
    """Let this process end without a farewell: one of its threads waits for an answer that may never come.

    A library that is shut down under such a thread may end the process before it has said why it ends, or
    crash at its exit: whoever says the last word then ends the process at once.
    """
    _abandoned.set()


def is_abandoned() -> bool:
    """Whether a thread of this process still waits."""
    return _abandoned.is_set()


@contextmanager
def stop_on_signal(label: str) -> Iterator[Callable[[], bool]]:
    """Yield `should_stop()`; it turns true at the first SIGINT or SIGTERM."""
    asked = threading.Event()

    def ask(number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say(label, f"{signal.Signals(number).name}: saving the state, then stopping; once more stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # a sweep trial in a thread is asked to stop by its sweep, not by signals
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
