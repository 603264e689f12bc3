"""How the learning rate moves and how a token budget becomes forward passes: pure functions of integers."""

import math
from collections.abc import Iterator

from pipeline.config.training import TrainConfig


def learning_rate(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then cosine down to `floor` at `total`.

    `step` counts from 0; the first one already moves, by peak / warmup.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of one step of a configured run."""
    return learning_rate(
        step,
        peak=config.lr,
        warmup=config.warmup_steps,
        total=config.max_steps,
        floor=config.lr * config.min_lr_ratio,
    )


def micro_batches(rows: int, micro_batch: int) -> Iterator[slice]:
    """Cut the rows of one rank into slices of at most `micro_batch`; none for a rank without rows."""
    for start in range(0, rows, micro_batch):
        yield slice(start, min(start + micro_batch, rows))


def is_due(step: int, every: int, *, total: int) -> bool:
    """Whether a thing of every `every` steps, and of the end, happens after `step` steps."""
    return step % every == 0 or step == total
