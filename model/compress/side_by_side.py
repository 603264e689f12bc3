"""Blocks in threads: as many at once as torch has threads, and every operation of a block on one.

A search over orders is many small products and assignments, which gain little from threads of their own. Side
by side they do, and what is found does not depend on how many threads there are.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """What the tasks return, in their order; without gradients. The first task that raises ends it."""
    threads = torch.get_num_threads()

    def run(task: Callable[[], T]) -> T:
        torch.set_num_threads(1)
        with torch.no_grad():  # the mode belongs to a thread
            return task()

    try:
        with ThreadPoolExecutor(max_workers=threads) as pool:
            return list(pool.map(run, tasks))
    finally:
        torch.set_num_threads(threads)
